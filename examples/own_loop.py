"""ORPO in a loop of your own: the model is asked for log-probabilities instead of logits.

python examples/own_loop.py [MODEL] [--steps 2]
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_kernels.commands.demo import locate_model
from orpo_kernels.demo.run import read_pairs
from orpo_kernels.integration.data import PreferenceCollator, prepare_dataset
from orpo_kernels.integration.lm_head import attached
from orpo_kernels.loss import merge_targets, orpo_from_logps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()

    folder, gguf_file = locate_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    rows, summary = prepare_dataset(read_pairs(), tokenizer, max_length=512)
    print(summary)

    loader = DataLoader(rows, batch_size=2, shuffle=True, collate_fn=PreferenceCollator(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with attached(model) as head:  # afterwards the model is what it was
        for step, batch in zip(range(args.steps), loader, strict=False):
            targets, nll_targets = batch["targets"], batch["nll_targets"]
            logps, _ = head.logps(
                merge_targets(targets, nll_targets),
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            )
            output = orpo_from_logps(logps, targets, nll_targets=nll_targets, preset="trl")
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            metrics = output.metrics()
            print(
                f"step {step + 1}: loss {output.loss.item():.3f}, "
                f"accuracy {metrics['rewards/accuracies'].item():.2f}, margin {metrics['rewards/margins'].item():.4f}"
            )


if __name__ == "__main__":
    main()
