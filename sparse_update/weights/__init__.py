"""Which weights move, and state for them only: subsets, optimizers, low-rank controls."""
