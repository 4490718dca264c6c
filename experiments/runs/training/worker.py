"""One of the processes that `launch.py` starts: `python -m experiments.runs.training.worker FOLDER`, under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.runs.training.launch import work
from experiments.train import train

if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), train))
