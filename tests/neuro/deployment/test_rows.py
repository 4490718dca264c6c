"""The shorter way of graded segments: the engine's bits, the engine's counts, and the engine itself where it must be."""

from __future__ import annotations

import copy
import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import neuro
from hardware.building import COMPILERS, FLAGS
from neuro.deployment import rows
from neuro.deployment.deployed import Deployed
from neuro.simulators.compiled.library import LOOPS, library

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler: graded segments run in the engine alone")


class Pair(nn.Module):
    """Two linear layers with (squared) rectification between."""

    def __init__(self, sizes: tuple[int, int, int], squared: bool, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes[0], sizes[1], bias=bias)
        self.fc2 = nn.Linear(sizes[1], sizes[2], bias=bias)
        self.squared = squared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.fc1(x))
        return self.fc2(hidden * hidden if self.squared else hidden)


def deployed(module: nn.Module, x: torch.Tensor, config: neuro.GradedConfig | None = None) -> tuple[Deployed, Deployed]:
    """Twice the same, the second one in the engine alone."""
    report = neuro.analyse(module, x)
    plan = neuro.convert(module, neuro.calibrate(module, [x]), report, config)
    quick, engine = neuro.deploy(module, plan), neuro.deploy(module, plan)
    for runner in engine._runners:
        runner._unprepared = False  # type: ignore[attr-defined]
    return quick, engine


def quick_rows(model: Deployed) -> int:
    """Rows that did not go through the engine and are not taken over yet."""
    found = [getattr(runner, "_rows", None) for runner in model._runners]
    return sum(each._rows for each in found if each is not None)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_bits_and_counts_are_the_engines(data: Any) -> None:
    sizes = tuple(data.draw(st.integers(1, 90)) for _ in range(3))
    kind = data.draw(st.sampled_from(["linear", "relu", "relu2"]))
    bias, batch = data.draw(st.booleans()), data.draw(st.integers(1, 150))
    torch.manual_seed(data.draw(st.integers(0, 10_000)))
    module = nn.Linear(sizes[0], sizes[2], bias=bias) if kind == "linear" else Pair(sizes, kind == "relu2", bias)
    if data.draw(st.booleans()):  # rows of zeros, so that some synapses do not exist
        for part in module.modules():
            if isinstance(part, nn.Linear):
                part.weight.data *= torch.rand_like(part.weight) < 0.3
                part.weight.data[0, 0] = 0.5
    x = torch.randn(64, sizes[0])
    config = neuro.GradedConfig(
        weight_bits=data.draw(st.sampled_from([8, 4, "ternary"])),
        scales=data.draw(st.sampled_from(["tensor", "channel", "power_of_two"])),
        drop_input=data.draw(st.sampled_from([0, 3])),
        drop_hidden=data.draw(st.sampled_from([0, 5])),
        narrow=data.draw(st.sampled_from(["synapse", "neuron"])),
    )
    quick, engine = deployed(module, x, config)
    seen = torch.randn(batch, sizes[0]) * data.draw(st.sampled_from([0.0, 0.3, 1.0, 1.2]))
    for part in (seen, seen[:1], x):
        assert torch.equal(quick(part), engine(part))
    assert quick.counts() == engine.counts()
    assert quick.health() == engine.health()
    quick.reset_counts(), engine.reset_counts()
    assert quick.counts() == engine.counts()


@pytest.mark.parametrize("squared", [False, True])
def test_common_layers_take_it(squared: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 16)
    for module in (nn.Linear(16, 24, bias=False), Pair((16, 32, 8), squared, False)):
        quick, engine = deployed(module, x)
        quick(x), engine(x)
        assert quick_rows(quick) == 40
        assert quick_rows(engine) == 0
        assert quick.counts() == engine.counts()
        assert quick_rows(quick) == 0


def test_what_comes_near_a_limit_goes_through_the_engine() -> None:
    torch.manual_seed(1)
    module = Pair((64, 32, 8), True, False)
    small = torch.randn(64, 64)
    quick, engine = deployed(module, small)
    wild = 4 * torch.sign(module.fc1.weight.detach())  # as large as a sum of these inputs can be
    with pytest.warns(RuntimeWarning, match="beyond"):
        left = quick(wild)
    with pytest.warns(RuntimeWarning, match="beyond"):
        right = engine(wild)
    assert quick_rows(quick) == 0
    assert torch.equal(left, right)
    assert torch.equal(quick(small), engine(small))
    assert quick.counts() == engine.counts()
    assert quick.health() == engine.health()
    assert quick.health()[0].payload_overflows > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_no_payload_carries_is_refused(bad: float) -> None:
    x = torch.randn(8, 16)
    quick, _ = deployed(nn.Linear(16, 8), x)
    x[3, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        quick(x)
    assert quick_rows(quick) == 0


def test_other_types_strides_and_threads_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    x = torch.randn(96, 16)
    quick, engine = deployed(Pair((16, 32, 8), True, False), x)
    expected = engine(x)
    assert torch.equal(quick(x.double()).float(), engine(x.double()).float())
    assert torch.equal(quick(torch.stack([x, x], dim=2)[..., 0]), expected)
    monkeypatch.setattr(rows, "THREAD_ROWS", 8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(quick(x), expected)
    finally:
        torch.set_num_threads(before)
    engine(x)
    assert quick.counts() == engine.counts()


def test_a_copy_runs_and_counts_for_itself() -> None:
    x = torch.randn(8, 16)
    quick, _ = deployed(nn.Linear(16, 8), x)
    quick(x)
    other = copy.deepcopy(quick)
    assert torch.equal(other(x), quick(x))
    assert other.counts() == quick.counts()
    other(x)
    assert other.counts()[0].tokens == 24
    assert quick.counts()[0].tokens == 16


def test_without_a_library_the_engine_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 16)
    quick, engine = deployed(nn.Linear(16, 8), x)
    monkeypatch.setattr(rows, "library", lambda: None)
    assert torch.equal(quick(x), engine(x))
    assert quick_rows(quick) == 0
    assert quick.counts() == engine.counts()


def test_a_processor_without_products_of_bytes_gives_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)))
    made = tmp_path / "plain.so"
    subprocess.run([compiler, *FLAGS, str(LOOPS.sources / "rows.c"), "-lm", "-o", str(made)], check=True, timeout=120)
    torch.manual_seed(3)
    x = torch.randn(21, 19)
    for squared in (False, True):
        quick, engine = deployed(Pair((19, 33, 7), squared, True), x)
        monkeypatch.setattr(rows, "library", lambda: ctypes.CDLL(str(made)))
        assert torch.equal(quick(x), engine(x))
        assert quick.counts() == engine.counts()


def test_packed_weights_stand_where_the_loop_reads_them() -> None:
    weight = np.arange(20 * 6).reshape(20, 6).astype(np.int8)
    packed = rows._packed(weight, 4)
    assert packed.shape == (4, 2, 16, 4)
    assert packed[1, 1, 3, 1] == weight[19, 5]
    assert not packed[1, 1, :, 2:].any()
    assert not packed[2:].any()
