"""Triton 3.6's interpreter beside NumPy 2.4 and later.

It keeps a kernel's scalars as arrays of one element and turns them into ints where Python asks for an index (a loop's
bounds, say). NumPy has come to refuse that for arrays that have a dimension; later Tritons drop it first.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def mend() -> bool:
    """Let scalars be indices again; returns whether that was needed. Once a process, before a kernel is run."""
    import numpy as np
    from triton.runtime import interpreter

    try:
        int(np.ones(1, np.int32))
        return False
    except TypeError:
        pass
    patch: Any = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched
    return True
