"""`python -m experiments.bench generation`: our sampler beside Hugging Face's `generate` on the same weights.

`command.py` is the command, `peer.py` puts our weights into a class of transformers and asks it for outputs.
"""

from experiments.benches.generating.command import main

__all__ = ["main"]
