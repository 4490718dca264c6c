"""The integer simulator against Lava itself: live where Lava's interpreter is, and against files that Lava made.

To make the files of tests/neuro/golden again (with Lava):
    SPIKEGATE_WRITE_GOLDEN=1 python -m pytest tests/neuro/test_lava.py -k golden_files
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuro.graph import Population, Projection, SpikingGraph, identical, load_graph, save_graph
from neuro.simulators import lava_client
from neuro.simulators.activity import RECORD_ALL, Activity
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava_client import LavaError, LavaTimeout, LavaUnavailable, compare

GOLDEN = {"lif_loop": 3, "lif_self_loop": 4, "lif_deep": 7, "mlp_relu": 1, "mlp_squared": 2}


def golden_case(name: str, lif_graph: Any, mlp_graph: Any, messages: Any) -> tuple[SpikingGraph, dict[str, np.ndarray]]:
    seed = GOLDEN[name]
    graph = lif_graph(seed) if name.startswith("lif") else mlp_graph(seed, squared=name == "mlp_squared")
    return graph, messages(graph, seed, 2, 40)


@pytest.mark.lava
@pytest.mark.parametrize("seed", range(14))
def test_lif_networks_equal_lava_in_every_state(seed: int, lif_graph: Any, messages: Any, lava_python: Path) -> None:
    graph = lif_graph(seed)
    inputs = messages(graph, seed, 1, 50)
    ours = simulate(graph, inputs, record=RECORD_ALL)
    result = compare(lava_client.run(graph, inputs, python=lava_python, record=RECORD_ALL), ours)
    assert result.equal, str(result)
    assert result.skipped == ()
    assert result.values > 1500
    assert torch.count_nonzero(ours.spikes[graph.outputs[0]]) > 0  # a silent network would prove little


@pytest.mark.lava
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_graded_pipelines_equal_lava(seed: int, squared: bool, mlp_graph: Any, messages: Any, lava_python: Path) -> None:
    graph = mlp_graph(seed, squared, (32, 64, 16))
    inputs = messages(graph, seed, 1, 40)
    ours = simulate(graph, inputs, record=RECORD_ALL)
    result = compare(lava_client.run(graph, inputs, python=lava_python, record=RECORD_ALL), ours)
    assert result.equal, str(result)
    assert torch.count_nonzero(ours.spikes["y"]) > 300


@pytest.mark.lava
def test_registers_that_run_over_do_so_as_in_lava(lava_python: Path) -> None:
    """Wraps of u (one wrap only), clips of v, int32 wraps of sums and products, biases alone."""
    rng = np.random.default_rng(0)
    wide = {"num_message_bits": 32}
    weight = 2 * rng.integers(-128, 128, (6, 6))
    graph = SpikingGraph(
        (
            Population("x", "input", 6),
            Population("lif", "lif", 6, {"du": 10, "dv": 3, "vth": 131071}),
            Population("alone", "lif", 3, {"du": 0, "dv": 0, "vth": 9, "bias_mant": -4096, "bias_exp": 7}),
            Population("graded", "graded", 6, {"vth": 5}),
            Population("relu", "graded_relu", 6, {"vth": 5}),
            Population("product", "product", 6, {"vth": 7, "exp": 3}),
        ),
        (
            Projection("w1", "x", "lif", "a_in", weight, 4, **wide),
            Projection("w2", "x", "graded", "a_in", weight, 5, **wide),
            Projection("w3", "x", "graded", "a_in", weight, -20, **wide),
            Projection("w4", "x", "relu", "a_in", weight, -1, **wide),
            Projection("w5", "graded", "product", "a_in1", weight, -3, **wide),
            Projection("w6", "relu", "product", "a_in2", weight, 0, **wide),
        ),
        ("lif", "alone", "product"),
    )
    inputs = {"x": rng.integers(-(2**31), 2**31, (1, 30, 6))}
    ours = simulate(graph, inputs, record=RECORD_ALL)
    result = compare(lava_client.run(graph, inputs, python=lava_python, record=RECORD_ALL), ours)
    assert result.equal, str(result)
    assert ours.populations["lif"].wraps_u > 0
    assert ours.populations["alone"].saturations_v > 0
    assert ours.populations["product"].wraps_sum > 0


def golden_arrays(name: str, folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / f"{name}.activity.npz", allow_pickle=False) as archive:
        return dict(archive)


@pytest.mark.lava
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_are_what_lava_says(
    name: str, lif_graph: Any, mlp_graph: Any, messages: Any, lava_python: Path, golden_folder: Path
) -> None:
    graph, inputs = golden_case(name, lif_graph, mlp_graph, messages)
    activity = lava_client.run(graph, inputs, python=lava_python, record=RECORD_ALL)
    arrays = {f"state/{population}/{variable}": v.numpy() for (population, variable), v in activity.variables().items()}
    arrays.update({f"input/{key}": value for key, value in inputs.items()})
    if os.environ.get("SPIKEGATE_WRITE_GOLDEN"):
        golden_folder.mkdir(exist_ok=True)
        save_graph(graph, golden_folder / f"{name}.graph.npz")
        np.savez_compressed(golden_folder / f"{name}.activity.npz", **arrays)  # type: ignore[arg-type]
    kept = golden_arrays(name, golden_folder)
    assert identical(load_graph(golden_folder / f"{name}.graph.npz"), graph)
    assert set(kept) == set(arrays)
    for key, value in arrays.items():
        assert np.array_equal(kept[key], value), key


@pytest.mark.parametrize("name", GOLDEN)
def test_what_lava_once_computed_is_what_we_compute(name: str, golden_folder: Path) -> None:
    graph = load_graph(golden_folder / f"{name}.graph.npz")
    arrays = {tuple(key.split("/")): value for key, value in golden_arrays(name, golden_folder).items()}
    inputs = {key[1]: value for key, value in arrays.items() if key[0] == "input"}
    ours = simulate(graph, inputs, record=RECORD_ALL).variables()
    states = {(key[1], key[2]): value for key, value in arrays.items() if key[0] == "state"}
    assert set(states) == set(ours)
    assert sum(value.size for value in states.values()) > 4000
    for key, value in states.items():
        assert np.array_equal(ours[key].numpy(), value), key


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


@pytest.fixture
def tiny(mlp_graph: Any, messages: Any) -> tuple[SpikingGraph, dict[str, np.ndarray]]:
    graph = mlp_graph(0, False, (3, 4, 2))
    return graph, messages(graph, 0, 1, 5)


@pytest.mark.lava
@pytest.mark.parametrize(
    ("fault", "timeout_s", "error", "text"),
    [
        ("hang", 4, LavaTimeout, "still running after 4 s"),
        ("raise", 30, LavaError, "ArithmeticError: raised on purpose inside a Lava process model"),
        ("exit", 30, LavaError, "a process of the Lava network ended with code 3"),
    ],
)
def test_a_failure_inside_lava_is_an_error_in_time_and_leaves_nothing(
    tiny: Any, lava_python: Path, monkeypatch: Any, fault: str, timeout_s: float, error: type[LavaError], text: str
) -> None:
    with tempfile.TemporaryDirectory(prefix="sg-") as folder:  # short: sockets are made in it
        monkeypatch.setenv("SPIKEGATE_LAVA_FAULT", fault)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        begin = time.monotonic()
        with pytest.raises(error, match=text):
            lava_client.run(*tiny, python=lava_python, timeout_s=timeout_s)
        assert time.monotonic() - begin < 4 + lava_client.GRACE_S + 2
        assert commands_with(folder) == []
        assert list(Path(folder).iterdir()) == []
    assert not list(Path("/dev/shm").glob(f"psm_spikegate_{os.getpid()}_*"))


@pytest.mark.lava
def test_a_starter_that_is_killed_takes_lava_with_it(tiny: Any, lava_python: Path) -> None:
    graph, inputs = tiny
    with tempfile.TemporaryDirectory(prefix="sg-") as folder:
        save_graph(graph, Path(folder) / "net.graph.npz")
        np.save(Path(folder) / "x.npy", inputs["x"])
        inside = Path(folder) / "t"
        inside.mkdir()
        code = (
            "import numpy, tempfile\n"
            f"tempfile.tempdir = {str(inside)!r}\n"
            "from neuro.graph import load_graph\n"
            "from neuro.simulators import lava_client\n"
            f"lava_client.run(load_graph({folder + '/net.graph.npz'!r}), {{'x': numpy.load({folder + '/x.npy'!r})}},"
            f" python={str(lava_python)!r})\n"
        )
        environment = {**os.environ, "SPIKEGATE_LAVA_FAULT": "hang"}
        root = Path(lava_client.__file__).parents[2]
        starter = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=root)
        segments = f"psm_spikegate_{starter.pid}_*"
        try:
            wait_for(lambda: len(list(Path("/dev/shm").glob(segments))) > 5, 60)
            assert commands_with(str(inside))
        finally:
            starter.kill()
            starter.wait()
        wait_for(lambda: not commands_with(str(inside)), 10)
        wait_for(lambda: not list(Path("/dev/shm").glob(segments)), 10)
        wait_for(lambda: not list(inside.iterdir()), 10)


def wait_for(condition: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_worker_that_ignores_sigterm_is_killed_with_its_children(tiny: Any, tmp_path: Path) -> None:
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
    assert time.monotonic() - begin < 1 + lava_client.GRACE_S + 2
    wait_for(lambda: not commands_with(str(tmp_path)), 5)  # killed at once; a busy machine may reap it a moment later


def test_a_worker_that_fails_says_why(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(LavaError, match=r"code 1; stderr:\n(.|\n)*ValueError: no luck"):
        lava_client.run(*tiny, python=script(tmp_path / "a", "raise ValueError('no luck')"))
    with pytest.raises(LavaUnavailable, match="has no lava-nc; run `make lava`"):
        lava_client.run(*tiny, python=script(tmp_path / "b", "import lava.magma"))
    with pytest.raises(LavaUnavailable, match="cannot be started"):
        lava_client.run(*tiny, python=tmp_path / "none")


def test_no_interpreter_is_said_with_the_remedy(tiny: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.delenv("SPIKEGATE_LAVA_PYTHON", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lava_client, "__file__", str(tmp_path / "neuro" / "simulators" / "lava_client.py"))
    with pytest.raises(LavaUnavailable, match=r"no Lava environment at .*\.venv-lava.*run `make lava` .*Python 3\.10"):
        lava_client.run(*tiny)
    monkeypatch.setenv("SPIKEGATE_LAVA_PYTHON", "/nowhere/python")
    with pytest.raises(LavaUnavailable, match="SPIKEGATE_LAVA_PYTHON is '/nowhere/python', which is no program"):
        lava_client.find_python()
    monkeypatch.setenv("SPIKEGATE_LAVA_PYTHON", sys.executable)
    assert lava_client.find_python() == Path(sys.executable)


def test_too_little_shared_memory_is_said_before_the_start(tiny: Any, monkeypatch: Any) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(lava_client.shutil, "disk_usage", lambda path: usage)
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm here")
    with pytest.raises(LavaError, match=r"MiB free and Lava needs about .* MiB"):
        lava_client.run(*tiny, python=sys.executable)


def test_the_first_divergence_is_named() -> None:
    def activity(**spikes: list[list[int]]) -> Activity:
        tensors = {name: torch.tensor([rows], dtype=torch.int32) for name, rows in spikes.items()}
        return Activity(tensors, {}, 1, 3, "test")

    first = activity(a=[[0, 0], [0, 0], [5, 0]], b=[[0], [7], [0]], c=[[1], [1], [1]])
    second = activity(a=[[0, 0], [0, 0], [6, 1]], b=[[0], [8], [0]])
    result = compare(first, second)
    assert (result.values, result.mismatches, result.skipped) == (9, 3, ("c.spikes",))
    assert str(result.first) == "population 'b', spikes, sample 0, step 1, neuron 0: expected 7, got 8"
    assert str(compare(first, first)) == "equal over 12 values"
    with pytest.raises(ValueError, match="no variable in common"):
        compare(activity(a=[[1]]), activity(b=[[1]]))
    with pytest.raises(ValueError, match="shapes differ"):
        compare(activity(a=[[1]]), activity(a=[[1, 2]]))
