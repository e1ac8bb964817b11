"""The two implementations of the head's log-probabilities: plain torch (`torch_path`) and Triton."""
