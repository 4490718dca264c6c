"""The probe for a board, with fake interpreters and environments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hardware import BoardUnavailable, LayerDemand, lava_python, probe, require_board
from hardware.boards.loihi import EXTENSION, Route, find_route
from tests.environments import missing

TABLE = "NODELIST NODES PARTITION STATE\nog-1 1 oheogulch* idle\nog-2 1 kp down*\nog-3 1 kp mixed\n"


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def interpreter(folder: Path, **answer: object) -> Path:
    """A stand-in for the Lava interpreter that prints what the probe's script would."""
    reply = {"python": "3.10.13", "lava": "0.10.0", "extension": [], **answer}
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
        "board",
        "host route, SLURM",
        "host route, Ethernet",
    ]
    text = str(caught.value)
    for check in caught.value.report.missing:
        assert check.name in text
        assert check.remedy in text
    assert "What works all the same: the integer simulator, placement, energy estimates." in text
    assert f"{tmp_path / 'absent'} is no executable file" in text


@pytest.fixture
def site(tmp_path: Path) -> dict[str, str]:
    """Everything there for a run by SLURM but the choice of a board: programs are stand-ins."""
    executable(tmp_path / "sinfo", f'[ "$1" = -N ] && printf "{TABLE}"')
    executable(tmp_path / "ping", '[ "$3" = 10.0.0.2 ]')
    return {
        "SPIKEGATE_LAVA_PYTHON": str(interpreter(tmp_path, extension=EXTENSION)),
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "LOIHI_GEN": "N3B3",
    }


def test_one_route_is_enough(site: dict[str, str]) -> None:
    env = {**site, "PARTITION": "oheogulch"}
    report = require_board(env)
    assert report.ready
    assert report.to_dict()["ready"] is True
    assert "MISSING  host route, Ethernet" in str(report)
    assert "works all the same: Lava on the CPU" in str(report)
    assert find_route(env) == Route("slurm", "N3B3", partition="oheogulch")
    assert find_route(env).name == "Loihi board oheogulch (N3B3)"
    del env["PARTITION"]
    assert names(probe(env).missing) == ["board", "host route, SLURM", "host route, Ethernet"]
    env |= {"NXSDKHOST": "10.0.0.2"}
    assert "HOST_BINARY not set" in probe(env).routes[1].detail
    env |= {"HOST_BINARY": "nxcore/bin/nx_driver_server"}
    assert require_board(env).ready
    assert find_route(env).name == "Loihi board 10.0.0.2 (N3B3)"


@pytest.mark.parametrize(
    ("env", "detail"),
    [
        ({"BOARD": "og-2"}, "og-2: down*"),
        ({"BOARD": "og-9"}, "og-9 is not among the 3 nodes that sinfo lists"),
        ({"NXSDKHOST": "10.9.9.9", "HOST_BINARY": "x"}, "`ping -c 1 10.9.9.9` failed"),
        ({}, "cannot be asked for without a host route"),
    ],
)
def test_a_board_that_does_not_answer(site: dict[str, str], env: dict[str, str], detail: str) -> None:
    missing = {check.name: check for check in probe({**site, **env}).missing}
    assert detail in missing["board"].detail
    assert missing["board"].remedy


def test_a_partition_is_there_while_one_of_its_nodes_is_up(site: dict[str, str]) -> None:
    assert require_board({**site, "PARTITION": "kp"}).ready


def test_whether_a_network_fits_is_one_more_check(site: dict[str, str]) -> None:
    env = {**site, "BOARD": "og-1"}
    assert require_board(env, demands=[LayerDemand("small", 10)]).checks[-1].detail == "1 cores of 1 chip(s)"
    with pytest.raises(BoardUnavailable, match=r"placement fits: .*\bcores\b") as caught:
        require_board(env, demands=[LayerDemand("large", 4_000_000)], chips=1)
    assert names(caught.value.report.missing) == ["placement fits"]


def test_an_extension_in_parts_names_what_is_absent(site: dict[str, str], tmp_path: Path) -> None:
    env = {**site, "SPIKEGATE_LAVA_PYTHON": str(interpreter(tmp_path, extension=EXTENSION[:2])), "BOARD": "og-1"}
    (missing,) = probe(env).missing
    assert missing.detail == "lava.proc.embedded_io.spike not found"
    assert "SPIKEGATE_LAVA_PATH" in missing.remedy


def test_no_route_is_an_error_of_its_own() -> None:
    with pytest.raises(ValueError, match="LOIHI_GEN is ''"):
        find_route({})
    with pytest.raises(ValueError, match="no route to a board's host"):
        find_route({"LOIHI_GEN": "N3B3", "PATH": ""})


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
        missing("lava", "no Lava interpreter; make lava")
    by_name = {check.name: check for check in probe().checks}
    assert by_name["Python 3.10 for Lava"].present
    assert by_name["lava-nc"].detail == "0.10.0"
