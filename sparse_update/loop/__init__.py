"""The training loop over its named parts: budget, updates, records, checkpoints."""
