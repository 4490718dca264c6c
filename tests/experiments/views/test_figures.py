"""The comparison's picture as the renderer lays it out: no name covers another, twenty arms fit, one evaluation is seen."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from scipy.optimize import isotonic_regression

from experiments.comparison.record import Arm, Comparison, Deployment, Run, Stream
from experiments.views.figures import figure
from experiments.views.labels import apart
from experiments.views.page import STYLE, THEMED
from experiments.views.rasters import surprise_figure

CHIP = {"profile": "loihi1_sanafe", "low_j": 1e-6, "mid_j": 2e-6, "high_j": 3e-6, "kind": "modelled", "source": "s"}


def run(arm: str, loss: float, evaluations: int = 8, **result: object) -> Run:
    curve = tuple((5.0 * i, loss + 1 / i - 1 / evaluations) for i in range(1, evaluations + 1))
    numbers = {"loss_nats": loss, "val_tokens": 64, "energy_j": None, "reference_s": 40.0, **result}
    return Run(f"runs/{arm}", "noisy", arm, 0, "a" * 64, numbers, curve)


def deployment(arm: str, loss: float) -> Deployment:
    losses = {f"loss_{kind}_nats": loss for kind in ("float", "quantised", "simulated")}
    return Deployment(f"runs/{arm}/deploy", "noisy", arm, 0, {"arm": arm, "val_tokens": 64, "energy": [CHIP], **losses})


def stream(losses: dict[str, float], name: str = "noisy", **changes: int) -> Stream:
    """Arms with these end losses; the first one deployed."""
    arms = {arm: Arm(arm, (run(arm, loss, **changes),)) for arm, loss in losses.items()}
    first = next(iter(losses))
    return Stream(name, arms, (deployment(first, losses[first]),), ())


def names_at_the_edge(picture: Figure) -> list[Annotation]:
    picture.draw_without_rendering()
    return [text for ax in picture.axes for text in ax.texts if isinstance(text, Annotation)]


def boxes(names: list[Annotation]) -> list[np.ndarray]:
    """(left, bottom, right, top) of the words alone, in pixels."""
    return [Text.get_window_extent(name).extents for name in names]


CLOSE = {"surprise": 1.6100, "random": 1.6104, "dense": 1.6106, "dense_half_batch": 1.6107}
MANY = {f"surprise_middle_{i}": 1.6 + 0.0004 * i * (i % 3) for i in range(20)}


@pytest.mark.parametrize("losses", [CLOSE, MANY, {"surprise": 1.5, "dense": 3.5}], ids=["close", "twenty", "far"])
@pytest.mark.parametrize("flat", [False, True])
def test_no_name_covers_another_and_all_are_on_the_picture(losses: dict[str, float], flat: bool) -> None:
    picture = figure(Comparison({"clean": stream(losses, "clean"), "noisy": stream(losses)}), flat=flat)
    names = names_at_the_edge(picture)
    told = {name.get_text().split(" ")[0] for name in names}
    assert told == set(losses)
    width, height = picture.bbox.width, picture.bbox.height
    for box in boxes(names):
        assert box[0] >= -0.5
        assert box[2] <= width + 0.5
        assert box[1] >= -0.5
        assert box[3] <= height + 0.5
    for (a, one), (b, other) in itertools.combinations(zip(names, boxes(names), strict=True), 2):
        covers = min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(one[1], other[1])
        assert not covers, f"{a.get_text()!r} covers {b.get_text()!r}"


def test_arms_of_one_colour_differ_in_their_lines() -> None:
    picture = figure(Comparison({"noisy": stream(MANY)}))
    lines = [line for line in picture.axes[1].lines if len(np.asarray(line.get_xdata())) == 8]
    looks = {(line.get_color(), str(line._dash_pattern)) for line in lines}  # type: ignore[attr-defined]
    assert len(lines) == len(looks) == 20


def test_many_streams_stay_as_wide_as_two() -> None:
    streams = {f"s{i}": stream(CLOSE, f"s{i}") for i in range(5)}
    two = figure(Comparison(dict(list(streams.items())[:2])))
    five = figure(Comparison(streams))
    assert five.get_figwidth() == two.get_figwidth()
    assert five.get_figheight() > 2.5 * two.get_figheight()
    titles = [ax.get_title(loc="left") for ax in five.axes if ax.axison]
    assert len(titles) == 10
    assert len(five.axes) == 12  # two rows of panels for each pair of streams; the last pair is half empty


def test_a_single_evaluation_is_a_dot() -> None:
    (panel,) = figure(Comparison({"noisy": Stream("noisy", {"dense": Arm("dense", (run("dense", 1.6, 1),))}, (), ())})).axes
    (line,) = panel.lines
    assert line.get_marker() == "o"
    assert panel.get_ylim()[0] < 1.6 < panel.get_ylim()[1]


def test_flops_that_hardly_differ_do_not_fill_the_axis() -> None:
    arms = {}
    for i, name in enumerate(("dense", "random_50", "surprise_50")):
        numbers = {"flops": 8.84e12 * (1 + 1e-5 * i), "prequential": {"loss_nats": 2.2 + 0.01 * i}}
        arms[name] = Arm(name, (run(name, 2.2, **numbers),))
    picture = figure(Comparison({"drift": Stream("drift", arms, (), ())}))
    picture.draw_without_rendering()
    panel = picture.axes[-1]
    assert "prequential" in panel.get_title(loc="left")
    assert panel.xaxis.get_offset_text().get_text() == ""
    low, high = panel.get_xlim()
    assert (high - low) / high > 0.05


def test_names_move_as_little_as_they_must() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        wanted = rng.uniform(0.2, 0.8, size=rng.integers(1, 9))
        size = float(rng.uniform(0.01, 0.08))
        order = np.argsort(wanted, kind="stable")
        offsets = size * (np.arange(len(wanted)) + 0.5)
        best = isotonic_regression(wanted[order] - offsets).x  # least squares under "in order, at least a size apart"
        expected = np.clip(best, 0, 1 - size * len(wanted)) + offsets
        found = np.asarray(apart(list(wanted), [size] * len(wanted)))
        assert found[order] == pytest.approx(expected)
    assert apart([0.5, 0.5], [1.0, 1.0]) == [0.0, 1.0]  # more than fits is centred


def test_quartiles_close_to_each_other_can_be_read() -> None:
    picture = surprise_figure([2.0, 2.01, 2.02, 2.03, 9.0])
    picture.draw_without_rendering()
    shares = [text.get_window_extent().extents for text in picture.axes[0].texts if "%" in text.get_text()]
    assert len(shares) == 3
    for one, other in itertools.combinations(shares, 2):
        assert min(one[3], other[3]) <= max(one[1], other[1]), "no two at one height"


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two #rrggbb colours, WCAG 2.1."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_names_of_arms_stand_out_on_the_page(dark: bool) -> None:
    light_part, dark_part = STYLE.split("prefers-color-scheme:dark", 1)
    values = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", dark_part if dark else light_part))
    from experiments.views.figures import ARM_COLOURS, MORE_COLOURS

    for colour in (*ARM_COLOURS.values(), *MORE_COLOURS):
        variable = re.match(r"var\(--(\w+)\)", THEMED.get(colour.lower(), ""))
        shown = values[variable[1]] if variable else colour.lower()
        assert contrast(shown, values["card"]) >= (4.5 if dark else 2.0), (colour, shown)


@pytest.mark.parametrize("span", [1.5, 3.0, 10.0, 1000.0])
def test_joules_on_the_axis_can_be_read(span: float) -> None:
    record = {
        "arm": "surprise",
        "val_tokens": 64,
        "energy": [CHIP | {"low_j": 4e-7, "mid_j": 1.2e-6, "high_j": span * 1e-6}],
    }
    losses = {f"loss_{kind}_nats": 1.6 for kind in ("float", "quantised", "simulated")}
    one = Deployment("runs/surprise/deploy", "noisy", "surprise", 0, record | losses)
    picture = figure(Comparison({"noisy": Stream("noisy", {}, (one,), ())}), flat=True)
    picture.draw_without_rendering()
    axis = picture.axes[0].xaxis
    low, high = sorted(picture.axes[0].get_xlim())
    shown = [
        label
        for which in ("major", "minor")
        for label, place in zip(axis.get_ticklabels(which=which), axis.get_ticklocs(minor=which == "minor"), strict=True)
        if low <= place <= high and label.get_text()
    ]
    assert len(shown) >= 2
    for a, b in itertools.pairwise(sorted(label.get_window_extent().extents[::2].tolist() for label in shown)):
        assert a[1] < b[0], [label.get_text() for label in shown]
