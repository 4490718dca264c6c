"""`python -m experiments.bench gate`: the document, its arithmetic, and what is refused."""

from __future__ import annotations

import pytest
import torch

from experiments import bench
from experiments.benches import gate as bench_gate
from experiments.benches.nanogpt import PlainGPT
from tests.experiments.console import document as printed

SMALLEST = ["--model", "tiny", "--batch", "2", "--rounds", "2", "--compile", "off", "--precision", "fp32"]


@pytest.fixture
def narrow(monkeypatch):
    """A model that steps in milliseconds."""
    load = bench_gate.load_model

    def load_narrow(name, vocab):
        cfg = load(name, vocab)
        cfg.width, cfg.heads, cfg.context = 16, 2, 16
        return cfg

    monkeypatch.setattr(bench_gate, "load_model", load_narrow)


def test_the_last_line_is_the_document(narrow, capsys):
    assert bench.main(["gate", *SMALLEST, "--rates", "0.5,0.25", "--kinds", "all", "--rounds", "1"]) == 0
    document = printed(capsys.readouterr().out)
    assert set(document["step"]) == set(bench_gate.KINDS + bench_gate.EXTRA)
    for kind, rates in document["step"].items():
        assert set(rates) == {"0.5", "0.25"}, kind
        for row in rates.values():
            assert row["conversion"] == pytest.approx((1 - row["time_ratio"]) / (1 - row["flop_ratio"]))
            assert 0 < row["flop_ratio"] < 1
            assert row["time_ratio"] > 0
    steps = document["step"]
    assert steps["sequence_before"]["0.5"]["flop_ratio"] == 0.5
    assert steps["token_rows"]["0.5"]["flop_ratio"] > steps["token_rows"]["0.25"]["flop_ratio"] > 1 / 3
    assert document["reference"] == min(document["dense"], key=document["dense"].get)
    assert {name.split("/")[0] for name in document["dense"]} == {"plain gpt", "autograd", "stepper"}


def test_an_interruption_prints_what_is_there(narrow, capsys, monkeypatch):
    times = bench_gate.Bench._time
    calls = []

    def stop_later(self, step):
        calls.append(step)
        if len(calls) > 60:
            raise KeyboardInterrupt
        return times(self, step)

    monkeypatch.setattr(bench_gate.Bench, "_time", stop_later)
    assert bench.main(["gate", *SMALLEST, "--rounds", "30", "--kinds", "dw_rows"]) == 130
    document = printed(capsys.readouterr().out)
    assert document["interrupted"] is True
    assert document["dense"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "0"], "--rates 0"),
        (["--rates", "1.5"], "--rates 1.5"),
        (["--kinds", "magic"], "magic"),
        (["--model", "giant"], "--model giant"),
        (["--batch", "0"], "--batch 0"),
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
