"""The language-model experiment on a small text: all arms once, resumed without training, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.studies import spiking_lm
from neuro.graph import load_graph
from tests.experiments.console import document as printed

SMALL = ["--tokens", "6000", "--batch", "4", "--context", "16", "--width", "16", "--layers", "1", "--heads", "2"]
SMALL += ["--eval-tokens", "320", "--lava-samples", "0", "--quiet"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number}.txt").write_text(
            "".join(f"{i * (number + 3) % 97} birds sat on wall {i}; " for i in range(60))
        )
    return folder


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs")
    assert spiking_lm.main([*SMALL, "--text", str(texts), "--out", str(out)]) == 0
    return out


def last_line(capsys) -> dict:
    return printed(capsys.readouterr().out)


def test_every_arm_learns_and_the_simulator_equals_the_grid(finished, texts, capsys):
    """The second call trains nothing: each arm is at its last step already."""
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/checkpoint/meta.json")}
    assert len(before) == 3
    assert spiking_lm.main([*SMALL, "--text", str(texts), "--out", str(finished)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    document = last_line(capsys)
    assert document["holds"] is True
    assert document["held_out_tokens"] == 320
    for arm, seeds in document["arms"].items():
        (found,) = seeds.values()
        assert found["loss_float_nats"] < 3.5, arm  # 5.5 for 256 bytes untrained
        if arm == "transformer":
            continue
        assert found["equals_grid"]
        assert abs(found["loss_simulated_nats"] - found["loss_float_nats"]) < 0.2
        assert found["health"] == {"wraps": 0, "wide": 0, "payload_overflows": 0}
        assert found["mapped_mac_share"] == found["macs_per_token"]["chip"] / sum(found["macs_per_token"].values())
        assert found["chip"]["apart"]["chips"] == 1
        gap = found["loss_simulated_nats"] - document["arms"]["transformer"]["0"]["loss_float_nats"]
        assert found["minus_transformer"]["mean"] == pytest.approx(gap)
        assert load_graph(finished / f"{arm}-s0" / "model.graph.npz").outputs


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(finished, texts, tmp_path, capsys, monkeypatch):
    args = [*SMALL, "--text", str(texts), "--arms", "graded", "--out", str(tmp_path)]
    monkeypatch.setattr(spiking_lm, "SAVE_EVERY_S", 0.0)
    steps, clip = 0, torch.nn.utils.clip_grad_norm_

    def interrupt(*given, **more):
        nonlocal steps
        steps += 1
        if steps == 60:
            raise KeyboardInterrupt
        return clip(*given, **more)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)
    with pytest.raises(KeyboardInterrupt):
        spiking_lm.main(args)
    assert spiking_lm.main(args) == 0
    resumed = last_line(capsys)["arms"]["graded"]["0"]
    whole = json.loads((finished / "graded-s0" / "result.json").read_text())
    assert resumed["loss_simulated_nats"] == whole["loss_simulated_nats"]


def test_refusals(finished, texts, tmp_path, capsys):
    assert spiking_lm.main([*SMALL, "--text", str(texts), "--out", str(finished), "--lr", "1e-3"]) == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert spiking_lm.main([*SMALL, "--text", str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 2
    for bad in (["--grid-share", "0"], ["--width", "0"], ["--eval-tokens", "3"]):
        with pytest.raises(SystemExit) as stop:
            spiking_lm.main([*SMALL, *bad])
        assert stop.value.code == 2
