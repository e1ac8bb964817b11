"""Scalars of Triton's interpreter as Python integers, whatever numpy makes of arrays of one element."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton import language as tl  # noqa: E402
from triton.runtime import interpreter as tritons  # noqa: E402

from orpo_kernels import interpreter  # noqa: E402
from orpo_kernels.kernels import tile  # noqa: E402, F401  (mends the interpreter)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted: there is a GPU")


@triton.jit
def counted_kernel(p_count, p_out):
    n = tl.load(p_count)
    total = tl.zeros((1,), dtype=tl.int32)
    for i in range(0, n, 2):
        total += i
    tl.store(p_out + tl.arange(0, 1), total)


def counted(n: int) -> int:
    """0 + 2 + ... below n, by a kernel whose loop ends where a loaded number says."""
    out = torch.zeros(1, dtype=torch.int32)
    counted_kernel[(1,)](torch.tensor([n], dtype=torch.int32), out)
    return int(out)


def test_a_loaded_number_ends_a_loop() -> None:
    assert counted(7) == 12


def test_mends_an_interpreter_that_numpy_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tritons._patch_lang_tensor

    def refuse(self: Any) -> int:
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    def broken(tensor: Any, scope: Any) -> None:
        given(tensor, scope)
        scope.set_attr(tensor, "__index__", refuse)

    monkeypatch.setattr(tritons, "_patch_lang_tensor", broken)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="0-dimensional"):
        counted(7)
    interpreter.mend()
    assert counted(7) == 12
    assert not hasattr(tl.tensor, "__index__"), "left behind after the launch"


def test_leaves_an_interpreter_that_works_as_it_is() -> None:
    given = tritons._patch_lang_tensor
    interpreter.mend()
    assert tritons._patch_lang_tensor is given
