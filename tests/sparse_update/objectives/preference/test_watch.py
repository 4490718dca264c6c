"""The flag of over-optimisation on synthetic series: false alarms, and how soon a real fall is seen."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_update.objectives.preference.errors import PreferenceError
from sparse_update.objectives.preference.watch import Watch, WatchConfig

PROMPTS, OUTPUTS, EVALUATIONS = 48, 8, 60


def watched(true_TP, proxy_TP, **settings):
    watch = Watch(WatchConfig(evaluations=EVALUATIONS, **settings))
    for step, (proxy, true) in enumerate(zip(proxy_TP, true_TP, strict=True)):
        watch.add(step, proxy, true)
    return watch.flag


def drawn(share_TP, generator):
    """Means of 0/1 scores of `OUTPUTS` outputs."""
    return generator.binomial(OUTPUTS, np.clip(share_TP, 0, 1)) / OUTPUTS


def rising(generator):
    return np.linspace(0, 3, EVALUATIONS)[:, None] + generator.normal(0, 0.3, (EVALUATIONS, PROMPTS))


def plateau(generator):
    """True reward as it was, drawn anew."""
    return drawn(np.tile(generator.beta(2, 2, PROMPTS), (EVALUATIONS, 1)), generator)


def risen(generator):
    """True reward that rises to a plateau."""
    level = 0.3 + 0.5 * (1 - np.exp(-np.arange(EVALUATIONS) / 6))
    return drawn(np.tile(level[:, None], (1, PROMPTS)), generator)


def wandering(generator):
    """Each prompt goes its own way, up or down, and the mean stays."""
    steps = generator.normal(0, 0.03, (EVALUATIONS, PROMPTS))
    return drawn(0.5 + steps.cumsum(0), generator)


def rare(generator):
    """Few right answers: skewed scores."""
    return drawn(np.full((EVALUATIONS, PROMPTS), 0.02), generator)


@pytest.mark.parametrize("series", [plateau, risen, wandering, rare])
def test_a_true_reward_that_does_not_fall_is_hardly_ever_flagged(series):
    runs = 80
    flags = sum(
        watched(series(generator), rising(generator)) is not None for generator in map(np.random.default_rng, range(runs))
    )
    assert flags <= 0.05 * runs


def test_a_proxy_that_does_not_rise_is_no_hacking():
    generator = np.random.default_rng(0)
    falling = drawn(np.tile(np.linspace(0.9, 0.3, EVALUATIONS)[:, None], (1, PROMPTS)), generator)
    assert watched(falling, generator.normal(0, 1, (EVALUATIONS, PROMPTS)) - np.arange(EVALUATIONS)[:, None]) is None
    assert watched(falling, rising(generator)) is not None


def test_a_fall_by_the_published_form_is_flagged_before_a_tenth_of_the_gain_is_lost():
    before, runs = 0, 40
    d = np.linspace(0, 4, EVALUATIONS)
    curve = 0.4 + d * (0.6 - 0.2 * d)  # turns at 1.5 with a gain of 0.45, and is back to 0 at 3
    late = next(t for t in range(EVALUATIONS) if d[t] > 1.5 and curve[t] < 0.85 - 0.045)
    for seed in range(runs):
        generator = np.random.default_rng(seed)
        true = generator.binomial(32, np.clip(np.tile(curve[:, None], (1, 128)), 0, 1)) / 32
        proxy = np.linspace(0, 3, EVALUATIONS)[:, None] + generator.normal(0, 0.3, true.shape)
        flag = watched(true, proxy)
        assert flag is not None
        assert d[flag.step] > 1.5
        before += flag.step <= late
    assert before >= 0.9 * runs


def test_slopes_are_those_of_least_squares():
    generator = np.random.default_rng(1)
    true = generator.normal(0, 0.01, (4, 20)) - 0.1 * np.arange(4)[:, None]
    proxy = generator.normal(0, 0.01, (4, 20)) + 0.2 * np.arange(4)[:, None]
    flag = watched(true, proxy)
    assert flag is not None
    assert flag.true_slope == pytest.approx(np.polyfit(np.arange(4), true.mean(1), 1)[0])
    assert flag.proxy_slope == pytest.approx(np.polyfit(np.arange(4), proxy.mean(1), 1)[0])
    assert "over-optimised at step 3" in flag.text()


def test_a_watch_resumes_to_the_same_flag():
    generator = np.random.default_rng(2)
    true = drawn(np.tile(np.linspace(0.8, 0.3, 20)[:, None], (1, PROMPTS)), generator)
    proxy = rising(generator)[:20]
    whole, first = Watch(), Watch()
    for step in range(6):
        first.add(step, proxy[step], true[step])
    again = Watch()
    again.load_state_dict(first.state_dict())
    for step in range(20):
        whole.add(step, proxy[step], true[step])
        if step >= 6:
            again.add(step, proxy[step], true[step])
    assert whole.flag is not None
    assert again.flag == whole.flag
    assert Watch().state_dict()["flag"] is None


def test_what_cannot_be_watched_is_refused():
    watch = Watch()
    with pytest.raises(PreferenceError, match="8 at least"):
        watch.add(0, np.zeros(3), np.zeros(3))
    watch.add(0, np.zeros(9), np.zeros(9))
    with pytest.raises(PreferenceError, match="10 prompts after 9"):
        watch.add(1, np.zeros(10), np.zeros(10))
    with pytest.raises(PreferenceError, match="not finite"):
        watch.add(1, np.zeros(9), np.full(9, np.nan))
    for bad in ({"alpha": 0.0}, {"evaluations": 0}, {"lengths": (8, 4)}, {"lengths": (2, 4)}):
        with pytest.raises(PreferenceError):
            WatchConfig(**bad)
