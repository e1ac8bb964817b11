"""What `orpo-kernels demo` does: tunes a small model, compares it with full logits, and shows the result."""
