"""Counts to seconds: sums of counts times prices, timed shapes first, factors that never flatter."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from sparse_update.clock.cost import ComponentTimesError
from sparse_update.own.arms import DENSE, OwnArm, arms_of
from sparse_update.own.clock import OwnClock
from sparse_update.own.counting import Count, Product
from sparse_update.own.measure import dense_step_s, measure, rehearse
from sparse_update.own.prices import Prices, shipped_prices
from tests.sparse_update.own.tasks import mlp, task

CPU = torch.device("cpu")
SMALL, LARGE = Product(1, 8, 4, 2, "nn", "float32"), Product(1, 80, 40, 20, "nt", "float32")
PRICES = {"forward_flops": 2.0, "dx_flops": 3.0, "dw_flops": 5.0, "moved_bytes": 7.0, "hard_elements": 11.0}
PRICES |= {"operations": 13.0, "step": 17.0}
TABLE = Prices("modelled", "here", PRICES, {"token": 1.5})


def count(product, times=1, **more):
    return Count(**more, products=Counter({product: times}))


def test_seconds_are_counts_times_prices():
    work = {
        "forward": count(SMALL, 3, moved_bytes=10, hard_elements=2, operations=4),
        "backward_dx": count(SMALL),
        "backward_dw": count(SMALL),
    }
    assert SMALL.flops == 128
    expected = [2 * 3 * 128 + 7 * 10 + 11 * 2 + 13 * 4, 3 * 128, 5 * 128]
    found = TABLE.step_s(work, DENSE)
    assert [round(found[part] * 1e12) for part in work] == expected
    assert TABLE.total_s(work, DENSE) == pytest.approx((sum(expected) + 17) * 1e-12)
    assert TABLE.total_s(work, "token") == pytest.approx(1.5 * TABLE.total_s(work, DENSE))


def test_a_timed_shape_costs_what_it_took_and_others_go_at_the_pace_of_the_nearest():
    timed = replace(TABLE, products_ps={SMALL.key: 1000.0, LARGE.key: 64000.0})
    assert timed.step_s({"forward": count(SMALL, 2)}, DENSE)["forward"] == pytest.approx(2e-9)
    near = Product(1, 80, 40, 40, "nt", "float32")
    assert timed.step_s({"forward": count(near)}, DENSE)["forward"] == pytest.approx(2 * 64e-9)


def test_a_kind_without_a_factor_is_never_cheap():
    table = replace(TABLE, factors={"token": 1.5, "blocks": 1.2})
    assert table.factor(DENSE) == 1.0
    assert table.factor("token+blocks") == pytest.approx(1.8)
    assert table.factor("unheard of") == 1.5


def test_the_hash_is_of_the_clock_alone(tmp_path):
    assert replace(TABLE, about={"machine": "another"}).sha256 == TABLE.sha256
    assert replace(TABLE, scale=1.1).sha256 != TABLE.sha256
    (tmp_path / "t.json").write_text(json.dumps(TABLE.to_json()))
    assert Prices.load(tmp_path / "t.json").sha256 == TABLE.sha256
    (tmp_path / "t.json").write_text(json.dumps({"schema": 9}))
    with pytest.raises(ComponentTimesError, match="measure it again"):
        Prices.load(tmp_path / "t.json")
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(ComponentTimesError, match="no table of prices"):
        Prices.load(tmp_path / "t.json")


def test_every_shipped_factor_is_at_least_one():
    table = shipped_prices()
    assert table.source == "modelled"
    assert min(table.factors.values()) >= 1
    assert min(table.prices_ps.values()) >= 0


@pytest.mark.parametrize(
    "gate",
    [
        {"backward": {"unit": "token", "keep_fraction": 0.5}},
        {"backward": {"unit": "sequence", "keep_fraction": 0.5}},
        {"before": {"signal": "ngram", "keep_fraction": 0.5, "pool": 16}},
        {"weights": {"kind": "blocks", "active_fraction": 0.25, "block_rows": 4, "policy": "energy"}},
    ],
)
def test_chance_at_the_same_rate_has_the_same_products_and_the_same_factor(gate):
    _, control, arm = arms_of({"mine": gate})
    assert control.name == "random"
    assert control.kind == arm.kind
    ours, theirs = (rehearse(task(mlp), one, 0, CPU) for one in (arm, control))
    seconds = [shipped_prices().step_s(one.work, arm.kind) for one in (ours, theirs)]
    for part in ("forward", "backward_dx", "backward_dw", "optimizer"):  # the choice itself is "loss" and "gate"
        assert ours.work[part].products == theirs.work[part].products, part
        assert seconds[0][part] == pytest.approx(seconds[1][part]), part


def test_a_measured_table_has_every_shape_and_the_dense_steps_own_time():
    arms = arms_of({"mine": {"backward": {"unit": "token", "keep_fraction": 0.5}}})
    torch.manual_seed(1)
    small = task(mlp)
    before = [p.clone() for p in small.make_model(0, CPU).parameters()]
    table = measure(small, arms, 0, CPU, rounds=3)
    assert table.source == "measured"
    assert min(table.factors.values()) >= 1
    assert set(table.factors) == {"token"}
    for arm in arms:
        work = rehearse(small, arm, 0, CPU).work
        assert {p.key for c in work.values() for p in c.products} <= set(table.products_ps)
    assert dense_step_s(small, table, 0, CPU) * 1000 == pytest.approx(table.check["dense_ms"])
    assert all(torch.equal(a, b) for a, b in zip(before, small.make_model(0, CPU).parameters(), strict=True))
    assert set(table.check["steps"]) == {"random", "mine"}


class Routed(torch.nn.Module):
    """Does more for some batches than for others of the same shape."""

    def __init__(self):
        super().__init__()
        self.body, self.calls = mlp(), 0

    def forward(self, x):
        self.calls += 1
        return self.body(x) if self.calls % 2 else self.body(x) + 0 * self.body(x)


@pytest.mark.parametrize(("model", "counted"), [(mlp, [True, True, False, False, False]), (Routed, [True] * 5)])
def test_steps_alike_are_counted_twice_and_others_each_time(model, counted):
    small = task(model)
    made = small.make_model(0, CPU)
    clock = OwnClock(TABLE, OwnArm(DENSE), made, None, torch.optim.SGD(made.parameters(), lr=0.1))
    batch, found, flops = next(iter(small.train)), [], []
    for _ in counted:
        key = clock.key(batch)
        with clock.counted(key) as part:
            with part("forward"):
                out = made(batch[:, :-1]).sum()
            with part("backward"):
                out.backward()
        made.zero_grad()
        found.append(clock.last_counted)
        flops.append(clock.flops)
    assert found == counted
    steps = [b - a for a, b in zip([0, *flops[:-1]], flops, strict=True)]
    once = flops[0]
    assert steps == ([once] * 5 if model is mlp else [once, pytest.approx(2 * once, rel=0.1)] * 2 + [once])
    assert bool(clock.notes) == (model is Routed)
