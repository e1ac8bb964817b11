"""What an optimiser holds between steps, and what it makes in one and drops.

torch's         states are of the weight's dtype. foreach, its way on a GPU unless fused, makes a list of all at a
                time: adamw_torch one number a weight. On a CPU it takes weight by weight.
8 bits          bitsandbytes: a byte a number and fp32 scales of blocks of 256; weights of fewer than 4096 numbers
                have fp32 states, and so have embeddings (transformers' Trainer asks for that)
32 bits         bitsandbytes: fp32 states
paged           states lie in memory that the driver moves to the host: none on the card where it is short
adafactor       transformers': fp32 sums of rows and columns, and the update of a weight in fp32
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_BLOCK, _LEAST_8BIT = 256, 4096


class Weight(NamedTuple):
    """A parameter that trains. layers: how many layers have one like it."""

    shape: tuple[int, ...]
    itemsize: int
    is_embedding: bool = False
    layers: int = 1

    @property
    def numbers(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product


class Optimizer(NamedTuple):
    """states: numbers a weight. bits: of a state; 0: as the weight's dtype has.

    made: bytes made in a step of the weight's own, for all weights where `foreach` and the device is a GPU, else for
    the largest.
    """

    states: int
    bits: int = 0
    made: float = 0.0
    foreach: bool = False
    paged: bool = False
    factored: bool = False


OPTIMIZERS = {
    "adamw_torch_fused": Optimizer(2),
    "adamw_torch": Optimizer(2, made=1.0, foreach=True),
    "adamw_8bit": Optimizer(2, 8),
    "adamw_bnb_8bit": Optimizer(2, 8),
    "paged_adamw_8bit": Optimizer(2, 8, paged=True),
    "paged_adamw_32bit": Optimizer(2, 32, paged=True),
    "lion_8bit": Optimizer(1, 8),
    "lion_32bit": Optimizer(1, 32),
    "adafactor": Optimizer(0, 32, factored=True),
    "rmsprop": Optimizer(1, made=1.0, foreach=True),
    "adagrad": Optimizer(1, made=1.0, foreach=True),
    "sgd": Optimizer(0),
}


def state_bytes(optim: str, weights: Sequence[Weight]) -> int:
    """Held on the device between steps."""
    optimizer = OPTIMIZERS[optim]
    return 0 if optimizer.paged else sum(weight.layers * _of_one(optimizer, weight) for weight in weights)


def _of_one(optimizer: Optimizer, weight: Weight) -> int:
    numbers = weight.numbers
    if optimizer.factored:
        if len(weight.shape) < 2:
            return 4 * numbers
        return 4 * (numbers // weight.shape[-1] + numbers // weight.shape[-2])
    if optimizer.bits == 8 and numbers >= _LEAST_8BIT and not weight.is_embedding:
        return optimizer.states * (numbers + 4 * -(-numbers // _BLOCK))
    return optimizer.states * numbers * (4 if optimizer.bits else weight.itemsize)


def step_bytes(optim: str, weights: Sequence[Weight], device: str) -> int:
    """Made in a step, beside gradients, and dropped."""
    optimizer = OPTIMIZERS[optim]
    sizes = [(weight.numbers * weight.itemsize, weight) for weight in weights]
    if not sizes:
        return 0
    largest, weight = max(sizes, key=lambda pair: pair[0])
    if optimizer.factored:
        return 3 * 4 * weight.numbers
    if optimizer.foreach and device != "cpu":
        return int(optimizer.made * sum(weight.layers * size for size, weight in sizes))
    return int(2 * optimizer.made * largest)
