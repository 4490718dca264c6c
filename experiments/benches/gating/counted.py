"""Instructions of one step, by processes that take one step and three: `--instructions` of `bench gate`, where they can be
counted at all (`hardware.meters.instructions`).

Run as a program it takes the steps: `python -m experiments.benches.gating.counted REQUEST`, REQUEST being JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from experiments.benches.gating.steps import How, Steps
from hardware.meters.instructions import Instructions, count_instructions
from sparse_update.transformer import ModelConfig

FEW, MORE = 1, 3
"""Steps of the two processes, after one that is in both and allocates the optimizer's state."""
ROOT = Path(__file__).resolve().parents[3]
Counter = Callable[[Sequence[str]], Instructions | None]


@dataclass(frozen=True)
class Request:
    """One kind of step on one thread, eager; kind "dense" is the written-out engine's own dense step."""

    model: dict[str, object]
    batch: int
    block_rows: int
    attention: str
    kind: str
    rate: float
    steps: int


def instructions_of_a_step(request: Request, count: Counter | None = None) -> Instructions | None:
    """The difference of both processes, for one step; None where nothing counts here."""
    found = []
    for steps in (FEW, MORE):
        words = json.dumps({**asdict(request), "steps": steps})
        each = (count or _count)([sys.executable, "-m", "experiments.benches.gating.counted", words])
        if each is None:
            return None
        found.append(each)
    return Instructions((found[1].count - found[0].count) // (MORE - FEW), found[0].by)


def _count(command: Sequence[str]) -> Instructions | None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return count_instructions(command, timeout_s=1800, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})


def main(argv: Sequence[str]) -> int:
    """Take the steps."""
    request = Request(**json.loads(argv[0]))
    torch.set_num_threads(1)
    steps = Steps(ModelConfig(**request.model), request.batch, torch.device("cpu"), request.block_rows)  # type: ignore[arg-type]
    how = How(request.attention)
    dense = request.kind == "dense"
    step = steps.dense(f"stepper/{how.name}") if dense else steps.arm(request.kind, request.rate, how).step
    for _ in range(1 + request.steps):
        step()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
