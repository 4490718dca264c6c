"""Training a Transformer on many GPUs, planned by counting: bytes, operations, seconds, and what fits."""
