"""Peak memory of a training step, plain and with a quarter of the weight blocks, as promised and as measured.

Both are those of `bench attach`; each peak is taken in a process of its own.
"""

from __future__ import annotations

from typing import Any

from experiments.benches.attach_arms import BLOCKS, Shape
from experiments.benches.attach_memory import peak_apart
from experiments.benches.gpu.setting import Emit, Setting

ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "blocks 0.25": BLOCKS,
    "token rows 0.5": {"backward": {"unit": "token", "keep_fraction": 0.5}},
}


def measure(setting: Setting, emit: Emit) -> dict[str, Any]:
    """Bytes promised and measured, by arm: our Transformer at the part's size, float32, AdamW, two micro-batches a step."""
    cfg = setting.model()
    shape = Shape(
        width=cfg.width, layers=cfg.layers, heads=cfg.heads, hidden=cfg.hidden_ratio * cfg.width, vocab=cfg.vocab_size,
        batch=setting.batch // 2, length=cfg.context,
    )  # fmt: skip
    found: dict[str, Any] = {}
    for name, config in ARMS.items():
        found[name] = peak_apart("transformer", shape, config, setting.where, threads=1).to_dict()
        if name != "plain":
            found[name]["of_plain"] = found[name]["measured"] / found["plain"]["measured"]
        emit({"bytes": found})
    return {"bytes": found}
