"""What cannot be converted is refused by name before anything is changed: no half-converted model, no stray file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import neuro
from hardware.placement import DoesNotFit

CONFIGS = [neuro.GradedConfig(), neuro.SigmaDeltaConfig(), neuro.RateConfig(8)]
ROUTE = {"GradedConfig": "graded", "SigmaDeltaConfig": "sigma_delta", "RateConfig": "rate"}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Embedding(20, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 20)]
    return nn.Sequential(*layers).eval()


def tokens() -> Tensor:
    return torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))


def unchanged(module: nn.Module, work: Callable[[], object]) -> None:
    """`work` fails, and leaves module, weights and hooks as they were."""
    kinds = [(name, type(m)) for name, m in module.named_modules()]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    work()
    assert [(name, type(m)) for name, m in module.named_modules()] == kinds
    assert all(torch.equal(before[n], v) or v.isnan().any() for n, v in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named_at_every_step(bad: float) -> None:
    good, broken = model(), model()
    with torch.no_grad():
        broken[3].weight[2, 5] = bad
    report, ranges = neuro.analyse(good, tokens()), neuro.calibrate(good, [tokens()])

    def each() -> None:
        with pytest.raises(ValueError, match=r"'3\.weight' holds 1 NaN or infinite"):
            neuro.analyse(broken, tokens())
        with pytest.raises(ValueError, match=r"the output of layer '3' holds NaN or infinite values"):
            neuro.calibrate(broken, [tokens()])
        for config in CONFIGS:  # a report and ranges of the model before it broke
            with pytest.raises(ValueError, match=r"layer '3'.*NaN or infinite"):
                neuro.convert(broken, ranges, report, config)
        with pytest.raises(ValueError, match="layer '3' holds other weights"):
            neuro.deploy(broken, neuro.convert(good, ranges, report))

    unchanged(broken, each)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(3, 7), r"calibration batch 1 of shape \[\(3, 7\)\] does not run through Sequential"),
        (torch.full((3, 7), 20), r"calibration batch 1 of shape \[\(3, 7\)\] does not run through Sequential: IndexError"),
        (torch.zeros(0, 7, dtype=torch.long), r"calibration batch 1 is empty at layer '1' \(shape \(0, 7, 32\)\)"),
        ("text", "calibration batch 1: "),
    ],
)
def test_calibration_data_of_another_shape(batch: object, message: str) -> None:
    found = model()

    def run() -> None:
        with pytest.raises(ValueError, match=message):
            neuro.calibrate(found, [tokens(), batch])  # type: ignore[list-item]
        with pytest.raises(ValueError, match="at least one batch"):
            neuro.calibrate(found, [])

    unchanged(found, run)


def test_calibration_of_another_width_or_another_model() -> None:
    found = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 8)
    with pytest.raises(ValueError, match=r"calibration batch 0 of shape \[\(5, 9\)\]"):
        neuro.calibrate(found, [torch.randn(5, 9)])
    report = neuro.analyse(found, x)
    other = neuro.calibrate(nn.Sequential(nn.Linear(8, 4)), [x])
    for config in CONFIGS:
        with pytest.raises(ValueError, match="the calibration holds nothing for layer '2'"):
            neuro.convert(found, other, report, config)


def test_a_chip_that_is_too_small() -> None:
    found = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048))
    x = torch.randn(1, 2048)

    def run() -> None:
        with pytest.raises(DoesNotFit, match=r"does not fit: .* of .*\. "):
            neuro.analyse(found, x, "loihi2", chips=1)

    unchanged(found, run)
    assert neuro.analyse(found, x, "loihi2", chips=10).mac_share == 1.0
    wide = nn.Linear(5000, 8)  # more inputs than a core of Loihi 1 can tell apart
    with pytest.raises(neuro.NothingToMap, match="axon_in 5,000 of 4,096"):
        neuro.analyse(wide, torch.randn(1, 5000), "loihi1")
    assert neuro.analyse(model(), tokens(), "loihi1").mapped == ("1", "3", "5")


class Mystery(nn.Module):
    """Nobody knows it, and torch.export cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x @ self.weight if x.sum().item() > -1e9 else x, dim=-1)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_layer_never_seen_stays_on_the_host_and_is_listed(config: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(16, 16), Mystery(), nn.Linear(16, 4)).eval()
    x = torch.randn(6, 16)
    report = neuro.analyse(found, x, route=ROUTE[type(config).__name__])
    assert [op.kind for op in report.operations if op.name == "1"] == ["unknown: Mystery"]
    plan = neuro.convert(found, neuro.calibrate(found, [x]), report, config)  # type: ignore[arg-type]
    assert plan.modules == ("0", "2")
    deployed = neuro.deploy(found, plan)
    assert type(deployed.module[1]) is Mystery  # type: ignore[index]
    assert torch.equal(deployed.module[1].weight, found[1].weight)  # type: ignore[index]
    (host,) = (c for c in (deployed(x), deployed.counts())[1] if c.host)
    assert (host.layer.split(":")[0], host.dense_macs) == ("1", 16 * 16 * 6)
    with torch.no_grad():
        error = (deployed(x) - found(x)).abs().max()
    assert error < 0.1

    only = nn.Sequential(Mystery()).eval()
    with pytest.raises(neuro.NothingToMap, match="Mystery"):
        neuro.analyse(only, x)


def test_a_plan_of_another_module_converts_nothing() -> None:
    found, x = model(), tokens()
    plan = neuro.convert(found, neuro.calibrate(found, [x]), neuro.analyse(found, x))
    other = copy.deepcopy(found)
    other[5] = nn.Linear(16, 21)

    def run() -> None:
        with pytest.raises(ValueError, match="layer '5' holds other weights"):
            neuro.deploy(other, plan)

    unchanged(other, run)
    shorter = found[:4]
    with pytest.raises(ValueError, match="the plan maps layer '5', which Sequential does not have"):
        neuro.deploy(shorter, plan)


def test_modules_that_cannot_be_copied_or_looked_into_are_refused_with_the_way_out() -> None:
    x = torch.randn(4, 16)
    pruned = nn.Sequential(nn.Conv1d(4, 8, 1), nn.Linear(16, 8))
    prune.random_unstructured(pruned[0], "weight", 0.5)
    for found, message in (
        (nn.Sequential(nn.LazyLinear(8)), r"module '0' has no 'weight' yet \(LazyLinear is lazy\); run it once"),
        (pruned, r"module '0' holds 'weight' as the result of a computation .*prune\.remove\(layer, 'weight'\)"),
        (torch.compile(nn.Linear(16, 8), backend="eager"), r"module '\(root\)' is compiled .* inside, `_orig_mod`"),
    ):
        for work in (neuro.prepare, neuro.analyse, lambda m, v: neuro.calibrate(m, [v])):
            with pytest.raises(ValueError, match=message):
                work(found, x)
    assert isinstance(nn.Sequential(nn.LazyLinear(8))[0].weight, nn.UninitializedParameter)
    prune.remove(pruned[0], "weight")
    assert neuro.analyse(pruned, x).mapped == ("1",)


def test_examples_without_rows_and_layers_without_an_order() -> None:
    with pytest.raises(ValueError, match="the example inputs hold no row"):
        neuro.analyse(nn.Linear(16, 8), torch.randn(0, 16))
    with pytest.raises(neuro.NothingToMap, match="1 x linear"):
        neuro.analyse(nn.Linear(16, 8, dtype=torch.complex64), torch.randn(3, 16, dtype=torch.complex64))
