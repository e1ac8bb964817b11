"""How a model's own head comes to answer one call with log-probabilities."""
