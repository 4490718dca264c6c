"""The fit of prices for any module: known prices are found again, and no factor makes a gate look cheaper."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.benches.any_module import GATES, GUESS, Step, fit, main
from sparse_update.own.arms import DENSE
from sparse_update.own.prices import Prices

TRUE = {"forward_flops": 14.0, "dx_flops": 30.0, "dw_flops": 22.0, "moved_bytes": 130.0, "hard_elements": 3000.0}
TRUE |= {"operations": 1.1e7, "step": 3e8}


def steps(slower: float = 1.0):
    generator = np.random.default_rng(0)
    found = []
    for setting in map(str, range(8)):
        whole = {name: float(generator.uniform(0.2, 2) * 1e10 / TRUE[name]) for name in GUESS} | {"step": 1.0}
        plain = sum(TRUE[name] * whole[name] for name in GUESS) * 1e-12
        found.append(Step(setting, DENSE, DENSE, whole, plain, 1.0))
        for kind in ("token", "blocks"):
            less = {name: value * float(generator.uniform(0.4, 1.1)) for name, value in whole.items()} | {"step": 1.0}
            seconds = sum(TRUE[name] * less[name] for name in GUESS) * 1e-12 * (slower if kind == "token" else 1.0)
            found.append(Step(setting, kind, kind, less, seconds, seconds / plain))
    return found


def test_known_prices_are_found_again():
    prices, factors, check = fit(steps())
    for name in ("dx_flops", "moved_bytes", "hard_elements", "operations"):
        assert prices[name] == pytest.approx(TRUE[name], rel=0.05), name
    assert all(measured == pytest.approx(priced, rel=0.02) for _, _, measured, priced in check)
    assert all(1.0 <= factor < 1.02 for factor in factors.values())


def test_a_kind_that_is_slower_than_its_counts_gets_a_factor():
    _, factors, check = fit(steps(slower=1.2))
    assert factors["token"] > factors["blocks"]
    for _, gate, measured, priced in check:
        assert measured <= priced * factors[gate] * 1.001  # nowhere cheaper than it was


def test_the_bench_writes_a_table_that_is_one(tmp_path, capsys):
    assert main(["--settings", "no-such"]) == 2
    assert "settings are ours-32-2" in capsys.readouterr().err
    assert main(["--rounds", "2", "--settings", "mlp-64", "--out", str(tmp_path / "t.json")]) == 0
    table = Prices.load(tmp_path / "t.json")
    assert min(table.factors.values()) >= 1
    assert len(table.about["check"]) == len(GATES)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["prices_ps"] == dict(table.prices_ps)
