"""The three ways to the best size beside the law that the losses were made from."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.laws.form import fit
from experiments.laws.gain import gain_law
from experiments.laws.points import LawError, Point
from experiments.laws.ways import by_law, envelope, parabolas
from tests.experiments.laws.conftest import FLOPS_EACH, LAW, grid


def equal_flops() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seven sizes about the best one at each of four budgets."""
    n, c = [], []
    for budget in np.geomspace(1e12, 1e15, 4):
        best = LAW.best_size(budget / FLOPS_EACH)
        n += list(best * np.geomspace(0.5, 2, 7))
        c += [budget] * 7
    n_P, c_P = np.array(n), np.array(c)
    return n_P, c_P, LAW.loss(n_P, c_P / FLOPS_EACH / n_P)


def test_parabolas_find_the_exponent():
    found = parabolas(*equal_flops())
    assert found.exponent == pytest.approx(LAW.size_share, abs=0.005)
    assert found.at(1e13) == pytest.approx(LAW.best_size(1e13 / FLOPS_EACH), rel=0.05)


def test_the_envelope_finds_the_exponent():
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 3e6, 25), np.geomspace(1e5, 1e9, 25)))
    found = envelope(n, FLOPS_EACH * n * d, LAW.loss(n, d))
    assert found.exponent == pytest.approx(LAW.size_share, abs=0.05)


def test_the_law_gives_the_same_best_size():
    n, d = grid()
    found = by_law(fit(n, d, LAW.loss(n, d)).law, n, d, FLOPS_EACH * n * d)
    assert found.exponent == pytest.approx(LAW.size_share)
    assert found.at(1e14) == pytest.approx(LAW.best_size(1e14 / FLOPS_EACH), rel=1e-4)


def test_parameters_without_embeddings_bend_the_exponent():
    """The known cause of disagreement between published laws (Pearce and Song, arXiv 2406.12907): a law in all parameters,
    fitted over those without embeddings, has a larger exponent of the best size at small sizes."""
    width = np.geomspace(32, 512, 8)
    blocks, table = 12 * 6 * width**2, 2 * 256 * width
    n, d = (v.ravel() for v in np.meshgrid(blocks + table, np.geomspace(1e6, 1e8, 8)))
    without = np.meshgrid(blocks, np.ones(8))[0].ravel()
    loss, flops = LAW.loss(n, d), FLOPS_EACH * without * d
    whole, part = (by_law(fit(size, d, loss).law, size, d, flops).exponent for size in (n, without))
    assert whole == pytest.approx(LAW.size_share, abs=1e-3)
    assert part > whole + 0.01


def test_too_few_runs_are_refused_with_what_is_missing():
    n, c, loss = equal_flops()
    with pytest.raises(LawError, match="1 budgets of equal FLOPs"):
        parabolas(n[:7], c[:7], loss[:7])
    with pytest.raises(LawError, match="0 sizes have runs at two budgets"):
        envelope(n[:7], c[:7], loss[:7])
    with pytest.raises(LawError, match="beyond the sizes"):
        parabolas(*(v.reshape(4, 7)[:, :3].ravel() for v in (n, c, loss)))


def point(parameters: float, tokens: float, loss: float, arm: str, seed: int) -> Point:
    return Point(int(parameters), None, int(tokens), 6 * parameters * tokens, loss, seed, arm, "noisy", float(tokens))


def test_a_plane_of_gains_comes_back_and_says_where_it_ends():
    dense, gated = [], []
    for size in (1e5, 2e5, 4e5, 8e5):
        for each in (2, 8, 32):
            for seed in range(3):
                tokens = size * each
                loss = float(LAW.loss(size, tokens)) + 0.001 * seed
                gain = 0.03 - 0.01 * np.log2(size / 1e5)
                dense.append(point(size, tokens, loss, "dense", seed))
                gated.append(point(size, tokens, loss - gain, "surprise", seed))
    found = gain_law(dense, [*gated, point(3e5, 1e6, 2, "surprise", 9)], LAW)
    assert found.by_size.value == pytest.approx(-0.01)
    assert found.by_tokens.value == pytest.approx(0, abs=1e-9)
    assert found.zero_at(8) == pytest.approx(8e5, rel=1e-3)  # 3 doublings
    assert "falls with the parameters" in found.verdict
    assert len(found.left_out) == 1
    first = found.pairs[0]
    assert first.time_ratio == pytest.approx(
        LAW.tokens_for(1e5, LAW.loss(1e5, 2e5)) / LAW.tokens_for(1e5, LAW.loss(1e5, 2e5) - 0.03)
    )


def test_a_gain_at_one_size_is_no_law():
    dense = [point(1e5, 1e5 * k, 3, "dense", 0) for k in range(1, 7)]
    gated = [point(1e5, 1e5 * k, 2.9, "surprise", 0) for k in range(1, 7)]
    with pytest.raises(LawError, match="6 pairs of 1 sizes"):
        gain_law(dense, gated)
