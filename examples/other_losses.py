"""DPO and SimPO on log-probabilities from the head: what a loss of your own needs of it.

python examples/other_losses.py [MODEL] [--steps 2]
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_kernels.commands.demo import locate_model
from orpo_kernels.demo.run import read_pairs
from orpo_kernels.integration.data import PreferenceCollator, prepare_dataset
from orpo_kernels.integration.lm_head import attached


def dpo(logps: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """arXiv 2305.18290. logps, reference: [2B] of sequences, chosen then rejected."""
    chosen, rejected = (logps - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def simpo(mean_logps: Tensor, beta: float = 2.0, margin: float = 1.0) -> Tensor:
    """arXiv 2405.14734. mean_logps: [2B], means over each answer's tokens."""
    chosen, rejected = mean_logps.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected) - margin).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()

    folder, gguf_file = locate_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    reference = copy.deepcopy(model).requires_grad_(False)
    rows, _ = prepare_dataset(read_pairs(), tokenizer, max_length=512)
    loader = DataLoader(rows, batch_size=2, collate_fn=PreferenceCollator(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with attached(model) as head, attached(reference) as frozen:
        for step, batch in zip(range(args.steps), loader, strict=False):
            targets = batch["targets"]  # -100 where nothing is scored, and 0 in what follows
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logps = head.logps(targets, use_cache=False, **inputs)[0].sum(-1)
            with torch.no_grad():  # one pass of the product, and no gradient
                fixed = frozen.logps(targets, use_cache=False, **inputs)[0].sum(-1)
            counts = (targets != -100).sum(-1)
            losses = {"dpo": dpo(logps, fixed), "simpo": simpo(logps / counts)}
            losses["dpo"].backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step + 1}: " + ", ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items()))


if __name__ == "__main__":
    main()
