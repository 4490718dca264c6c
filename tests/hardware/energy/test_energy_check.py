"""The real Zeus beside our meter, over one faked RAPL counter and over none: `make energy-check`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.environments import python_of

ROOT = Path(__file__).resolve().parents[3]
JOB = Path(__file__).with_name("energy_check_job.py")


@pytest.fixture(scope="module")
def python() -> Path:
    return python_of("SPIKEGATE_ENERGY_PYTHON", ".venv-energy", "energy-check")


def job(python: Path, *words: str | Path) -> dict[str, Any]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, JOB, *words], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_both_read_the_same_joules(python: Path, tmp_path: Path) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for name, text in (("name", "package-0"), ("energy_uj", "5000000"), ("max_energy_range_uj", "262143328850")):
        (zone / name).write_text(text)
    found = job(python, tmp_path, "42.5")
    (own,), (zeus,) = found["own"], found["zeus"]
    assert own["joules"] == pytest.approx(42.5)
    assert zeus["joules"] == pytest.approx(42.5)
    assert zeus["source"] == "Zeus: CPU 0"
    assert "agree" in found["compared"][0]


def test_the_real_zeus_says_0_j_without_a_meter_and_the_check_says_not_measured(python: Path, tmp_path: Path) -> None:
    found = job(python, tmp_path / "absent")
    if found["gpus"]:
        pytest.skip(f"{found['gpus']} GPUs here: Zeus has a meter")
    assert found["plain_total_j"] == 0
    assert [reading["joules"] for reading in (*found["own"], *found["zeus"])] == [None, None]
    assert "its total of 0 J is not a measurement" in found["zeus"][0]["reason"]
    assert "no cross-check" in found["compared"][0]
