"""Input codes by their definition, layers against neurons written out by hand, learning on a separable problem."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from neuro.modules.spiking import SpikingClassifier, SpikingLayer, count_loss, current_code, predicted, rate_code
from neuro.simulators.snntorch_backend import SnnTorchUnavailable


def test_current_code_repeats_each_value():
    x = torch.tensor([[0.25, 1.0]])
    assert current_code(x, 3).tolist() == [[[0.25, 1.0]] * 3]


def test_even_rate_code_has_the_nearest_count_and_spreads_it():
    values = torch.tensor([[0.0, 0.25, 0.5, 0.96, 1.0]])
    spikes = rate_code(values, 8)
    assert spikes.sum(dim=1).tolist() == [[0, 2, 4, 8, 8]]
    assert spikes[0, :, 2].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert spikes[0, :, 1].tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    assert torch.equal(spikes, rate_code(values, 8))


def test_random_rate_code_follows_its_generator_and_its_rate():
    values = torch.full((1, 400), 0.3)

    def draw(seed: int) -> torch.Tensor:
        return rate_code(values, 100, torch.Generator().manual_seed(seed))

    spikes = draw(0)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    deviation = (0.3 * 0.7 / spikes.numel()) ** 0.5
    assert abs(spikes.mean().item() - 0.3) < 4 * deviation
    assert torch.equal(spikes, draw(0))
    assert not torch.equal(spikes, draw(1))


@pytest.mark.parametrize(
    ("values", "steps", "message"),
    [
        (torch.tensor([[1.5]]), 4, r"0\.\.1 and was given 1\.5\.\.1\.5"),
        (torch.tensor([[-0.5]]), 4, "divide by the largest first"),
        (torch.tensor([0.5]), 4, r"\(batch, features\) and was given \(1,\)"),
        (torch.tensor([[0.5]]), 0, "steps is 0"),
    ],
)
def test_codes_refuse_what_they_cannot_code(values, steps, message):
    with pytest.raises(ValueError, match=message):
        rate_code(values, steps)


def by_hand(x_TF: np.ndarray, layer: SpikingLayer, beta: float, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence in numpy, float64, neuron by neuron."""
    weight, bias = (p.detach().double().numpy() for p in (layer.linear.weight, layer.linear.bias))
    v = np.zeros(len(weight))
    spikes, membrane = [], []
    for x_F in x_TF:
        v = beta * v + weight @ x_F + bias
        fired = v > threshold
        v = np.where(fired, 0, v)
        spikes.append(fired)
        membrane.append(v)
    return np.array(spikes), np.array(membrane)


def test_a_layer_is_the_recurrence_of_its_docstring():
    torch.manual_seed(0)
    layer = SpikingLayer(5, 7, beta=0.8, threshold=0.4)
    x = torch.rand(1, 30, 5)
    spikes, v = layer(x)
    expected_spikes, expected_v = by_hand(x[0].double().numpy(), layer, 0.8, 0.4)
    assert 0 < expected_spikes.mean() < 1
    assert np.array_equal(spikes[0].detach().numpy() > 0, expected_spikes)
    assert np.allclose(v[0].detach().numpy(), expected_v, atol=1e-5)


def test_a_perfect_integrator_has_the_period_of_its_threshold():
    """0.3 a step reaches beyond 1 at the fourth step, and again every four."""
    layer = SpikingLayer(1, 1, beta=1.0, bias=False)
    with torch.no_grad():
        layer.linear.weight.fill_(0.3)
    spikes, _ = layer(torch.ones(1, 12, 1))
    assert torch.nonzero(spikes[0, :, 0]).flatten().tolist() == [3, 7, 11]


def test_samples_do_not_meet():
    torch.manual_seed(0)
    model = SpikingClassifier((3, 6, 2))
    x = torch.rand(4, 9, 3)
    assert torch.equal(model(x)[2:3], model(x[2:3]))


def test_rates_are_those_of_the_layers():
    torch.manual_seed(0)
    model = SpikingClassifier((3, 6, 2))
    x = 3 * torch.rand(4, 9, 3)
    rates = model.rates(x)
    assert [tuple(rate.shape) for rate in rates] == [(4, 6), (4, 2)]
    assert torch.equal(rates[1], model(x).mean(dim=1))


def test_training_learns_a_separable_problem():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(100, 4, generator=generator)
    y = (x[:, 0] + x[:, 1] > x[:, 2] + x[:, 3]).long()
    model = SpikingClassifier((4, 16, 2), learn_beta=True)
    losses = []
    for _ in range(12):
        loss = count_loss(model(rate_code(x, 8)), y)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        losses.append(loss.item())
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())
    assert losses[-1] < 0.75 * losses[0]
    assert (predicted(model(rate_code(x, 8))) == y).float().mean() > 0.8


def test_loss_and_prediction_by_hand():
    spikes = torch.zeros(2, 3, 3)
    spikes[0, :2, 1] = 1  # counts 0 2 0
    spikes[1, 0, 1:] = 1  # counts 0 1 1: the lower class wins
    assert predicted(spikes).tolist() == [1, 1]
    assert predicted(torch.zeros(1, 3, 3)).tolist() == [0]
    expected = -np.log(np.exp(1.0) / (np.exp(1.0) + 2))
    assert count_loss(spikes[:1], torch.tensor([1])).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SpikingLayer(2, 2, beta=1.5), "beta is 1.5"),
        (lambda: SpikingLayer(2, 2, threshold=0.0), "threshold is 0.0"),
        (lambda: SpikingClassifier((4,)), r"sizes is \(4,\)"),
    ],
)
def test_unusable_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_without_snntorch_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "snntorch", None)
    with pytest.raises(SnnTorchUnavailable, match=r"pip install 'spikegate\[spiking\]'"):
        SpikingLayer(2, 2)
