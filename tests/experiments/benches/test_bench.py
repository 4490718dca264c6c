"""`python -m experiments.bench gate`: the document, its arithmetic, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from experiments import bench
from experiments.benches import gate as bench_gate
from experiments.benches.gating import counted
from experiments.benches.gating.counted import Request, instructions_of_a_step
from experiments.benches.gating.products import Pool, record, replay
from experiments.benches.gating.steps import EXTRA, KINDS, How, Steps
from experiments.benches.nanogpt import PlainGPT
from hardware.meters.instructions import Instructions
from hardware.meters.ratios import Ratio
from sparse_update.step.backward import Stepper
from sparse_update.step.flops import plan_flops
from sparse_update.transformer import ModelConfig
from tests.experiments.console import document as printed

SMALLEST = ["--model", "tiny", "--batch", "2", "--compile", "off", "--precision", "fp32"]
ANY_WIDTH = ["--interval", "1e9", "--rounds", "7"]
"""Every ratio is narrow enough: what is checked is arithmetic, not time."""


@pytest.fixture
def narrow(monkeypatch):
    """A model that steps in milliseconds."""
    load = bench_gate.load_model

    def load_narrow(name, vocab):
        cfg = load(name, vocab)
        cfg.width, cfg.heads, cfg.context = 16, 2, 16
        return cfg

    monkeypatch.setattr(bench_gate, "load_model", load_narrow)


def test_the_last_line_is_the_document(narrow, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.main(["gate", *SMALLEST, *ANY_WIDTH, "--rates", "0.5,0.25", "--kinds", "all"]) == 0
    document = printed(capsys.readouterr().out)
    steps, gated = document["step"], document["gated"]["ratios"]
    assert set(steps) == set(KINDS + EXTRA)
    whole = gated["products of dense"]
    for kind, rates in steps.items():
        assert set(rates) == {"0.5", "0.25"}, kind
        for rate, row in rates.items():
            left = 1 - row["flop_ratio"]
            assert 0 < left < 1
            assert row["time"] == gated[f"{kind} {rate}"]
            assert row["conversion"] == pytest.approx((1 - row["time"]["median"]) / left)
            own = gated[f"products of {kind} {rate}"]
            assert row["bound"] == pytest.approx((whole["median"] - own["median"]) / left)
            assert row["bound_time_ratio"] == pytest.approx(1 - whole["median"] + own["median"])
            assert row["bound_interval"][0] <= row["bound"] <= row["bound_interval"][1]
            assert row["of_bound"] == pytest.approx(row["conversion"] / row["bound"])
    assert steps["sequence_before"]["0.5"]["flop_ratio"] == 0.5
    assert steps["token_rows"]["0.5"]["flop_ratio"] > steps["token_rows"]["0.25"]["flop_ratio"] > 1 / 3
    times = document["dense"]["median_s"]
    assert document["reference"] == min(times, key=times.get)
    assert {name.split("/")[0] for name in times} == {"plain gpt", "autograd", "stepper"}
    assert [target["of"] for target in document["targets"]] == [
        f"{k} {r}" for k in bench_gate.JUDGED for r in ("0.5", "0.25")
    ]
    for target in document["targets"]:
        assert target["verdict"] == ("met" if target["of_bound"] >= 0.95 else "missed")
    assert document["machine"]["threads"] == torch.get_num_threads()


def test_what_is_noisy_has_no_number(narrow, capsys):
    arguments = ["--rounds", "2", "--kinds", "blocks", "--rates", "0.5"]  # two rounds give no interval
    assert bench.main(["gate", *SMALLEST, *arguments]) == 0
    out = capsys.readouterr().out
    document = printed(out)
    row = document["step"]["blocks"]["0.5"]
    assert row["time"]["verdict"] == "too noisy"
    assert [row[key] for key in ("conversion", "bound", "of_bound")] == [None] * 3
    assert row["time"]["best"] > 0
    assert document["targets"][0]["verdict"] == "too noisy"
    assert "blocks 0.5: target 0.95 of the bound: too noisy" in out


def test_the_bound_of_known_times():
    """Products of the reference take 0.8 of it, those of a kind with 0.6 of its FLOPs 0.5: by hand."""
    whole, own = (Ratio("", "", m, m, m - 0.01, m + 0.01, 12, True) for m in (0.8, 0.5))
    found = bench_gate.bound_of(whole, own, 0.6)
    assert found == pytest.approx({"time": 0.7, "conversion": 0.75, "low": 0.7, "high": 0.8})
    noisy = Ratio("", "", 0.5, 0.5, 0.3, 0.7, 12, False)
    assert set(bench_gate.bound_of(whole, noisy, 0.6).values()) == {None}


CFG = ModelConfig(width=32, layers=3, heads=2, context=24, vocab_size=40)


@pytest.mark.parametrize("kind", [kind for kind in KINDS + EXTRA if kind != "layers_frozen"])
@pytest.mark.parametrize("rate", [0.5, 0.25])
def test_recorded_products_are_the_counted_ones(kind, rate):
    """The recording sees what ran; `plan_flops` counts from the plan alone."""
    steps = Steps(CFG, 4, torch.device("cpu"), 8)
    arm = steps.arm(kind, rate, How())
    found = record(arm.step, Pool())
    assert found.flops == arm.flops()


def test_recorded_products_of_the_dense_step_are_called_again_in_their_order():
    steps = Steps(CFG, 4, torch.device("cpu"), 8)
    pool = Pool(depth=2)
    found = record(steps.dense("stepper/explicit/fp32/eager"), pool)
    assert found.flops == plan_flops(CFG, 4).total
    again = record(replay(found), Pool())
    assert [(f, [a.shape for a in args], [a.stride() for a in args]) for f, args, _ in again.calls] == [
        (f, [a.shape for a in args], [a.stride() for a in args]) for f, args, _ in found.calls
    ]
    layers = [args[0].data_ptr() for f, args, _ in found.calls if args[0].shape == (96, 32)]
    assert len(set(layers)) > 1  # not one operand over and over
    fused = record(steps.dense("stepper/sdpa/fp32/eager"), pool)
    kinds = [f.overloadpacket.__name__ for f, _, _ in fused.calls]
    assert sum("flash_attention" in kind and "backward" not in kind for kind in kinds) == CFG.layers
    assert sum("backward" in kind for kind in kinds) == CFG.layers
    replay(found, fused)()


def test_an_interruption_prints_what_is_there(narrow, capsys, monkeypatch):
    times = bench_gate.ratios.probe
    calls = []

    def probe(step, device, clock):
        inner = times(step, device, clock)

        def once():
            calls.append(step)
            if len(calls) > 80:
                raise KeyboardInterrupt
            return inner()

        return once

    monkeypatch.setattr(bench_gate.ratios, "probe", probe)
    assert bench.main(["gate", *SMALLEST, "--rounds", "30", "--kinds", "dw_rows"]) == 130
    document = printed(capsys.readouterr().out)
    assert document["interrupted"] is True
    assert document["dense"]["rounds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "0"], "--rates 0"),
        (["--rates", "1.5"], "--rates 1.5"),
        (["--kinds", "magic"], "magic"),
        (["--model", "giant"], "--model giant"),
        (["--batch", "0"], "--batch 0"),
        (["--rounds", "0"], "most_rounds = 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    assert bench.main(["gate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_bench_lists_the_known_ones(capsys):
    assert bench.main(["nothing"]) == 2
    assert "gate" in capsys.readouterr().err
    assert bench.main(["--help"]) == 0


def test_the_plain_gpt_learns():
    torch.manual_seed(0)
    model = PlainGPT(16, 2, 2, 8, 11)
    tokens = torch.randint(0, 11, (4, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(11.0).log().item(), abs=0.2)
    assert losses[-1] < 0.7 * losses[0]


REQUEST = Request(asdict(CFG), 2, 8, "explicit", "blocks", 0.5, 1)


def test_instructions_of_a_step_are_the_difference_of_two_processes():
    asked = []

    def count(command):
        asked.append(json.loads(command[-1])["steps"])
        return Instructions(1000 + 70 * asked[-1], "stand-in")

    assert instructions_of_a_step(REQUEST, count) == Instructions(70, "stand-in")
    assert asked == [counted.FEW, counted.MORE]
    assert instructions_of_a_step(REQUEST, lambda command: None) is None


@pytest.mark.parametrize("kind", ["dense", "blocks"])
def test_the_process_takes_one_step_more_than_asked_for(kind, monkeypatch):
    taken = []
    step = Stepper.step
    monkeypatch.setattr(Stepper, "step", lambda *given, **more: taken.append(1) or step(*given, **more))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert counted.main([json.dumps({**asdict(REQUEST), "kind": kind, "steps": 3})]) == 0
    assert len(taken) == 4


def test_the_bench_shows_instructions_or_that_nothing_counts_them(narrow, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        bench_gate, "instructions_of_a_step", lambda r: None if r.kind == "dense" else Instructions(5, "stand-in")
    )
    assert bench.main(["gate", *SMALLEST, "--rounds", "1", "--kinds", "blocks", "--rates", "0.5", "--instructions"]) == 0
    out = capsys.readouterr().out
    assert printed(out)["instructions"] == {"dense 1": None, "blocks 0.5": {"count": 5, "by": "stand-in"}}
    assert "dense 1: not counted here" in out
