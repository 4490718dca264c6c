"""The learning rate over a run: one rule in both packages that train, and torch's own where that knows the steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuro.training.loop import TrainSettings, rate_at
from sparse_update.weights.settings import OptimConfig, schedule

SHARES = st.floats(0, 0.9)


@given(progress=st.floats(0, 1), warmup=SHARES, final=st.floats(0, 1))
def test_both_packages_that_train_have_one_schedule(progress, warmup, final):
    ours = schedule(progress, OptimConfig(warmup_fraction=warmup, final_fraction=final))
    assert ours == rate_at(progress, TrainSettings(warmup=warmup, final_lr=final))
    assert 0 <= ours <= 1


def test_the_cosine_is_torchs():
    cfg = OptimConfig(warmup_fraction=0.25, final_fraction=0.05)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=75, eta_min=0.05)
    for step in range(76):
        assert schedule((25 + step) / 100, cfg) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_wsd_is_torchs_warm_up_constant_and_line_in_a_row():
    cfg = OptimConfig(schedule="wsd", warmup_fraction=0.1, decay_fraction=0.25, final_fraction=0.2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-9, total_iters=10),
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=65),
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.2, total_iters=25),
    ]
    theirs = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[10, 75])
    for step in range(101):
        assert schedule(step / 100, cfg) == pytest.approx(theirs.get_last_lr()[0], abs=1e-8), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule": "linear"}, "optim.schedule = 'linear': one of cosine, wsd"),
        ({"decay_fraction": 0.0}, "optim.decay_fraction = 0.0: must lie above 0"),
        ({"schedule": "wsd", "decay_fraction": 0.9, "warmup_fraction": 0.2}, "at most at 0.8"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        OptimConfig(**settings)
