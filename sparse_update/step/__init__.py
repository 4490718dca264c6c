"""The sparse step: its plan, forward and backward, unbiased draws, compiled kernels, counted FLOPs."""
