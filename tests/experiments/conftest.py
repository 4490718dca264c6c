"""What the entry points' tests share."""

from __future__ import annotations

from pathlib import Path

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
