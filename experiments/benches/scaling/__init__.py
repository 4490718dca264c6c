"""`python -m experiments.bench scale`: many processes measured here, and up to 10,000 GPUs planned by counting.

`command.py` is the command, `plan.py` what is planned and the published tables that the plan reproduces first.
`measured.py`, where it is there, measures DDP, FSDP and tensor parallelism with real processes on this machine.
"""

from experiments.benches.scaling.command import main

__all__ = ["main"]
