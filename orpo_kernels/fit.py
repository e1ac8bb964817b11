"""The largest tiles that a budget holds. Bytes and counts alone; what a token or an entry costs is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

# Fewer rows than this make a product that waits for the weight to arrive from memory.
_MIN_CHUNK = 64
# Measured on an H100 (docs/gpu.md): a library's products of heights that are no multiple of this run at up to a sixth
# less than its rate, and whole waves of tiles do not matter beside that, as it cuts the inner dimension itself.
_HEIGHT = 256
# There too: the gradient's products reach the library's rate from about 4096 entries and 4096 tokens on. 66 tiles wide:
# with multiples of 512 tokens, whole waves on the 132 multiprocessors of a Hopper card.
_WIDEST_BLOCK = 66 * 256
_LEAST_INNER = 4096


class Bytes(NamedTuple):
    """What a tile of tokens by vocabulary entries takes: for each token, each logit, each entry."""

    token: int
    logit: int
    entry: int

    def of(self, chunk: int, block: int) -> int:
        return chunk * self.token + chunk * block * self.logit + block * self.entry

    def chunk(self, budget: int, block: int) -> int:
        """The most tokens beside `block` entries; 0 or less if there is no room for one."""
        return (budget - block * self.entry) // (self.token + block * self.logit)


def even(tokens: int, chunk: int, height: int = 1) -> int:
    """As many chunks as `chunk` makes of the tokens, all about as high, in multiples of `height`.

    1153 tokens in chunks of 1152 would make a second one of a single row.
    """
    count = -(-tokens // chunk)
    return min(chunk, -(-tokens // (count * height)) * height)


def largest(budget: int, cost: Bytes, tokens: int, block: int, highest: int | None = None) -> tuple[int, int] | None:
    """The largest tile of at most `highest` of the tokens by `block` entries: it loses tokens, down to `_MIN_CHUNK`,
    before it loses entries."""
    most = min(tokens, highest or tokens)
    while cost.chunk(budget, block) < min(most, _MIN_CHUNK) and block > 1:
        block = -(-block // 2)
    most = min(most, cost.chunk(budget, block))
    return (even(tokens, most), block) if most >= 1 else None


def whole_rows(budget: int, cost: Bytes, tokens: int, vocab_size: int) -> tuple[int, int] | None:
    """The highest tile that spans the vocabulary: all tokens, or multiples of a height that suits a GPU's products."""
    most = min(cost.chunk(budget, vocab_size), tokens)
    if most < 1:
        return None
    if most == tokens:
        return tokens, vocab_size
    height = next((h for h in (_HEIGHT, _HEIGHT // 2) if most >= h), 1)
    return even(tokens, most // height * height, height), vocab_size


def whole_tokens(
    budget: int, whole: Bytes, cut: Bytes, tokens: int, vocab_size: int, moved: Callable[[int, int], int]
) -> tuple[int, int] | None:
    """The tile of the weight's gradient that moves the fewest bytes.

    Its products run over the tokens: with all of them at once, a block of the gradient is written once, and where they
    are cut it is added to. whole, cut: what a tile takes in either case. moved: the bytes of a backward by
    [chunk, block].
    """
    found: list[tuple[int, int]] = []
    for block in _blocks(vocab_size):
        most = tokens if whole.of(tokens, block) <= budget else min(cut.chunk(budget, block), tokens - 1)
        if most == tokens:
            found.append((tokens, block))
        elif most >= _LEAST_INNER:
            found.append((even(tokens, most // _HEIGHT * _HEIGHT, _HEIGHT), block))
    if found:
        return min(found, key=lambda tile: moved(*tile))
    return largest(budget, cut, tokens, min(_WIDEST_BLOCK, vocab_size))


def _blocks(vocab_size: int) -> Iterator[int]:
    """Widths of blocks to try, in equal parts of the vocabulary."""
    block = _WIDEST_BLOCK
    while block >= _HEIGHT:
        yield min(block, vocab_size)
        block = block * 3 // 4 if block % 3 else block * 2 // 3
