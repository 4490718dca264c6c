"""The sigma-delta route: its graph step by step, its runner, Lava, and the quantised network that it must equal."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import neuro
from neuro.conversion import graded
from neuro.conversion.sigma_delta import SigmaDeltaConfig
from neuro.deployment.coding import changes, encode
from neuro.deployment.deployed import Deployed
from neuro.simulators.activity import compare
from neuro.simulators.fixed_point import latency, run_pipelined, simulate
from neuro.simulators.lava.client import LavaWorker


class Mlp(nn.Module):
    def __init__(self, activation: str, bias: bool, width: int = 10, hidden: int = 24, out: int = 7) -> None:
        super().__init__()
        self.activation = activation
        self.fc1, self.fc2 = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        return self.fc2(h * h if self.activation == "relu2" else h)


def slow_stream(seed: int, streams: int, tokens: int, width: int = 10) -> Tensor:
    """A random walk, float32 (streams, tokens, width)."""
    steps = torch.randn(streams, tokens, width, generator=torch.Generator().manual_seed(seed))
    return (steps * 0.3).cumsum(1)


def plan_of(module: nn.Module, x: Tensor, **config: object) -> neuro.Plan:
    settings_ = SigmaDeltaConfig(**config)  # type: ignore[arg-type]
    return neuro.convert(module, neuro.calibrate(module, [x]), neuro.analyse(module, x), settings_)


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    made = {f"{a}, bias {b}": Mlp(a, b) for a in ("relu", "relu2") for b in (False, True)}
    return {**made, "linear": nn.Linear(10, 7), "linear, no bias": nn.Linear(10, 7, bias=False)}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_receivers_hold_follows_the_value_within_the_threshold(data: st.DataObject) -> None:
    """Delta coding against Lava's Delta neuron, step by step in Python's integers."""
    threshold, tokens = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 12))
    values = data.draw(st.lists(st.integers(-127, 127), min_size=tokens, max_size=tokens))
    start = data.draw(st.integers(-20, 20))
    held, sent = changes(torch.tensor(values)[None, :, None], torch.tensor([[start]]), threshold)
    act, residue, receiver = start, 0, start
    for value, got, message in zip(values, held.flatten().tolist(), sent.flatten().tolist(), strict=True):
        change = value - act + residue
        out = change if abs(change) >= threshold else 0
        residue, act, receiver = change - out, value, receiver + out
        assert (message, got) == (out, receiver)
        assert abs(receiver - value) < max(threshold, 1)


@pytest.mark.parametrize("thresholds", [(0, 0), (1, 1), (3, 5)])
@pytest.mark.parametrize("name", modules())
def test_the_runner_gives_the_graphs_bits_and_counts(name: str, thresholds: tuple[int, int]) -> None:
    module, x = modules()[name], slow_stream(1, 3, 17)
    plan = plan_of(module, x, input_threshold=thresholds[0], hidden_threshold=thresholds[1])
    (segment,) = plan.segments
    fresh = 1.5 * slow_stream(2, 3, 17)  # beyond what calibration saw
    deployed = neuro.deploy(module, plan)
    out = deployed(fresh)
    inputs, clipped = encode(segment, fresh)
    stepped = simulate(segment.graph, {k: torch.nn.functional.pad(v, (0, 0, 0, 9)) for k, v in inputs.items()})
    late = latency(segment.graph, "out")
    assert torch.equal(out, (stepped.spikes["out"][:, late : late + 17].double() * segment.output_scale).float())

    aligned = run_pipelined(segment.graph, inputs)
    (health,), counts = deployed.health(), deployed.counts()
    assert health.clipped_inputs == clipped > 0
    assert sum(c.events for c in counts) == sum(p.events for p in aligned.projections.values())
    one = {p.name for p in segment.graph.projections if p.name.startswith(("hold", "copy", "pass", "delay"))}
    assert sum(c.synops for c in counts) == sum(p.events if k in one else p.synops for k, p in aligned.projections.items())
    assert sum(c.neuron_updates_active for c in counts) == sum(p.updates_active for p in aligned.populations.values())
    assert sum(c.neuron_updates_inactive for c in counts) == sum(p.updates_inactive for p in aligned.populations.values())
    assert health.wide == sum(p.wide_v for p in aligned.populations.values())
    for source, bits in health.max_payload_bits.items():
        sent = max(aligned.projections[p.name].max_abs_payload for p in segment.graph.outgoing(source))
        assert bits == int(sent).bit_length() + 1
    assert {c.tokens for c in counts} == {3 * 17}
    macs = sum(c.dense_macs for c in counts)
    assert macs == 51 * sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["relu", "relu2"]), st.booleans(), st.sampled_from([0, 1]))
def test_with_every_change_sent_it_is_the_quantised_network(seed: int, activation: str, bias: bool, threshold: int) -> None:
    torch.manual_seed(seed)
    module, x = Mlp(activation, bias), slow_stream(seed, 2, 9)
    plan = plan_of(module, x, input_threshold=threshold, hidden_threshold=threshold)
    fresh = 1.2 * slow_stream(seed + 1, 2, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(neuro.deploy(module, plan)(fresh), neuro.deploy(module, plan, "quantised")(fresh))
    (s,) = plan.segments
    q = np.clip(np.rint(fresh.numpy().astype(np.float32) / np.float32(s.input_scale)), -127, 127).astype(np.int64)
    w1, w2 = (np.rint(layer.weight.detach().double().numpy() / scale).astype(np.int64)
              for layer, scale in zip((module.fc1, module.fc2), s.weight_scales, strict=True))  # fmt: skip
    b1, b2 = (
        0 if layer.bias is None else np.rint(layer.bias.detach().double().numpy() / unit).astype(np.int64)
        for layer, unit in ((module.fc1, s.input_scale * s.weight_scales[0]), (module.fc2, s.output_scale))
    )
    total = q @ w1.T + b1
    half = (1 << s.shifts[0]) >> 1
    level = np.maximum((total + half) >> s.shifts[0], 0)
    hidden = level**2 >> s.square_shift if activation == "relu2" else level
    by_hand = (hidden @ w2.T + b2) * s.output_scale
    np.testing.assert_array_equal(neuro.deploy(module, plan, "quantised")(fresh).numpy(), by_hand.astype(np.float32))


@pytest.mark.parametrize("bits", [9, 11])
def test_it_equals_the_graded_routes_twin(bits: int) -> None:
    """The same int8 inputs, the same weights and the same hidden grid make one quantised network, whatever the route."""
    torch.manual_seed(8)
    module, x = Mlp("relu", bias=False).double(), slow_stream(5, 4, 30).double()
    ranges, report = neuro.calibrate(module, [x]), neuro.analyse(module, x)
    ours = neuro.convert(module, ranges, report, SigmaDeltaConfig(0, 0, hidden_bits=bits))
    theirs = graded.convert(module, ranges, report, graded.GradedConfig(scales="tensor", hidden_bits=bits))
    (a,), (b,) = ours.segments, theirs.segments
    assert (a.input_scale, a.weight_scales[0], a.rectified_scale) == (b.input_scale, b.weight_scales[0], b.rectified_scale)
    twin = neuro.deploy(module, theirs, "quantised")(x)
    torch.testing.assert_close(neuro.deploy(module, ours)(x), twin, rtol=1e-13, atol=1e-13)


def test_a_higher_threshold_sends_less_and_strays_more() -> None:
    torch.manual_seed(4)
    module, x = Mlp("relu", True, hidden=64), slow_stream(6, 4, 60)
    sent, error = [], []
    for threshold in (1, 4, 12, 40):
        deployed = neuro.deploy(module, plan_of(module, x, input_threshold=threshold, hidden_threshold=threshold))
        error.append(float((deployed(x) - module(x).detach()).square().mean()))
        sent.append(sum(c.synops for c in deployed.counts()))
    assert sent == sorted(sent, reverse=True)
    assert error == sorted(error)
    assert sent[-1] < 0.5 * sent[0]
    assert error[0] < 1e-3


def test_token_by_token_continues_the_stream() -> None:
    torch.manual_seed(4)
    module, x = Mlp("relu2", True), slow_stream(7, 3, 12)
    plan = plan_of(module, x, input_threshold=4, hidden_threshold=3)
    whole, steps = neuro.deploy(module, plan), neuro.deploy(module, plan)
    wanted = whole(x)
    with steps.keep_state():
        got = torch.cat([steps(x[:, :5]), *(steps(x[:, t : t + 1]) for t in range(5, 12))], dim=1)
        assert torch.equal(got, wanted)
        assert steps.counts() == whole.counts()
        with pytest.raises(ValueError, match=r"segment 'fc1' keeps the state of 3 streams and got 1; call reset_state\(\)"):
            steps(x[:1])
        steps.reset_state()
        assert torch.equal(steps(x[:1]), wanted[:1])
    assert torch.equal(steps(x), wanted)  # from rest again
    assert not torch.equal(torch.cat([steps(x[:, :5]), steps(x[:, 5:])], dim=1), wanted)


def test_batch_rows_are_streams_of_their_own() -> None:
    module, x = modules()["relu, bias True"], slow_stream(9, 4, 11)
    deployed = neuro.deploy(module, plan_of(module, x, input_threshold=5, hidden_threshold=5))
    together = deployed(x)
    assert torch.equal(together, torch.stack([deployed(row) for row in x]))
    assert torch.equal(together.view(2, 2, 11, 7), deployed(x.view(2, 2, 11, 10)))
    assert torch.equal(together[2, 0], deployed(x[2, 0]))
    assert deployed(x[:0]).shape == (0, 11, 7)
    time_first = neuro.deploy(module, plan_of(module, x, input_threshold=5, hidden_threshold=5, sequence_dim=0))
    assert torch.equal(time_first(x.transpose(0, 1)).transpose(0, 1), together)
    assert not torch.equal(time_first(x), together)


def test_a_layer_in_several_places_has_no_stream_to_keep() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp("relu", True, out=10)

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x + self.mlp(x))

    torch.manual_seed(2)
    module, x = Twice(), slow_stream(3, 2, 8)
    deployed: Deployed = neuro.deploy(module, plan_of(module, x))
    torch.testing.assert_close(deployed(x), module(x).detach(), rtol=0, atol=0.1)
    with deployed.keep_state(), pytest.raises(RuntimeError, match=r"called 2 times per token.*without keep_state"):
        deployed(x)


def test_values_beyond_their_words_are_counted_and_said() -> None:
    torch.manual_seed(3)
    module, x = Mlp("relu2", False, width=40), 1e-3 * torch.eye(40)[None]  # sums of one input each
    deployed = neuro.deploy(module, plan_of(module, x))
    weight = module.fc1.weight.detach()
    with pytest.warns(RuntimeWarning, match=r"segment 'fc1': .* messages beyond their width"):
        deployed(torch.sign(weight[:3])[None] * 10)
    (health,) = deployed.health()
    assert health.clipped_inputs == 120
    assert health.payload_overflows + health.wide > 0


def test_what_is_refused() -> None:
    module, x = modules()["linear"], slow_stream(1, 2, 5)
    with pytest.raises(ValueError, match=r"hidden_bits is 3; it lies in 4\.\.15"):
        SigmaDeltaConfig(hidden_bits=3)
    with pytest.raises(ValueError, match="sequence_dim is -1"):
        SigmaDeltaConfig(sequence_dim=-1)
    deployed = neuro.deploy(module, plan_of(module, x, sequence_dim=1))
    with pytest.raises(ValueError, match=r"sequence_dim 1 is no token dimension of an input \(5, 10\)"):
        deployed(x[0])
    with pytest.raises(ValueError, match=r"takes floats \(\.\.\., 10\), not torch\.float32 \(2, 5, 9\)"):
        deployed(x[..., :9])
    with pytest.raises(ValueError, match="NaN or infinite"):
        deployed(x * float("nan"))


@pytest.mark.lava
def test_the_graph_equals_lava(lava: LavaWorker) -> None:
    torch.manual_seed(5)
    x = slow_stream(4, 1, 25, width=12)
    for activation, thresholds in (("relu", (1, 1)), ("relu", (3, 4)), ("relu2", (0, 5)), ("", (2, 0))):
        module = Mlp(activation, bias=True, width=12, hidden=32, out=12) if activation else nn.Linear(12, 12)
        (segment,) = plan_of(module, x, input_threshold=thresholds[0], hidden_threshold=thresholds[1]).segments
        inputs, _ = encode(segment, x)
        ours = simulate(segment.graph, inputs, record=("spikes",))
        found = compare(lava.run(segment.graph, inputs, record=("spikes",)), ours)
        assert found.equal, f"{activation}: {found}"
        assert ours.spikes["out"].any()
