"""Batches without padding, each prompt once: layouts, the attention behind them, which models may have them."""
