"""What several processes do on this machine: two of them against one, in turn, by the trainer's own parts.

Two processes of one thread each are started by torchrun's launcher. A round trains a few steps alone (the other process
waits at a barrier) and the same steps together, with the gate off and on, in an order that turns with the round; so the
machine's mood meets all alike. Text is made up (a Markov chain over bytes): nothing here depends on what is learnt.

    speedup      tokens per wall second of two processes over those of one, gate off and on; medians over rounds
    bytes_ratio  bytes of weights, gradients and optimizer state on the fuller of two processes over those of one
    gate_share   seconds of the gate's own collectives over those of a gated step: each timed apart behind a barrier
    resume       seconds to go on from a checkpoint that two processes wrote in parts, over those of torch's own load of it,
                 and what training waits for where parts are written beside it, over where it stands still: by processor
                 time, until the interval of the ratio is narrower than 5 %, and by the wall

Wall times need two idle processors; `load` says how busy they were. Ratios of processor time do not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FAST = {"size": "tiny", "windows": 8, "steps": 1, "rounds": 2, "load_rounds": 2}
"""A quick look that everything runs; its figures mean nothing."""


def figures(words: Sequence[str] = ()) -> dict[str, Any]:
    """{"ddp": {"speedup", ...}, "fsdp": {"bytes_ratio", ...}, "tp": {"bytes_ratio", ...}, "gate_share",
    "resume": {"ratio", ...}}.

    `words`: --size, --windows, --steps, --rounds, --optim, --load-s, --load-rounds, --only-resume, or --fast.
    Raises RuntimeError where a process failed.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    asked = vars(_parser().parse_args(list(words)))
    if asked.pop("fast"):
        asked |= FAST
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="spikegate-") as name:
        place = Path(name)
        (place / "asked.json").write_text(json.dumps(asked))
        os.environ["OMP_NUM_THREADS"] = "1"
        config = LaunchConfig(1, 1, 2, run_id=place.name, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
        try:
            elastic_launch(config, sys.executable)("-m", "experiments.benches.scaling.rank", str(place))
        except ChildFailedError as error:
            raise RuntimeError(f"a measuring process failed ({error.get_first_failure()[1].exitcode}), see above") from None
        found: dict[str, Any] = json.loads((place / "found.json").read_text())
    found["load"] = {"before": before, "after": os.getloadavg()[0], "processors": os.cpu_count()}
    return {**found, "asked": asked}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench scale --measure", description=figures.__doc__)
    parser.add_argument("--size", default="small", help="a shipped model size (small)")
    parser.add_argument("--windows", type=int, default=16, help="windows of a batch, of both processes together (16)")
    parser.add_argument("--steps", type=int, default=3, help="steps of an arm in a round (3)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (7)")
    parser.add_argument("--load-s", type=float, default=240.0, help="seconds for each ratio of loading and saving (240)")
    parser.add_argument("--load-rounds", type=int, default=200, help="rounds of loading and saving, at most (200)")
    parser.add_argument("--only-resume", action="store_true", help="measure nothing but loading and saving")
    parser.add_argument("--optim", default="muon", choices=["muon", "adamw"], help="the optimizer (muon)")
    parser.add_argument("--fast", action="store_true", help="a quick look that everything runs")
    return parser


def summary(seconds: dict[str, list[float]], tokens: dict[str, list[int]]) -> dict[str, Any]:
    """Speed-ups with the gate off and on: the median of the rounds' ratios, and the smallest and largest of them."""
    found: dict[str, Any] = {}
    for gate in ("off", "on"):
        rates = {
            mesh: [t / s for t, s in zip(tokens[f"{mesh} {gate}"], seconds[f"{mesh} {gate}"], strict=True)]
            for mesh in ("single", "ddp")
        }
        ratios = [two / one for one, two in zip(rates["single"], rates["ddp"], strict=True)]
        found[f"gate_{gate}"] = {
            "speedup": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "tokens_per_s": {mesh: statistics.median(values) for mesh, values in rates.items()},
        }
    return {"speedup": min(found["gate_off"]["speedup"], found["gate_on"]["speedup"]), **found}
