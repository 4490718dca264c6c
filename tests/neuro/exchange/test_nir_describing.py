"""NIR graphs in real numbers: every layer's spikes and values equal a run of the nodes by their definitions."""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from neuro.conversion.spiking.description import Description, NotConvertible, run_float
from neuro.exchange.nir import NotInNir
from neuro.exchange.nir.describing import describe
from neuro.exchange.nir.linear_maps import count
from neuro.exchange.nir.ports import Described
from tests.published import published

nir = pytest.importorskip("nir")
reference = import_module("tests.neuro.exchange.nir_reference")
made_ = import_module("tests.neuro.exchange.nir_made")
DT_S = made_.DT_S
STEPS = 25
PUBLISHED = ("cnn_sinabs", "lif_norse", "braille_noDelay_bias_zero", "braille_noDelay_noBias_subtract")
POOLS = [(2, 2, 0), (3, 3, 0), (3, 2, 0), (3, 2, 1), (2, 1, 1), (1, 2, 0)]


def compared(graph: Any, x: np.ndarray, reset: str = "zero") -> tuple[Described, dict[str, int]]:
    """Checks every Output of one sample (T, *shape) against the definitions; spikes of each."""
    described = describe(graph, DT_S, reset=reset)
    flat = described.input.arranged(torch.from_numpy(x))[None]
    run = run_float(described.description, flat)
    expected = reference.run(graph, x, reset=reset)
    assert {port.name for port in described.outputs} == set(expected)
    sent = {}
    for port in described.outputs:
        layer = described.description.layer(port.layer)
        values = run.potentials if layer.is_readout else run.spikes
        ours = port.restored(values[port.layer][0]).reshape(len(x), -1).numpy()
        np.testing.assert_allclose(ours, expected[port.name], atol=1e-9, err_msg=port.name)
        sent[port.name] = int(np.count_nonzero(expected[port.name]))
    return described, sent


def spikes(rng: np.random.Generator, shape: tuple[int, ...], rate: float = 0.3) -> np.ndarray:
    return (rng.random((STEPS, *shape)) < rate).astype(np.float64)


def synapses_between(description: Description, source: str, target: str) -> list[Any]:
    return [item for item in description.synapses if (item.source, item.target) == (source, target)]


@pytest.mark.parametrize("seed", range(12))
def test_grids_stay_convolutions(seed):
    """Convolution, neurons, pool and convolution, neurons, Flatten and matrix, with whatever geometry."""
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(1, 3))
    shape = (2, int(rng.integers(5, 9)), int(rng.integers(5, 9)))
    first = made_.conv(rng, shape, 4, groups=groups)
    between = made_.conv_shape(first, shape)
    kind = ["LIF", "IF", "CubaLIF"][seed % 3]
    pooled = made_.pool(["SumPool2d", "AvgPool2d"][seed % 2], 2) if min(between[1:]) > 1 else made_.pool("SumPool2d", 1)
    small = made_.conv_shape(pooled, between)
    second = made_.conv(rng, small, 4, padding=(1, 1), dilation=(1, 1), kernel=(2, 2), groups=int(rng.integers(1, 3)))
    last = made_.conv_shape(second, small)
    scaled = nir.Scale(np.broadcast_to(rng.uniform(0.5, 2, (4, 1, 1)), last).copy())
    flat = nir.Flatten({"input": np.array(last)}, start_dim=0, end_dim=-1)
    dense = nir.Affine(rng.normal(0.1, 0.4, (5, int(np.prod(last)))), rng.normal(0, 0.1, 5))
    if kind == "CubaLIF":
        first.bias[:] = 0
    edges, nodes = made_.chain(
        ("c1", first),
        ("n1", made_.neurons(kind, rng, between, v_threshold=0.3)),
        ("pool", pooled),
        ("c2", second),
        ("scale", scaled),
        ("n2", made_.neurons("LIF", rng, last, v_threshold=0.2)),
        ("flat", flat),
        ("fc", dense),
        ("n3", made_.neurons("CubaLIF", rng, (5,), v_threshold=0.2)),
    )
    described, sent = compared(made_.graph(edges, shape, **nodes), spikes(rng, shape))
    assert min(sent.values()) > 0
    (one,) = synapses_between(described.description, "x", "n1")
    (two,) = synapses_between(described.description, "n1", "n2")
    (three,) = synapses_between(described.description, "n2", "n3")
    assert one.conv is not None
    assert one.conv.groups == groups
    assert two.conv is not None or between[1] % 2 or between[2] % 2  # a pool that leaves a row out, and padding behind it
    assert three.conv is None


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 1), (2, 2)])
def test_padding_by_name(padding, kernel):
    rng = np.random.default_rng(1)
    node = nir.Conv2d((5, 6), rng.normal(0.2, 0.5, (3, 2, *kernel)), (1, 1), padding, (1, 1), 1, np.zeros(3))
    shape = made_.conv_shape(node, (2, 5, 6))
    edges, nodes = made_.chain(("c", node), ("n", made_.neurons("LIF", rng, shape)))
    described, sent = compared(made_.graph(edges, (2, 5, 6), **nodes), spikes(rng, (2, 5, 6)))
    assert sent["out_n"] > 10
    (way,) = described.description.synapses
    assert (way.conv is not None) == (padding == "valid" or kernel == (3, 1))  # an even kernel pads one end more


def test_a_convolution_along_one_axis():
    rng = np.random.default_rng(2)
    node = nir.Conv1d(9, rng.normal(0.2, 0.5, (4, 3, 3)), 2, 1, 1, 1, rng.normal(0, 0.1, 4))
    edges, nodes = made_.chain(("c", node), ("n", made_.neurons("LIF", rng, (4, 5))))
    described, sent = compared(made_.graph(edges, (3, 9), **nodes), spikes(rng, (3, 9)))
    assert sent["out_n"] > 10
    (way,) = described.description.synapses
    assert way.conv.input_shape == (9, 1, 3)
    assert way.weight.shape == (4, 3, 1, 3)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(2, 2, 0), (3, 3, 0), (3, 2, 0), (3, 2, 1), (2, 1, 1), (1, 2, 0)]
)
def test_a_pool_folds_into_the_kernel_behind_it_where_that_is_exact(kernel, stride, padding):
    rng = np.random.default_rng(kernel)
    for side, pad, dilation in itertools.product((6, 7, 9), (0, 1), (1, 2)):
        shape = (2, side, side)
        pooled = made_.pool("SumPool2d", kernel, stride, padding)
        small = made_.conv_shape(pooled, shape)
        if min(small[1:]) + 2 * pad < 1 + dilation:
            continue
        node = made_.conv(rng, small, 3, kernel=(2, 2), stride=(1, 1), padding=(pad, pad), dilation=(dilation, dilation))
        edges, nodes = made_.chain(
            ("pool", pooled), ("c", node), ("n", made_.neurons("IF", rng, made_.conv_shape(node, small)))
        )
        described, sent = compared(made_.graph(edges, shape, **nodes), spikes(rng, shape, 0.1))
        assert sent["out_n"] > 0
        if not pad:
            assert described.description.synapses[0].conv is not None


def test_two_convolutions_without_neurons_between_are_one():
    rng = np.random.default_rng(5)
    shape = (2, 8, 7)
    first = made_.conv(rng, shape, 4, padding=(0, 0), groups=2)
    between = made_.conv_shape(first, shape)
    second = made_.conv(rng, between, 3, padding=(0, 0), dilation=(1, 1), stride=(1, 2), kernel=(2, 1))
    edges, nodes = made_.chain(
        ("a", first), ("b", second), ("n", made_.neurons("LIF", rng, made_.conv_shape(second, between)))
    )
    described, sent = compared(made_.graph(edges, shape, **nodes), spikes(rng, shape))
    assert sent["out_n"] > 10
    assert described.description.synapses[0].conv is not None


def test_branches_that_meet_again():
    """A residual add before neurons, one before a matrix whose bias counts once, and the input past a layer."""
    rng = np.random.default_rng(6)
    shape = (3, 4, 4)
    nodes = {
        "c1": made_.conv(rng, shape, 3, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)),
        "n1": made_.neurons("LIF", rng, shape),
        "c2": made_.conv(rng, shape, 3, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)),
        "n2": made_.neurons("IF", rng, shape),
        "flat": nir.Flatten({"input": np.array(shape)}, start_dim=0, end_dim=-1),
        "fc": nir.Affine(rng.normal(0.05, 0.3, (4, 48)), rng.normal(0.3, 0.1, 4)),
        "n3": made_.neurons("LIF", rng, (4,)),
    }
    edges = [("input", "c1"), ("c1", "n1"), ("n1", "c2"), ("c2", "n2"), ("n1", "n2"), ("n2", "flat"), ("n1", "flat")]
    described, sent = compared(made_.graph([*edges, ("flat", "fc"), ("fc", "n3")], shape, **nodes), spikes(rng, shape))
    assert min(sent.values()) > 0
    through, past = synapses_between(described.description, "n1", "n2")
    assert {through.conv.groups, past.conv.groups} == {1, 3}
    assert len(synapses_between(described.description, "n1", "n3")) == 1


@pytest.mark.parametrize("reset", ["zero", "subtract"])
@pytest.mark.parametrize("kind", ["LIF", "CubaLIF", "IF"])
def test_loops_biases_leaks_and_resets(kind, reset):
    rng = np.random.default_rng(7)
    more = {} if kind == "IF" else {"v_leak": -0.2, "v_reset": -0.3}
    nodes = {
        "fc": nir.Affine(rng.normal(0.3, 0.5, (6, 4)), rng.normal(0, 0.2, 6)),
        "n": made_.neurons(kind, rng, (6,), **more),
        "rec": nir.Affine(rng.normal(0, 0.4, (6, 6)), rng.normal(0, 0.2, 6)),
        "out": nir.Linear(rng.normal(0.3, 0.6, (3, 6))),
        "m": made_.neurons("CubaLIF", rng, (3,)),
    }
    edges = [("input", "fc"), ("fc", "n"), ("n", "rec"), ("rec", "n"), ("n", "out"), ("out", "m")]
    described, sent = compared(made_.graph(edges, (4,), **nodes), spikes(rng, (4,)), reset)
    assert min(sent.values()) > 5
    assert described.description.depths()["n"] == 1
    assert bool(described.starts) == (kind != "IF")
    assert described.description.layer("n").reset == reset
    current = described.description.layer("n").current_bias
    assert current.any() == (kind == "CubaLIF")  # a current that forgets over steps has a bias of its own


@pytest.mark.parametrize("kind", ["LI", "CubaLI", "I"])
def test_values_are_results_or_a_threshold_makes_spikes_of_them(kind):
    rng = np.random.default_rng(8)
    nodes = {
        "fc": nir.Linear(rng.normal(0.3, 0.5, (6, 4))),
        "n": made_.neurons("LIF", rng, (6,)),
        "value": made_.neurons(kind, rng, (6,)),
        "more": made_.neurons(kind, rng, (6,)),
        "above": made_.neurons("Threshold", rng, (6,)),
        "bare": made_.neurons("Threshold", rng, (6,), v_threshold=0.2),
    }
    edges = [("input", "fc"), ("fc", "n"), ("n", "value"), ("n", "more"), ("more", "above"), ("fc", "bare")]
    described, sent = compared(made_.graph(edges, (4,), **nodes), spikes(rng, (4,)))
    assert min(sent.values()) > 5
    layers = {layer.name: layer for layer in described.description.neurons}
    assert set(layers) == {"n", "value", "above", "bare"}
    assert layers["value"].is_readout
    assert layers["above"].reset == "none"


def test_weights_behind_the_last_neurons_are_a_result_without_memory():
    rng = np.random.default_rng(9)
    edges, nodes = made_.chain(
        ("fc", nir.Linear(rng.normal(0.3, 0.5, (6, 4)))),
        ("n", made_.neurons("LIF", rng, (6,))),
        ("tail", nir.Affine(rng.normal(0, 1, (3, 6)), rng.normal(0, 1, 3))),
    )
    whole = made_.graph(edges, (4,), **nodes)
    whole.nodes["result"] = nir.Output({"output": np.array([3])})
    whole.edges.append(("tail", "result"))
    described, sent = compared(whole, spikes(rng, (4,)))
    assert sent["result"] == 3 * STEPS
    assert described.description.layer("result").is_readout


def test_neurons_behind_a_flatten_keep_the_grid_that_it_flattens():
    rng = np.random.default_rng(10)
    shape = (2, 5, 4)
    node = made_.conv(rng, shape, 3, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    edges, nodes = made_.chain(
        ("c", node),
        ("flat", nir.Flatten({"input": np.array([3, 5, 4])}, start_dim=0, end_dim=-1)),
        ("n", made_.neurons("LIF", rng, (60,))),
        ("fc", nir.Linear(rng.normal(0.1, 0.3, (4, 60)))),
        ("m", made_.neurons("LIF", rng, (4,))),
    )
    described, sent = compared(made_.graph(edges, shape, **nodes), spikes(rng, shape))
    assert min(sent.values()) > 0
    assert described.description.synapses[0].conv is not None


def test_a_delay_of_the_loops_own_step_is_no_delay():
    rng = np.random.default_rng(11)
    nodes = {
        "fc": nir.Linear(rng.normal(0.3, 0.5, (6, 4))),
        "n": made_.neurons("LIF", rng, (6,)),
        "rec": nir.Linear(rng.normal(0, 0.4, (6, 6))),
        "d": nir.Delay(np.full(6, DT_S)),
        "same": nir.ir.graph.Identity({"input": np.array([6])}),
    }
    edges = [("input", "fc"), ("fc", "n"), ("n", "rec"), ("rec", "d"), ("d", "same"), ("same", "n")]
    _, sent = compared(made_.graph(edges, (4,), **nodes), spikes(rng, (4,)))
    assert sent["out_n"] > 5


def wired(edges: list[tuple[str, str]], shape: tuple[int, ...] = (4,), **nodes: Any) -> Any:
    rng = np.random.default_rng(0)
    given = {
        "fc": nir.Linear(np.ones((6, 4))),
        "n": made_.neurons("LIF", rng, (6,)),
        "w": nir.Linear(np.ones((6, 6))),
        "m": made_.neurons("LIF", rng, (6,)),
        **nodes,
    }
    used = {name for edge in edges for name in edge}
    return made_.graph(edges, shape, **{name: node for name, node in given.items() if name in used})


def _kernel(size: int) -> Any:
    return nir.Conv2d((3, 3), np.ones((2, 1, size, size)), 1, 0, 1, 1, np.zeros(2))


IN = [("input", "fc"), ("fc", "n")]
REFUSED = {
    "loop over two": (
        lambda: wired([*IN, ("n", "w"), ("w", "m"), ("m", "n")]),
        r"layers 'n', 'm': they form a loop .* join the layers",
    ),
    "loop without neurons": (
        lambda: wired([*IN, ("w", "w"), ("w", "n")]),
        r"node 'w' \(Linear\) is at a loop without neurons.* Put neurons",
    ),
    "delay": (
        lambda: wired([*IN, ("n", "d"), ("d", "m")], d=nir.Delay(np.full(6, 3 * DT_S))),
        r"node 'd' \(Delay\): 3 steps between 'n' and 'm'; .* Take it out",
    ),
    "delay between steps": (
        lambda: wired([*IN, ("n", "d"), ("d", "m")], d=nir.Delay(np.full(6, 1.5 * DT_S))),
        r"node 'd' \(Delay\): 0.00015 to 0.00015 s are no whole number of steps",
    ),
    "value that feeds": (
        lambda: wired([*IN, ("n", "li"), ("li", "m")], li=made_.neurons("LI", np.random.default_rng(0), (6,))),
        r"node 'li' \(LI\): its value, which is no spike, feeds node 'm' \(LIF\)\. Put a Threshold behind it",
    ),
    "kernel larger than the input": (
        lambda: wired([("input", "c"), ("c", "n")], (1, 3, 3), c=_kernel(5)),
        r"node 'c' \(Conv2d\): its kernel reaches over 5 positions of axis 0, and its padded input has 3",
    ),
    "channels": (
        lambda: wired([("input", "c"), ("c", "n")], (2, 3, 3), c=_kernel(2)),
        r"node 'c' \(Conv2d\) does not fit what reaches it, \(2, 3, 3\): .* takes 1 channels",
    ),
    "flat input of a convolution": (
        lambda: wired([("input", "c"), ("c", "n")], (9,), c=_kernel(2)),
        r"node 'c' \(Conv2d\) does not fit what reaches it, \(9,\): \(channels, x, y\) is needed",
    ),
    "nowhere": (lambda: wired([*IN, ("n", "w")]), r"node 'w' \(Linear\) is not on the way"),
    "shapes": (
        lambda: wired([*IN, ("n", "v"), ("v", "m"), ("n", "m")], v=nir.Linear(np.ones((5, 6)))),
        r"node 'm' \(LIF\): what reaches it has different shapes: .*\(5,\) from 'v'",
    ),
    "half a stride": (
        lambda: wired(
            [("input", "p"), ("p", "n")],
            (1, 3, 3),
            p=nir.SumPool2d(np.array([1.5, 1]), np.array([1, 1]), np.array([0, 0])),
        ),
        r"node 'p' \(SumPool2d\): kernel_size is 1.5; a whole number from 1",
    ),
    "threshold at the reset": (
        lambda: wired(IN, n=made_.neurons("LIF", np.random.default_rng(0), (6,), v_reset=1.0)),
        r"node 'n' \(LIF\): v_threshold is 1, not above the 1 that a neuron starts from",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_counterpart_is_named(case):
    make, message = REFUSED[case]
    with pytest.raises((NotInNir, NotConvertible), match=message):
        describe(make(), DT_S)


def test_the_published_network_stays_small():
    """Five layers with 1,122,848 connections where the folded matrices had 28,477,952 weights."""
    described = describe(nir.read(published("nir_paper/cnn_sinabs.nir"), type_check=False), DT_S)
    description = described.description
    found = {
        (item.source, item.target): item.weight.size if item.conv is None else count(item.weight.shape, item.conv)
        for item in description.synapses
    }
    assert found == {
        ("x", "1"): 199_712,
        ("1", "3"): 541_696,
        ("3", "6"): 247_808,
        ("6", "10"): 131_072,
        ("10", "12"): 2_560,
    }
    assert described.input.shape == (2, 34, 34)
    assert description.input_shape == (34, 34, 2)


@pytest.mark.parametrize(
    "name", ["braille_noDelay_bias_zero", "braille_noDelay_noBias_subtract", "cnn_sinabs", "lif_norse"]
)
def test_the_published_networks_run_as_their_nodes_say(name):
    graph = nir.read(published(f"nir_paper/{name}.nir"), type_check=False)
    shape = tuple(int(n) for n in graph.nodes["input"].input_type["input"])
    rng = np.random.default_rng(3)
    x = (rng.random((20 if name == "cnn_sinabs" else 200, *shape)) < 0.15).astype(np.float64)
    _, sent = compared(graph, x, "subtract" if "subtract" in name else "zero")
    assert sent["output"] > 0
