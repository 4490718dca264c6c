"""The examples run as they are and print what they promise; the findings are whole and listed. The findings themselves run
under `make findings`: each installs packages of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environments import missing

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FINDINGS = sorted((ROOT / "findings").rglob("*.sh"))
SHORTER = {
    "own_loop": {"STEPS = 100  #": "STEPS = 12  #"},
    "own_model": {"budget_steps=100": "budget_steps=57"},
    "sweep_page": {
        "budget_tokens: 40000": "budget_tokens: 8000",
        "  random: {{set: [gate=random, gate.keep_fraction=0.7]}}\n": "",
    },
}
"""What the short runs of the examples have in the place of what a reader finds there. Fewer steps of `own_model` are no
budget that all arms use up to 2 %."""
LENGTHS = pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.soak)], ids=["short", "whole"])
INTERVAL = r"\d+\.\d{4} \[-?\d+\.\d{4}, \d+\.\d{4}\]"


def run(name: str, folder: Path, *needs: str, short: bool = False) -> str:
    """What an example prints, run in an empty folder with warnings as errors; `short`: with less training in it."""
    for module in needs:
        pytest.importorskip(module)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SPIKEGATE_EXAMPLES": str(folder / "out"), "MPLBACKEND": "agg"}
    script = ROOT / "examples" / f"{name}.py"
    if short:
        text = script.read_text(encoding="utf-8")
        for whole, less in SHORTER[name].items():
            assert text.count(whole) == 1, f"{script.name}: {whole!r}"
            text = text.replace(whole, less)
        script = folder / script.name
        script.write_text(text, encoding="utf-8")
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.slow
@LENGTHS
def test_a_signal_of_ones_own_in_a_loop_of_ones_own(short, tmp_path):
    said = run("own_loop", tmp_path, "transformers", short=short)
    rows = {m[1]: m for m in re.finditer(r"^(\w+) +(\d+)% +([\d.]+) +([\d.]+) +[\d.]+ +\d+%$", said, re.M)}
    assert set(rows) == {"dense", "random", "compressed_size"}
    assert [int(rows[arm][2]) for arm in ("dense", "random", "compressed_size")] == [100, 60, 60]
    assert len({row[3] for row in rows.values()}) == 1  # equal operations, or the comparison means nothing
    assert float(rows["random"][4]) == pytest.approx(0.6 * float(rows["dense"][4]), rel=0.01)
    for arm in rows:
        assert re.search(rf"^{arm} +{INTERVAL} nats", said, re.M), arm
    for control in ("dense", "random"):
        sentence = rf"compressed_size beats {control}: (yes|no); [^()]*\([^()]*p (=|<) ([\d.]+)\)"
        answer = re.search(sentence, " ".join(said.split()))
        assert answer, said
        assert (answer[1] == "yes") == (float(answer[3]) < 0.05)  # the word and the number agree
    assert is_picture(tmp_path / "out" / "own_loop.png")


@pytest.mark.slow
@LENGTHS
def test_a_model_of_ones_own_on_the_counted_clock(short, tmp_path):
    said = run("own_model", tmp_path, "transformers", short=short)
    for arm in ("dense", "random", "gated"):
        assert re.search(rf"^  {arm} +2 +{INTERVAL}", said, re.M), said
    for control in ("dense", "random at the same rate"):
        sentence = rf"llama: gated beats {control}: (yes|no); [^()]*\(n = 2[^()]* p (=|<) ([\d.]+)\)"
        answer = re.search(sentence, " ".join(said.split()))  # the sentence is folded where its numbers make it long
        assert answer, said
        assert (answer[1] == "yes") == (float(answer[3]) < 0.05)
    steps = dict(re.findall(r"^(\w+) +([\d.]+) of a plain step by the clock$", said, re.M))
    assert float(steps["random"]) == pytest.approx(float(steps["gated"]), abs=0.03)
    runs = sorted(path.parent.name for path in (tmp_path / "out" / "own_model").glob("*/result.json"))
    assert runs == [f"{arm}-s{seed}" for arm in ("dense", "gated", "random") for seed in (0, 1)]
    assert is_picture(tmp_path / "out" / "own_model.png")


@pytest.mark.slow
def test_a_network_of_snntorch_on_the_chip(tmp_path):
    said = run("spiking_digits", tmp_path, "snntorch", "sklearn")
    right = dict(
        re.findall(r"^(float network|simulated \(ours, \w+\)|snnTorch [\d.]+ \(float64\)) +([\d.]+)% right", said, re.M)
    )
    assert len(right) == 4
    values = [float(value) for value in right.values()]
    assert values[0] > 90
    assert max(values) - min(values) <= 2
    assert "the same spikes" in said
    assert "2 of 128 cores on 1 chip" in said
    for profile in ("loihi1_davies2018", "loihi1_sanafe", "digital45_int8_sram, dense once a sample"):
        row = re.search(rf"^energy, {profile} +(\S+) +(\S+) +(\S+)  uJ/sample +modelled, at least +\S", said, re.M)
        assert row, profile
        low, mid, high = map(float, row.groups())
        assert 0 < low <= mid <= high
    assert is_picture(tmp_path / "out" / "spiking_digits_raster.png")
    assert is_picture(tmp_path / "out" / "spiking_digits_cores.png")


@pytest.mark.slow
@LENGTHS
def test_a_sweep_and_its_page(short, tmp_path):
    said = run("sweep_page", tmp_path, short=short)
    arms = ("dense", "surprise") if short else ("dense", "random", "surprise")
    for arm in arms:
        assert re.search(rf"{arm} +2 +{INTERVAL}", said), said
    assert f"stream noisy: {', '.join(arms)}" in said
    verdicts = re.findall(r"surprise beats (?:dense|random)[^:]*: (?:yes|no); [^()]*\(n = 2", " ".join(said.split()))
    assert len(verdicts) == len(arms) - 1, said
    page = (tmp_path / "out" / "tiny_sweep" / "comparison" / "comparison.html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert not re.search(r"(?:src|href)=[\"']?https?:", page)
    picture = tmp_path / "out" / "sweep_page.png"
    if "no Chromium here" in said:
        missing("chromium", "no browser for the screenshot")
    assert is_picture(picture)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_notebook_too(path):
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.read(path)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[:2] == ["markdown", "code"]
    assert kinds.count("markdown") >= 4
    assert notebook.cells[0].source.startswith("# ")
    assert f"`{path.name}`" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_a_finding_is_whole_and_stands_alone(path):
    text = path.read_text(encoding="utf-8")
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    head = text.split("set -euo pipefail")[0]
    assert all(re.search(rf"^# {word}", head, re.M) for word in ("Version:", "Expected:", "Seen:", "Output"))
    assert "mktemp -d" in text
    assert "trap 'rm -rf" in text
    assert not re.search(r"spikegate|sparse_update|experiments", text)
    assert text.count("behaviour changed") >= 1
    installed = re.findall(r"(?<=[\s])([A-Za-z][\w-]*)==([\d.]+)", text)
    assert installed
    compile(re.search(r"<<'END'\n(.*?)\nEND$", text, re.S | re.M)[1], path.name, "exec")
    assert f"`{path.stem}`" in (ROOT / "findings" / "README.md").read_text(encoding="utf-8")


def test_no_finding_is_listed_without_its_script():
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "findings" / "README.md").read_text(encoding="utf-8"), re.M)
    assert listed == [path.stem for path in FINDINGS]
