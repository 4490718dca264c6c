"""Grids of runs whose law is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from experiments.laws.form import Law

LAW = Law(1.2, 60.0, 0.35, 400.0, 0.37)
FLOPS_EACH = 6.5
"""a parameter and token"""


def grid(sizes: int = 6, lengths: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and tokens of every pair, (sizes * lengths,) each."""
    n, d = np.meshgrid(np.geomspace(1e4, 3e6, sizes), np.geomspace(2e5, 2e7, lengths))
    return n.ravel(), d.ravel()


def noisy(law: Law, n: np.ndarray, d: np.ndarray, seed: int, share: float = 0.004) -> np.ndarray:
    return law.loss(n, d) * np.exp(share * np.random.default_rng(seed).normal(size=n.shape))


@pytest.fixture
def write_runs(tmp_path: Path) -> Callable[..., Path]:
    """Run folders as training leaves them, as far as a law reads them."""

    def write(
        n: np.ndarray,
        d: np.ndarray,
        loss: np.ndarray,
        arm: str = "dense",
        seed: int = 0,
        started: str = "2026-11-30T10:00:00+0000",
        **more: object,
    ) -> Path:
        for index, (parameters, tokens, nats) in enumerate(zip(n, d, loss, strict=True)):
            folder = tmp_path / "runs" / f"{arm}-{seed}-{index}"
            folder.mkdir(parents=True)
            result = {
                "status": "finished", "loss_nats": float(nats) if np.isfinite(nats) else "nan", "tokens": int(tokens),
                "flops": FLOPS_EACH * float(parameters) * float(tokens), "params": int(parameters), "corpus": "text",
                "val_tokens": 1000, "budget_reference_s": None, "budget_offered_tokens": int(tokens),
            }  # fmt: skip
            info = {"kind": "train", "status": "finished", "arm": arm, "stream": "clean", "seed": seed, "started": started}
            config = {"data": {"tokenizer": "bytes", "vocab_size": 256}} | more
            for name, what in (("result.json", result), ("run.json", info), ("config.yaml", config)):
                (folder / name).write_text(json.dumps(what))  # JSON is YAML
        return tmp_path / "runs"

    return write
