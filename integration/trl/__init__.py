"""TRL's trainers without the logits, for TRL 1.16.

    from orpo_kernels.integration.trl import use

    use()                                    # SFT, DPO, KTO, GRPO and RLOO: trainers made from here on have our head
    trainer = trl.DPOTrainer(...)

- `use`, `restore`, `accelerate`: our head in the trainers that take theirs from `trl.trainer.utils` (`door`).
- `ORPOTrainer`, `CPOTrainer` (SimPO and more) instead of TRL's, which take whole logits (`preference`).

Raises ImportError at import where TRL is missing or of another version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..versions import require

try:
    import datasets  # noqa: F401
    import trl.trainer.utils  # noqa: F401

    _cause = None
except ImportError as error:
    _cause = error

require(__name__, {"trl": ">=1.16,<1.17"}, cause=_cause, also=" with datasets and accelerate")

from .door import accelerate, restore, use  # noqa: E402

if TYPE_CHECKING:
    from .preference import CPOTrainer, ORPOTrainer

__all__ = ["CPOTrainer", "ORPOTrainer", "accelerate", "restore", "use"]


# On demand, since TRL warns at the import of its experimental trainers.
def __getattr__(name: str) -> Any:
    if name not in ("CPOTrainer", "ORPOTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import preference

    globals()[name] = getattr(preference, name)
    return globals()[name]
