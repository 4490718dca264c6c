"""Our account against SANA-FE on one network; skipped, with the command to install it, where SANA-FE is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.studies import sanafe_check
from experiments.studies.sanafe_check import SanafeError, check, main, sanafe_python
from tests.environments import missing


def test_counts_energy_and_time_agree() -> None:
    try:
        sanafe_python()
    except SanafeError as reason:
        missing("energy-check", str(reason))
    found = check(inputs=256, width=512, steps=12)  # six cores on two tiles
    assert found["counts_equal"], found["counts"]
    assert found["counts"]["ours"]["hops"] > 0
    energy = found["energy"]
    assert energy["synapse"]["ours_j"][1] == pytest.approx(energy["synapse"]["sanafe_j"], rel=1e-9)
    assert energy["traffic"]["ours_j"][1] == pytest.approx(energy["traffic"]["sanafe_j"], rel=1e-9)
    # SANA-FE pays an update where a neuron holds charge; our middle value pays it where it sent a message
    assert energy["total"]["ours_j"][1] == pytest.approx(energy["total"]["sanafe_j"], rel=0.05)
    assert found["energy_inside_interval"]
    assert found["time_inside_interval"]


def test_without_sanafe_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(sanafe_check.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(SanafeError, match=r"`make energy-check` makes \.venv-energy"):
        sanafe_python()
    assert main(["--steps", "5", "--inputs", "4", "--width", "4"]) == 3
    assert "`make energy-check` makes .venv-energy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 7", "SANA-FE failed: 7"),
        ("echo broken >&2; exit 1", "SANA-FE failed: broken"),
        ("echo hello", "printed no result"),
    ],
)
def test_a_worker_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv(sanafe_check.VARIABLE, str(fake))
    with pytest.raises(SanafeError, match=message):
        check(inputs=4, width=4, steps=3)


def test_what_the_worker_prints_is_put_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {
        "energy": {"total": 3.0, "synapse": 1.0, "soma": 1.0, "network": 1.0},
        "sim_time": 1.0,
        "spikes": -1,
        "packets_sent": 0,
        "hops": 0,
        "fired": {"x": -1, "layer1": 0, "layer2": 0},
    }
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\ncat <<'E'\n{json.dumps(answer)}\nE\n")
    fake.chmod(0o755)
    monkeypatch.setenv(sanafe_check.VARIABLE, str(fake))
    found = check(inputs=4, width=4, steps=3)
    assert found["counts_equal"] is False
    assert found["counts"]["sanafe"]["synops"] == -1
    assert found["energy_inside_interval"] is False
    assert found["time"]["sanafe_s"] == 1.0
