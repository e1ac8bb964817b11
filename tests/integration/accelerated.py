"""The plain training loop under accelerate, as one process of `accelerate launch`; the first one writes argv[1]."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from processes import Setup
from torch import Tensor, nn

accelerator = Accelerator(cpu=True)


@dataclass(frozen=True)
class Accelerated(Setup):
    def backward(self, wrapped: nn.Module, loss: Tensor) -> None:
        accelerator.backward(loss)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert accelerator.num_processes == 2
    trained = Accelerated(accelerator.prepare).train(accelerator.process_index)
    if accelerator.is_main_process:
        torch.save(tuple(trained), sys.argv[1])
    accelerator.wait_for_everyone()
    accelerator.end_training()
