"""`python -m experiments.bench gpu`: every figure that needs a GPU, in one command of at most eight minutes.

`command.py` is the command, `parts.py` the list of what is measured and its time limits, `running.py` gives every part a
process of its own. `training.py`, `memory.py`, `simulator.py` and `generation.py` measure; `wheels.py` packs what the
machine needs where it has no package index.
"""

from experiments.benches.gpu.command import main

__all__ = ["main"]
