"""Our trainer, which needs transformers alone (PEFT for LoRA): a frozen head, batches without padding.

python examples/lora_and_packing.py [MODEL] [--steps 2]
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_kernels.commands.demo import locate_model
from orpo_kernels.demo.run import read_pairs
from orpo_kernels.integration.transformers import ORPOConfig, ORPOTrainer


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
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        # Where it saves a tenth of the tokens: said before training. True asks for it, False for padding.
        packing="auto",
        loss_normalization="global",  # gradient accumulation does not change a step
    )
    trainer = ORPOTrainer(
        model,
        config,
        train_dataset=read_pairs(),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    # The embeddings do not train; looking for their first size would ask a hub.
    trainer.model.save_pretrained(args.output_dir, save_embedding_layers=False)


if __name__ == "__main__":
    main()
