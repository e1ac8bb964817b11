"""TRL's ORPOTrainer and CPOTrainer without the logits.

Subclasses of `trl.experimental.orpo.ORPOTrainer` and `trl.experimental.cpo.CPOTrainer`, which take whole logits and
not the head that `use` exchanges. Arguments, collator, optimiser, checkpoints, generation, metric names and, on the
same batch, losses are TRL's; the model is asked for the log-probabilities of the scored tokens (`lm_head`) where TRL
takes its logits. What differs, because TRL 1.16 is wrong or stops there:

- Length. TRL cuts completions only: a prompt of `max_length` tokens leaves them empty. Rows that are too long
  are cut by the rule of `data.truncate_pair`, which always leaves a completion. Rows that fit become TRL's
  ids and labels, its BOS and EOS included, except where a token holds text of both prompt and completion and
  TRL, comparing ids, misplaces the boundary or refuses the row (`data.tokenize_pair`). An encoder-decoder's
  rows are TRL's.
- Empty completions (ORPO). Their pairs leave the odds-ratio mean, where TRL's weights all become NaN.
- Evaluation (ORPO). Metrics, `eval_loss` too, run over examples and are the same at every batch size. TRL's
  are means of batch means in which a smaller last batch weighs as much as the others. Each of a dict of
  evaluation sets has metrics of its own, `eval_NAME_rewards/margins`, where TRL says `eval_rewards/margins`
  for all.
- Dicts of evaluation sets and streams, neither of which has the `map` that TRL calls. A stream needs
  `max_steps`; each process reads all of it and takes its share.
- Messages. What Arrow has filled up with None does not reach the chat template, contents may be lists of text parts,
  and template options and the arguments of calls JSON text (`chat`). An error names the row.
- Images. TRL leaves out what an `images` column holds, and lets the chat template print messages whose content is a
  list. Here such rows are refused (`data.formats.refuse_images`).
- Packing. `packing=True` lays sequences out one after the other instead of padding them and, unless
  `share_prefix=False`, each pair's prompt once (`packing.layout`): fewer tokens, the same loss. A model that cannot
  have that gets padded rows, with a warning (`packing.gate`). `logits/chosen` and `logits/rejected` are means over each
  sequence's own tokens, prompt included, then over sequences: there is no padding for them to count as TRL's do.
- `logits/chosen` and `logits/rejected` of a model that soft-caps its logits: their mean has no form without
  them. Left out (ORPO) or NaN (CPO).

`data_summary` (`data.DataSummary`) says what became of the training rows; rows with nothing to score are
dropped. The columns it counts stay in the data set, `length` among them for length-grouped batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import datasets
import torch
from torch import Tensor, nn
from trl.data_utils import maybe_extract_prompt
from trl.experimental.cpo import CPOTrainer as _TrlCPOTrainer
from trl.experimental.orpo import ORPOTrainer as _TrlORPOTrainer

from orpo_kernels.linear_logps import shift_labels
from orpo_kernels.loss import merge_targets, orpo_from_logps
from orpo_kernels.pair_sums import PairSums
from orpo_kernels.plan import Plan
from orpo_kernels.presets import get_preset

from ..data.dataset import (
    TOKENIZED_COLUMNS,
    DataSummary,
    announce,
    refuse_splits,
    tokenize_pair,
    truncate_pair,
)
from ..data.limits import Limits
from ..data.located import located
from ..lm_head import SequenceScores
from ..metrics import for_metrics, pair_metrics, pair_table
from ..packing.batch_layout import BatchLayout
from ..packing.layout import asked_for
from ..training.arguments import refuse_label_smoothing
from ..training.dropout import disable_dropout
from ..training.evaluation_rows import EvaluationRows
from ..training.head_access import HeadAccess, read_streams_everywhere
from ..training.memory_told import MemoryTold
from ..training.row_order import RowOrder
from ..training.running import RunningMean, whole_batches
from .rows import Sets, Stream, check_row, has_scored_token, mappable

__all__ = ["CPOTrainer", "ORPOTrainer"]

_SIDES = ("chosen", "rejected")
_PRESET = get_preset("trl")


# What stands behind the class below in the bases of what is built: one of TRL's trainers.
_TrlTrainer: Any = object


class _HeadLogps(MemoryTold, HeadAccess, RowOrder, EvaluationRows, _TrlTrainer):
    """What the trainers share: their data, and log-probabilities from the head."""

    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *more: Any,
        plan: Plan | None = None,
        packing: bool = False,
        share_prefix: bool | str = "auto",
        packing_length: int | None = None,
        **options: Any,
    ) -> None:
        self.plan = plan
        self.layout = asked_for(packing, share_prefix, packing_length)
        self.packing_length = packing_length
        self._eval_pairs: list[Tensor] = []
        if args is not None:
            refuse_label_smoothing(args)
            read_streams_everywhere(args)
        refuse_splits(train_dataset, "train_dataset")
        tokenizer = options.get("processing_class", more[0] if more else None)
        super().__init__(
            model,
            args,
            data_collator,
            mappable("train_dataset", train_dataset, tokenizer),
            mappable("eval_dataset", eval_dataset, tokenizer),
            *more,
            **options,
        )
        # TRL's lists grow until it logs.
        self._stored_metrics: Any = defaultdict(partial(defaultdict, RunningMean))
        if self.args.disable_dropout:  # TRL has switched off what is a module of its own
            disable_dropout(self.model)
        self.data_summary: DataSummary | None = None
        if not self.is_encoder_decoder:
            Limits.of(self.model).check_tokenizer(self.processing_class)
        self.train_dataset = self._checked("train_dataset", self.train_dataset)
        self.eval_dataset = self._checked("eval_dataset", self.eval_dataset)
        if isinstance(self.train_dataset, datasets.Dataset) and not self.is_encoder_decoder:
            rows = self.train_dataset.select_columns(list(TOKENIZED_COLUMNS))
            batch_size = self.args.per_device_train_batch_size
            self.data_summary = DataSummary.from_rows(rows, self.max_length, batch_size)
            if self.data_summary.dropped:
                self.train_dataset = self.train_dataset.filter(has_scored_token)
            announce(f"training data: {self.data_summary}", self.args)

    def _prepared(self, name: str, rows: Any, batch_size: int) -> Any:
        if isinstance(rows, Mapping):
            return Sets({key: self._prepared(f"{name}[{key!r}]", part, batch_size) for key, part in rows.items()})
        if "chosen_input_ids" in (getattr(rows, "column_names", None) or ()):
            return rows
        rows = mappable(name, rows, self.processing_class)
        return self._checked(name, rows.map(maybe_extract_prompt).map(self.tokenize_row))

    def _checked(self, name: str, rows: Any) -> Any:
        """The tokenised rows; ValueError that names one which the model cannot take, of a stream when it is read."""
        if rows is None or self.is_encoder_decoder:
            return rows
        if isinstance(rows, Mapping):
            return Sets({key: self._checked(f"{name}[{key!r}]", part) for key, part in rows.items()})
        limits = Limits.of(self.model)
        if isinstance(rows, Stream):
            return rows.map(check_row, fn_kwargs={"limits": limits})
        for index, row in enumerate(rows.select_columns(list(TOKENIZED_COLUMNS))):
            with located(f"{name}, row {index}"):
                limits.check(row)
        return rows

    def train(self, *args: Any, **options: Any) -> Any:
        self._stored_metrics.pop("train", None)  # of a run before this one, after its last log
        return super().train(*args, **options)

    def tokenize_row(self, feature: Mapping[str, Any], model: Any = None) -> dict[str, Any]:
        """TRL's columns of one row of strings, and those of `data.TOKENIZED_COLUMNS`."""
        if self.is_encoder_decoder:
            return super().tokenize_row(feature, model)
        tokenizer = self.processing_class
        bos = tokenizer.bos_token_id
        row: dict[str, Any] = dict(
            tokenize_pair({name: feature.get(name) for name in ("prompt", *_SIDES)}, tokenizer, None)
        )
        for side in _SIDES:
            ids, prompt_length = row[f"{side}_input_ids"], row[f"{side}_prompt_length"]
            # TRL ends every answer with the EOS token, also after a template's end of turn and line end.
            if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids.append(tokenizer.eos_token_id)
            # It starts every prompt with the BOS token, also for a tokenizer that adds none.
            if bos is not None and (prompt_length == 0 or ids[0] != bos):
                row[f"{side}_input_ids"], row[f"{side}_prompt_length"] = [bos, *ids], prompt_length + 1
        row = truncate_pair(row, self.max_length, bos)
        for side in _SIDES:
            ids, prompt_length = row[f"{side}_input_ids"], row[f"{side}_prompt_length"]
            row[f"{side}_attention_mask"] = [1] * len(ids)
            row[f"{side}_labels"] = [-100] * prompt_length + ids[prompt_length:]
        # To generate from: the tokens that are prompt on both sides.
        shared = min(row[f"{side}_prompt_length"] for side in _SIDES)
        row["prompt_input_ids"] = row["chosen_input_ids"][:shared]
        row["prompt_attention_mask"] = [1] * shared
        return row

    def _score(
        self, model: nn.Module, batch: dict[str, Any], padding_value: Any, *, prompt_nll: bool
    ) -> tuple[SequenceScores, Tensor, Tensor | None]:
        """(scores [2B, T], targets [2B, T], nll_targets [B, T] or None) of TRL's batch.

        prompt_nll: score the chosen sequences' prompts too, for an NLL over both (a decoder's only).
        Mean logits [2B] are over the positions that TRL's metric of that trainer takes; without
        padding, over each sequence's own.
        """
        inputs = self.concatenated_inputs(batch, self.is_encoder_decoder, padding_value, self.accelerator.device)
        ids, mask, labels = (inputs[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if self.aux_loss_enabled:
            arguments["output_router_logits"] = True
        targets, nll_targets = labels, None
        mean_logits_over: Any = torch.ones_like(labels, dtype=torch.bool)
        if self.is_encoder_decoder:
            arguments["decoder_input_ids"] = self._shift_right(labels)
        else:
            targets = shift_labels(labels)
            if prompt_nll:
                nll_targets = shift_labels(ids.masked_fill(mask != 1, -100)[: len(ids) // 2])
                mean_logits_over[:, -1] = False
        merged = merge_targets(targets, nll_targets)
        if not self.is_encoder_decoder:
            half = len(ids) // 2
            pairs = [(index, half + index) for index in range(half)]
            batches = BatchLayout(self.layout_gate, self.layout, self.packing_length, padding_value or 0)
            laid = batches.lay_out(arguments, merged, lambda _: pairs, model)
            if laid is not None:
                arguments, mean_logits_over = laid
        scores = self.head_logps.sequence_scores(merged, mean_logits_over, model=model, **arguments)
        device = scores.logps.device
        return scores, targets.to(device), None if nll_targets is None else nll_targets.to(device)


class ORPOTrainer(_HeadLogps, _TrlORPOTrainer):
    """`trl.experimental.orpo.ORPOTrainer` without the logits; its arguments, and

    plan: `Plan`, the memory that the loss may use. By default it follows shapes and device.
    packing, share_prefix: rows without padding, and each prompt once (see above).
    packing_length: most tokens a packed row; a pair must fit into one. Default: one row a batch.

    Raises TypeError for a data set of a kind that it cannot take, ValueError for one with images and for layout
    options that do not fit, and what `lm_head.attach` raises.
    """

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: Literal["train", "eval"] = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and TRL's metrics of one batch, as [] tensors: nothing waits for the device."""
        scores, targets, nll_targets = self._score(model, batch, self.padding_value, prompt_nll=True)
        logps, mean_logits, outputs = scores
        output = orpo_from_logps(logps, targets, nll_targets=nll_targets, beta=self.beta, preset=_PRESET)
        aux_loss = getattr(outputs, "aux_loss", None) if self.aux_loss_enabled else None
        aux_loss = None if aux_loss is None else self.aux_loss_coef * aux_loss.to(output.loss.device)
        loss = output.loss if aux_loss is None else output.loss + aux_loss

        chosen, rejected = (None, None) if mean_logits is None else mean_logits.view(2, -1).mean(1)
        metrics = output.metrics(logits_chosen=chosen, logits_rejected=rejected)
        if train_eval == "train":
            means = self.accelerator.reduce(torch.stack(list(metrics.values())), "mean")  # over processes
            return loss, dict(zip(metrics, means, strict=True))
        of = PairSums.of_targets(for_metrics(logps), targets, nll_targets)
        rows = pair_table(of, mean_logits, aux_loss=aux_loss)
        self._eval_pairs.append(self.accelerator.gather_for_metrics(rows))
        # TRL's prediction_step hands the logits on as predictions, whether or not they are known.
        unknown = dict.fromkeys(("logits/chosen", "logits/rejected"), loss.new_tensor(torch.nan))
        return loss, {f"eval_{name}": value for name, value in (unknown | metrics).items()}

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """TRL's loop, its metrics and its loss replaced by those of all pairs at once."""
        self._eval_pairs = []
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        self._stored_metrics.pop("eval", None)
        if self._eval_pairs:
            metrics = pair_metrics(torch.cat(self._eval_pairs), beta=self.beta, preset=_PRESET)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output


class CPOTrainer(_HeadLogps, _TrlCPOTrainer):
    """`trl.experimental.cpo.CPOTrainer` (SimPO, IPO, hinge too) without the logits; its arguments, and

    plan: `Plan`, the memory that the loss may use. By default it follows shapes and device.
    packing, share_prefix: rows without padding, and each prompt once (see above).
    packing_length: most tokens a packed row; a pair must fit into one. Default: one row a batch.

    The objective and its metrics are TRL's own, evaluation included, on log-probabilities from the head; but where a
    step's last batch is short, TRL counts that many pairs of the step's other ones too, and we count all.

    Raises TypeError for a data set of a kind that it cannot take, ValueError for one with images and for layout
    options that do not fit, and what `lm_head.attach` raises.
    """

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: Literal["train", "eval"] = "train"
    ) -> tuple[Tensor, dict[str, Any]]:
        with whole_batches(self.accelerator) if train_eval == "train" else nullcontext():
            return super().get_batch_loss_metrics(model, batch, train_eval)

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """TRL's tuple, with each sequence's mean logit [B] for its logits, of which TRL takes the mean."""
        (logps, mean_logits, outputs), targets, _ = self._score(model, batch, self.pad_token_id, prompt_nll=False)
        counts = (targets != -100).sum(-1)
        sums = logps.sum(-1)
        nll_loss = sums.new_zeros(())
        pairs = len(sums) // 2
        if self.cpo_alpha != 0:
            nll_loss = -sums[:pairs].sum() / counts[:pairs].sum().clamp(min=1)
        if self.loss_type in ("ipo", "simpo"):
            sums = sums / counts.clamp(min=1)
        if mean_logits is None:
            mean_logits = torch.full_like(sums, torch.nan)
        parts = (*sums.split(pairs), *mean_logits.split(pairs), nll_loss)
        if not self.aux_loss_enabled:
            return parts
        aux_loss = getattr(outputs, "aux_loss", None)
        return (*parts, sums.new_zeros(()) if aux_loss is None else aux_loss.to(sums.device))
