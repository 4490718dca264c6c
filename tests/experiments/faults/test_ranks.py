"""A rank that dies or hangs: the job ends within its limit and names the rank, or is started again and goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.faults.traces import OUTCOME

ROOT = Path(__file__).resolve().parents[3]
WAIT_S = 500
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def rank_of(pid: int) -> int | None:
    """Which rank a process is, None for another."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"experiments.runs.training.worker" in words or b"experiments.train" in words:
            for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if pair.startswith(b"RANK="):
                    return int(pair[5:])
    return None


def children(pid: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


def started(words: list[str], folder: Path, module: tuple[str, ...]) -> subprocess.Popen[str]:
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *module, *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def strike(process: subprocess.Popen[str], run: Path, number: int) -> None:
    """Give rank 1 a signal when there is a checkpoint."""
    deadline = time.monotonic() + WAIT_S
    while not (run / "checkpoint").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    (victim,) = [pid for pid in children(process.pid) if rank_of(pid) == 1]
    os.kill(victim, number)


@pytest.fixture(scope="module")
def meshed(words: list[str]) -> list[str]:
    """The settings of the other faults' run, longer, trained by two processes."""
    given = [word for word in words if not word.startswith("trainer.budget_offered_tokens")]
    return [*given[1:], "trainer.budget_offered_tokens=12000", "mesh=ddp"]


@pytest.fixture(scope="module")
def unharmed(meshed: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes end with when nothing happens."""
    process = started([*meshed, "mesh.processes=2"], tmp_path_factory.mktemp("unharmed") / "x", ("experiments.train",))
    said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, said
    return json.loads(said[0].splitlines()[-1])


def resumed_at(run: Path) -> int:
    """The step that the run's last start went on from."""
    return int(json.loads((run / "result.json").read_text())["checkpoints"]["resumed_at_step"] or 0)


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    keys = [key for key in OUTCOME if key in expected]
    assert {"loss_nats", "steps"} <= set(keys)
    return [found[key] for key in keys] == [expected[key] for key in keys]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_rank_that_is_lost_is_named_within_the_limit_and_the_same_command_goes_on(
    meshed: list[str], unharmed: dict[str, Any], tmp_path: Path, number: int
) -> None:
    words = [*meshed, "mesh.processes=2"]
    process = started([*words, "mesh.timeout_s=20"], tmp_path / "x", ("experiments.train",))
    strike(process, tmp_path / "x" / "run", number)
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1, said
    died = number == signal.SIGKILL and "rank 1 was ended by SIGKILL" in said  # else the other one has told it already
    assert died or "rank 1 of 2 died or hangs" in said
    assert "the same command goes on" in said
    command = [sys.executable, "-m", "experiments.train", *words]
    done = subprocess.run(command, cwd=tmp_path / "x", env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert resumed_at(tmp_path / "x" / "run") > 0
    assert same(json.loads(done.stdout.splitlines()[-1]), unharmed)


TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1", "-m")


@pytest.mark.parametrize(
    ("module", "more"),
    [(("experiments.train",), ["mesh.processes=2", "mesh.restarts=1"]), ((*TORCHRUN, "experiments.train"), [])],
    ids=["spikegate", "torchrun"],
)
def test_a_rank_that_dies_is_started_again_and_goes_on(
    module: tuple[str, ...],
    more: list[str],
    meshed: list[str],
    unharmed: dict[str, Any],
    tmp_path: Path,
) -> None:
    process = started([*meshed, *more], tmp_path / "x", module)
    strike(process, tmp_path / "x" / "run", signal.SIGKILL)
    shown, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, said
    assert resumed_at(tmp_path / "x" / "run") > 0
    assert same(json.loads(shown.splitlines()[-1]), unharmed)
