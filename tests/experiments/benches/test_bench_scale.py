"""`python -m experiments.bench scale`: the tables, the plan, the place of what is measured, and refusals in words."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest

from experiments import bench
from experiments.benches.scaling import command
from hardware.clusters.collectives import Group, moved_bytes
from hardware.clusters.layout import Layout
from hardware.clusters.machines import load_machine
from hardware.clusters.shapes import Shape
from hardware.clusters.step import plan_step
from sparse_update.parallel.products import products
from sparse_update.transformer import ModelConfig


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_last_line_has_what_is_measured_and_what_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scale", "--plan-only", "--models", "gpt2-124m,llama3-405b", "--gpus", "64,10000"]
    assert bench.main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    document = json.loads(printed[-1])
    assert {key: document[key] for key in command.UNMEASURED} == command.UNMEASURED
    fits = [(entry["model"], entry["gpus"]) for entry in document["plan"] if entry.get("fits", True)]
    assert fits == [("gpt2-124m", 64), ("gpt2-124m", 10000), ("llama3-405b", 10000)]
    assert any(line.startswith("torchtitan_a100") and "held_out" in line for line in printed)
    assert any("llama3-405b" in line and "does not fit" in line for line in printed)
    whole = json.loads(Path(document["file"]).read_text())
    entry = whole["plan"][1]
    assert set(entry["gates"]) == {"windows", "windows, scored apart", "windows, scores known", "tokens", "weight blocks"}
    small, large = (whole["plan"][n]["gates"]["windows"]["largest_keep_that_saves"] for n in (0, 1))
    assert small > 0.9
    assert large is None  # the gate of a small model stops paying on many GPUs
    low, mid, high = entry["step_s"]
    assert 0 < low < mid < high


def test_what_is_measured_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    figures = {"ddp": {"speedup": 1.8}, "gate_share": 0.004}
    module = types.SimpleNamespace(figures=lambda words: seen.append(words) or figures)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(command.importlib, "import_module", lambda name: module)
    found = command.measured(["--rounds", "3"])
    assert found == {**command.UNMEASURED, **figures}
    assert seen == [["--rounds", "3"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "gpt9"], "--models 'gpt9': there is gpt2-124m"),
        (["--gpus", "many"], "--gpus 'many': whole numbers with commas between them"),
        (["--gpus", "0"], "--gpus 0: whole numbers from 1"),
        (["--machine", "abacus"], "no name 'abacus'; shipped names: a100_40gb"),
    ],
)
def test_what_cannot_be_planned_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["scale", "--plan-only", *words]) == 2
    assert message in capsys.readouterr().err


def test_what_is_planned_of_tensor_parallelism_is_what_our_transformer_sends() -> None:
    """Two counts by two hands: the plan's closed form, and the table that the collectives which run are held to."""
    cfg = ModelConfig(width=128, layers=5, heads=8, context=64, hidden_ratio=4, vocab_size=256)
    shape = Shape("ours", 5, 128, 512, 8, 8, 256, "plain", False, 0, 0, "sparse_update.transformer")
    layout = Layout(8, 64, 3, 1, "ddp", tensor=4)  # two data ranks of three windows
    found = [product for product in products(cfg, 6, 64, 2, 4, itemsize=2) if product.times == cfg.layers]
    group = Group(4, 4)
    sent = sum(
        product.times * moved_bytes("all_reduce", each.bytes, group)
        for product in found
        for each in (*product.forward, *product.backward)
    )
    assert sent > 0
    assert plan_step(shape, load_machine("h100_80gb"), layout).sent_bytes["activations"] == pytest.approx(sent)
    whole = sum(product.flops for product in products(cfg, 6, 64, 1, 1) if product.times == cfg.layers)
    assert whole == 6 * 64 * (shape.layer_flops() + 2 * shape.attention_flops(64))  # the plan's attention is causal


def test_a_measurement_that_fails_is_an_error_and_not_a_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: list[str]) -> None:
        raise RuntimeError("a measuring process failed (1), see above")

    monkeypatch.setattr(command, "measured", fail)
    assert bench.main(["scale", "--models", "gpt2-124m", "--gpus", "8"]) == 1
    assert "bench scale: a measuring process failed" in capsys.readouterr().err
