"""The probe for a board, with fake interpreters and environments."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hardware import BoardUnavailable, lava_python, probe, require_board


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def interpreter(folder: Path, **answer: object) -> Path:
    """A stand-in for the Lava interpreter that prints what the probe's script would."""
    reply = {"python": "3.10.13", "lava": "0.10.0", "extension": False, **answer}
    return executable(folder / "python", f"echo '{json.dumps(reply)}'")


def names(checks: tuple[object, ...]) -> list[str]:
    return [check.name for check in checks]  # type: ignore[attr-defined]


def test_a_bare_machine_misses_everything(tmp_path: Path) -> None:
    env = {"SPIKEGATE_LAVA_PYTHON": str(tmp_path / "absent"), "PATH": str(tmp_path)}
    with pytest.raises(BoardUnavailable) as caught:
        require_board(env)
    assert names(caught.value.report.missing) == [
        "Python 3.10 for Lava",
        "lava-nc",
        "Lava-Loihi extension",
        "LOIHI_GEN",
        "host route, SLURM",
        "host route, Ethernet",
    ]
    text = str(caught.value)
    for check in caught.value.report.missing:
        assert check.name in text
        assert check.remedy in text
    assert "What still works: the integer simulator" in text
    assert f"{tmp_path / 'absent'} is no executable file" in text


def test_one_route_is_enough(tmp_path: Path) -> None:
    executable(tmp_path / "sinfo", "true")
    env = {
        "SPIKEGATE_LAVA_PYTHON": str(interpreter(tmp_path, extension=True)),
        "PATH": str(tmp_path),
        "LOIHI_GEN": "N3B3",
        "PARTITION": "oheogulch",
    }
    report = require_board(env)
    assert report.ready
    assert report.to_dict()["ready"] is True
    assert "MISSING  host route, Ethernet" in str(report)
    del env["PARTITION"]
    assert names(probe(env).missing) == ["host route, SLURM", "host route, Ethernet"]
    env |= {"NXSDKHOST": "10.0.0.2"}
    assert "HOST_BINARY not set" in probe(env).routes[1].detail
    env |= {"HOST_BINARY": "nxcore/bin/nx_driver_server"}
    assert require_board(env).ready


def test_wrong_generation_and_wrong_python(tmp_path: Path) -> None:
    env = {"SPIKEGATE_LAVA_PYTHON": str(interpreter(tmp_path, python="3.11.4", lava=None)), "LOIHI_GEN": "N9"}
    report = probe(env)
    by_name = {check.name: check for check in report.checks}
    assert not by_name["Python 3.10 for Lava"].present
    assert "Python 3.11.4" in by_name["Python 3.10 for Lava"].detail
    assert not by_name["lava-nc"].present
    assert not by_name["LOIHI_GEN"].present
    assert by_name["LOIHI_GEN"].detail == "'N9'"


@pytest.mark.parametrize("body", ["exit 3", "echo not json", "true", "echo 5", "exec sleep 30"])
def test_an_interpreter_that_does_not_answer(tmp_path: Path, body: str) -> None:
    env = {"SPIKEGATE_LAVA_PYTHON": str(executable(tmp_path / "python", body))}
    check = probe(env, timeout_s=0.5).checks[0]
    assert not check.present
    assert "does not answer" in check.detail


def test_where_the_interpreter_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".venv-lava/bin").mkdir(parents=True)
    here = interpreter(tmp_path / ".venv-lava/bin")
    monkeypatch.chdir(tmp_path)
    assert lava_python({}) == here
    other = executable(tmp_path / "other", "true")
    assert lava_python({"SPIKEGATE_LAVA_PYTHON": str(other)}) == other
    assert lava_python({"SPIKEGATE_LAVA_PYTHON": str(tmp_path / "no")}) is None


@pytest.mark.lava
def test_the_real_lava_interpreter_answers() -> None:
    if lava_python() is None:
        reason = "no Lava interpreter; make lava"
        if "lava" in os.environ.get("SPIKEGATE_REQUIRE", "").split(","):
            pytest.fail(reason)
        pytest.skip(reason)
    by_name = {check.name: check for check in probe().checks}
    assert by_name["Python 3.10 for Lava"].present
    assert by_name["lava-nc"].detail == "0.10.0"
