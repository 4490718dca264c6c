"""Building blocks and the language model on the chip: scans against snnTorch, graphs against the model on its grid."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hardware.placement import place
from neuro.graph import identical, load_graph, save_graph
from neuro.graph.demand import layer_demands
from neuro.language import (
    GatedMixer,
    GradedMLP,
    LanguageConfig,
    ShortConvolution,
    SpikingLanguageModel,
    SpikingMixer,
    SpikingMLP,
    use_grid,
)
from neuro.language.conversion import (
    DeployedLanguageModel,
    NotConvertible,
    StreamNetwork,
    convert_blocks,
    convert_language,
)
from neuro.language.grid import EVENT_BITS, EventGate, GridLinear, floor_to, range_penalty, round_to
from neuro.language.scan import gated_scan, lif_scan
from neuro.modules.spiking import SpikingLayer, leaky
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava.client import LavaWorker, compare

BLOCKS = {
    "spiking_mlp": lambda threshold: SpikingMLP(6, 12, betas=(0.5, 0.9), event_threshold=threshold),
    "spiking_mixer": lambda threshold: SpikingMixer(6, 8, taps=3, event_threshold=threshold),
    "graded_mlp": lambda threshold: GradedMLP(6, 10, event_threshold=threshold),
    "graded_mlp_relu": lambda threshold: GradedMLP(6, 10, squared=False, event_threshold=threshold),
    "gated_mixer": lambda threshold: GatedMixer(6, 7, event_threshold=threshold),
    "gated_mixer_without_taps": lambda threshold: GatedMixer(6, 7, taps=1, event_threshold=threshold),
}


def shaken(module: nn.Module, seed: int, size: float = 0.2) -> nn.Module:
    """The module in float64 with every weight moved, biases and zeros too."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() > 0:
                p.add_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def random_model(neurons: str, seed: int = 0, threshold: float = 0.0) -> SpikingLanguageModel:
    torch.manual_seed(seed)
    model = SpikingLanguageModel(LanguageConfig(20, 12, 2, neurons=neurons, event_threshold=threshold))
    shaken(model, seed, 0.1)
    model.on_chip_grid(True)
    return model.eval()


@pytest.mark.parametrize("beta", [0.0, 0.7, 1.0])
def test_the_scan_is_snntorch_stepped_spikes_and_gradients(beta):
    """`SpikingLayer` steps snntorch.Leaky; the scan must give its spikes, and its gradients through the resets."""
    torch.manual_seed(1)
    layer = SpikingLayer(5, 9, beta=beta, learn_beta=True).double()
    layer.linear.weight.data.mul_(4)
    x = torch.randn(3, 25, 5, dtype=torch.float64)
    weight = torch.randn(3, 25, 9, dtype=torch.float64)
    spikes, _ = layer(x)
    (spikes * weight).sum().backward()
    stepped = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    scanned = lif_scan(layer.linear(x), layer.neuron.beta.double().clamp(0, 1).expand(9))
    (scanned * weight).sum().backward()
    assert 0.05 < spikes.mean() < 0.95
    assert torch.equal(scanned, spikes)
    for name, p in layer.named_parameters():
        assert torch.allclose(p.grad, stepped[name], rtol=1e-5, atol=1e-6), name  # snnTorch's surrogate is float32 in parts


def test_the_gated_scan_is_its_recurrence_for_autograd():
    generator = torch.Generator().manual_seed(0)
    keep, drive, weight = (torch.rand(2, 9, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    results = []
    for scan in (gated_scan, _stepped):
        a, b = keep.clone().requires_grad_(), drive.clone().requires_grad_()
        state = scan(a, b)
        (state * weight).sum().backward()
        results.append((state, a.grad, b.grad))
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-12)


def _stepped(keep: torch.Tensor, drive: torch.Tensor) -> torch.Tensor:
    state, found = torch.zeros_like(drive[:, 0]), []
    for t in range(drive.shape[1]):
        state = keep[:, t] * (state + drive[:, t])
        found.append(state)
    return torch.stack(found, dim=1)


@given(st.floats(-100, 100), st.integers(0, 12))
def test_rounding_keeps_to_the_grid_and_passes_gradients(value, bits):
    x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    for rounding, low, high in ((floor_to, -1.0, 0.0), (round_to, -0.5, 0.5)):
        y = rounding(x, bits)
        assert y.item() * 2**bits == round(y.item() * 2**bits)
        assert low <= (y.item() - value) * 2**bits <= high
        assert torch.autograd.grad(y, x)[0] == 1


@settings(max_examples=30)
@given(st.floats(1e-3, 100), st.sampled_from([(8, 12), (8, 10), (10, 12), (0, 12)]))
def test_weights_are_even_8_bit_and_as_fine_as_the_exponents_allow(size, bits):
    layer = GridLinear(5, 4, bits_in=bits[0], bits_out=bits[1]).double()
    with torch.no_grad():
        layer.weight.mul_(size / layer.weight.abs().max())
    layer.fit_grid()
    weight, exponent, bias, bias_exponent = layer.integers()
    assert -7 <= exponent <= 7
    assert -7 <= bias_exponent <= 7
    assert bias is not None
    assert int(weight.abs().max()) <= 254
    assert not (weight % 2).any()
    step = 2.0 ** (exponent - bits[1] + bits[0])  # value of one unit of a weight
    reach = 254 * step
    if size <= reach:
        assert torch.all((weight.double() * step - layer.weight).abs() <= step * (1 + 1e-9))
    assert reach < 2 * size * 254 / 127 or exponent == -7  # no finer grid reaches the largest weight


@pytest.mark.parametrize("threshold", [0.0, 0.25])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("seed", range(3))
def test_a_block_on_its_own_is_its_graph_value_for_value(block, seed, threshold):
    torch.manual_seed(seed)
    module = shaken(BLOCKS[block](threshold), seed).eval()
    use_grid(module, True)
    network = convert_blocks([("only", module)], 6)
    stream = round_to(torch.randn(3, 20, 6, dtype=torch.float64), 12)
    with torch.no_grad():
        expected = stream + module(stream)
    activity = simulate(network.graph, network.inputs(stream), strict=True)
    assert torch.equal(network.collect(activity), expected)
    assert not torch.equal(expected, stream)


@pytest.mark.parametrize("neurons", ["graded", "lif"])
@pytest.mark.parametrize("seed", range(2))
def test_the_deployed_model_has_the_logits_of_the_model_on_its_grid(neurons, seed):
    model = random_model(neurons, seed, threshold=0.1)
    tokens = torch.randint(0, 20, (3, 24), generator=torch.Generator().manual_seed(seed))
    deployed = DeployedLanguageModel(model)
    with torch.no_grad():
        expected = model(tokens)
        assert torch.equal(deployed(tokens), expected)
        model.on_chip_grid(False)
        assert not torch.equal(model(tokens), expected)  # the grid is there, and not for nothing
    assert deployed.health == {"wraps": 0, "wide": 0, "payload_overflows": 0}


def test_the_float_model_is_close_to_the_grid_where_weights_are_on_it():
    """Only roundings of values are left: 2^-8 in events, which a linear readout of a few hundred of them keeps small."""
    torch.manual_seed(0)
    block = shaken(GatedMixer(16, 16), 0)
    use_grid(block, True)
    with torch.no_grad():
        for part in block.modules():
            if isinstance(part, GridLinear):
                weight, exp, bias, bias_exp = part.integers()
                part.weight.copy_(weight * 2.0 ** (exp - part.bits_out + part.bits_in))
                if bias is not None and part.bias is not None:
                    part.bias.copy_(bias * 2.0 ** (bias_exp - part.bits_out + EVENT_BITS))
            if isinstance(part, ShortConvolution):
                weight, exp = part.integers()
                part.taps_KD.copy_(weight * 2.0**exp)
        x = round_to(torch.randn(2, 40, 16, dtype=torch.float64), 12)
        on = block(x)
        use_grid(block, False)
        off = block(x)
    assert off.abs().mean() > 0.1
    assert (on - off).abs().mean() < 0.03 * off.abs().mean()


@pytest.mark.parametrize("neurons", ["graded", "lif"])
def test_no_token_sees_a_later_one_and_silence_stays_silent(neurons):
    model = random_model(neurons)
    tokens = torch.randint(0, 20, (1, 30), generator=torch.Generator().manual_seed(3))
    other = tokens.clone()
    other[0, 20:] = (other[0, 20:] + 1) % 20
    with torch.no_grad():
        first, second = model(tokens), model(other)
    assert torch.equal(first[:, :20], second[:, :20])
    assert not torch.equal(first[:, 20:], second[:, 20:])
    network = convert_language(model)
    nothing = {"x": torch.zeros(1, 15, 13, dtype=torch.int32)}
    activity = simulate(network.graph, nothing, record=("spikes",))
    assert not any(bool(spikes.any()) for spikes in activity.spikes.values())  # biases wait for the line of 1.0


@pytest.mark.parametrize("neurons", ["graded", "lif"])
def test_a_few_steps_of_training_on_the_grid_lower_the_loss(neurons):
    torch.manual_seed(0)
    model = SpikingLanguageModel(LanguageConfig(10, 16, 1, neurons=neurons))
    tokens = torch.arange(21).remainder(10).expand(8, -1)  # the next token is the last one plus 1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(45):
        model.on_chip_grid(step >= 20)
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + range_penalty(model)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < 0.5 * losses[20] < 1.2
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_penalty_is_the_mean_square_beyond_the_limit():
    gate = EventGate()
    gate.watch((torch.tensor([1.0, -6.0, 3.0]), 2.0), (torch.tensor([1.0]), 2.0))
    assert float(range_penalty(nn.Sequential(gate))) == pytest.approx((2.0**2 + 0.5**2) / 3)
    gate.eval()
    gate.watch((torch.tensor([100.0]), 2.0))
    assert float(range_penalty(gate)) == pytest.approx((2.0**2 + 0.5**2) / 3)  # of the last pass in training


def test_counts_cover_every_synapse_and_event_thresholds_save_some():
    model, tokens = random_model("graded"), torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    deployed = DeployedLanguageModel(model)
    deployed(tokens)
    activity = simulate(deployed.network.graph, deployed.network.inputs(model.stream(tokens)))
    *blocks, head = deployed.counts()
    assert sum(c.synops for c in blocks) == sum(p.synops for p in activity.projections.values())
    assert deployed.synops_per_token == sum(c.synops for c in blocks) / 32
    assert [c.layer for c in blocks] == ["block0.mixer", "block0.mlp", "block1.mixer", "block1.mlp"]
    assert sum(c.dense_macs for c in blocks) == 32 * 2 * (4 * 12 * 12 + 8 * 12 * 12)
    assert (head.host, head.dense_macs) == (True, 32 * 12 * 20)
    quiet = DeployedLanguageModel(random_model("graded", threshold=0.5))
    quiet(tokens)
    assert quiet.synops_per_token < deployed.synops_per_token


def test_the_graph_fits_the_chip_and_its_file(tmp_path: Path):
    for neurons in ("graded", "lif"):
        graph = convert_language(random_model(neurons)).graph
        assert identical(load_graph(save_graph(graph, tmp_path / f"{neurons}.graph.npz")), graph)
        placed = place(layer_demands(graph), "loihi2", chips=1)
        assert 0 < len(placed.cores) <= 128
        assert all(-7 <= p.weight_exp <= 7 for p in graph.projections)


@pytest.mark.lava
@pytest.mark.parametrize("neurons", ["graded", "lif"])
def test_lava_sends_the_same_messages(neurons, lava: LavaWorker):
    model = random_model(neurons, 5, threshold=0.1)
    network: StreamNetwork = convert_language(model)
    inputs = network.inputs(model.stream(torch.randint(0, 20, (1, 12), generator=torch.Generator().manual_seed(0))))
    ours = simulate(network.graph, inputs, record=("spikes",))
    result = compare(lava.run(network.graph, inputs, record=("spikes",)), ours)
    assert result.equal, str(result)
    assert bool(ours.spikes[network.graph.outputs[0]].any())


def test_what_does_not_convert_is_refused():
    model = random_model("graded")
    model.on_chip_grid(False)
    with pytest.raises(NotConvertible, match=r"block0\.mixer computes in floats"):
        convert_language(model)
    with pytest.raises(NotConvertible, match="no block was given"):
        convert_blocks([], 4)
    with pytest.raises(NotConvertible, match="odd is a Linear, which has no populations here"):
        convert_blocks([("odd", nn.Linear(4, 4))], 4)
    mlp = SpikingMLP(4, 6)
    mlp.neurons[0] = leaky(0.5, threshold=2.0)
    use_grid(mlp, True)
    with pytest.raises(NotConvertible, match="a threshold is 2; blocks have 1"):
        convert_blocks([("mlp", mlp)], 4)
    layer = GridLinear(2, 2, bits_in=8, bits_out=12)
    with pytest.raises(ValueError, match="has no grid yet"):
        layer.integers()
    layer.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        use_grid(layer, True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpikingMLP(4, 6, betas=(0.1, 0.2, 0.3, 0.4)), "6 neurons do not divide into 4 groups"),
        (lambda: EventGate(1.0), "event threshold is 1"),
        (lambda: ShortConvolution(4, 9), "taps is 9"),
        (lambda: GatedMixer(4, 4, memory=2.0), "memory is 2"),
        (lambda: LanguageConfig(10, neurons="rate"), "neurons is 'rate'; there is: graded, lif"),
        (lambda: LanguageConfig(0), "vocab_size is 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_parameters_are_those_of_a_transformer_block_but_for_taps_and_biases():
    for neurons in ("graded", "lif"):
        model = SpikingLanguageModel(LanguageConfig(256, 64, 3, neurons=neurons))
        assert model.macs_per_token()["host"] == 256 * 64
        weights = sum(p.weight.numel() for p in model.modules() if isinstance(p, GridLinear))
        assert weights == 3 * 12 * 64 * 64
        assert np.isclose(model.macs_per_token()["chip"] / weights, 1, atol=0.01)
