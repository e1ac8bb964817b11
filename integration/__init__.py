"""Where the loss meets other people's code: the model's head, trainers, data."""
