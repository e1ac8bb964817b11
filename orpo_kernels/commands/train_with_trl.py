"""`orpo-kernels train --loss ...` for what TRL's trainers do: their arguments, rows and trainers, with our head."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from orpo_kernels.commands.train_data import Arguments


@dataclass(frozen=True)
class Loss:
    """trainer: TRL's name of it. settings: its arguments that the loss is about. reference: it has a second model."""

    trainer: str
    settings: dict[str, Any]
    reference: bool = False

    @property
    def module(self) -> str:
        return "trl.experimental.cpo" if self.trainer == "CPO" else "trl"


LOSSES = {
    "sft": Loss("SFT", {}),
    "dpo": Loss("DPO", {}, reference=True),
    "ipo": Loss("DPO", {"loss_type": ["ipo"]}, reference=True),
    "kto": Loss("KTO", {}, reference=True),
    "simpo": Loss("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "cpo": Loss("CPO", {}),
}


@dataclass
class LayoutArguments(Arguments):
    packing: bool = field(
        default=False, metadata={"help": "Lay batches out without padding, where the model allows it."}
    )
    share_prefix: str = field(
        default="auto", metadata={"help": "Compute each prompt once. auto: where packing is on. True packs too."}
    )
    packing_length: int | None = field(
        default=None, metadata={"help": "Most tokens a packed row. Default: one row a batch."}
    )


def groups(loss: str) -> list[type]:
    """The arguments of TRL's trainer, and how its batches are laid out; SFT packs by arguments of its own.

    Raises ImportError that names the loss where TRL is missing or of another version.
    """
    try:
        importlib.import_module("orpo_kernels.integration.trl")
        config = getattr(importlib.import_module(LOSSES[loss].module), f"{LOSSES[loss].trainer}Config")
    except ImportError as error:
        raise ImportError(f"--loss {loss} trains with TRL: {error}") from error
    return [config] if loss == "sft" else [config, LayoutArguments]


def check(loss: str, config: Any) -> None:
    """ValueError where the arguments contradict the loss's name."""
    for name, value in LOSSES[loss].settings.items():
        given = getattr(config, name)
        if given != value:
            raise ValueError(f"--{name} {given} and --loss {loss} were both given, which sets it to {value}: use one")


def dataset(loss: str, rows: Any, what: str) -> Any:
    """A `datasets.Dataset` of the columns that TRL takes; ValueError that names a row which has none of the shapes."""
    if rows is None:
        return None
    import datasets

    read = {"sft": _read_sft, "kto": _read_kto}.get(loss, _read_pair)
    found = []
    for index, row in enumerate(rows):
        try:
            found.append(read(row))
        except ValueError as error:
            raise ValueError(f"{what} {index}: {error}") from error
    return datasets.Dataset.from_list(found)


def _read_pair(row: dict[str, Any]) -> dict[str, Any]:
    from orpo_kernels.integration.data.formats import normalize_example

    return normalize_example(row)


def _read_sft(row: dict[str, Any]) -> dict[str, Any]:
    """TRL's own shapes as they are; of a preference pair, the chosen answer."""
    for shape in (("messages",), ("text",), ("prompt", "completion")):
        if all(row.get(name) is not None for name in shape):
            return {name: row[name] for name in shape}
    pair = _read_pair(row)
    return {"prompt": pair["prompt"], "completion": pair["chosen"]}


def _read_kto(row: dict[str, Any]) -> dict[str, Any]:
    """{prompt, completion, label} as it is; a preference pair, which TRL makes two of."""
    shape = ("prompt", "completion", "label")
    if all(row.get(name) is not None for name in shape):
        return {name: row[name] for name in shape}
    return _read_pair(row)


def make_trainer(
    loss: str,
    load: Callable[[], Any],
    config: Any,
    layout: LayoutArguments | None,
    rows: tuple[Any, Any],
    **arguments: Any,
) -> Any:
    """TRL's trainer of the loss with our head. load: makes the model; arguments: the trainer's own."""
    import trl

    from orpo_kernels.integration import trl as ours

    options = {} if layout is None else vars(layout)
    name = f"{LOSSES[loss].trainer}Trainer"
    given = {"args": config, "train_dataset": rows[0], "eval_dataset": rows[1], **arguments}
    if LOSSES[loss].trainer == "CPO":
        return ours.CPOTrainer(load(), **given, **options)
    if LOSSES[loss].reference and arguments.get("peft_config") is None:
        given["ref_model"] = load()
    with ours.use(**options):
        return getattr(trl, name)(load(), **given)
