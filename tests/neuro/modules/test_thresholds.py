"""Event thresholds against closed forms, torch autograd, and the trace that conversion reads."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neuro.analysis.tracing import trace
from neuro.modules.thresholds import EventThreshold, sigmoid_step


def gate(channels: int = 5, **given: object) -> EventThreshold:
    if given.get("step") is not None or given.get("count_to_input"):
        given = {"theta_gradient": "both", **given}
    made = EventThreshold(channels, **given)  # type: ignore[arg-type]
    if made.raw.requires_grad:
        made.set_theta(torch.linspace(0.2, 1.2, made.raw.numel()))
    return made


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.floats(0.1, 4.0))
def test_values_are_the_definition_in_both_modes(seed: int, two_sided: bool, shared: bool, scale: float) -> None:
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(seed))
    made = gate(two_sided=two_sided, shared=shared, scale=scale)
    theta_C = made.theta_C.detach()
    expected = torch.where((x.abs() if two_sided else x) > theta_C, x, torch.zeros(()))
    torch.testing.assert_close(made.train()(x), expected, rtol=0, atol=0)
    assert made.rate_C is not None
    torch.testing.assert_close(made.rate_C.detach(), (expected != 0).float().mean((0, 1)))
    torch.testing.assert_close(made.eval()(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("width", [0.2, 1.5])
def test_surrogate_has_the_derivative_of_the_sigmoid(width: float) -> None:
    u = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    y = sigmoid_step(width)(u)
    assert torch.equal(y, (u > 0).double())
    (found,) = torch.autograd.grad(y.sum(), u)
    (expected,) = torch.autograd.grad(torch.sigmoid(u / width).sum(), u)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize(
    ("mode", "own_step"),
    [("count", False), ("task", False), ("both", False), ("value", False), ("count", True), ("task", True), ("both", True)],
)
def test_gradients_are_the_closed_forms(mode: str, two_sided: bool, own_step: bool) -> None:
    """Through the fused path and through a step given as a callable, which takes the general one."""
    torch.manual_seed(1)
    x = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    to_y, to_rate, scale, width = torch.randn(11, 5).double(), torch.randn(5).double(), 1.7, 0.3
    step = sigmoid_step(width) if own_step else None
    made = gate(two_sided=two_sided, theta_gradient=mode, scale=scale, width=width, step=step).double().train()
    y = made(x)
    assert made.rate_C is not None
    theta_C = made.theta_C
    rate_term = (made.rate_C * to_rate).sum()
    total = (y * to_y).sum() + rate_term
    to_x, to_raw = torch.autograd.grad(total, [x, made.raw], allow_unused=True)

    size = x.detach().abs() if two_sided else x.detach()
    s = torch.sigmoid((size - theta_C.detach()) / (width * scale))
    slope = s * (1 - s) / (width * scale)
    kept = x.detach() * to_y  # first-order gain of keeping x; dropping it costs 11 (x g)^2 / 2 besides
    value = kept - 11 / 2 * kept.square() if mode == "value" else kept
    from_task = -(slope * value).sum(0) if mode != "count" else torch.zeros(5)
    from_count = -(slope * to_rate / 11).sum(0) if mode != "task" else torch.zeros(5)
    to_theta = scale * torch.sigmoid(made.raw.detach())  # d theta / d raw of scale x softplus
    torch.testing.assert_close(to_x, torch.where(size > theta_C.detach(), to_y, 0.0))
    torch.testing.assert_close(to_raw, (from_task + from_count) * to_theta)


def test_the_count_can_push_inputs_too() -> None:
    x = torch.randn(9, 5, requires_grad=True)
    made = gate(count_to_input=True).train()
    made(x)
    assert made.rate_C is not None
    (to_x,) = torch.autograd.grad(made.rate_C.sum(), x)
    s = torch.sigmoid((x.detach().abs() - made.theta_C.detach()) / made.width)
    torch.testing.assert_close(to_x, s * (1 - s) / made.width * x.detach().sign() / 9)


def test_a_foreign_surrogate_is_used() -> None:
    surrogate = pytest.importorskip("snntorch.surrogate")
    x = torch.randn(9, 5)
    made = gate(step=surrogate.fast_sigmoid(slope=25)).train()
    made(x).sum().backward()
    u = x.abs() - made.theta_C.detach()
    expected = -(x / (25 * u.abs() + 1) ** 2).sum(0) * torch.sigmoid(made.raw.detach())
    torch.testing.assert_close(made.raw.grad, expected)


def test_zero_threshold_changes_nothing_and_stays() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    made = EventThreshold(5, initial=0.0).train()
    y = made(x)
    assert torch.equal(y, x)
    assert not made.raw.requires_grad
    assert torch.equal(made.theta_C, torch.zeros(5))
    (to_x,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(to_x, torch.ones_like(x))


@given(st.lists(st.floats(0, 50, width=32), min_size=5, max_size=5))
def test_thresholds_are_kept_as_given(values: list[float]) -> None:
    made = EventThreshold(5, scale=2.0)
    made.set_theta(torch.tensor(values))
    torch.testing.assert_close(made.theta_C, torch.tensor(values), rtol=1e-4, atol=1e-6)


def test_copies_and_export_after_a_training_pass() -> None:
    model = nn.Sequential(gate(), nn.Linear(5, 3)).train()
    model(torch.randn(4, 5)).sum().backward()
    twin = copy.deepcopy(model).eval()
    x = torch.randn(6, 5)
    assert torch.equal(twin(x), model.eval()(x))
    assert twin[0].raw is not model[0].raw
    found = trace(twin, x)
    assert found.complete
    assert {"abs", "gt", "mul", "linear"} <= {op.target for op in found.ops}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EventThreshold(0), "channels is 0"),
        (lambda: EventThreshold(4, scale=0.0), "scale 0"),
        (lambda: EventThreshold(4, initial=-1.0), "initial -1"),
        (lambda: EventThreshold(4, theta_gradient="all"), "one of count, task, both, value"),
        (lambda: sigmoid_step(0.0), "needs a positive one"),
        (lambda: EventThreshold(4)(torch.zeros(2, 5)), "5 channels, this threshold 4"),
        (lambda: EventThreshold(4).set_theta(torch.zeros(3)), "holds \\(4,\\)"),
        (lambda: EventThreshold(4).set_theta(-torch.ones(4)), "negative or non-finite"),
    ],
)
def test_bad_values_are_named(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


def test_floor_lifts_every_threshold() -> None:
    made = gate()
    made.floor.fill_(0.5)
    x = torch.tensor([[0.3, 0.45, 0.6, 0.6, 5.0]])
    theta = torch.linspace(0.2, 1.2, 5).clamp(min=0.5)
    expected: Tensor = torch.where(x > theta, x, 0.0)
    assert torch.equal(made.eval()(x), expected)
