"""`spikegate simulate`: what it writes equals what the simulators return; bad input stops it before anything is written."""

from __future__ import annotations

import argparse
import hashlib
import json

import numpy as np
import pytest
import torch

from experiments.commands.simulate import add_arguments, run
from neuro.graph import Population, Projection, SpikingGraph, load_graph, save_graph
from neuro.simulators.activity import RECORD_ALL, compare
from neuro.simulators.fixed_point import simulate
from neuro.simulators.inputs import InputError
from neuro.simulators.lava import client as lava_client
from neuro.simulators.results import ResultFileError, load_inputs, load_result, read_header, save_result

LIF = {"du": 4095, "dv": 0, "vth": 20}


def network(kind: str = "lif", **params) -> SpikingGraph:
    rng = np.random.default_rng(0)
    return SpikingGraph(
        (Population("x", "input", 4), Population("h", kind, 6, {**LIF, **params}), Population("y", "lif", 3, LIF)),
        (
            Projection("a", "x", "h", "a_in", 2 * rng.integers(-20, 30, (6, 4)), num_message_bits=5),
            Projection("b", "h", "y", "a_in", 2 * rng.integers(-20, 30, (3, 6))),
        ),
        ("y",),
    )


@pytest.fixture
def files(tmp_path):
    """(graph, input, out), the first two written."""
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "in.npz", x=rng.integers(-8, 9, (3, 10, 4)).astype(np.int16))
    return save_graph(network(), tmp_path / "net.graph.npz"), tmp_path / "in.npz", tmp_path / "out.npz"


def command(*words: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(word) for word in words]))


def expected(files, mode="lava"):
    graph = load_graph(files[0])
    return simulate(graph, load_inputs(files[1], graph), mode=mode, record=RECORD_ALL)


@pytest.mark.parametrize("mode", ["lava", "chip"])
def test_the_file_holds_the_simulators_result(files, mode, capsys):
    graph, inputs, out = files
    assert command(graph, inputs, "--mode", mode, "--record", "all", "--out", out) == 0
    result, want = load_result(out), expected(files, mode)
    comparison = compare(want, result)
    assert comparison.equal, comparison
    assert comparison.skipped == ()
    assert int(torch.count_nonzero(want.spikes["y"])) > 0
    assert (result.mode, result.ran_on, result.notes) == (mode, f"simulated (ours, {mode})", want.notes)
    assert (result.projections, result.populations) == (want.projections, want.populations)
    header = read_header(out)
    assert header["graph_sha256"] == hashlib.sha256(graph.read_bytes()).hexdigest()
    assert (header["backend"], header["graph"], header["outputs"]) == ("fixed_point", "net.graph.npz", ["y"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["messages"] == {"y": int(torch.count_nonzero(want.spikes["y"]))}
    assert (document["ran_on"], document["mode"]) == (result.ran_on, mode)
    assert document["left_registers"] == {}


def test_the_layout_is_what_the_readme_says(files):
    """Read with numpy and json alone."""
    graph, inputs, out = files
    assert command(graph, inputs, "--record", "spikes,h.v", "--out", out) == 0
    with np.load(out, allow_pickle=False) as archive:
        assert set(archive.files) == {"header", "x/spikes", "h/spikes", "y/spikes", "h/v"}
        assert archive["header"].dtype == np.uint8
        assert json.loads(archive["header"].tobytes())["schema"] == 1
        for name in ("y/spikes", "h/v"):
            assert archive[name].dtype == np.int32
        assert archive["y/spikes"].shape == (3, 10, 3)


def test_snntorch(files, capsys):
    graph, inputs, out = files
    assert command(graph, inputs, "--backend", "snntorch", "--out", out) == 0
    result = load_result(out)
    assert torch.equal(result.spikes["y"], expected(files).spikes["y"])
    assert (result.mode, result.ran_on) == ("float", "snnTorch 1.0.0 (float64)")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["backend"] == "snntorch"


@pytest.mark.lava
@pytest.mark.usefixtures("lava")
def test_lava(files):
    graph, inputs, out = files
    assert command(graph, inputs, "--backend", "lava", "--record", "all", "--timeout", 60, "--out", out) == 0
    result = load_result(out)
    comparison = compare(result, expected(files))
    assert comparison.equal, comparison
    assert comparison.values > 500
    assert (result.ran_on, result.mode) == ("Lava CPU", "lava")


def test_lavas_failure_is_ours(files, monkeypatch, capsys):
    def fail(*_, **__):
        raise lava_client.LavaTimeout("still running after 3 s")

    monkeypatch.setattr(lava_client, "run", fail)
    assert command(*files[:2], "--backend", "lava", "--timeout", 3, "--out", files[2]) == 1
    assert "simulate: still running after 3 s" in capsys.readouterr().err
    nothing_written(files)


def test_several_processes_give_what_one_gives(files):
    graph, inputs, out = files
    assert command(graph, inputs, "--processes", 2, "--record", "all", "--out", out) == 0
    result = load_result(out)
    comparison = compare(result, expected(files))
    assert comparison.equal, comparison
    assert result.populations == expected(files).populations


def nothing_written(files) -> None:
    folder = files[2].parent
    assert {path.name for path in folder.iterdir()} <= {"net.graph.npz", "in.npz", "sub.npz"}


def test_strict_names_the_value_and_writes_nothing(files, capsys):
    graph, inputs, out = files
    hot = network(bias_mant=4095, bias_exp=7, vth=2**17 - 1)
    save_graph(hot, graph)
    np.savez(inputs, x=np.zeros((1, 40, 4), dtype=np.int8))
    assert command(graph, inputs, "--strict", "--out", out) == 1
    error = capsys.readouterr().err
    assert "population 'h', step 16, sample 0, neuron 0: v is 8910720" in error
    nothing_written(files)
    assert command(graph, inputs, "--out", out) == 0
    text = capsys.readouterr().out
    assert "h: " in text
    assert "values left their register" in text
    assert json.loads(text.splitlines()[-1])["left_registers"]["h"] == load_result(out).populations["h"].saturations_v > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--backend", "lava", "--mode", "chip"),
            "backend lava has no mode chip, it has lava; use --mode lava, or --backend",
        ),
        (("--backend", "snntorch", "--mode", "lava"), "backend snntorch has no mode lava, it has float; leave --mode out"),
        (("--backend", "snntorch", "--strict"), "backend snntorch checks no register"),
        (("--timeout", "5"), "--timeout goes with --backend lava"),
        (("--backend", "lava", "--timeout", "-1"), "--timeout is -1 s; give a positive number"),
        (("--backend", "lava", "--device", "cuda"), "Lava runs on the CPU"),
        (("--device", "abacus"), "--device is 'abacus', which is none"),
        (("--device", "meta"), "--device is 'meta'; the integer arithmetic runs on cpu and cuda"),
        (("--processes", "0"), "--processes is 0; a whole number from 1 is needed"),
        (("--processes", "2", "--backend", "lava"), "--processes goes with --backend fixed_point on the CPU"),
        (("--by", "batch"), "--by batch says how several processes share a run; give --processes 2 or more"),
        (("--processes", "3", "--by", "populations"), "3 parts of a graph of 2 populations that compute"),
        (("--record", "w"), "record names 'w'; known are spikes"),
    ],
)
def test_options_that_do_not_go_together(files, words, message, capsys):
    assert command(*files[:2], *words, "--out", files[2]) == 2
    assert message in capsys.readouterr().err
    nothing_written(files)


def test_a_device_that_is_not_there(files, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(*files[:2], "--device", "cuda", "--out", files[2]) == 2
    assert "this machine has no CUDA device; leave --device out" in capsys.readouterr().err
    nothing_written(files)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "array 'x' is missing; the graph's inputs are: x"),
        ({"x": (1, 2, 4), "z": (1, 2, 4)}, "array 'z' is unknown; the graph's inputs are: x"),
        ({"x": (1, 2, 5)}, "input 'x' has shape (1, 2, 5); (batch, steps, 4) is needed"),
        ({"x": (2, 4)}, "input 'x' has shape (2, 4); (batch, steps, 4) is needed"),
        ({"x": (1, 0, 4)}, "(batch, steps, 4) is needed"),
        ({"x": np.zeros((1, 2, 4))}, "array 'x' is float64; messages are integers, so round and convert it first"),
        (
            {"x": np.full((1, 2, 4), 16)},
            "input 'x' is 16 at sample 0, step 0, neuron 0; projection 'a' (5 bits) carries -16..15",
        ),
        ({"x": np.full((1, 2, 4), 2**40, dtype=np.uint64)}, "holds 1099511627776; a message holds up to 2147483647"),
        ({"x": np.array([["a", "b"]])}, "array 'x' is of type '<U1'; only numbers belong here"),
        ({"x": np.array([[None]])}, "not a readable .npz of integer arrays"),
    ],
)
def test_inputs_that_do_not_fit(files, arrays, message, capsys):
    np.savez(files[1], **{key: np.zeros(v, dtype=int) if isinstance(v, tuple) else v for key, v in arrays.items()})
    assert command(*files[:2], "--out", files[2]) == 2
    assert message in capsys.readouterr().err
    nothing_written(files)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64, np.uint8, np.bool_])
def test_other_integers_are_taken(files, dtype):
    np.savez(files[1], x=np.ones((1, 3, 4), dtype=dtype))
    assert command(*files[:2], "--out", files[2]) == 0
    assert load_result(files[2]).steps == 3


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def other_schema(path):
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    header = json.loads(arrays["header"].tobytes())
    arrays["header"] = np.frombuffer(json.dumps({**header, "schema": 99}).encode(), dtype=np.uint8)
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("damage", "which", "message"),
    [
        (truncated, 0, "not a readable graph file"),
        (other_schema, 0, "the file has schema 99, this version reads schema 1 and 2"),
        (truncated, 1, "in.npz: not a readable .npz of integer arrays"),
        (lambda path: path.unlink(), 0, "No such file"),
        (lambda path: path.unlink(), 1, "No such file"),
        (lambda path: path.write_text("x, y"), 1, "not a readable .npz"),
    ],
)
def test_files_that_cannot_be_read(files, damage, which, message, capsys):
    damage(files[which])
    assert command(*files[:2], "--out", files[2]) == 2
    assert message in capsys.readouterr().err
    nothing_written(files)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("out.txt", "a result is a file NAME.npz"),
        ("none/out.npz", "none does not exist, make it first"),
        ("in.npz", "which is also read; give another name"),
        ("sub.npz", "a result is a file NAME.npz"),
    ],
)
def test_places_that_cannot_be_written(files, place, message, capsys):
    folder = files[2].parent
    (folder / "sub.npz").mkdir()
    before = files[1].read_bytes()
    assert command(*files[:2], "--out", folder / place) == 2
    assert message in capsys.readouterr().err
    nothing_written(files)
    assert files[1].read_bytes() == before


@pytest.mark.parametrize(
    ("words", "kind", "params", "message"),
    [
        (
            ("--backend", "lava"),
            "lif_refractory",
            {"refractory": 2},
            "backend lava, mode lava: population 'h' (lif_refractory): Lava 0.10 has no fixed-point model of it;"
            " --backend fixed_point --mode chip runs this graph",
        ),
        ((), "lif_refractory", {"refractory": 2}, "backend fixed_point, mode lava: population 'h' (lif_refractory)"),
    ],
)
def test_kinds_that_a_backend_does_not_have(files, words, kind, params, message, capsys):
    save_graph(network(kind, **params), files[0])
    assert command(*files[:2], *words, "--out", files[2]) == 2
    assert message in capsys.readouterr().err
    nothing_written(files)
    assert command(*files[:2], "--mode", "chip", "--out", files[2]) == 0


@pytest.mark.parametrize("backend", ["fixed_point", "snntorch"])
def test_a_graph_without_inputs_runs_for_the_steps_that_are_named(files, tmp_path, backend, capsys):
    bias = {**LIF, "bias_mant": 64 * 11}  # v in units of 64: 11, 22 and a spike, 11, 22 and a spike, ...
    alone = save_graph(SpikingGraph((Population("y", "lif", 2, bias),), (), ("y",)), tmp_path / "alone.graph.npz")
    assert command(alone, "--steps", 6, "--backend", backend, "--out", files[2]) == 0
    assert load_result(files[2]).spikes["y"][0, :, 0].tolist() == [0, 1, 0, 1, 0, 1]
    files[2].unlink()
    for words, message in (((), "give --steps N"), ((files[1], "--steps", 3), "leave the file out")):
        assert command(alone, *words, "--out", files[2]) == 2
        assert message in capsys.readouterr().err
    assert command(*files[:2], "--steps", 4, "--out", files[2]) == 0
    assert (load_result(files[2]).steps, load_result(files[2]).batch) == (4, 3)
    want = expected(files)
    assert torch.equal(load_result(files[2]).spikes["y"], want.spikes["y"][:, :4])


def test_an_older_result_stays_whole_when_a_run_fails(files):
    assert command(*files[:2], "--out", files[2]) == 0
    before = files[2].read_bytes()
    np.savez(files[1], x=np.zeros((1, 2, 9), dtype=int))
    assert command(*files[:2], "--out", files[2]) == 2
    assert files[2].read_bytes() == before


def test_a_write_that_breaks_off_leaves_nothing(files, monkeypatch):
    def broken(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", broken)
    assert command(*files[:2], "--out", files[2]) == 2
    nothing_written(files)


def test_results_that_cannot_be_read(files, tmp_path):
    assert command(*files[:2], "--out", files[2]) == 0
    with pytest.raises(ResultFileError, match=r"a result is named NAME\.npz"):
        save_result(load_result(files[2]), tmp_path / "out.json")
    with pytest.raises(ResultFileError, match="not a readable result"):
        load_result(files[1])
    with pytest.raises(InputError, match="array 'header' is unknown"):
        load_inputs(files[2], load_graph(files[0]))
    other_schema(files[2])
    with pytest.raises(ResultFileError, match="the result has schema 99, this version reads 1; simulate again"):
        load_result(files[2])
    truncated(files[2])
    with pytest.raises(ResultFileError, match="cut short"):
        load_result(files[2])
