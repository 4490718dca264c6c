"""What a run leaves behind, without what a clock wrote into it: for comparison with the bytes of an uninterrupted run."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

CLOCK = ("wall_s", "tokens_per_s")
OUTCOME = (
    "status", "loss_nats", "bits_per_byte", "held_out", "tokens", "steps", "windows_offered", "flops", "reference_s",
    "gate_reference_s", "optimizer_bytes", "gradient_bytes", "update_bytes", "keep_fraction", "source_keep",
    "skipped_steps", "val_split",
)  # fmt: skip


def trace(run: Path) -> dict[str, Any]:
    """Tensors by sha256, the checkpoint's head, every metric line, the outcome."""
    checkpoint = run / "checkpoint"
    head = json.loads((checkpoint / "meta.json").read_text())
    for clocked in ("records", "sha256"):
        head.pop(clocked)
    head["state"]["counters"].pop("wall_s")
    result = json.loads((run / "result.json").read_text())
    return {
        "tensors": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in checkpoint.glob("*.safetensors")},
        "head": head,
        "lines": lines(run),
        "outcome": {key: result[key] for key in OUTCOME},
        "points": points(run),
    }


def lines(run: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in found]


def points(run: Path) -> Counter[tuple[str, int]]:
    """(tag, step) of every scalar in the event files, as any reader finds them; a curve has each once."""
    found: Counter[tuple[str, int]] = Counter()
    for path in sorted(run.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found[value.tag, event.step] += 1
    return found


def leftovers(run: Path) -> list[str]:
    """What a killed process may leave, and a restart takes away."""
    return sorted(path.name for path in run.rglob("*") if path.name.endswith((".part", ".new", ".old", "_tmp")))
