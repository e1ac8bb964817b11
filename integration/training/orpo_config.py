"""The arguments of our trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from orpo_kernels.plan import Plan
from orpo_kernels.presets import check_weight, get_preset

from ..data.tokenization import check_max_length
from ..packing.layout import Name, asked_for
from .arguments import numbers_from_text, refuse_label_smoothing


@dataclass
class ORPOConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what ORPO adds; names and defaults as TRL's where it has them."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the collator needs the tokenised columns."}
    )
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest prompt + completion in tokens; the prompt is cut from its start. None: no limit."},
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Order of the training rows: group_by_length (random, rows of about a length together: less "
            "padding), random, sequential or batch_rebalance. A stream keeps its own.",
            "choices": ["random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "Weight of the odds-ratio term (the paper's lambda). Default: the preset's, 0.1 for trl."},
    )
    preset: str = field(
        default="trl",
        metadata={"help": "Whose objective to follow: trl (NLL on prompt + chosen), llama_factory or paper."},
    )
    loss_normalization: str = field(
        default="batch",
        metadata={
            "help": "batch: mean over the micro-batches of an optimiser step, as TRL. global: divide by the tokens "
            "and pairs of the whole step, over all processes."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the model to 0."})
    padding_value: int | None = field(
        default=None, metadata={"help": "Token id used as padding. Default: the tokenizer's pad token."}
    )
    # Or True, or False: annotated as what a command line gives; the next too.
    packing: str = field(
        default="auto",
        metadata={
            "help": "Lay sequences out one after the other in a row instead of padding them. auto: where that computes "
            "a tenth fewer tokens and the model allows it; on a GPU with FlashAttention only."
        },
    )
    share_prefix: str = field(
        default="auto",
        metadata={"help": "Compute each pair's prompt once. auto: where packing is on. True packs too."},
    )
    packing_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens a packed row; a pair must fit into one. Default: one row a batch."},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise the data. Default: this one."}
    )
    scratch_bytes: int | None = field(
        default=None, metadata={"help": "Memory budget of the loss in bytes. Default: follows the device."}
    )
    keep_logit_grads_bytes: int = field(
        default=0, metadata={"help": "Bytes to spend on keeping logit gradients, where the head trains: less work."}
    )

    def __post_init__(self) -> None:
        numbers_from_text(self)
        super().__post_init__()
        refuse_label_smoothing(self)
        if self.loss_normalization not in ("batch", "global"):
            raise ValueError(f"loss_normalization={self.loss_normalization!r}: use 'batch' or 'global'")
        check_max_length(self.max_length)
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the tokenised columns: leave it False")
        asked_for(self.packing, self.share_prefix, self.packing_length)
        if self.beta is None:
            self.beta = get_preset(self.preset).beta
        check_weight("beta", self.beta)

    @property
    def layout(self) -> Name:
        """What batches are to be, if the model allows it and, with packing="auto", it is worth it."""
        return asked_for(self.packing, self.share_prefix)

    @property
    def packs_where_worth_it(self) -> bool:
        """Whether nothing but packing="auto" asks for a layout."""
        automatic = str(self.packing).lower() == "auto" and str(self.share_prefix).lower() != "true"
        return automatic and self.packing_length is None

    @property
    def plan(self) -> Plan:
        return Plan(scratch_bytes=self.scratch_bytes, keep_logit_grads=self.keep_logit_grads_bytes)
