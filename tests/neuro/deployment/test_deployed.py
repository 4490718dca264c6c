"""The deployed model against integers recomputed in numpy, against its quantised twin, and against the float model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuro.analysis.compatibility import analyse
from neuro.conversion.calibration import calibrate
from neuro.conversion.graded import GradedConfig, convert
from neuro.conversion.plan import Segment, load_plan, save_plan
from neuro.deployment.deployed import Deployed, deploy
from neuro.deployment.segments import encode, output_units
from neuro.modules.attention import split_attention
from neuro.simulators.activity import compare
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava.client import LavaWorker
from sparse_update.transformer import ModelConfig, Transformer, token_loss


def deployed(module: nn.Module, batch: Tensor, backend: str = "fixed_point", **config: object) -> Deployed:
    plan = convert(module, calibrate(module, [batch]), analyse(module, batch), GradedConfig(**config))  # type: ignore[arg-type]
    return deploy(module, plan, backend)


class Mlp(nn.Module):
    def __init__(self, activation: str, bias: bool, width: int = 24, hidden: int = 64) -> None:
        super().__init__()
        self.activation = activation
        self.fc1, self.fc2 = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x))
        return self.fc2(h * h if self.activation == "relu2" else h)


def by_hand(segment: Segment, x: Tensor) -> np.ndarray:
    """The whole integer pipeline in numpy int64, from weights and shifts alone; floats out."""
    shift = np.right_shift  # arithmetic: floor
    weight = {p.name: p.weight.astype(np.int64) for p in segment.graph.projections}
    q = np.clip(np.rint(x.numpy() / np.float32(segment.input_scale)), -127, 127).astype(np.int64)
    s = np.concatenate(
        [q, np.broadcast_to(np.array(segment.constant_lines, dtype=np.int64), (len(q), len(segment.constant_lines)))],
        axis=1,
    )
    if not segment.n_hidden:
        out = shift(s @ weight["fc"].T, segment.shifts[0])
    else:
        hidden = np.maximum(shift(s @ weight["fc1"].T, segment.shifts[0]), 0)
        if segment.activation == "relu2":
            hidden = shift(hidden * hidden, segment.square_shift)
        out = shift(hidden @ weight["fc2"].T, segment.shifts[1])
        if segment.bias_lines:
            out = out + shift(weight["bias"] @ np.array(segment.bias_lines, dtype=np.int64), 1)
    scales = np.array((segment.channel_scales[-1] if segment.channel_scales else ()) or segment.weight_scales[-1])
    unit = (segment.hidden_scale if segment.n_hidden else segment.input_scale) * scales / 2
    return (out + segment.output_offset) * (unit * 2.0 ** segment.shifts[-1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_simulation_equals_integers_by_hand(activation: str, bias: bool) -> None:
    torch.manual_seed(5)
    module, x = Mlp(activation, bias), torch.randn(150, 24)
    model = deployed(module, x)
    (segment,) = model.plan.segments
    assert segment.activation == activation
    fresh = 1.3 * torch.randn(70, 24)  # beyond what calibration saw
    np.testing.assert_array_equal(model(fresh).numpy(), by_hand(segment, fresh).astype(np.float32))
    layer = nn.Linear(24, 7, bias=bias)
    single = deployed(layer, x)
    np.testing.assert_array_equal(single(fresh).numpy(), by_hand(single.plan.segments[0], fresh).astype(np.float32))


@pytest.mark.lava
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_converted_graph_equals_lava(activation: str, lava: LavaWorker) -> None:
    torch.manual_seed(5)
    module, x = Mlp(activation, bias=True, hidden=32), torch.randn(30, 24)
    segment = deployed(module, x).segments[0]
    inputs, _ = encode(segment, x)
    ours = simulate(segment.graph, inputs, record=("spikes",))
    found = compare(lava.run(segment.graph, inputs, record=("spikes",)), ours)
    assert found.equal, str(found)
    assert ours.spikes["out"].any()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_linear_layer_equals_its_twin_up_to_the_last_shift(power_of_two: bool) -> None:
    torch.manual_seed(6)
    x = torch.randn(100, 24, dtype=torch.float64)
    for bias, largest in ((False, 1.0), (True, 1.0), (True, 30.0)):
        layer = nn.Linear(24, 9, bias=bias).double()
        if bias:
            nn.init.uniform_(layer.bias, -largest, largest)
        simulated = deployed(layer, x, scales="power_of_two" if power_of_two else "tensor")
        twin = deploy(layer, simulated.plan, "quantised")
        (segment,) = simulated.plan.segments
        unit = segment.output_scale * 2.0 ** -segment.shifts[0]  # one step of the sum
        bound = (2 ** (segment.shifts[0] - 1) if segment.shifts[0] >= 2 else 0) * unit
        assert (simulated(x) - twin(x)).abs().max() <= bound * (1 + 1e-9)
        assert (simulated(x) - layer(x)).abs().mean() < 0.05


def test_without_a_shift_simulation_and_twin_are_equal() -> None:
    torch.manual_seed(7)
    layer, x = nn.Linear(1, 40, bias=False), torch.randn(300, 1)  # small sums: nothing to shift away
    simulated = deployed(layer, x)
    assert simulated.plan.segments[0].shifts[0] <= 1  # sums are even: a shift by one loses nothing
    assert torch.equal(simulated(x), deploy(layer, simulated.plan, "quantised")(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_an_mlp_stays_within_the_bound_of_its_twin(activation: str, bias: bool) -> None:
    """Hidden values and biases are on the same grids, so only the last shift (half a step) differs."""
    torch.manual_seed(8)
    module, x = Mlp(activation, bias).double(), torch.randn(120, 24, dtype=torch.float64)
    simulated = deployed(module, x)
    (s,) = simulated.plan.segments
    twin = deploy(module, simulated.plan, "quantised")
    assert s.shifts[1] > 1
    bound = 0.5 * output_units(s)
    difference = (simulated(x) - twin(x)).abs()
    assert (difference <= bound * (1 + 1e-9)).all()
    assert simulated(x) == pytest.approx(module(x).detach(), abs=0.05 * float(module(x).detach().abs().max()))


def test_sequence_of_layers_in_a_plain_sequential() -> None:
    torch.manual_seed(9)
    module = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 3))
    x = torch.randn(4, 25, 12)
    model = deployed(module.train(), x)
    assert module.training
    assert [s.modules for s in model.segments] == [("0", "3"), ("5",)]
    torch.testing.assert_close(model(x), module.eval()(x).detach(), rtol=0, atol=0.02)
    assert model(x).shape == (4, 25, 3)
    assert model(x[:0]).shape == (0, 25, 3)


@pytest.mark.parametrize("split", [False, True])
def test_transformer_encoder(split: bool) -> None:
    torch.manual_seed(10)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    module, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(3, 7, 16)
    wanted = module(x).detach()
    model = deployed(split_attention(module) if split else module, x)
    assert len(model.plan.modules) == 2 * (6 if split else 2)
    assert sum(s.activation == "relu" for s in model.segments) == 2
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=0.06)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    got, full = model(x, src_key_padding_mask=padding), module(x, src_key_padding_mask=padding).detach()
    torch.testing.assert_close(got[~padding], full[~padding], rtol=0, atol=0.06)


def tiny_transformer(**changes: object) -> Transformer:
    torch.manual_seed(11)
    config = ModelConfig(**{"width": 16, "layers": 2, "heads": 2, "context": 8, "vocab_size": 32, **changes})  # type: ignore[arg-type]
    model = Transformer(config)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.2)
    return model


def test_tied_head_and_counts() -> None:
    model = tiny_transformer(tie_embeddings=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    tokens = torch.randint(0, 32, (3, 8))
    twin = deployed(model, tokens)
    assert twin.module.embed.weight is not None  # type: ignore[union-attr]
    assert not isinstance(twin.module.head, nn.Linear)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())

    twin(tokens)
    twin(tokens[:1])
    counts = {c.layer: c for c in twin.counts()}
    report = analyse(model, tokens)
    total = sum(c.dense_macs for c in counts.values())
    assert total == pytest.approx(report.macs_per_token * 32)
    assert {c.tokens for c in counts.values()} == {32}
    assert counts["embed:embedding lookup"].host
    q = counts["blocks.0.attn.q"]
    assert q.dense_macs == 32 * 16 * 16
    assert q.synops == q.events * 16
    assert 0 < q.events <= 32 * 17  # 16 inputs and the line that rounds
    assert q.neuron_updates_active + q.neuron_updates_inactive == 32 * 16
    assert q.payload_bits == 8
    square, fc2 = counts["blocks.1.mlp.fc1:square"], counts["blocks.1.mlp.fc2"]
    assert square.synops == square.events == 2 * counts["blocks.1.mlp.fc1"].neuron_updates_active
    assert fc2.events == square.neuron_updates_active
    assert fc2.synops == 16 * fc2.events
    twin.reset_counts()
    assert all(c.tokens == c.dense_macs == c.events == 0 for c in twin.counts())

    control = deploy(model, twin.plan, "quantised")
    control(tokens)
    assert all(c.host for c in control.counts())
    assert sum(c.dense_macs for c in control.counts()) == pytest.approx(report.macs_per_token * 24)


def test_events_are_the_nonzero_payloads() -> None:
    torch.manual_seed(12)
    module, x = Mlp("relu", bias=False), torch.randn(40, 24)
    model = deployed(module, x)
    model(x)
    (segment,) = model.segments
    inputs, clipped = encode(segment, x)
    fc1, fc2 = model.counts()
    assert fc1.events == int(np.count_nonzero(inputs["x"].numpy()))
    q = inputs["x"][0].numpy().astype(np.int64)
    first = next(p for p in segment.graph.projections if p.name == "fc1")
    hidden = np.maximum((q @ first.weight.T.astype(np.int64)) >> segment.shifts[0], 0)
    assert fc2.events == int(np.count_nonzero(hidden))
    assert fc1.neuron_updates_active == fc2.events
    (health,) = model.health()
    assert health.clipped_inputs == clipped
    assert health.max_payload_bits["hidden"] == int(hidden.max()).bit_length() + 1
    assert health.wraps == health.wide == health.payload_overflows == 0


def test_values_beyond_their_words_are_counted_and_said() -> None:
    torch.manual_seed(13)
    module, x = Mlp("relu2", bias=False), 0.01 * torch.randn(40, 24)
    plan = convert(module, calibrate(module, [x]), analyse(module, x), GradedConfig(square_bits=12, hidden_bits=15))
    model = deploy(module, plan)
    model(x)
    with pytest.warns(RuntimeWarning, match=r"segment 'fc1'.*messages beyond their width"):
        model(torch.sign(module.fc1.weight.detach()[:3]) * 10)  # every input clips, every product of one row is positive
    (health,) = model.health()
    assert health.clipped_inputs == 3 * 24
    assert health.payload_overflows > 0


def test_a_shared_layer_is_counted_per_call() -> None:
    torch.manual_seed(14)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.norm = Mlp("relu", bias=True), nn.LayerNorm(24)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x + self.mlp(self.norm(x))
            return x

    module, x = Shared(), torch.randn(5, 24)
    model = deployed(module, x)
    assert [s.modules for s in model.segments] == [("mlp.fc1", "mlp.fc2")]
    model(x)
    counts = {c.layer: c for c in model.counts()}
    assert counts["mlp.fc1"].tokens == 15
    assert counts["norm:normalisation"].tokens == 5
    torch.testing.assert_close(model(x), module(x).detach(), rtol=0, atol=0.1)


def test_an_unseen_path_between_a_pair_is_refused() -> None:
    class Sneaky(Mlp):
        double = False

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.fc1(x))
            return self.fc2(2 * h if self.double else h)

    module, x = Sneaky("relu", bias=True), torch.randn(9, 24)
    model = deployed(module, x)
    model(x)
    model.module.double = True
    with pytest.raises(RuntimeError, match="something other than relu happened between 'fc1' and 'fc2'"):
        model(x)
    with pytest.raises(RuntimeError, match="called without 'fc1' before it"):
        model.module.fc2(torch.zeros(9, 64))  # type: ignore[operator]


def test_hooks_of_replaced_layers_still_run() -> None:
    seen = []
    module, x = Mlp("relu", bias=True), torch.randn(9, 24)
    module.fc2.register_forward_hook(lambda _m, _a, out: seen.append(out.shape))
    model = deployed(module, x)
    seen.clear()
    model(x)
    assert seen == [(9, 24)]


def test_a_saved_plan_deploys_the_same(tmp_path: Path) -> None:
    model, tokens = tiny_transformer(), torch.randint(0, 32, (2, 8))
    first = deployed(model, tokens)
    second = deploy(model, load_plan(save_plan(first.plan, tmp_path)))
    assert torch.equal(first(tokens), second(tokens))


def test_misuse_is_refused_with_a_reason() -> None:
    module, x = Mlp("relu", bias=True), torch.randn(9, 24)
    model = deployed(module, x)
    with pytest.raises(RuntimeError, match="has no gradients"):
        model(x.requires_grad_())
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model.train()
    assert not model.eval().training
    x = x.detach()
    with pytest.raises(ValueError, match="segment 'fc1' got NaN"):
        model(x * float("nan"))
    with pytest.raises(ValueError, match=r"takes floats \(\.\.\., 24\), not torch\.float32 \(9, 23\)"):
        model(x[:, 1:])
    with pytest.raises(ValueError, match="backend 'chip' is unknown; known: fixed_point, quantised"):
        deploy(module, model.plan, "chip")
    with pytest.raises(ValueError, match="maps layer 'fc1', which Linear does not have"):
        deploy(nn.Linear(2, 2), model.plan)
    with torch.no_grad():
        module.fc2.weight[0, 0] += 1
    with pytest.raises(ValueError, match="layer 'fc2' holds other weights than the plan"):
        deploy(module, model.plan)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_float_types_keep_their_type(dtype: torch.dtype) -> None:
    torch.manual_seed(15)
    module, x = Mlp("relu2", bias=True).to(dtype), torch.randn(9, 24, dtype=dtype)
    out = deployed(module, x)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, module(x).detach(), rtol=0, atol=0.05)


def test_loss_of_a_trained_model_barely_moves() -> None:
    """A briefly trained byte model on text of this very package; width 32, 2 layers, 120 steps."""
    text = (Transformer.__doc__ or "") + "".join(str(getattr(F, n).__doc__ or "") for n in dir(F))
    data = torch.tensor(list(text.encode("utf-8", "replace")), dtype=torch.long)
    torch.manual_seed(16)
    model = Transformer(ModelConfig(width=32, layers=2, heads=2, context=32, vocab_size=256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    cut = int(0.9 * len(data))

    def batch(low: int, high: int, rows: int) -> Tensor:
        return torch.stack([data[i : i + 33] for i in torch.randint(low, high - 33, (rows,)).tolist()])

    for step in range(120):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / 120)
        x = batch(0, cut, 16)
        loss = token_loss(model(x[:, :-1]), x[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 3.0
    calibration, held_out = batch(0, cut, 32)[:, :-1], batch(cut, len(data), 128)
    simulated = deployed(model, calibration)
    losses = {}
    for name, run in (("float", model), ("twin", deploy(model, simulated.plan, "quantised")), ("simulated", simulated)):
        with torch.no_grad():
            losses[name] = float(token_loss(run(held_out[:, :-1]), held_out[:, 1:]).mean())
    assert abs(losses["simulated"] - losses["float"]) < 0.003
    assert abs(losses["simulated"] - losses["twin"]) < 0.003
