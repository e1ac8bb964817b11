"""Bytes that are alive, seen from the dispatcher, in the segments that marks cut a step into.

A storage counts from the operation that made it until the last tensor on it is gone. What a kernel allocates inside
itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Segment(NamedTuple):
    """What memory did between two marks, in bytes above what was alive at the first.

    change: at the second mark. rise: at the highest. gradients, gradients_at_rise: of it, those of parameters. shared:
    what of the change is memory from before the first mark that went, such as masks, which all layers use.
    """

    name: str
    change: int
    rise: int
    gradients: int = 0
    gradients_at_rise: int = 0
    shared: int = 0


class LiveBytes(TorchDispatchMode):
    """Counts storages that are made while the mode is on.

    known: tensors that are there already, and do not count. granule: bytes that the allocator gives out at least, 512
    on a GPU.
    """

    def __init__(self, known: Iterable[Tensor], granule: int = 1) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        self._released: dict[int, int] | None = None
        self._marks = 0
        self._granule = granule
        self._seen: dict[int, weakref.ref] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = weakref.ref(storage)
        self._live = self._gradients = 0
        self._restart()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return out

    def mark(self, name: str) -> None:
        """Ends a segment, and calls it `name`."""
        self.segments.append(
            Segment(
                name,
                self._live - self._begun,
                self._highest - self._begun,
                self._gradients - self._gradients_begun,
                self._gradients_at_highest - self._gradients_begun,
                self._shared,
            )
        )
        self._marks += 1
        self._restart()

    @contextmanager
    def releasing(self) -> Iterator[list[Segment]]:
        """For the end of something that held memory of many segments. Gives a list that is filled, when the block ends,
        with a segment for each of those whose memory went, by their names."""
        found: list[Segment] = []
        released: dict[int, int] = {}
        self._released = released
        yield found
        self._released = None
        found += [Segment(self.segments[birth].name, -nbytes, 0) for birth, nbytes in sorted(released.items())]
        self._restart()

    def kept_as_gradient(self, parameter: Tensor) -> None:
        """For `register_post_accumulate_grad_hook`."""
        if parameter.grad is not None:
            self._gradients += self._rounded(parameter.grad.untyped_storage().nbytes())

    def _restart(self) -> None:
        self._begun = self._highest = self._live
        self._shared = 0
        self._gradients_begun = self._gradients_at_highest = self._gradients

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        nbytes = self._rounded(storage.nbytes())
        self._seen[key] = weakref.ref(storage, partial(self._gone, key, nbytes, self._marks))
        self._live += nbytes
        if self._live > self._highest:
            self._highest, self._gradients_at_highest = self._live, self._gradients

    def _gone(self, key: int, nbytes: int, birth: int, _: Any) -> None:
        del self._seen[key]
        self._live -= nbytes
        if birth == 0:
            self._shared -= nbytes
        if self._released is not None:
            self._released[birth] = self._released.get(birth, 0) + nbytes

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self._granule) * self._granule
