"""Calibration ranges, integers, exponents and headroom, saved plans; against numpy, not against our own code."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import neuro
from neuro.analysis.compatibility import analyse
from neuro.conversion.calibration import calibrate
from neuro.conversion.graded import GradedConfig, convert
from neuro.conversion.integers import constant_lines, payload_bits, quantise, scale_for, shift_for
from neuro.conversion.plan import Plan, PlanFileError, load_plan, save_plan
from neuro.graph import identical


def mlp(bias: bool = True, inputs: int = 6, hidden: int = 20, outputs: int = 5) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(inputs, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, outputs, bias=bias))


def planned(module: nn.Module, batch: Tensor, **config: object) -> Plan:
    return convert(module, calibrate(module, [batch]), analyse(module, batch), GradedConfig(**config))  # type: ignore[arg-type]


def test_importing_the_package_brings_in_nothing_heavy() -> None:
    code = "import sys, neuro; assert not {'torch', 'numpy', 'hardware'} & set(sys.modules); neuro.SpikingGraph"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        neuro.nonsense  # noqa: B018
    for name in neuro.__all__:
        assert getattr(neuro, name).__name__ == name


# Calibration


def test_ranges_equal_numpys() -> None:
    module, batches = mlp(), [torch.randn(50, 6), 3 * torch.randn(70, 6)]
    calibration = calibrate(module, iter(batches), percentile=90)
    x = torch.cat(batches).numpy()
    first, second = calibration.layers["0"], calibration.layers["2"]
    w, b = (t.detach().numpy() for t in (module[0].weight, module[0].bias))
    pre = x @ w.T + b
    assert calibration.batches == 2
    assert first.rows == 120
    assert first.input_max == pytest.approx(np.abs(x).max())
    assert first.input_percentile == pytest.approx(np.percentile(np.abs(x), 90), rel=0.03)
    assert first.output_max == pytest.approx(np.abs(pre).max(), rel=1e-6)
    assert first.output_positive_max == pytest.approx(pre.max(), rel=1e-6)
    assert second.input_max == pytest.approx(np.maximum(pre, 0).max(), rel=1e-6)
    assert second.input_percentile == pytest.approx(np.percentile(np.maximum(pre, 0), 90), rel=0.03)
    json.dumps(calibration.to_dict(), allow_nan=False)


def test_calibration_refuses_what_it_cannot_use() -> None:
    module = mlp()
    with pytest.raises(ValueError, match="got no batch"):
        calibrate(module, [])
    with pytest.raises(ValueError, match=r"batch 1 of shape \[\(4, 7\)\] does not run through Sequential"):
        calibrate(module, [torch.zeros(4, 6), torch.zeros(4, 7)])
    with pytest.raises(ValueError, match=r"batch 0: the input of layer '0' holds NaN"):
        calibrate(module, [torch.full((4, 6), float("nan"))])
    with pytest.raises(ValueError, match="batch 0 is empty at layer '0'"):
        calibrate(module, [torch.zeros(0, 6)])
    with pytest.raises(ValueError, match="percentile is 101"):
        calibrate(module, [torch.zeros(4, 6)], percentile=101)
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        calibrate(nn.ReLU(), [torch.zeros(4, 6)])
    assert not module[0]._forward_hooks  # refused or not, the hooks are gone


# Integers


@given(st.lists(st.integers(-(127**3), 127**3), min_size=1, max_size=8))
def test_constant_lines_add_up(halves: list[int]) -> None:
    values = 2 * np.array(halves, dtype=np.int64)
    payloads, weights = constant_lines(values)
    assert (weights.astype(np.int64) @ np.array(payloads, dtype=np.int64) == values).all()
    assert not weights.size or (np.abs(weights).max() <= 254 and not (weights % 2).any())
    if np.abs(values).max() <= 16_000:
        assert max(payloads, default=0) <= 127  # int8 lines suffice


def test_constant_lines_refuse_odd_and_huge_values() -> None:
    with pytest.raises(ValueError, match="must be even"):
        constant_lines(np.array([3]))
    with pytest.raises(ValueError, match="beyond four lines"):
        constant_lines(np.array([2 * 127**5]))


@given(st.floats(1e-6, 1e6), st.booleans())
def test_scales_reach_the_largest_value(largest: float, power_of_two: bool) -> None:
    scale = scale_for(largest, power_of_two)
    assert scale * 127 >= largest * (1 - 1e-9)
    assert scale * 127 <= largest * (2 if power_of_two else 1) * (1 + 1e-9)
    if power_of_two:
        assert np.log2(scale) == round(np.log2(scale))


@given(st.floats(0.0, 2.0**40), st.integers(1, 2**23))
def test_shift_is_the_smallest_that_fits(largest: float, limit: int) -> None:
    shift = shift_for(largest, limit)
    assert largest * 2.0**-shift <= limit * (1 + 1e-9)
    assert shift == 0 or largest * 2.0 ** -(shift - 1) > limit * (1 - 1e-9)


def test_payload_width_counts_the_sign() -> None:
    assert [payload_bits(v) for v in (0, 1, 127, 128, 317, 32767)] == [1, 2, 8, 9, 10, 16]


# Graphs


def test_a_linear_layer_becomes_one_even_int8_projection() -> None:
    torch.manual_seed(0)
    layer, batch = nn.Linear(6, 5), torch.randn(40, 6)
    before = layer.weight.clone()
    (segment,) = planned(layer, batch, scales="tensor").segments
    (projection,) = segment.graph.projections
    stored = projection.weight[:, :6]
    assert (stored % 2 == 0).all()
    assert np.abs(stored).max() == 254
    np.testing.assert_array_equal(stored // 2, quantise(before.detach(), segment.weight_scales[0]).numpy())
    assert projection.num_message_bits >= 8
    assert projection.weight_exp == -segment.shifts[0]
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("width", [8, 300, 2000])
def test_linear_sums_cannot_leave_23_bits(width: int, power_of_two: bool) -> None:
    torch.manual_seed(width)
    layer = nn.Linear(width, 4)
    (segment,) = planned(layer, torch.randn(64, width), scales="power_of_two" if power_of_two else "tensor").segments
    (projection,) = segment.graph.projections
    payload = np.array([127] * width + list(segment.constant_lines), dtype=np.int64)
    worst = int((np.abs(projection.weight.astype(np.int64)) @ payload).max()) >> segment.shifts[0]
    assert worst < 2**23
    assert 0 <= 23 - np.log2(worst) - segment.headroom[0].static_bits + 0.005 < 0.2  # never more than there is
    assert segment.payload_bits["out"] <= 16
    assert all(-8 <= p.weight_exp <= 7 for p in segment.graph.projections)


def test_what_is_squared_fits_its_word() -> None:
    torch.manual_seed(1)

    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(torch.relu(self.fc1(x)).square())

    plan = planned(Squared(), torch.randn(200, 32))
    (segment,) = plan.segments
    assert [p.kind for p in segment.graph.populations if p.name in ("x", "hidden", "square", "out")] == [
        "input", "graded_relu", "product", "graded"
    ]  # fmt: skip
    assert segment.headroom[1].population == "square"
    assert segment.headroom[1].static_bits > 0
    assert 11 < segment.payload_bits["square"] <= 13 == GradedConfig().hidden_bits
    assert "headroom bits" in plan.table()


def test_zero_weights_convert() -> None:
    module = mlp()
    with torch.no_grad():
        module[2].weight.zero_()
        module[2].bias.zero_()
    (segment,) = planned(module, torch.randn(8, 6)).segments
    assert not segment.graph.projections[1].weight.any()


def test_conversion_refuses_what_does_not_fit_together() -> None:
    module, batch = mlp(), torch.randn(8, 6)
    calibration, report = calibrate(module, [batch]), analyse(module, batch)
    with pytest.raises(ValueError, match=r"layer '1' is ReLU, not nn\.Linear"):
        convert(module, calibration, dataclasses.replace(report, mapped=("1",), pairs=(), rows_per_token=(("1", 1.0),)))
    with pytest.raises(ValueError, match="no layer 'gone'"):
        convert(module, calibration, dataclasses.replace(report, mapped=("gone",), rows_per_token=(("gone", 1.0),)))
    with pytest.raises(ValueError, match="holds nothing for layer '0'"):
        convert(module, dataclasses.replace(calibration, layers={}), report)
    with torch.no_grad():
        module[0].bias[2] = float("inf")
    with pytest.raises(ValueError, match="layer '0' has NaN or infinite"):
        convert(module, calibration, report)
    with pytest.raises(ValueError, match=r"hidden_bits is 2; it lies in 4\.\.15"):
        GradedConfig(hidden_bits=2)


# Plans on disk


def test_a_plan_survives_its_folder(tmp_path: Path) -> None:
    plan = planned(mlp(), torch.randn(30, 6))
    back = load_plan(save_plan(plan, tmp_path / "plan"))
    assert {p.name for p in (tmp_path / "plan").iterdir()} == {"plan.json", "0.graph.npz"}
    assert identical(plan.segments[0].graph, back.segments[0].graph)
    without = [
        dataclasses.replace(p, segments=tuple(dataclasses.replace(s, graph=None) for s in p.segments))  # type: ignore[arg-type]
        for p in (plan, back)
    ]
    assert without[0] == without[1]
    with pytest.raises(FileExistsError, match="already holds a plan"):
        save_plan(plan, tmp_path / "plan")


def test_broken_plan_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match=r"holds no plan\.json"):
        load_plan(tmp_path)
    folder = save_plan(planned(mlp(), torch.randn(30, 6)), tmp_path / "plan")
    text = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text(text.replace('"schema": 1', '"schema": 7'))
    with pytest.raises(PlanFileError, match="schema 7, this version reads 1"):
        load_plan(folder)
    (folder / "plan.json").write_text(text[:100])
    with pytest.raises(PlanFileError, match="not readable as JSON"):
        load_plan(folder)
    (folder / "plan.json").write_text(text)
    (folder / "0.graph.npz").unlink()
    with pytest.raises(PlanFileError, match="a graph of the plan is missing"):
        load_plan(folder)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.booleans(), st.integers(4, 15))
def test_any_small_mlp_converts_within_the_words(seed: int, bias: bool, power_of_two: bool, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module, batch = mlp(bias), torch.randn(20, 6, generator=generator)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2.0 ** float(seed % 9 - 4))
    (segment,) = planned(module, batch, hidden_bits=bits, scales="power_of_two" if power_of_two else "tensor").segments
    assert all(room.calibrated_bits > 0 for room in segment.headroom)
    assert segment.payload_bits["out"] <= 16
    assert segment.payload_bits["hidden"] <= 16
