"""Graded graphs as networks of Akida 2.0: equal to its documented layers, and to the makers' package where there is one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import neuro
from experiments.commands import place as place_command
from experiments.commands import verify as verify_command
from hardware import interpreters
from neuro.graph import GraphError, Population, Projection, SpikingGraph, save_graph
from neuro.graph.akida import akida_network
from neuro.graph.synapses import Convolution
from neuro.simulators.activity import compare
from neuro.simulators.akida import client, devices, process
from neuro.simulators.akida.alignment import ours, read, samples_of, with_constants
from neuro.simulators.inputs import InputError
from tests.environments import python_of
from tests.neuro.simulators import akida_networks as made

SEEDS = pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(40, 1000), marks=pytest.mark.soak)], ids=["40", "960"]
)


@SEEDS
def test_generated_networks_send_what_the_documented_layers_send(seeds: range) -> None:
    kinds: Counter[str] = Counter()
    different = values = 0
    for seed, graph, inputs, sent in made.jobs(seeds):
        network = akida_network(graph)
        documented = made.documented(network, samples_of(network, inputs).reshape(-1, *network.shape))
        for layer in network.layers:
            expected = read(layer, documented[layer.name]) if layer.last else documented[layer.name]
            found = sent.spikes[layer.name].flatten(0, 1).numpy()
            assert np.array_equal(found, expected), f"network {seed}, {layer.name}"
            kinds.update((layer.kind, layer.padding, f"{layer.weight_bits} bits", "relu" if layer.relu else "linear"))
            different += len(np.unique(found))
        values += len(network.layers)
    assert {"dense", "conv", "depthwise", "same", "same_upper", "valid", "4 bits", "8 bits", "linear"} <= kinds.keys()
    assert different > 20 * values  # neither silent nor at one end of its range


@SEEDS
def test_generated_networks_send_what_the_akida_package_sends(seeds: range) -> None:
    python = python_of(process.ENV_PYTHON, ".venv-akida", "akida")
    jobs = made.jobs(seeds)
    found_by_them = client.run_all([(graph, inputs) for _, graph, inputs, _ in jobs], python=python)
    for (seed, _, _, sent), theirs in zip(jobs, found_by_them, strict=True):
        found = compare(theirs, sent)
        assert found.equal, f"network {seed}: {found}"
        assert not found.skipped
        assert theirs.ran_on == "akida 2.19.3 (software)"


def perceptron(bias: bool = True) -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(20, 24, bias=bias), nn.ReLU(), nn.Linear(24, 6, bias=bias)), torch.randn(256, 20)


def pictures() -> tuple[nn.Module, torch.Tensor]:
    parts = [
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 5),
    ]
    return nn.Sequential(*parts).eval(), torch.rand(64, 2, 8, 8)


def lines() -> tuple[nn.Module, torch.Tensor]:
    parts = [nn.Conv1d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv1d(5, 4, 3, padding=2, dilation=2), nn.ReLU()]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(32, 4)).eval(), torch.rand(64, 3, 8)


FOR_AKIDA = {"hidden_bits": 6, "bias_bits": 8, "narrow": "neuron"}
TRAINED = {
    "perceptron": (perceptron, FOR_AKIDA),
    "four bits": (perceptron, {**FOR_AKIDA, "weight_bits": 4, "hidden_bits": 4}),
    "pictures": (pictures, FOR_AKIDA),
    "lines": (lines, FOR_AKIDA),
}


def converted(name: str) -> tuple[SpikingGraph, dict[str, torch.Tensor]]:
    """The one graph of a network, and its inputs for samples as its calibration saw."""
    torch.manual_seed(0)
    make, settings = TRAINED[name]
    model, example = make()
    report = neuro.analyse(model, example)
    plan = neuro.convert(model, neuro.calibrate(model, [example]), report, neuro.GradedConfig(**settings))
    (segment,) = plan.segments
    payloads = torch.round(example / segment.input_scale).clamp(-127, 127).to(torch.int64)
    flat = (payloads.permute(0, *range(example.dim() - 1, 0, -1)) if example.dim() > 2 else payloads).flatten(1)
    network = akida_network(segment.graph)
    inputs = {n: torch.zeros(1, len(example), segment.graph.population(n).size).long() for n in segment.graph.inputs}
    inputs[network.input][0, :, : flat.shape[1]] = flat
    return segment.graph, with_constants(network, inputs)


@pytest.mark.parametrize("name", TRAINED)
def test_converted_networks_fit_with_biases_and_few_bits(name: str) -> None:
    graph, inputs = converted(name)
    network = akida_network(graph)
    sent = ours(graph, network, inputs)
    documented = made.documented(network, samples_of(network, inputs).reshape(-1, *network.shape))
    for layer in network.layers:
        expected = read(layer, documented[layer.name]) if layer.last else documented[layer.name]
        assert np.array_equal(sent.spikes[layer.name].flatten(0, 1).numpy(), expected)
    assert any(layer.bias.any() for layer in network.layers[:-1])
    assert {layer.weight_bits for layer in network.layers} == {4 if name == "four bits" else 8}
    if name == "lines":
        assert [layer.weight.shape[:2] for layer in network.layers[:2]] == [(3, 3), (5, 5)]  # dilation written out


def test_converted_networks_send_what_the_akida_package_sends() -> None:
    python = python_of(process.ENV_PYTHON, ".venv-akida", "akida")
    jobs = [converted(name) for name in TRAINED]
    for (graph, inputs), theirs in zip(jobs, client.run_all(jobs, python=python), strict=True):
        found = compare(theirs, ours(graph, akida_network(graph), inputs))
        assert found.equal, str(found)


def wire(name: str, source: str, target: str, weight: Any, **more: Any) -> Projection:
    port = more.pop("port", "a_in")
    return Projection(name, source, target, port, np.array(weight), num_message_bits=16, **more)


def graph_of(*parts: Population | Projection, outputs: tuple[str, ...] = ("y",), **meta: Any) -> SpikingGraph:
    populations = tuple(p for p in parts if isinstance(p, Population))
    return SpikingGraph(populations, tuple(p for p in parts if isinstance(p, Projection)), outputs, meta)


X, Y = Population("x", "input", 2), Population("y", "graded", 2, {"vth": 0})
H = Population("h", "graded_relu", 2, {"vth": 0})
EYE = [[2, 0], [0, 2]]
PICTURE = Population("x", "input", 36)


def convolution(kernel: tuple[int, int] = (3, 3), **geometry: Any) -> SpikingGraph:
    conv = Convolution((6, 6, 1), **geometry)
    weight = np.ones((1, *kernel, 1), dtype=int)
    size = int(np.prod(conv.output_shape(weight.shape)))
    return graph_of(
        PICTURE, Population("y", "graded", size, {"vth": 0}), wire("c", "x", "y", weight, kind="conv", conv=conv)
    )


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (graph_of(X, Population("y", "lif", 2, {"du": 0, "dv": 0, "vth": 1}), wire("a", "x", "y", EYE)),
         r"'y' \(lif\) is no part of an Akida network, whose layers keep no state"),
        (graph_of(X, Population("y", "graded", 2, {"vth": [0, 3]}), wire("a", "x", "y", EYE)),
         "'y': vth is not 0; Akida has no event thresholds. Convert with drop_hidden=0"),
        (graph_of(X, H, Y, wire("a", "x", "h", EYE), wire("b", "x", "y", EYE), wire("c", "h", "y", EYE)),
         "'x' feeds h, y; .* branches and residual adds stay out"),
        (graph_of(X, H, Population("y", "product", 2, {"vth": 0, "exp": 1}), wire("a", "x", "h", EYE),
                  wire("b", "h", "y", EYE, port="a_in1"), wire("c", "h", "y", EYE, port="a_in2")),
         "'y' multiplies two messages; Akida has no such layer. Use ReLU in place of its square"),
        (graph_of(X, H, Y, wire("a", "x", "h", EYE), wire("b", "h", "y", EYE), outputs=("h",)),
         "the outputs are h; of a network of Akida the last population is read, 'y'"),
        (graph_of(X, Population("z", "input", 2), Y, wire("a", "x", "y", EYE), wire("b", "z", "y", EYE)),
         r"the graph has 2 inputs of samples \(x, z\)"),
        (graph_of(X, Y, wire("a", "x", "y", EYE, kind="delay_dense", delays=np.ones((2, 2), dtype=int))),
         r"'a' \(delay_dense\): Akida has no synaptic delays"),
        (graph_of(X, H, Y, wire("a", "x", "h", EYE), wire("b", "h", "y", [[255, 1], [1, 1]], sign_mode="excitatory")),
         "weight 255 is 255 after the factor that all weights share; Akida's weights have 8 bits, -128..127"),
        (graph_of(X, H, Population("l", "input", 1), Y, wire("a", "x", "h", EYE),
                  wire("k", "l", "h", [[2], [2]]), wire("b", "h", "y", EYE)),
         r"2 inputs of samples \(x, l\)"),
        (graph_of(X, H, Population("lines1001", "input", 1), Y, wire("a", "x", "h", EYE, weight_exp=-4),
                  wire("k", "lines1001", "h", [[2], [2]]), wire("b", "h", "y", EYE), constant_lines=[1001]),
         r"'h': channel 0 needs a bias of 16,012, .* 8 bits and a shift. Convert with GradedConfig\(bias_bits=8\)"),
        (graph_of(X, H, Population("lines3", "input", 1), Population("y", "product", 2, {"vth": 0, "exp": 1}),
                  wire("a", "x", "h", EYE), wire("b", "h", "y", EYE, port="a_in1"),
                  wire("k", "lines3", "y", [[2], [2]], port="a_in2"), constant_lines=[3]),
         "'y' multiplies by 6; of products Akida has only those by 1"),
        (convolution((2, 2)), "a kernel of 2 x 2 with stride 1, .* fits none of Akida's: 1 x 1, 3 x 3, 5 x 5, 7 x 7"),
        (convolution(stride=(3, 3)), r"its stride is \(3, 3\); Akida has 1 and 2"),
        (convolution((5, 5), stride=(2, 2), padding=(2, 2)), "stride 2, .* fits none of Akida's"),
        (graph_of(Population("x", "input", 40000), Population("y", "graded", 1, {"vth": 0}),
                  wire("a", "x", "y", np.full((1, 40000), 254) - 4 * (np.arange(40000) % 2))),
         "its sum can reach 645,120,000; Akida's sums have 28 bits"),
    ],
)  # fmt: skip
def test_what_akida_has_none_of_is_refused_with_the_remedy(graph: SpikingGraph, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        akida_network(graph)


def test_loops_and_residual_adds_are_refused_by_their_names() -> None:
    loop = graph_of(X, Y, wire("a", "x", "y", EYE), wire("b", "y", "y", EYE))
    with pytest.raises(GraphError, match="projection 'b' closes a loop"):
        akida_network(loop)
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.Conv2d(2, 2, 3, padding=1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.b(torch.relu(self.a(x))) + x)

    model, example = nn.Sequential(Block(), nn.Flatten(), nn.Linear(32, 3, bias=False)).eval(), torch.rand(8, 2, 4, 4)
    plan = neuro.convert(model, neuro.calibrate(model, [example]), neuro.analyse(model, example))
    with pytest.raises(GraphError, match="branches and residual adds stay out"):
        akida_network(plan.segments[0].graph)


def test_messages_inputs_and_constants_out_of_range_are_named_with_the_remedy() -> None:
    graph = graph_of(X, H, Y, wire("a", "x", "h", EYE), wire("b", "h", "y", EYE))
    network = akida_network(graph)
    with pytest.raises(InputError, match=r"'h' sends 128 at sample 0, step 1, neuron 1 \(1 of 4 values\); .* 0..127"):
        ours(graph, network, {"x": torch.tensor([[[0, 0], [7, 64]]])})
    assert ours(graph, network, {"x": torch.tensor([[[0, 0], [7, 63]]])}).spikes["y"][0].tolist() == [[0, 0], [28, 252]]
    with pytest.raises(InputError, match=r"'x' sends 200 .* Akida's inputs have 8 bits, -128..127. Scale the input down"):
        client.run(graph, {"x": [[[200, 0]]]}, python=Path("/none"))
    graph, inputs = converted("pictures")
    name = next(n for n in graph.inputs if n.startswith("lines"))
    with pytest.raises(InputError, match=rf"'{name}' is 0 at sample 0, step 0, neuron 0, which holds the constant"):
        client.run(graph, {**inputs, name: torch.zeros_like(inputs[name])}, python=Path("/none"))
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)]
    model, example = nn.Sequential(*parts).eval(), torch.rand(8, 1, 4, 4)
    settings = neuro.GradedConfig(**FOR_AKIDA)
    plan = neuro.convert(model, neuro.calibrate(model, [example]), neuro.analyse(model, example), settings)
    pooled = plan.segments[0].graph
    network = akida_network(pooled)
    inputs = {n: torch.randint(-127, 128, (1, 9, pooled.population(n).size)) for n in pooled.inputs}
    with pytest.raises(InputError, match=r"A pooling of whole sums .* use a convolution with a stride in its place"):
        ours(pooled, network, with_constants(network, inputs))


def test_the_constants_of_a_sample_are_there_from_the_first_one() -> None:
    graph, inputs = converted("perceptron")
    network = akida_network(graph)
    assert network.warm_up > 0
    whole = ours(graph, network, inputs)
    later = ours(graph, network, {name: value[:, 5:9] for name, value in inputs.items()})
    for layer in network.layers:
        assert torch.equal(later.spikes[layer.name], whole.spikes[layer.name][:, 5:9])


def test_a_missing_slow_or_dying_package_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(text: str) -> Path:
        path = tmp_path / f"python{len(list(tmp_path.iterdir()))}"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    job = (graph_of(X, Y, wire("a", "x", "y", EYE)), {"x": [[[1, 0]]]})
    monkeypatch.setenv(process.ENV_PYTHON, str(tmp_path / "none"))
    with pytest.raises(process.AkidaUnavailable, match=r"which is no program; read the licence .* `make akida`"):
        client.run(*job)
    monkeypatch.delenv(process.ENV_PYTHON)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interpreters, "__file__", str(tmp_path / "hardware" / "interpreters.py"))
    with pytest.raises(process.AkidaUnavailable, match="no akida environment at"):
        devices.map_on(job[0])
    with pytest.raises(process.AkidaTimeout, match=r"still at work after 0.2 s"):
        client.run(*job, python=script("exec sleep 20"), timeout_s=0.2)
    with pytest.raises(process.AkidaError, match="ended by SIGSEGV; it wrote: half a sentence"):
        client.run(*job, python=script("echo half a sentence >&2; kill -SEGV $$"))
    with pytest.raises(process.AkidaError, match="exit code 3: the last line"):
        client.run(*job, python=script("echo one >&2; echo the last line >&2; exit 3"))
    with pytest.raises(process.AkidaUnavailable, match="has no akida; if you accept the licence"):
        client.run(*job, python=script("echo \"ModuleNotFoundError: No module named 'akida'\" >&2; exit 1"))
    with pytest.raises(process.AkidaError, match="gave no answer that can be read; it wrote: hello"):
        client.run(*job, python=script("echo hello"))
    answer = json.dumps({"akida": "2", "jobs": [{"refused": "no such layer"}]})
    with pytest.raises(process.AkidaRefused, match="takes no such network: no such layer"):
        client.run(*job, python=script(f"echo '{answer}'"))
    with pytest.raises(process.AkidaUnavailable, match="could not be started"):
        client.run(*job, python=tmp_path)


def test_mappings_are_read_from_the_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    found = {
        "SixNodesIPv2": {"version": "v", "program_bytes": 1234, "passes": 1, "layers": [{"A": 2}, {"A": 1, "B": 1}]},
        "TwoNodesIPv2": {"refused": "Cannot map layer 'layer1'.\n  too large"},
    }
    answer = tmp_path / "answer"
    answer.write_text(json.dumps({"akida": "2.19.3", "jobs": [{"devices": found}]}))
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat {answer}\n")
    python.chmod(0o755)
    graph = graph_of(X, H, Y, wire("a", "x", "h", EYE), wire("b", "h", "y", EYE))
    mapped, version = devices.map_on(graph, ["akida_six_nodes", "akida_two_nodes"], python=python)
    assert version == "2.19.3"
    assert (mapped[0].nodes, mapped[0].program_bytes) == (4, 1234)
    assert mapped[0].layers == {"h": {"A": 2}, "y": {"A": 1, "B": 1}}
    assert str(mapped[0]).endswith("fits, 4 nodes, program of 1,234 bytes, 1 pass (h: 2 A; y: 1 A + 1 B)")
    assert mapped[1].refused == "Cannot map layer 'y'. too large"
    monkeypatch.setenv(process.ENV_PYTHON, str(python))
    path = save_graph(graph, tmp_path / "net.graph.npz")
    assert place_command.main([str(path), "--chip", "akida_two_nodes", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["devices"]["akida_two_nodes"]["fits"] is False
    assert place_command.main([str(path), "--chip", "akida_two_nodes"]) == 1
    assert "\n  akida_two_nodes: does not fit: Cannot map layer 'y'. too large\n" in capsys.readouterr().out
    assert place_command.main([str(path), "--chip", "akida_six_nodes", "--chips", "2"]) == 2
    assert "--chips goes with chips of cores" in capsys.readouterr().err


def test_the_commands_refuse_and_fail_with_their_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save_graph(graph_of(X, H, Y, wire("a", "x", "h", EYE), wire("b", "h", "y", EYE)), tmp_path / "good.graph.npz")
    lif = graph_of(X, Population("y", "lif", 2, {"du": 0, "dv": 0, "vth": 1}), wire("a", "x", "y", EYE))
    other = save_graph(lif, tmp_path / "lif.graph.npz")
    for main in (place_command.main, verify_command.main):
        assert main([str(other), "--chip", "akida"]) == 2
        assert "'y' (lif) is no part of an Akida network" in capsys.readouterr().err
    assert place_command.main([str(good), "--chip", "akd1000"]) == 2
    assert "akd1000: a chip of Akida 1.0, whose layers send 4 bits without a sign" in capsys.readouterr().err
    monkeypatch.setenv(process.ENV_PYTHON, str(tmp_path / "none"))
    for main in (place_command.main, verify_command.main):
        assert main([str(good), "--chip", "akida"]) == 1
        assert "which is no program; read the licence of the akida package" in capsys.readouterr().err


def test_the_commands_place_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python_of(process.ENV_PYTHON, ".venv-akida", "akida")
    graph, inputs = converted("pictures")
    path = save_graph(graph, tmp_path / "net.graph.npz")
    np.savez(tmp_path / "input.npz", **{name: value.numpy() for name, value in inputs.items()})
    assert verify_command.main([str(path), str(tmp_path / "input.npz"), "--chip", "akida", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["graphs"]["net"]
    assert found["equal"]
    assert found["expected"] == "akida 2.19.3 (software)"
    assert verify_command.main([str(path), "--chip", "akida", "--steps", "4"]) == 0  # made-up samples
    capsys.readouterr()
    assert place_command.main([str(path), "--chip", "akida", "--json"]) == 0
    placed = json.loads(capsys.readouterr().out.splitlines()[-1])["devices"]
    assert placed.keys() == devices.DEVICES.keys()
    for one in placed.values():
        assert one["fits"]
        assert one["nodes"] == sum(sum(parts.values()) for parts in one["layers"].values()) >= len(one["layers"]) == 4
        assert one["program_bytes"] > 0
