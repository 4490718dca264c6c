"""What the entry points' tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.runs import output
from neuro.simulators.lava import client as lava_client
from tests.environments import missing


@pytest.fixture(autouse=True)
def documents_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that are longer than a line may be, of commands in this process, go to the test's folder."""
    monkeypatch.setattr(output, "FOLDER", tmp_path / "documents")


@pytest.fixture(scope="module")
def lava():
    """Lava's interpreter; skips without it, or fails where SPIKEGATE_REQUIRE lists lava."""
    try:
        return lava_client.find_python()
    except lava_client.LavaUnavailable as error:
        missing("lava", str(error))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve files of words, 200 different ones, the same in every test."""
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    words = [bytes(generator.integers(97, 123, generator.integers(2, 8)).astype(np.uint8)) for _ in range(200)]
    for i in range(12):
        (folder / f"{i}.txt").write_bytes(b" ".join(words[j] for j in generator.integers(0, 200, 1500)))
    return folder
