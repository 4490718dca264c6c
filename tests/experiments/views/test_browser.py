"""What people see, in a real headless Chromium against a real TensorBoard server: pages, runs by name, the HTML page.

Screenshots go to SPIKEGATE_SCREENSHOTS where it names a folder.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.compare import write
from experiments.comparison.collection import collect
from experiments.comparison.settings import experiment_settings
from experiments.views.hparam_rows import run_row
from experiments.views.rasters import raster_figure, surprise_figure
from experiments.views.tracking import Tracker, hparam_metrics

spec = importlib.util.spec_from_file_location("experiments_browser", Path(__file__).with_name("browser.py"))
assert spec is not None
browser = importlib.util.module_from_spec(spec)
sys.modules["experiments_browser"] = browser
assert spec.loader is not None
spec.loader.exec_module(browser)

LIMIT_S = 240.0  # a busy machine takes its time to start a server and a browser
PROFILE = {"kind": "modelled", "lower_bound": True, "unknown": ["static: no time"], "tokens": 64, "labels": []}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def chromium() -> str:
    """The browser; skips without it, or fails where SPIKEGATE_REQUIRE lists chromium."""
    program = browser.find()
    if program is None:
        reason = "no Chromium on the path (apt-get install chromium), and SPIKEGATE_CHROMIUM names none"
        if "chromium" in os.environ.get("SPIKEGATE_REQUIRE", "").split(","):
            pytest.fail(f"SPIKEGATE_REQUIRE asks for Chromium: {reason}")
        pytest.skip(reason)
    return str(program)


def train(folder: Path, arm: str, loss: float) -> None:
    """A training run as `experiments.train` leaves it, with made-up numbers."""
    run = folder / f"clean-{arm}-s0"
    result: dict[str, Any] = {"loss_nats": loss, "bits_per_byte": loss / math.log(2), "tokens": 1_000_000, "flops": 2.5e12}
    result |= {"reference_s": 20.0, "wall_s": 22.0, "peak_bytes": 5e8, "energy_j": None, "energy_reason": "not measured"}
    result |= {"keep_fraction": 0.5, "val_tokens": 64, "folder": str(run)}
    with Tracker(run) as tracker:
        tracker.text("config", f"```\narm: {arm}\n```", 0)
        for step in range(1, 9):
            values = {"loss_nats": loss + 1 / step, "val_loss_nats": loss + 1 / step, "reference_s": 2.5 * step}
            values |= {"keep_fraction": 0.5, "flops": 1e9 * step, "saved/flops_share": 0.25, "saved/reference_s_share": 0.2}
            tracker.log(step, values)
        tracker.histogram("gate/surprise_nats", [1.0, 2.0, 3.0], 8)
        tracker.figure("surprise", surprise_figure([1.0, 2.0, 3.0]))
        config = {"gate": {"signal": "ngram" if arm == "surprise" else "none"}, "optim": {"lr": 0.008}}
        config |= {"trainer": {"batch_windows": 32}}
        row = run_row("clean", arm, 0, str(run), experiment_settings(config))
        tracker.hparams(row, hparam_metrics(result))
    info = {"schema": 1, "kind": "train", "status": "finished", "stream": "clean", "arm": arm, "seed": 0}
    (run / "run.json").write_text(json.dumps(info | {"component_times_sha256": "a" * 64}))
    (run / "result.json").write_text(json.dumps(result))
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms, one of them deployed, and their comparison."""
    top = tmp_path_factory.mktemp("shown")
    for arm, loss in (("dense", 1.75), ("surprise", 1.7125)):
        train(top, arm, loss)
    out = top / "clean-surprise-s0" / "deploy"
    with Tracker(out) as tracker:
        tracker.log(1, {"deploy/loss_simulated_nats": 1.72})
        tracker.text("compatibility", "| operation | verdict |\n|---|---|\n| linear | native |")
        tracker.figure("spike raster", raster_figure({"fc1": [[0, 1, 1], [1, 0, -1]]}))
    info = {"schema": 1, "kind": "deploy", "status": "finished", "stream": "clean", "arm": "surprise", "seed": 0}
    (out / "run.json").write_text(json.dumps(info))
    record: dict[str, Any] = {"loss_float_nats": 1.7125, "loss_quantised_nats": 1.715, "loss_simulated_nats": 1.72}
    record |= {"mapped_mac_share": 0.75, "events_per_token": 20.0, "synops_per_token": 3000.0, "macs_per_token": 12288.0}
    groups = {"fc1": {"synapse": [1e-6, 2e-6, 3e-6]}}
    chip = {
        "profile": "loihi1_sanafe",
        "low_j": 1e-6,
        "mid_j": 2e-6,
        "high_j": 3e-6,
        "source": "SANA-FE",
        "by_layer": groups,
    }
    digital = {"profile": "digital45_int8_sram", "low_j": 4e-7, "mid_j": 5e-7, "high_j": 6e-7, "source": "Horowitz"}
    record |= {"energy": [PROFILE | chip, PROFILE | digital], "val_tokens": 64}
    (out / "deploy.json").write_text(json.dumps(record))
    write(collect([top]), top / "comparison")
    return top


@pytest.fixture(scope="module")
def server(chromium: str, folder: Path) -> Iterator[str]:
    """The address of a TensorBoard on that folder, at a port of its own."""
    words = [sys.executable, "-m", "tensorboard.main", f"--logdir={folder}", "--port=0", "--load_fast=false"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        said: list[str] = []
        assert process.stderr is not None
        reader = threading.Thread(target=lambda: said.extend(iter(process.stderr.readline, "")), daemon=True)
        reader.start()
        deadline = time.monotonic() + LIMIT_S
        address = None
        while address is None and time.monotonic() < deadline and process.poll() is None:
            found = re.search(r"at (http://\S+)", "".join(said))
            address = found[1] if found else None
            time.sleep(0.2)
        try:
            assert address is not None, f"TensorBoard did not start:\n{''.join(said)}"
            yield address.rstrip("/")
        finally:
            process.terminate()
            process.wait(30)
            reader.join(30)


@pytest.fixture(scope="module")
def window(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser.Browser(chromium, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def keep(tab: Any, name: str) -> None:
    """Where somebody wants to look."""
    if place := os.environ.get("SPIKEGATE_SCREENSHOTS"):
        time.sleep(10)  # charts draw after their text is there
        tab.screenshot(Path(place) / f"{name}.png")


RUNS = ("clean-dense-s0", "clean-surprise-s0")


def test_custom_scalars_compare_the_gate_with_dense(server: str, window: Any) -> None:
    tab = window.open(f"{server}/#custom_scalars")
    pages = ("gate against dense", "what the gate saved", "energy")
    charts = ("held-out loss, nats per token", "share of the work kept", "counted FLOPs", "reference seconds")
    tab.until(*pages, *charts, *RUNS, "comparison/tensorboard/clean/dense", limit_s=LIMIT_S)
    keep(tab, "custom_scalars")


def test_the_margins_of_the_energies_are_drawn(server: str, window: Any) -> None:
    tab = window.open(f"{server}/#custom_scalars")
    tab.until("energy", "nJ per token and profile", limit_s=LIMIT_S)
    shapes = f"""(() => {{ {ALL} walk(document.body);
    const card = all.find(n => n.tagName === "TF-CUSTOM-SCALAR-MARGIN-CHART-CARD");
    if (!card) return [];
    card.scrollIntoView();
    all.length = 0; walk(card);
    return all.filter(n => n.tagName === "path" && /area|line/.test(n.getAttribute("class"))).map(
      n => [n.getAttribute("class"), n.getAttribute("d") || ""]); }})()"""
    deadline = time.monotonic() + LIMIT_S
    drawn: dict[str, str] = {}
    while not {"area", "line"} <= drawn.keys() and time.monotonic() < deadline:
        time.sleep(1.0)
        drawn = {name.split()[0]: path for name, path in tab.evaluate(shapes) if len(path) > 10 and "NaN" not in path}
    keep(tab, "margin")
    assert {"area", "line"} <= drawn.keys(), drawn
    points = re.findall(r"[ML](-?[\d.]+),(-?[\d.]+)", drawn["area"])
    assert len({y for _, y in points}) == 4, "low and high of two profiles"


def test_the_hparams_table_has_one_row_per_run_and_deployment(server: str, window: Any, folder: Path) -> None:
    tab = window.open(f"{server}/#hparams")
    results = ("Result/loss_nats", "Result/energy_nj_per_token", "Result/reference_s", "Result/tflop")
    settings = ("gate.signal", "optim.lr", "trainer.batch_windows")
    rows = [f"clean {arm} s0 [{folder}/clean-{arm}-s0]" for arm in ("dense", "surprise")]
    rows.append(f"clean surprise s0 deployed [{folder}/clean-surprise-s0/deploy]")
    text = tab.until(*results, *settings, *rows, "1.7500", "1.7125", "2000.0", limit_s=LIMIT_S)
    keep(tab, "hparams")
    lines = text.splitlines()
    assert all(lines.count(row) == 1 for row in rows)
    assert not any(line.startswith("comparison/") for line in lines)


# Every element below a node, shadow roots included.
ALL = """const all = [];
const walk = n => {
  all.push(n);
  for (const c of [...(n.shadowRoot ? n.shadowRoot.children : []), ...n.children]) walk(c);
};
"""


def test_hparams_sort_by_a_click(server: str, window: Any) -> None:
    tab = window.open(f"{server}/#hparams")
    tab.until("Result/loss_nats", "1.7500", "1.7125", "1.7200", limit_s=LIMIT_S)
    click = """(() => { %s walk(document.body);
    for (const label of %s) all.find(n => n.tagName === "PAPER-ITEM" && n.textContent.trim() === label).click(); })()"""
    for direction, expected in (
        ("Ascending", ["1.7125", "1.7200", "1.7500"]),
        ("Descending", ["1.7500", "1.7200", "1.7125"]),
    ):
        tab.evaluate(click % (ALL, json.dumps(["Result/loss_nats", direction])))
        deadline, seen = time.monotonic() + LIMIT_S, [""]
        while seen != expected and time.monotonic() < deadline:
            time.sleep(0.5)
            seen = list(dict.fromkeys(re.findall(r"^1\.7\d{3}$", tab.text(), flags=re.MULTILINE)))
        assert seen == expected
    keep(tab, "hparams sorted")


def test_figures_are_there_with_their_runs(server: str, window: Any) -> None:
    tab = window.open(f"{server}/#images")
    tags = ("comparison", "joules by layer", "surprise", "spike raster")
    tab.until(*tags, *RUNS, "clean-surprise-s0/deploy", "comparison/tensorboard", limit_s=LIMIT_S)
    keep(tab, "images")


def test_text_says_where_each_joule_comes_from(server: str, window: Any) -> None:
    tab = window.open(f"{server}/#text")
    tab.until("comparison", "compatibility", "config", "energy per token", limit_s=LIMIT_S)
    for heading in ("config", "energy per token"):  # TensorBoard opens the first two
        assert tab.press(heading) == 1
    tab.until("linear", "SANA-FE", "Horowitz", "arm: dense", "arm: surprise", "static: no time", *RUNS, limit_s=LIMIT_S)
    keep(tab, "text")


def test_the_page_sorts_by_a_click_and_asks_for_nothing(folder: Path, window: Any) -> None:
    tab = window.open((folder / "comparison" / "comparison.html").as_uri())
    tab.until("Comparison: clean", "surprise against dense", "energy/token", limit_s=LIMIT_S)
    names = "[...document.querySelector('table').tBodies[0].rows].map(row => row.cells[0].textContent)"
    press = "[...document.querySelectorAll('table th')].find(h => h.textContent === {!r}).querySelector('button').click()"
    assert tab.evaluate(names) == ["dense", "surprise", "surprise, deployed"]
    tab.evaluate(press.format("loss nats"))
    assert tab.evaluate(names) == ["surprise", "surprise, deployed", "dense"]
    tab.evaluate(press.format("loss nats"))
    assert tab.evaluate(names) == ["dense", "surprise, deployed", "surprise"]
    tab.evaluate(press.format("energy/token"))
    assert tab.evaluate(names)[0] == "surprise, deployed"  # what has no figure goes last, whichever way
    loaded = "performance.getEntriesByType('resource').map(entry => entry.name)"
    assert tab.evaluate(loaded) == []
    assert tab.evaluate("document.querySelectorAll('figure svg').length") == 2
    box = "[...document.querySelectorAll('figure svg')].every(s => s.getBoundingClientRect().height > 100)"
    assert tab.evaluate(box)
    keep(tab, "page")
