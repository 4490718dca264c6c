"""The same commit, seed and threads give the same tokens, and the same losses to 1e-3, on any machine, however busy.

`golden_demo.json` holds a short run of the demo's kind, two streams and three arms, as it came out on one machine.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.runs.hydra_app import to_dataclass
from experiments.train import TrainConfig, train
from sparse_update.clock import timing
from sparse_update.clock.cost import ComponentTimes

GOLDEN = json.loads(Path(__file__).with_name("golden_demo.json").read_text())
BUDGET_REFERENCE_S = 0.2
GATES = {
    "dense": {},
    "random": {"unit": "sequence", "signal": "random", "keep_fraction": 0.7},
    "surprise": {"unit": "sequence", "signal": "ngram", "keep_fraction": 0.7, "noise_cut": 0.2},
}
STREAMS = {"clean": 0.0, "noisy": 0.3}


def run(text, folder, stream, arm, **trainer):
    config = {
        "run": str(folder),
        "seed": 0,
        "progress": False,
        "data": {"name": "files", "path": str(text), "garbage_fraction": STREAMS[stream]},
        "model": {"width": 32, "layers": 2, "heads": 2, "context": 32},
        "gate": {"name": arm, **GATES[arm], "pool_windows": 32, "ngram_bits": 12},
        "optim": {"name": "muon", "lr": 4e-3, "muon_lr": 0.01},
        "trainer": {
            "budget_reference_s": BUDGET_REFERENCE_S,
            "batch_windows": 8,
            "eval_tokens": 4096,
            "evaluations": 1,
            "device": "cpu",
            "threads": torch.get_num_threads(),
            **trainer,
        },
    }
    from omegaconf import OmegaConf

    return train(to_dataclass(OmegaConf.create(config), TrainConfig))


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("arm", GATES)
def test_the_default_budget_gives_the_golden_tokens_and_losses(text, tmp_path, stream, arm):
    found, golden = run(text, tmp_path / "run", stream, arm), GOLDEN[f"{stream}-{arm}"]
    assert found["tokens"] == golden["tokens"]
    assert found["steps"] == golden["steps"]
    assert found["loss_nats"] == pytest.approx(golden["loss_nats"], abs=1e-3)
    assert found["reference_s"] == pytest.approx(golden["reference_s"], rel=1e-9)
    assert found["reference_s"] <= BUDGET_REFERENCE_S
    assert found["clock"]["component_times"] == "shipped table x86_1_thread"
    assert found["notes"] == []


def test_a_slow_machine_trains_the_same_tokens(text, tmp_path, monkeypatch):
    """Every second takes thirty here."""
    true = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: 30 * true())
    slow = run(text, tmp_path / "slow", "noisy", "surprise")
    assert (slow["tokens"], slow["steps"]) == tuple(GOLDEN["noisy-surprise"][key] for key in ("tokens", "steps"))


def test_a_table_of_a_slow_machine_buys_fewer_tokens_and_says_so(text, tmp_path):
    """What a table that is measured does to a budget: half of the steps where every component took twice its time."""
    steps = {}
    for name, factor in (("idle", 1.0), ("busy", 2.0)):
        run(text, tmp_path / f"{name}-first", "noisy", "dense")
        priced = ComponentTimes.load(tmp_path / f"{name}-first" / "component_times.json")
        machine = {"processors": 2, "load_average": 9.0, "best_over_median": 0.4} if name == "busy" else {}
        ms = {key: factor * value for key, value in priced.ms.items()}
        measured = replace(priced, ms=ms, machine=machine, shipped="", shipped_sha256="")
        measured.save(tmp_path / f"{name}.json")
        found = run(text, tmp_path / name, "noisy", "dense", component_times=str(tmp_path / f"{name}.json"))
        steps[name] = found["steps"]
        assert found["clock"]["component_times"] == "measured on the run's machine"
        assert bool(found["notes"]) == (name == "busy")
    assert steps == {"idle": GOLDEN["noisy-dense"]["steps"], "busy": GOLDEN["noisy-dense"]["steps"] // 2}
    assert "load average 9.0 on 2 processors" in found["notes"][0]
    assert "0.40 of the median" in found["notes"][0]


def test_nothing_is_timed_for_the_default_budget(text, tmp_path, monkeypatch):
    def never(device):
        raise AssertionError("a component was timed")

    monkeypatch.setattr(timing, "clock", never)
    assert run(text, tmp_path / "run", "clean", "surprise")["steps"] == GOLDEN["clean-surprise"]["steps"]
