"""What happens when Lava fails: a typed error within the limit, and no process and no shared-memory file left."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hardware import interpreters
from neuro.graph import SpikingGraph, save_graph
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava import client as lava_client
from neuro.simulators.lava import process as lava_process
from neuro.simulators.lava.client import (
    LavaCrash,
    LavaError,
    LavaMemory,
    LavaTimeout,
    LavaUnavailable,
    LavaWorker,
    compare,
)

SHM = Path("/dev/shm")
ROOT = Path(lava_client.__file__).parents[3]
# Each takes a second or two on an idle machine, and a minute where ten processes share a core.
SLACK_S = 60
START_S = 240

Tiny = tuple[SpikingGraph, dict[str, np.ndarray]]


def commands_with(pattern: str) -> list[str]:
    """Command lines of living processes that mention a text, this one aside."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if pattern in line:
                found.append(line)
    return found


def shared_memory(owner: int) -> list[Path]:
    """Segments and semaphores of workers that a process started."""
    return [*SHM.glob(f"psm_spikegate_{owner}_*"), *SHM.glob(f"sem.psm_spikegate_{owner}_*")]


def wait_for(condition: Callable[[], bool], limit_s: float = SLACK_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def tiny(mlp_graph: Any, messages: Any) -> Tiny:
    graph = mlp_graph(0, False, (3, 4, 2))
    return graph, messages(graph, 0, 1, 5)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the workers put what they need; short, because sockets are made in it."""
    with tempfile.TemporaryDirectory(prefix="sg-") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)


def unfinished_semaphores() -> list[Path]:
    return [path for path in SHM.glob("sem.??????") if path.name[4:].isalnum()]


def nothing_is_left(folder: Path) -> None:
    wait_for(lambda: commands_with(str(folder)) == [])
    wait_for(lambda: unfinished_semaphores() == [])  # another process's are there for microseconds
    assert list(folder.iterdir()) == []
    assert shared_memory(os.getpid()) == []


@pytest.mark.lava
@pytest.mark.parametrize(
    ("fault", "timeout_s", "error", "text"),
    [
        ("hang", 6, LavaTimeout, "still running after 6 s and was ended"),
        ("raise:3", 60, LavaCrash, "ArithmeticError: raised on purpose inside a Lava process model"),
        ("exit:2", 60, LavaCrash, "a process of the Lava network ended with code 3"),
        ("shortage:2000", 60, LavaMemory, "No space left on device .*docker run --shm-size"),
    ],
)
def test_a_failure_inside_lava_is_an_error_in_time_and_leaves_nothing(
    tiny: Tiny,
    lava_python: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    fault: str,
    timeout_s: float,
    error: type[LavaError],
    text: str,
) -> None:
    with LavaWorker(lava_python, timeout_s=timeout_s) as worker:
        monkeypatch.setenv("SPIKEGATE_LAVA_FAULT", fault)
        begin = time.monotonic()
        with pytest.raises(error, match=text):
            worker.run(*tiny)
        assert time.monotonic() - begin < timeout_s + SLACK_S
        assert worker.process is None
        nothing_is_left(folder)


@pytest.mark.lava
def test_a_worker_serves_many_graphs_and_is_replaced_after_an_error(
    tiny: Tiny, lava_python: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    graph, inputs = tiny
    expected = simulate(graph, inputs)
    with LavaWorker(lava_python, timeout_s=60) as worker:
        for _ in range(2):
            assert compare(expected, worker.run(graph, inputs)).equal
        first = worker.process
        assert first is not None
        assert (worker.started, first.served) == (1, 2)
        monkeypatch.setenv("SPIKEGATE_LAVA_FAULT", "raise")
        with pytest.raises(LavaCrash):
            worker.run(graph, inputs)
        monkeypatch.delenv("SPIKEGATE_LAVA_FAULT")
        result = worker.run(graph, inputs)
        assert compare(expected, result).equal
        assert result.ran_on == "Lava CPU"
        assert worker.started == 2
        assert worker.process is not first
    nothing_is_left(folder)


@pytest.mark.lava
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 20))])
def test_a_process_killed_at_a_random_moment_is_an_error_or_harmless(
    seed: int, mlp_graph: Any, messages: Any, lava_python: Path, folder: Path
) -> None:
    rng = random.Random(seed)
    graph = mlp_graph(0, False, (3, 4, 2))
    inputs = messages(graph, 0, 1, 300)
    with LavaWorker(lava_python, timeout_s=60) as worker:
        killed: list[int] = []
        over = threading.Event()

        def kill() -> None:
            """One process of the group, as soon as a random number of them lives and a random moment passed."""
            many = rng.randint(1, 9)
            while not over.wait(0.005):
                process = worker.process
                group = lava_process.members(process.pid) if process is not None else []
                if len(group) >= many:
                    time.sleep(rng.random() * 0.3)
                    killed.append(rng.choice(group))
                    os.kill(killed[0], signal.SIGKILL)
                    return

        killer = threading.Thread(target=kill)
        killer.start()
        begin = time.monotonic()
        try:
            result = worker.run(graph, inputs)
        except LavaError:
            assert worker.process is None
            nothing_is_left(folder)
        else:  # a helper that nobody needed any more, or it came too late
            assert compare(simulate(graph, inputs), result).equal
        finally:
            over.set()
            killer.join()
        assert killed
        assert time.monotonic() - begin < 60 + SLACK_S
        assert compare(simulate(graph, inputs), worker.run(graph, inputs)).equal  # and it goes on
    nothing_is_left(folder)


def starter(folder: Path, tiny: Tiny, lava_python: Path, fault: str, before: str = "") -> subprocess.Popen[str]:
    """A process that runs a graph in Lava, with its workers' files in `folder`/t."""
    graph, inputs = tiny
    save_graph(graph, folder / "net.graph.npz")
    np.save(folder / "x.npy", inputs["x"])
    (folder / "t").mkdir()
    code = (
        "import numpy, signal, tempfile\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        f"tempfile.tempdir = {str(folder / 't')!r}\n"
        "from neuro.graph import load_graph\n"
        "from neuro.simulators.lava import client as lava_client\n"
        f"{before}\n"
        f"graph, x = load_graph({str(folder / 'net.graph.npz')!r}), numpy.load({str(folder / 'x.npy')!r})\n"
        f"lava_client.run(graph, {{'x': x}}, python={str(lava_python)!r})\n"
    )
    environment = {**os.environ, "SPIKEGATE_LAVA_FAULT": fault}
    command = [sys.executable, "-c", code]
    if before:  # in a mount namespace of its own, where /dev/shm is small
        command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh", *command]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.lava
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_starter_that_is_killed_or_interrupted_takes_lava_with_it(
    number: signal.Signals, tiny: Tiny, lava_python: Path, folder: Path
) -> None:
    process = starter(folder, tiny, lava_python, "hang")
    inside = folder / "t"
    try:
        wait_for(lambda: len(shared_memory(process.pid)) > 5 or process.poll() is not None, START_S)
        assert process.poll() is None, process.communicate()[1]
        assert commands_with(str(inside))
    finally:
        process.send_signal(number)
        _, text = process.communicate(timeout=SLACK_S)
    assert ("KeyboardInterrupt" in text) == (number == signal.SIGINT)
    wait_for(lambda: not commands_with(str(inside)))
    wait_for(lambda: not shared_memory(process.pid))
    wait_for(lambda: not list(inside.iterdir()))


@pytest.mark.lava
def test_a_full_dev_shm_is_an_error_and_no_bus_error(tiny: Tiny, lava_python: Path, folder: Path) -> None:
    """A real one, of 64 KiB, that the estimate before the start is kept from seeing."""
    trial = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"no mount namespace of one's own here: {trial.stderr.strip()}")
    process = starter(folder, tiny, lava_python, "", before="lava_client.check_shared_memory = lambda *args: None")
    _, text = process.communicate(timeout=START_S)
    assert "LavaMemory" in text
    assert "No space left on device" in text
    assert "SIGBUS" not in text
    wait_for(lambda: not commands_with(str(folder)))
    assert list((folder / "t").iterdir()) == []


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_worker_that_ignores_sigterm_is_killed_with_its_children(tiny: Tiny, tmp_path: Path) -> None:
    fake = script(
        tmp_path / "python",
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)  # {tmp_path}'])\n"
        "time.sleep(60)\n",
    )
    begin = time.monotonic()
    with pytest.raises(LavaTimeout, match="still running after 1 s"):
        lava_client.run(*tiny, python=fake, timeout_s=1)
    assert time.monotonic() - begin < 1 + SLACK_S
    wait_for(lambda: not commands_with(str(tmp_path)))  # killed at once; a busy machine may reap it a moment later


def test_a_worker_that_fails_says_why(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(LavaCrash, match=r"with code 1; stderr:\n(.|\n)*ValueError: no luck"):
        lava_client.run(*tiny, python=script(tmp_path / "a", "raise ValueError('no luck')"))
    with pytest.raises(LavaUnavailable, match="has no lava-nc; run `make lava`"):
        lava_client.run(*tiny, python=script(tmp_path / "b", "import lava.magma"))
    with pytest.raises(LavaUnavailable, match="cannot be started"):
        lava_client.run(*tiny, python=tmp_path / "none")


def test_no_interpreter_is_said_with_the_remedy(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPIKEGATE_LAVA_PYTHON", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interpreters, "__file__", str(tmp_path / "hardware" / "interpreters.py"))
    with pytest.raises(LavaUnavailable, match=r"no Lava environment at .*\.venv-lava.*run `make lava` .*Python 3\.10"):
        lava_client.run(*tiny)
    monkeypatch.setenv("SPIKEGATE_LAVA_PYTHON", "/nowhere/python")
    with pytest.raises(LavaUnavailable, match="SPIKEGATE_LAVA_PYTHON is '/nowhere/python', which is no program"):
        lava_client.find_python()
    monkeypatch.setenv("SPIKEGATE_LAVA_PYTHON", sys.executable)
    assert lava_client.find_python() == Path(sys.executable)


@pytest.mark.skipif(not SHM.is_dir(), reason="no /dev/shm here")
def test_a_semaphore_that_was_being_made_is_removed_and_no_other() -> None:
    """A process killed inside sem_open leaves sem.XXXXXX; found by the test that kills at random moments."""
    letters = "".join(random.Random(os.getpid()).choices("abcdefghijklmnopqrstuvwxyz", k=5))
    orphan, held, older, named = (SHM / f"sem.{letters}{end}" for end in ("1", "2", "3", "4-a"))
    try:
        older.write_bytes(bytes(32))
        time.sleep(0.05)
        since = time.time()
        time.sleep(0.05)
        orphan.write_bytes(bytes(32))
        named.write_bytes(bytes(32))
        with held.open("wb"):
            lava_process.remove_unfinished_semaphores(since)
            assert [path.exists() for path in (orphan, held, older, named)] == [False, True, True, True]
    finally:
        for path in (orphan, held, older, named):
            path.unlink(missing_ok=True)


@pytest.mark.skipif(not SHM.is_dir(), reason="no /dev/shm here")
def test_too_little_shared_memory_is_said_before_the_start(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lava_process.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(LavaMemory, match=r"MiB free and Lava needs about .* MiB"):
        lava_client.run(*tiny, python=sys.executable)
