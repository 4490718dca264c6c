"""Registered layers: verdicts in the report, converters that are shown to be equal, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuro
from neuro.analysis.compatibility import analyse
from neuro.analysis.preparation import TransformError, prepare
from neuro.analysis.registry import (
    LayerRule,
    layer_rule,
    register_layer,
    registered,
    unregister_layer,
)
from neuro.modules.thresholds import EventThreshold


class Transposed(nn.Module):
    """y = x W + b with W (in, out), as Hugging Face's Conv1D has it."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width_in, width_out) / width_in**0.5)
        self.bias = nn.Parameter(torch.randn(width_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], -1)


def to_linear(layer: Transposed) -> nn.Linear:
    new = nn.Linear(*layer.weight.shape)
    new.weight.copy_(layer.weight.T)
    new.bias.copy_(layer.bias)
    return new


class Rotary(nn.Module):
    """A layer without weights, of several operations."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.cos(x) + torch.sin(x)


@pytest.fixture
def transposed() -> Iterator[LayerRule]:
    yield register_layer(Transposed, verdict="after transform", reason="stored transposed", to_linear=to_linear)
    unregister_layer(Transposed)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Transposed(6, 16), nn.ReLU(), Transposed(16, 3))


def test_a_registered_layer_is_one_row_and_nothing_of_it_is_lost(transposed: LayerRule) -> None:
    model, x = mlp(), torch.randn(5, 7, 6)
    report = analyse(model, x, strict=False)
    rows = {op.name: op for op in report.operations}
    assert [op.name for op in report.operations] == ["0", "1", "2"]
    assert report.tokens == 35
    for name, macs in (("0", 6 * 16), ("2", 16 * 3)):
        op = rows[name]
        assert (op.kind, op.verdict, op.runs_on, op.reason) == (
            "Transposed",
            "after transform",
            "host",
            "stored transposed",
        )
        assert op.macs_per_token == macs
    assert rows["0"].parameters == 6 * 16 + 16
    assert report.mapped == ()


def test_prepare_makes_it_an_mlp_pair(transposed: LayerRule) -> None:
    model, x = mlp(), torch.randn(5, 6)
    ready = prepare(model, x)
    assert isinstance(model[0], Transposed)
    torch.testing.assert_close(ready(x), model(x))
    report = analyse(ready, x)
    assert [(p.fc1, p.fc2, p.activation) for p in report.pairs] == [("0", "2", "relu")]
    assert report.mac_share == 1
    calibration = neuro.calibrate(ready, [x])
    deployed = neuro.deploy(ready, neuro.convert(ready, calibration, report), "quantised")
    assert (deployed(x) - model(x).detach()).abs().max() < 0.05 * model(x).abs().max()


def test_a_layer_in_two_places_and_a_layer_that_is_the_model(transposed: LayerRule) -> None:
    layer, x = Transposed(4, 4), torch.randn(3, 4)
    twice = nn.Sequential(layer, nn.Tanh(), layer)
    ready = prepare(twice, x)
    assert ready[0] is ready[2]
    torch.testing.assert_close(ready(x), twice(x))
    alone = prepare(layer, x)
    assert isinstance(alone, nn.Linear)
    torch.testing.assert_close(alone(x), layer(x))


def test_hooks_move_along(transposed: LayerRule) -> None:
    model, x = mlp(), torch.randn(5, 6)
    model[0].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    model[2].register_forward_hook(lambda _, args, kwargs, output: output + 1, with_kwargs=True)
    ready = prepare(model, x)
    torch.testing.assert_close(ready(x), model(x))
    assert not torch.allclose(ready(x), mlp()(x))


def test_a_converter_that_is_wrong_is_named_with_its_layer() -> None:
    def scaled(layer: Transposed) -> nn.Linear:
        new = to_linear(layer)
        new.bias.mul_(1.01)
        return new

    x = torch.randn(5, 6)
    for convert, message in (
        (scaled, r"layer '0' \(Transposed\): the converted form differs by up to"),
        (
            lambda layer: nn.Linear(6, 2),
            r"layer '0' \(Transposed\): the converted form returns shape \(5, 2\), not \(5, 16\)",
        ),
        (lambda layer: 1 / 0, r"layer '0' \(Transposed\): its converter failed: ZeroDivisionError"),
        (lambda layer: "linear", r"layer '0' \(Transposed\): its converter returned str"),
    ):
        register_layer(Transposed, verdict="after transform", reason="stored transposed", to_linear=convert)
        try:
            with pytest.raises(TransformError, match=message):
                prepare(mlp(), x)
        finally:
            unregister_layer(Transposed)
    with pytest.raises(ValueError, match="does not run on the example inputs"):
        prepare(mlp(), torch.randn(5, 5))


def test_a_layer_the_example_does_not_reach_stays(transposed: LayerRule) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = Transposed(4, 4), Transposed(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    ready = prepare(Branch(), torch.randn(2, 4))
    assert isinstance(ready.used, nn.Linear)
    assert isinstance(ready.unused, Transposed)


def test_attention_and_encoder() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 8)
    ready = prepare(encoder, x)
    with torch.no_grad():
        torch.testing.assert_close(ready(x), encoder(x))
    assert len(analyse(ready, x).mapped) == 2 * 6
    assert len(analyse(encoder, x).mapped) == 2 * 2
    refused = nn.MultiheadAttention(8, 2, add_zero_attn=True)
    with pytest.raises(
        TransformError, match=r"layer '\(root\)' \(MultiheadAttention\): its converter failed.*add_zero_attn"
    ):
        prepare(refused, (x, x, x))


def test_verdicts_with_bounds_and_chips() -> None:
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 4), Rotary())
    unknown = [op for op in analyse(model, x).operations if op.name == "1"]
    assert {op.kind for op in unknown} == {"mask or position", "element-wise product", "residual add"}
    register_layer(
        Rotary,
        verdict="approximate",
        reason="a table",
        error_bound=0.25,
        bound_of="absolute",
        needs_graded=True,
        kind="wave",
    )
    try:
        row = next(op for op in analyse(model, x).operations if op.name == "1")
        assert (row.kind, row.verdict, row.error_bound, row.bound_of) == ("wave", "approximate", 0.25, "absolute")
        assert "0.25 (absolute)" in analyse(model, x).table()
        binary = next(op for op in analyse(model, x, "loihi1").operations if op.name == "1")
        assert (binary.verdict, binary.limit, binary.need, binary.have) == ("host", "payload_bits", 16, 1)
    finally:
        unregister_layer(Rotary)


def test_a_class_counts_exactly() -> None:
    class Sub(Transposed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    register_layer(Transposed, LayerRule("after transform", "stored transposed", to_linear=to_linear))
    try:
        assert layer_rule(Sub(2, 2)) is None
        assert isinstance(prepare(nn.Sequential(Sub(2, 2)), torch.randn(1, 2))[0], Sub)
    finally:
        unregister_layer(Transposed)


def test_what_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match="verdict 'maybe' is unknown; known: native"):
        register_layer(Rotary, verdict="maybe", reason="x")
    with pytest.raises(ValueError, match="needs its reason"):
        register_layer(Rotary, verdict="host", reason=" ")
    with pytest.raises(ValueError, match="needs error_bound, a number"):
        register_layer(Rotary, verdict="approximate", reason="a table")
    with pytest.raises(ValueError, match="one of the two"):
        register_layer(Rotary)
    with pytest.raises(ValueError, match=r"nn\.Linear has its verdict"):
        register_layer(nn.Linear, verdict="host", reason="x")
    with pytest.raises(TypeError, match=r"dict is no nn\.Module class"):
        register_layer(dict, verdict="host", reason="x")
    with pytest.raises(TypeError, match="by its class or the class's path"):
        register_layer(3, verdict="host", reason="x")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="is not registered"):
        unregister_layer(Rotary)
    assert "torch.nn.modules.activation.MultiheadAttention" in registered()


@pytest.mark.parametrize("place", ["pair", "input"])
def test_an_event_threshold_is_one_operation(place: str) -> None:
    gate = EventThreshold(8 if place == "pair" else 4, two_sided=place == "input", initial=0.3).eval()
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)]
    layers.insert(2 if place == "pair" else 0, gate)
    report = analyse(nn.Sequential(*layers), torch.randn(3, 4))
    found = [op for op in report.operations if op.kind == "event threshold"]
    assert [(op.verdict, op.runs_on) for op in found] == [("after transform", "chip" if place == "pair" else "host")]
    assert [p.threshold for p in report.pairs] == (["2"] if place == "pair" else [""])
    assert len(report.operations) == 4
    assert found[0].parameters == gate.raw.numel()
    assert sum(op.parameters for op in report.operations) == report.total_parameters


def test_a_frozen_threshold_is_not_taken_for_a_broken_weight() -> None:
    gate = EventThreshold(4, initial=0.0)  # keeps its threshold at 0 by raw = -inf
    assert analyse(nn.Sequential(gate, nn.Linear(4, 4)), torch.randn(3, 4)).mapped == ("1",)
    with torch.no_grad():
        gate.raw.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"'0\.raw' holds 4 NaN"):
        analyse(nn.Sequential(gate, nn.Linear(4, 4)), torch.randn(3, 4))


class Mystery(nn.Module):
    """A layer that nobody knows and that torch.export cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x @ self.weight if x.sum().item() > -1e9 else x, dim=-1)


def test_an_unknown_layer_is_never_dropped() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Mystery()), torch.randn(6, 4)
    report = analyse(model, x)
    assert not report.traced
    row = next(op for op in report.operations if op.name == "1")
    assert (row.kind, row.runs_on, row.parameters) == ("unknown: Mystery", "host", 16)
    assert row.macs_per_token == 4 * 4  # the product inside it, found by torch's own counter
    assert report.mac_share == 0.5
