"""Triton's interpreter with a newer numpy than it knows.

A scalar in the interpreter is an array of one element and one dimension. Triton 3.6 makes a Python integer of it with
`int(array)`, for `range` and wherever else an index is wanted; from 2.4 on, numpy refuses that for any dimension.
"""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any


def mend() -> None:
    """Lets interpreted kernels use scalars as integers; does nothing where they can."""
    # Only now: they need numpy, and compiled kernels do not.
    from triton.runtime import interpreter

    given = interpreter._patch_lang_tensor
    if _indexes(given, interpreter._LangPatchScope()):
        return

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        # Called at every launch, and undone by the scope at its end.
        given(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _indexes(patch_lang_tensor: Any, scope: Any) -> bool:
    """Whether the interpreter's scalars serve as integers."""
    import numpy as np

    class Scalar:
        handle = SimpleNamespace(data=np.ones(1, np.int32))

    patch_lang_tensor(Scalar, scope)
    try:
        return operator.index(Scalar()) == 1  # type: ignore[arg-type]
    except TypeError:
        return False
