"""Tune a chat model with ORPO, load it again, and compare what it says before and after.

python examples/chat.py [MODEL] [--steps 2] [--question "..."]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from orpo_kernels.commands.demo import locate_model
from orpo_kernels.demo.run import read_pairs
from orpo_kernels.integration.transformers import ORPOConfig, ORPOTrainer


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """Sampled, the same way each time."""
    set_seed(0)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(
        **inputs.to(model.device),
        max_new_tokens=40,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--question", default="What is the capital of France?")
    parser.add_argument("--output-dir", default="example_output")
    args = parser.parse_args()

    folder, gguf_file = locate_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    before = answer(model, tokenizer, args.question)

    config = ORPOConfig(
        args.output_dir,
        max_steps=args.steps,
        per_device_train_batch_size=2,
        max_length=512,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    trainer = ORPOTrainer(model, config, train_dataset=read_pairs(), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()

    tuned = AutoModelForCausalLM.from_pretrained(args.output_dir, dtype=torch.float32)
    after = answer(tuned, AutoTokenizer.from_pretrained(args.output_dir), args.question)
    print(f"question: {args.question}\nbefore:   {before}\nafter:    {after}")


if __name__ == "__main__":
    main()
