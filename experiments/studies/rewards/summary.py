"""From the points of all seeds to fits, verdicts and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from experiments.comparison.statistics import Interval, interval
from experiments.views.blocks import Block
from sparse_update.objectives.preference.errors import PreferenceError
from sparse_update.objectives.preference.overoptimisation import Fit, fit_form

EXPLAINED = 0.95
"""Share of the variance that a fit is to explain."""
MAY_LOSE = 0.1
"""Share of its gain that the true reward may have lost when the flag goes up."""
NAMES = {
    "learned": "learned reward alone",
    "kl": "with a KL term",
    "no_length": "liking of length taken out",
    "ensemble": "least of an ensemble",
}
WAYS = {"best_of_n": "best-of-n", "reinforcement": "reinforcement"}


def fit_points(way: str, points: Sequence[Mapping[str, float]]) -> Fit | None:
    """The published form over a curve's points, gains from its first one; None where there are too few."""
    try:
        return fit_form(way, [p["d"] for p in points], [p["true"] - points[0]["true"] for p in points])
    except PreferenceError:
        return None


def mean_points(curves: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Points of several seeds averaged place by place, as far as all go."""
    rows = zip(*curves, strict=False)
    keys = ("d", "true", "proxy", "length")
    return [{key: sum(row[key] for row in place) / len(place) for key in keys} for place in rows]


def flagged(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a run's true reward had gained and lost when it was flagged; None where it was not.

    The gain is that of the highest evaluation up to the flag, which noise makes too high rather than too low; `lost` is the
    share of it that is gone at the flag.
    """
    if run["flag"] is None:
        return None
    points = [point for point in run["points"] if point["step"] <= run["flag"]["step"]]
    true = [point["true"] for point in points]
    gain = max(true) - true[0]
    return {
        "step": points[-1]["step"],
        "d": points[-1]["d"],
        "true": true[-1],
        "gain": gain,
        "lost": (max(true) - true[-1]) / gain if gain > 0 else float("inf"),
        "p": run["flag"]["true_p"],
    }


def summarise(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fits of every seed and of the mean curve, flags, and ends, by way and arm."""
    found: dict[str, Any] = {"fits": {}, "flags": {}, "ends": {}}
    for way in WAYS:
        for arm in dict.fromkeys(arm for seed in seeds for arm in seed[way]):
            curves = [
                seed[way][arm] if way == "best_of_n" else seed[way][arm]["points"] for seed in seeds if arm in seed[way]
            ]
            each = [fit for curve in curves if (fit := fit_points(way, curve)) is not None]
            mean = fit_points(way, mean_points(curves))
            found["fits"][f"{way}/{arm}"] = {
                "seeds": [described(fit) for fit in each],
                "mean_curve": None if mean is None else described(mean),
                "explained": stated([fit.explained for fit in each]),
                "turning_d": stated([fit.turning_point for fit in each if fit.turning_point is not None]),
            }
            found["ends"][f"{way}/{arm}"] = {
                "start": stated([curve[0]["true"] for curve in curves]),
                "best": stated([max(p["true"] for p in curve) for curve in curves]),
                "end": stated([curve[-1]["true"] for curve in curves]),
                "end_d": stated([curve[-1]["d"] for curve in curves]),
            }
    for arm in dict.fromkeys(arm for seed in seeds for arm in seed["reinforcement"]):
        found["flags"][arm] = [flagged(seed["reinforcement"][arm]) for seed in seeds if arm in seed["reinforcement"]]
    if "learned" in found["flags"]:
        stops = [flag for flag in found["flags"]["learned"] if flag]
        found["ends"]["reinforcement/gate"] = {"end": stated([flag["true"] for flag in stops])}
    return found


def described(fit: Fit) -> dict[str, Any]:
    return asdict(fit) | {"turning_d": fit.turning_point, "peak_gain": fit.peak}


def stated(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean with its 95 % interval over seeds."""
    if not values:
        return {"mean": None, "low": None, "high": None, "n": 0}
    found = interval(values)
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n}


def verdicts(found: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Sentences, and whether every target is met: both fits of the arm that follows the learned reward alone in every
    seed, and the flag in time in every seed."""
    said, met = [], []
    for way, name in WAYS.items():
        fits = found["fits"].get(f"{way}/learned", {"seeds": []})["seeds"]
        if fits:
            shares = [fit["explained"] for fit in fits]
            met.append(min(shares) >= EXPLAINED)
            said.append(
                f"the published form explains at least {EXPLAINED} of the variance of {name}: {_yes(met[-1])}; "
                f"{', '.join(f'{share:.3f}' for share in shares)} by seed"
            )
    flags = found["flags"].get("learned", [])
    if flags:
        met.append(all(flag is not None and flag["lost"] < MAY_LOSE for flag in flags))
        lost = ", ".join("never flagged" if flag is None else f"{flag['lost']:.3f}" for flag in flags)
        said.append(f"the flag goes up before a tenth of the gain is lost: {_yes(met[-1])}; lost by seed: {lost}")
    return said, bool(met) and all(met)


def _yes(met: bool) -> str:
    return "yes" if met else "no"


def tables(found: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Fits and ends, flags, and the reward models."""
    rows = []
    for key, ends in found["ends"].items():
        way, arm = key.split("/")
        fit = found["fits"].get(key)
        rows.append(
            (
                WAYS[way],
                "stopped by the flag" if arm == "gate" else NAMES[arm],
                *(_cell(ends.get(part)) for part in ("start", "best", "end", "end_d")),
                *(("-", "-") if fit is None else (_cell(fit["explained"]), _cell(fit["turning_d"], 2))),
            )
        )
    head = ("way", "reward followed", "true: start", "best", "end", "d at the end", "variance explained", "turns at d")
    flags = []
    for arm, each in found["flags"].items():
        ran = [seed for seed in seeds if arm in seed["reinforcement"]]
        for seed, flag in zip(ran, each, strict=True):
            cells = ("never", "-", "-", "-", "-") if flag is None else _flag_cells(flag)
            flags.append((NAMES[arm], str(seed["seed"]), *cells))
    models = [
        (str(seed["seed"]), str(number), f"{model['accuracy']:.3f}", f"{model['error']:.3f}", f"{model['floor']:.3f}")
        for seed in seeds
        for number, model in enumerate(seed["reward_models"])
    ]
    controls = [
        (str(seed["seed"]), f"{p['beta']:g}", f"{p['d']:.2f}", f"{p['true']:.3f}", f"{p['proxy']:.2f}")
        for seed in seeds
        for p in seed["dpo"]
    ]
    return [
        Block("True reward and fits", head, rows, ("Mean [95 % interval] over seeds.",)),
        Block("Flags", ("reward followed", "seed", "step", "d", "gain", "share of it lost", "p"), flags),
        Block("Reward models", ("seed", "model", "accuracy", "calibration error", "of a perfect model"), models),
        Block("DPO on the same pairs", ("seed", "beta", "d", "true", "proxy"), controls),
    ]


def _flag_cells(flag: Mapping[str, Any]) -> tuple[str, ...]:
    return f"{flag['step']}", f"{flag['d']:.2f}", f"{flag['gain']:.3f}", f"{flag['lost']:.3f}", f"{flag['p']:.1g}"


def _cell(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    if value is None or value["mean"] is None:
        return "-"
    return Interval(value["mean"], value["low"], value["high"], None, value["n"], 0.95).text(digits)
