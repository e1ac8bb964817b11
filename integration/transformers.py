"""ORPO with transformers alone: a `Trainer` whose loss asks the model's head for log-probabilities.

Everything is transformers' own (arguments, optimiser, checkpoints, distribution) except the loss, the
preference collator and the metrics, which carry TRL's names. Metrics are taken over examples: they do not
depend on the batch size, and nor does `eval_loss`.

The training loss of one optimiser step is the mean over its micro-batches of each one's own loss, as in TRL
(`loss_normalization="batch"`); with `"global"` the tokens and pairs of the whole step, over all processes, are
counted first and each micro-batch is divided by that: 1 x 4 and 4 x 1 pairs then give the same step.

Batches are laid out without padding and, unless `share_prefix=False`, with each prompt once (`packing.layout`): fewer
tokens, the same loss and gradients. By default (`packing="auto"`) that is so where it saves a tenth of the tokens;
`True` asks for it, `False` for padded rows. Whether the model can have it is tried on the first batch (`packing.gate`);
one that cannot gets padded rows, and a warning where it was asked for.

`logits/chosen` and `logits/rejected` are means over the tokens of each sequence, its prompt included and padding not,
so they are the same in every layout. A model that soft-caps its logits has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from orpo_kernels.loss import merge_targets
from orpo_kernels.objective import orpo_from_sums
from orpo_kernels.pair_sums import PairSums
from orpo_kernels.presets import get_preset

from .batches import FlatBatch
from .data.collator import LayoutCollator, PreferenceCollator
from .data.dataset import announce, prepare_dataset, refuse_splits
from .data.limits import Limits
from .lm_head import SequenceScores
from .metrics import for_metrics, pair_metrics, pair_table
from .packing.gate import model_inputs
from .packing.kernels import flash_is_installed
from .packing.layout import Name, NllOver, sequence_places, tokens_a_step
from .training.dropout import disable_dropout
from .training.evaluation_rows import EvaluationRows
from .training.head_access import HeadAccess, read_streams_everywhere
from .training.memory_told import MemoryTold
from .training.orpo_config import ORPOConfig
from .training.row_order import RowOrder
from .training.running import RunningMetrics
from .training.sequence_parallel import CutSequences

__all__ = ["LayoutCollator", "ORPOConfig", "ORPOTrainer", "PreferenceCollator"]

_SUMMARY_PAIRS = 1000  # enough for a mean
_WORTH = 0.1  # the share of the tokens that packing="auto" is to save
_NORMALIZERS = ("nll_normalizer", "pair_normalizer")


class ORPOTrainer(MemoryTold, CutSequences, HeadAccess, RowOrder, EvaluationRows, Trainer):
    """`transformers.Trainer` with the ORPO loss; arguments as TRL's trainer of that name.

    model: a causal language model, a folder or name to load one from, or None with `model_init`.
    args: `ORPOConfig`.
    train_dataset, eval_dataset: rows of any shape that `data.tokenize_pair` takes, or already tokenised ones;
        lists, datasets.Dataset, iterable ones; eval_dataset may be a dict of them. Text only: a row with an image is
        refused (`data.formats.refuse_images`).
    processing_class: the tokenizer; by default the model's.
    data_collator: by default `PreferenceCollator` with the preset's NLL, or `LayoutCollator` with packing.
    peft_config: a PEFT configuration to wrap the model in.

    `data_summary` holds what preparing the training data did (None for data without a length).

    Raises ValueError for arguments that do not fit, before anything is loaded.
    """

    args: ORPOConfig
    model: Any
    _made: nn.Module | None = None

    def __init__(
        self,
        model: nn.Module | str | None = None,
        args: ORPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        peft_config: Any = None,
    ) -> None:
        args = ORPOConfig("orpo_output") if args is None else args
        if not isinstance(args, ORPOConfig):
            raise TypeError(f"args is a {type(args).__name__}: use orpo_kernels.integration.transformers.ORPOConfig")
        self.preset = get_preset(args.preset)
        if isinstance(model, str):
            name = model
            processing_class = processing_class or AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        if processing_class is None:
            if model is None:
                raise ValueError("processing_class is None: with model_init, give the tokenizer")
            processing_class = AutoTokenizer.from_pretrained(model.config.name_or_path)  # type: ignore[union-attr]
        if model is not None:
            model = _prepare_model(model, args, peft_config)
        elif peft_config is not None:
            raise ValueError("peft_config was given with model_init: wrap the model inside model_init instead")
        refuse_splits(train_dataset, "train_dataset")
        # Asked for before Trainer's own constructor has set them.
        self.args, self.model, self.processing_class = args, model, processing_class
        if model is None and model_init is not None:
            self.model_init = model_init
            set_seed(args.seed)
            self.model = self._made = self.call_model_init()
        if self.model is not None:
            Limits.of(self.model).check_tokenizer(processing_class)
        train_rows, self.data_summary = self._prepare("train_dataset", train_dataset, args.per_device_train_batch_size)
        eval_rows, self.eval_data_summary = self._prepare("eval_dataset", eval_dataset, args.per_device_eval_batch_size)
        tokens = {} if self.data_summary is None else self._tokens_a_batch(train_rows)
        collator = self._collator(data_collator, tokens)
        read_streams_everywhere(args)
        assert args.beta is not None  # ORPOConfig has put the preset's in its place
        self._running = RunningMetrics(beta=args.beta, preset=self.preset)
        self._eval_pairs: list[Tensor] = []
        self.plan, self.chose_layout = args.plan, not args.packs_where_worth_it
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            model_init=model_init,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Whether Trainer divides the loss by the number of micro-batches hangs on this and on a count being given.
        self.model_accepts_loss_kwargs = args.loss_normalization == "global"
        self.label_names = ["targets"]
        self._prepare_to_cut(data_collator)
        if tokens:
            announce(f"training data: {self.data_summary}\n{self._layout_told(tokens)}", args)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A model from `model_init`, prepared as a given one is; the first is there since the rows were checked."""
        made, self._made = self._made, None
        return _prepare_model(super().call_model_init(trial), self.args, None) if made is None else made

    def _tokens_a_batch(self, rows: Any) -> dict[Name, float]:
        """Tokens that the model computes for a batch of the training rows, by layout; of some rows, in about the order
        that the sampler gives."""
        some = [rows[index] for index in range(min(len(rows), _SUMMARY_PAIRS))]
        if self.args.train_sampling_strategy == "group_by_length":
            some.sort(key=lambda row: -row["length"])
        return tokens_a_step(some, self.args.per_device_train_batch_size)

    def _collator(self, given: Any, tokens: dict[Name, float]) -> Any:
        """The collator of the layout that is asked for or, with packing="auto", worth it."""
        args, tokenizer = self.args, self.processing_class
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        wanted = args.layout
        if args.packs_where_worth_it and (given is not None or not self._is_worth_packing(tokens)):
            wanted = "padded"
        if given is None and wanted == "padded":
            return self._padded_collator()
        if given is None:
            return LayoutCollator(
                tokenizer,
                wanted,
                row_length=args.packing_length,
                padding_value=args.padding_value,
                nll_over=self._nll_over,
            )
        if wanted != "padded" and not isinstance(given, LayoutCollator):
            raise ValueError(
                f"a {type(given).__name__} was given with packing={args.packing} and "
                f"share_prefix={args.share_prefix!r}: leave it out, or use data.LayoutCollator"
            )
        return given

    @property
    def _nll_over(self) -> NllOver:
        return "chosen" if self.preset.nll_over == "chosen" else "prompt+chosen"

    def _padded_collator(self) -> PreferenceCollator:
        tokenizer: Any = self.processing_class
        return PreferenceCollator(tokenizer, padding_value=self.args.padding_value, nll_over=self._nll_over)

    def _is_worth_packing(self, tokens: dict[Name, float]) -> bool:
        """Whether fewer tokens are computed by a tenth, with attention that has been measured to profit."""
        if not tokens or tokens[self.args.layout] > (1 - _WORTH) * tokens["padded"]:
            return False
        return self.args.device.type == "cpu" or (flash_is_installed() and (self.args.bf16 or self.args.fp16))

    def _layout_told(self, tokens: dict[Name, float]) -> str:
        """The tokens of a batch in each layout, which it is, and what that means."""
        listed = ", ".join(f"{number:,.0f} {name}" for name, number in tokens.items())
        used: Name = getattr(self.data_collator, "name", "padded")
        best: Name = self.args.layout if self.args.layout != "padded" else "shared"
        saved = 1 - tokens[best] / tokens["padded"]
        if self._cut > 1:
            meaning = f"rows are padded, and cut over {self._cut} ranks"
        elif used == "padded":
            meaning = f"rows are padded; packing=True would compute {saved:.0%} fewer tokens"
        else:
            meaning = f"rows are {used}, which computes {saved:.0%} fewer tokens than padded ones"
        return f"tokens a batch of {self.args.per_device_train_batch_size} pairs: {listed}; {meaning}"

    def orpo(
        self, model: nn.Module, inputs: dict[str, Any], counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        """(loss, the pairs' rows for metrics, the model's outputs) of one batch.

        counts: [2], the NLL tokens (or sequences) and valid pairs to divide by, in place of the batch's own.
        """
        normalizers: dict[str, Any] = {} if counts is None else dict(zip(_NORMALIZERS, counts, strict=True))
        score = self._score_layout if "layout" in inputs else self._score_padded
        logps, mean_logits, outputs = score(model, inputs)
        group = self._sequence_group(model.training)
        of = self._pair_sums(logps, inputs).over_ranks(group)
        output = orpo_from_sums(of, beta=self.args.beta, preset=self.preset, **normalizers)
        loss = self._averaged(output.loss, group)
        if counts is not None:
            # DDP averages gradients over processes; the counts are already global.
            loss = loss * self.accelerator.num_processes
        aux_loss = getattr(outputs, "aux_loss", None)
        if isinstance(aux_loss, Tensor) and aux_loss.requires_grad | (not torch.is_grad_enabled()):
            aux_loss = self.model.config.router_aux_loss_coef * aux_loss.to(loss.device)
            loss = loss + aux_loss / (self.current_gradient_accumulation_steps if counts is not None else 1)
        else:
            aux_loss = None
        of = self._pair_sums(for_metrics(logps), inputs).over_ranks(group)
        mean_logits = self._over_whole_sequences(mean_logits, inputs, group)
        return loss, pair_table(of, mean_logits, aux_loss=aux_loss), outputs

    def _score_padded(self, model: nn.Module, inputs: Mapping[str, Any]) -> SequenceScores:
        """Scores [2B, T] of `PreferenceCollator`'s batch."""
        ours = ("targets", "nll_targets", "labels", "shift_labels")  # the last two are there for Ulysses' adapter only
        arguments = {name: value for name, value in inputs.items() if name not in ours}
        return self.head_logps.sequence_scores(
            merge_targets(inputs["targets"], self._nll_targets(inputs)),
            inputs["attention_mask"],
            model=model,
            use_cache=False,
            **arguments,
        )

    def _score_layout(self, model: nn.Module, inputs: Mapping[str, Any]) -> SequenceScores:
        """Scores [N] of `LayoutCollator`'s batch."""
        batch = self.layout_gate.admit(cast(FlatBatch, dict(inputs)), model)
        if isinstance(self.data_collator, LayoutCollator):
            self.data_collator.name = batch["layout"].name  # what is refused is not laid out again
        return self.head_logps.sequence_scores(
            batch["targets"],
            sequence_places(batch),
            rows=batch["rows"],
            model=model,
            use_cache=False,
            **model_inputs(batch),
        )

    def _nll_targets(self, inputs: Mapping[str, Any]) -> Tensor | None:
        return None if self.preset.nll_over == "chosen" else inputs.get("nll_targets")

    def _pair_sums(self, logps: Tensor, inputs: Mapping[str, Any]) -> PairSums:
        """What the objective sees of a batch. logps: of its scored tokens, as its collator lays them out."""
        if "layout" in inputs:
            pair, kind = inputs["pair"].to(logps.device), inputs["kind"].to(logps.device)
            return PairSums.of_flat(logps, pair, kind, num_pairs=inputs["layout"].num_pairs, preset=self.preset)
        nll_targets = self._nll_targets(inputs)
        return PairSums.of_targets(
            logps, inputs["targets"].to(logps.device), None if nll_targets is None else nll_targets.to(logps.device)
        )

    def train(self, *args: Any, **options: Any) -> Any:
        self._running.clear()  # of a run before this one, after its last log
        return super().train(*args, **options)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, rows, outputs = self.orpo(model, inputs, num_items_in_batch)
        self._running.add(rows)
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """What one optimiser step counts, over all processes: [2], NLL tokens (or sequences) and valid pairs."""
        if self.args.loss_normalization != "global" or not batch_samples:
            return None
        counts = torch.zeros(2, device=device)
        for batch in batch_samples:
            of = self._pair_sums(torch.zeros(batch["targets"].shape), batch)
            if self._sp_size > 1:  # cut already; context parallelism will do it within the step
                of = PairSums(*(part.to(device) for part in of)).over_ranks(self._sequence_group(training=True))
            counts += torch.stack([of.nll_count(self.preset), of.pair_is_valid.sum()]).to(counts)
        return self.accelerator.gather(counts).view(-1, 2).sum(0)

    def _prepared(self, name: str, rows: Any, batch_size: int) -> Any:
        return self._prepare(name, rows, batch_size)[0]

    def _prepare(self, name: str, rows: Any, batch_size: int) -> tuple[Any, Any]:
        """(tokenised rows, their summary), (None, None) for no rows."""
        if rows is None:
            return None, None
        tokenizer: Any = self.processing_class
        return prepare_dataset(
            rows,
            tokenizer,
            self.args.max_length,
            dataset_num_proc=self.args.dataset_num_proc,
            batch_size=batch_size,
            name=name,
            limits=None if self.model is None else Limits.of(self.model),
        )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        cut, inputs = self._prepare_context_parallel_inputs(model, self._prepare_inputs(inputs))
        with cut(), torch.no_grad(), self.compute_loss_context_manager():
            loss, rows, _ = self.orpo(model, inputs)
        self._eval_pairs.append(self._once_each(rows))
        return loss.detach(), None, None

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Transformers' loop, its loss (a mean of batch means) replaced by the objective of all pairs at once."""
        self._eval_pairs = []
        output: Any = super().evaluation_loop(dataloader, description, *args, **kwargs)
        metric_key_prefix = args[2] if len(args) > 2 else kwargs.get("metric_key_prefix", "eval")
        if not self._eval_pairs:
            return output
        metrics = pair_metrics(torch.cat(self._eval_pairs), beta=self._running.beta, preset=self.preset)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._running.read(self.accelerator))
        super().log(logs, start_time)


def _prepare_model(model: nn.Module, args: ORPOConfig, peft_config: Any) -> nn.Module:
    quantizer: Any = getattr(model, "hf_quantizer", None)
    from_gguf = quantizer is not None and quantizer.quantization_config.quant_method == "gguf"
    if from_gguf and all(parameter.is_floating_point() for parameter in model.parameters()):
        # Unpacked when it was loaded, so a plain model; Trainer would refuse it by its origin.
        quantizer.remove_quantization_config(model)
    if peft_config is not None:
        try:
            from peft import PeftModel, get_peft_model
        except ImportError as error:
            raise ImportError("peft_config was given but peft is not installed: pip install 'peft>=0.18'") from error
        if isinstance(model, PeftModel):
            raise ValueError("peft_config was given with a model that has adapters already: give one or the other")
        set_seed(args.seed)  # the adapters' first weights are random
        model = get_peft_model(model, peft_config)
    # transformers 5.24 renames the argument.
    checkpointing = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
    if checkpointing and hasattr(model, "enable_input_require_grads"):
        # With frozen embeddings nothing that enters a checkpoint would require a gradient.
        model.enable_input_require_grads()  # type: ignore[operator]
    if args.disable_dropout:
        disable_dropout(model)
    return model
