"""RMSNorm in integers against torch's: the bound holds, is not idle, and Lava gives the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neuro.conversion.norm import REACH_BITS, ROOT_BITS, NormGraph, OnChipRMSNorm, inverse_root, rms_norm_graph
from neuro.simulators.activity import compare
from neuro.simulators.fixed_point import run_pipelined, simulate


def float_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rows(channels: int, limit: int, seed: int, count: int = 64) -> Tensor:
    """Integer rows of very different size and shape, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-3, 0.3, count, dtype=torch.float64)[:, None] * limit
    x[0], x[1] = 0, 0
    x[1, 0] = limit  # one channel alone: the largest output there is
    x[2] = limit
    return x.round().clamp(-limit, limit)


@pytest.mark.parametrize("knots", [2, 4, 8])
def test_the_inverse_root_by_hand(knots: int) -> None:
    table = inverse_root(knots)
    rng = np.random.default_rng(0)
    sums = np.unique(np.concatenate([rng.integers(table.floor, 2**REACH_BITS, 2000), [table.floor, 2**REACH_BITS]]))
    direct = np.array(
        [
            table.end
            + sum(sum(w * max(t - int(s), 0) for t, w in zip(ts, ws, strict=True)) >> k for ts, ws, k in table.groups)
            for s in sums
        ]
    )
    assert np.array_equal(direct, table.values()[sums])
    error = np.abs(direct * np.sqrt(sums + 0.5) / 2.0**ROOT_BITS - 1)
    assert error.max() <= table.relative_bound
    assert error.max() > table.relative_bound / 3
    assert table.relative_bound < {2: 0.008, 4: 0.0025, 8: 0.0015}[knots]


@settings(max_examples=15, deadline=None)
@given(
    channels=st.sampled_from([3, 16, 64, 200]),
    bits=st.integers(5, 12),
    eps=st.sampled_from([0.0, 1e-6, 1e-2, 3.0]),
    seed=st.integers(0, 10**6),
)
def test_the_bound_holds(channels: int, bits: int, eps: float, seed: int) -> None:
    weight = torch.randn(channels, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    norm = rms_norm_graph(weight, eps, 0.01, input_bits=bits)
    x = rows(channels, norm.input_limit, seed) * norm.input_scale
    got, wanted = norm.run(x), float_norm(x, weight, eps) if eps else float_norm(x, weight, 1e-300)
    loud = x.square().mean(dim=1).sqrt() >= norm.floor_rms
    error = (got - wanted).abs()
    assert bool((error <= norm.relative_bound * wanted.abs() + norm.absolute_bound)[loud].all())
    assert bool((got[0] == 0).all())  # a row of zeros
    quiet = got.abs() <= wanted.abs() * (1 + norm.relative_bound) + norm.absolute_bound
    assert bool(quiet[1:].all())  # below the floor too small, never too large


def test_the_error_is_small_where_it_counts() -> None:
    torch.manual_seed(0)
    weight, eps = 1 + 0.3 * torch.randn(128), 1e-6
    x = torch.randn(500, 128) * (0.2 + 1.8 * torch.rand(500, 1))
    norm = rms_norm_graph(weight, eps, 8 / 1023)
    got, wanted = norm.run(x), float_norm(x, weight, eps)
    assert (got - wanted).norm() / wanted.norm() < 0.01
    assert norm.relative_bound < 0.003
    assert float(((got - wanted).abs() / (norm.relative_bound * wanted.abs() + norm.absolute_bound)).max()) > 0.2


@pytest.mark.parametrize(("channels", "bits"), [(48, 11), (600, 12), (5, 6)])
def test_no_value_leaves_its_register(channels: int, bits: int) -> None:
    norm = rms_norm_graph(torch.linspace(-1, 1, channels), 1e-5, 0.01, input_bits=bits)
    inputs, _ = norm.encode(rows(channels, norm.input_limit, 0) * norm.input_scale)
    activity = run_pipelined(norm.graph, inputs, strict=True)  # raises otherwise
    assert activity.spikes["out"].shape == (1, 64, channels)
    assert any("outside the chip's register" in note for note in norm.notes)


def test_epsilon_counts() -> None:
    weight = torch.ones(16)
    x = torch.full((1, 16), 0.01)
    for eps in (0.0, 1e-4, 1e-2):
        norm = rms_norm_graph(weight, eps, 1e-4)
        assert float(norm.run(x)[0, 0]) == pytest.approx(0.01 / (1e-4 + eps) ** 0.5, rel=0.01)


def test_it_stands_in_for_a_layer() -> None:
    torch.manual_seed(0)
    layer = nn.RMSNorm(32, eps=1e-5)
    nn.init.normal_(layer.weight, 1, 0.2)
    model = nn.Sequential(nn.Linear(8, 32), layer, nn.Linear(32, 4)).eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        wanted = model(x)
        model[1] = OnChipRMSNorm(rms_norm_graph(layer.weight, 1e-5, 4 / 1023))
        got = model(x)
    assert got.shape == wanted.shape
    assert (got - wanted).norm() / wanted.norm() < 0.01
    assert (model[1].rows, model[1].clipped) == (15, 0)
    with pytest.raises(ValueError, match="NaN or infinite inputs"):
        model(torch.full((1, 8), float("nan")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_bits": 3}, "input_bits is 3; it lies in 4..12"),
        ({"knots_per_octave": 9}, "knots_per_octave is 9"),
        ({"input_scale": 0.0}, "input_scale is 0.0"),
        ({"eps": -1.0}, "eps -1.0"),
        ({"weight_C": torch.tensor([1.0, float("nan")])}, "NaN, infinite or all 0"),
        ({"weight_C": torch.zeros(4)}, "all 0"),
        ({"eps": 1e9}, "every row would vanish"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm_graph(**{"weight_C": torch.ones(4), "eps": 1e-6, "input_scale": 0.01, **change})


def small_norm() -> tuple[NormGraph, dict[str, np.ndarray]]:
    norm = rms_norm_graph(torch.tensor([1.0, -0.5, 0.25, 2.0, 0.7, 0.0]), 1e-5, 0.01, knots_per_octave=2)
    inputs, _ = norm.encode(rows(6, norm.input_limit, 3, count=12) * norm.input_scale)
    flush = 6
    return norm, {name: np.pad(value.numpy(), ((0, 0), (0, flush), (0, 0)), mode="edge") for name, value in inputs.items()}


@pytest.mark.lava
def test_lava_gives_the_same_bits(lava) -> None:
    norm, inputs = small_norm()
    ours = simulate(norm.graph, inputs)
    theirs = lava.run(norm.graph, inputs)
    result = compare(theirs, ours)
    assert result.equal, str(result)
    assert int(ours.spikes["out"].abs().max()) > 1000
