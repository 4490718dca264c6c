"""A text, a command that takes a second or two, and what an uninterrupted run of it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.experiments.faults.traces import trace
from tests.experiments.faults.zygote import Zygote


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as found:
        yield found


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A training of about 60 steps by a gate that learns as it goes; every step is told."""
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    known = [bytes(generator.integers(97, 123, generator.integers(2, 8)).astype(np.uint8)) for _ in range(200)]
    for i in range(12):
        (folder / f"{i}.txt").write_bytes(b" ".join(known[j] for j in generator.integers(0, 200, 1500)))
    return [
        "train", "gate=surprise", "model.width=16", "model.layers=1", "model.heads=2", "model.context=32",
        "trainer.batch_windows=4", "trainer.eval_tokens=2048", "trainer.evaluations=3", "trainer.precision=fp32",
        "model.attention=explicit", "gate.pool_windows=32", "gate.ngram_bits=12", "data=files", f"data.path={folder}",
        "trainer.budget_offered_tokens=12000", "trainer.log_every_steps=1", "trainer.checkpoint_every_s=0",
        "progress=false", "run=run",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(zygote: Zygote, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The trace of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    done = zygote.run(words, folder)
    assert done.code == 0, done.said
    return trace(folder / "run")
