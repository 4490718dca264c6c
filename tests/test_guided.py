"""Readers under a fuzzer that is guided by coverage."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import guided

ROOT = Path(__file__).resolve().parents[1]
RUNS = 20_000


@pytest.mark.parametrize("reader", guided.SEEDS)
def test_the_seeds_are_lawful(reader: str, tmp_path: Path) -> None:
    guided.prepare(reader, tmp_path)
    name, read, errors = guided.readers()[reader]
    accepted = 0
    for seed in sorted((tmp_path / "seeds").iterdir()):
        (tmp_path / name).write_bytes(seed.read_bytes())
        try:
            read(tmp_path / name)
            accepted += 1
        except errors:
            pass  # a seed of a neighbouring kind
    assert accepted


@pytest.mark.soak
@pytest.mark.parametrize("reader", guided.SEEDS)
def test_no_bytes_that_coverage_leads_to_are_more_than_refused(
    reader: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install atheris")
    guided.prepare(reader, tmp_path)
    words = [sys.executable, "-m", "tests.guided", reader, str(tmp_path), str(RUNS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(words, cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.glob("crash-*"))
    record_property("soak", {"what": f"files that coverage leads to, read as {reader} (atheris)", "tried": RUNS})
