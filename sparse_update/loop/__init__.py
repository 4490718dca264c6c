"""The training loop over its named parts: records, checkpoints, held-out loss."""
