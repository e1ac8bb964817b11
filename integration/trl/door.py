"""Our head in the place of the one that TRL's trainers take from `trl.trainer.utils`.

`add_fused_lm_head` is imported by name into each trainer's module (SFT, DPO, KTO, GRPO, RLOO and the experimental
asynchronous GRPO), and called as a trainer is made. `use` puts ours into all modules that have TRL's; those that are
imported later find ours in `trl.trainer.utils`. A trainer that exists already has TRL's on its models: `accelerate`
reads that one's arguments, and puts ours over it.

TRL does not say what the entropies are for. They are metrics everywhere but in GRPO with an entropy bonus, which the
trainer that calls is asked about: their gradient is computed there and nowhere else. A loss that asks for it
elsewhere is an error (`fused_head`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import trl.trainer.utils
from torch import nn

from orpo_kernels.plan import Plan

from ..head.patch import bare_model
from ..packing.layout import Name, asked_for
from .fused_head import head_on, put_on

_NAME = "add_fused_lm_head"
_STOCK = trl.trainer.utils.add_fused_lm_head


@dataclass(frozen=True)
class Options:
    """What `use` and `accelerate` take."""

    plan: Plan | None = None
    entropy_grad: bool | None = None
    layout: Name = "padded"
    packing_length: int | None = None


_options: Options | None = None


def use(
    *,
    packing: bool = False,
    share_prefix: bool | str = "auto",
    packing_length: int | None = None,
    plan: Plan | None = None,
    entropy_grad: bool | None = None,
) -> AbstractContextManager[Any]:
    """Put our head into TRL's trainers: those that are made from now on, or inside a `with` block.

        use()
        trainer = DPOTrainer(...)

    packing: lay batches out without padding, and each prompt once: DPO's answers to one, the groups of GRPO and RLOO.
        A model that cannot have that gets padded rows, with a warning. share_prefix=False: without padding only.
    packing_length: most tokens a packed row. Default: one row a batch.
    plan: `Plan`, the memory that the head may use. By default it follows shapes and device.
    entropy_grad: whether losses hold the entropies. Default: in GRPO with an entropy bonus.

    Raises ValueError for layout options that do not fit.

    A trainer keeps the head that it was made with. Calling `use` again changes the options; the end of a `with` block
    brings back what was before it.
    """
    block = ExitStack()
    block.callback(_switch, _options)
    _switch(Options(plan, entropy_grad, asked_for(packing, share_prefix, packing_length), packing_length))
    return block


def restore() -> None:
    """Give TRL's trainers their own head back; those made meanwhile keep ours."""
    _switch(None)


def accelerate(
    trainer: Any,
    *,
    packing: bool = False,
    share_prefix: bool | str = "auto",
    packing_length: int | None = None,
    plan: Plan | None = None,
    entropy_grad: bool | None = None,
) -> Any:
    """Put our head on the models of one trainer of TRL's that exists already, and return that trainer.

    The options are those of `use`.

    Raises ValueError where the trainer has no fused head to exchange, as those that take whole logits have none.
    """
    options = Options(plan, entropy_grad, asked_for(packing, share_prefix, packing_length), packing_length)
    models = [model for name in ("model", "ref_model") if (model := getattr(trainer, name, None)) is not None]
    settings = [found for model in models if (found := _settings(_inner(model))) is not None]
    if not models or len(settings) < len(models):
        raise ValueError(
            f"{type(trainer).__name__} has no head of TRL's on its model: give one of TRL's SFT, DPO, KTO, GRPO or "
            "RLOO trainers; for ORPO and CPO import ORPOTrainer or CPOTrainer from orpo_kernels.integration.trl"
        )
    for model, given in zip(models, settings, strict=True):
        _put(_inner(model), options, trainer, given)
    return trainer


def add_fused_lm_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """`trl.trainer.utils.add_fused_lm_head` with our head."""
    caller = inspect.currentframe()
    trainer = None if caller is None or caller.f_back is None else caller.f_back.f_locals.get("self")
    given = {"temperature": temperature, "cast_lm_head_to_fp32": cast_lm_head_to_fp32, "outputs": outputs}
    _put(model, _options or Options(), trainer, given)


def _put(model: nn.Module, options: Options, trainer: Any, given: dict[str, Any]) -> None:
    """given: the arguments of `add_fused_lm_head`."""
    entropy_grad = options.entropy_grad
    if entropy_grad is None:
        entropy_grad = bool(getattr(trainer, "_entropy_bonus_enabled", False))
    put_on(
        model,
        given["temperature"],
        given["cast_lm_head_to_fp32"],
        given["outputs"],
        entropy_grad=entropy_grad,
        plan=options.plan,
        layout=options.layout,
        row_length=options.packing_length,
    )


def _switch(options: Options | None) -> None:
    global _options
    _options = options
    wanted = _STOCK if options is None else add_fused_lm_head
    for module in _modules():
        setattr(module, _NAME, wanted)


def _modules() -> Iterator[ModuleType]:
    """TRL's modules that hold its head, or ours in its place."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trl" and vars(module).get(_NAME) in (_STOCK, add_fused_lm_head):
            yield module


def _inner(model: nn.Module) -> Any:
    """The transformers model beneath wrappers and PEFT."""
    bare = bare_model(model)
    return bare.get_base_model() if hasattr(bare, "get_base_model") else bare


def _settings(model: nn.Module) -> dict[str, Any] | None:
    """The arguments of the head, TRL's or ours, that is on a model; autocast may have been wrapped around it since."""
    ours = head_on(model)
    if ours is not None:
        return {
            "temperature": ours.temperature,
            "cast_lm_head_to_fp32": ours.logps.in_fp32,
            "outputs": ours.statistics,
        }
    function: Any = model.forward
    while function is not None:
        function = getattr(function, "__func__", function)
        if isinstance(function, FunctionType) and function.__code__ in _STOCK.__code__.co_consts:
            held = inspect.getclosurevars(function).nonlocals
            return {name: held[name] for name in ("temperature", "cast_lm_head_to_fp32", "outputs")}
        function = getattr(function, "__wrapped__", None)
    return None
