"""`spikegate bench attach`: its counts against closed forms, its document, and memory against what is promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments import bench
from experiments.benches import attach as bench_attach
from experiments.benches.attach_arms import ARMS, BLOCKS, Arm, Shape, build, count_flops, tokens
from experiments.benches.attach_memory import MICRO_BATCHES, Promise, peak, promise
from tests.experiments.console import document as printed

SMALL = Shape(width=64, layers=3, heads=2, hidden=128, vocab=50, batch=2, length=16)
SIZES = [word for name, value in vars(SMALL).items() for word in (f"--{name}", str(value))]
CPU = torch.device("cpu")


def arm(name: str, config: dict | None) -> Arm:
    return Arm(build(name, SMALL, CPU), *tokens(SMALL, CPU), config)


def products(name: str, kept: int) -> int:
    """FLOPs of a step that keeps `kept` tokens of each sequence in the backward of every linear layer."""
    s = SMALL
    matrices = 4 * s.width**2 + (3 if name == "llama" else 2) * s.width * s.hidden
    linear = s.layers * matrices + s.width * s.vocab
    attention = s.layers * 2 * s.length * s.width
    forward = s.length * (linear + attention)
    return 2 * s.batch * (forward + 2 * kept * linear + 2 * s.length * attention)  # attention itself runs in full


@pytest.mark.parametrize("name", ["transformer", "llama"])
def test_flops_are_those_of_the_products(name: str) -> None:
    if name == "llama":
        pytest.importorskip("transformers")
    assert count_flops(arm(name, None)) == products(name, SMALL.length)
    for which, kept in (("attached", 16), ("rows 1", 16), ("rows 0.5", 8), ("rows 0.25", 4)):
        assert count_flops(arm(name, ARMS[which])) == products(name, kept), which


def test_the_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["attach", *SIZES, "--models", "transformer", "--compile", "off", "--memory", "off"]
    words += ["--rounds", "7", "--interval", "1e9"]  # every ratio is narrow enough: what is checked is arithmetic, not time
    assert bench.main([*words, "--out", str(tmp_path / "attach.json")]) == 0
    found = printed(capsys.readouterr().out)
    whole = json.loads((tmp_path / "attach.json").read_text())
    assert found == whole
    assert list(whole["cells"]) == ["transformer/eager"]
    cell = whole["cells"]["transformer/eager"]
    assert set(cell["arms"]) == set(ARMS)
    assert cell["measured"]["base"] == "plain"
    for name, row in cell["arms"].items():
        ratio = whole["flops"][f"transformer/{name}"] / whole["flops"]["transformer/plain"]
        assert row["flop_ratio"] == ratio
        assert row["time"]["low"] <= row["time"]["median"] <= row["time"]["high"]
        if ratio < 1:
            assert row["conversion"] == pytest.approx((1 - row["time"]["median"]) / (1 - ratio))
        else:
            assert row["conversion"] is None
    assert [target["of"] for target in whole["targets"]] == [f"transformer/eager, {name}" for name in ARMS]
    for target in whole["targets"]:
        word, limit = target["target"].split()
        assert target["met"] == (target["value"] <= float(limit) if word == "<=" else target["value"] >= float(limit))
    assert whole["shape"] == vars(SMALL)
    assert whole["versions"]["torch"] == torch.__version__


def test_an_interruption_prints_what_is_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[object] = []
    timed = bench_attach.ratios.probe

    def probe(call, device, clock):
        inner = timed(call, device, clock)

        def once() -> float:
            steps.append(call)
            if len(steps) > (bench_attach.WARM_UP + 2) * (len(ARMS) + 2):
                raise KeyboardInterrupt
            return inner()

        return once

    monkeypatch.setattr(bench_attach.ratios, "probe", probe)
    words = ["attach", *SIZES, "--models", "transformer", "--compile", "off"]
    assert bench.main(words) == 130
    out = capsys.readouterr().out
    found = printed(out)
    assert "too noisy" in out  # two rounds give no interval
    assert {target["met"] for target in found["targets"]} == {None}
    assert found["interrupted"] is True
    assert found["targets"]


def test_wrong_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--models", "gru"], "--models gru: known are transformer, llama"),
        (["--rounds", "0"], "most_rounds = 0"),
        (["--hidden", "100"], "--hidden 100 must be a multiple of --width 768"),
        (["--batch", "0"], "--batch 0: must be at least 1"),
    ):
        assert bench.main(["attach", *words]) == 2
        assert said in capsys.readouterr().err


def test_what_is_promised_is_what_a_step_holds() -> None:
    s = SMALL
    whole, blocks = promise(arm("transformer", None)), promise(arm("transformer", BLOCKS))
    matrices = s.layers * (4 * s.width**2 + 2 * s.width * s.hidden)
    rest = 2 * s.width * s.vocab + (2 * s.layers + 1) * s.width  # embedding, head, norms
    assert whole.gradients == 4 * (matrices + rest)
    assert blocks.gradients == 4 * (matrices // 4 + rest)
    assert blocks.optimizer == 2 * blocks.gradients + 4 * len(arm("transformer", BLOCKS).parameters)
    assert whole.parameters == blocks.parameters
    assert whole.logits == 4 * s.batch * s.length * s.vocab
    assert whole.total == sum(vars(whole).values())
    assert blocks.saved == pytest.approx(whole.saved, rel=0.01)  # strips of rows need every input


@pytest.mark.parametrize("config", [None, BLOCKS], ids=["plain", "blocks"])
def test_the_peak_is_what_was_promised(config: dict | None, monkeypatch: pytest.MonkeyPatch) -> None:
    larger = Shape(width=64, layers=4, heads=2, hidden=128, vocab=50, batch=2, length=32)
    found = peak("transformer", larger, config, "cpu", torch.get_num_threads())
    assert found.to_dict()["ratio"] == pytest.approx(1, abs=bench_attach.MEMORY_WITHIN)
    assert MICRO_BATCHES > 1  # gradients are there while a backward begins
    # held against a step whose gradients are not kept between micro-batches: the promise is not idle
    monkeypatch.setattr("experiments.benches.attach_memory.MICRO_BATCHES", 1)
    once = peak("transformer", larger, config, "cpu", torch.get_num_threads())
    assert once.measured < found.measured
    assert isinstance(once.promised, Promise)
