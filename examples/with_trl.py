"""TRL's ORPOTrainer without the logits: one import is another.

python examples/with_trl.py [MODEL] [--steps 2]
"""

from __future__ import annotations

import argparse

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.orpo import ORPOConfig

from orpo_kernels.commands.demo import locate_model
from orpo_kernels.demo.run import read_pairs
from orpo_kernels.integration.trl import ORPOTrainer  # instead of trl.experimental.orpo.ORPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output-dir", default="example_output")
    args = parser.parse_args()

    folder, gguf_file = locate_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    config = ORPOConfig(
        args.output_dir,
        max_steps=args.steps,
        per_device_train_batch_size=2,
        max_length=512,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        bf16=torch.cuda.is_available(),
        report_to=[],
    )
    columns = ("prompt", "chosen", "rejected")
    rows = datasets.Dataset.from_list([{column: pair[column] for column in columns} for pair in read_pairs()])
    # packing=True would lay batches out without padding, each prompt once.
    trainer = ORPOTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()


if __name__ == "__main__":
    main()
