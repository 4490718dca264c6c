"""`bench gpu`: without a GPU it says so; its parts run on the CPU at toy size; limits hold; the file is gone on with."""

from __future__ import annotations

import json
import time
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.benches.gpu import command, parts, running, simulator, training, wheels
from experiments.benches.gpu.setting import Setting, peak_flops_per_s
from neuro.simulators import fixed_point

TOY = Setting("cpu", toy=True, compiled=False, seconds=60.0)


def nothing(found: dict[str, Any]) -> None:
    """Where a part hands on what it has."""


def test_without_a_gpu_it_says_so_and_ends_with_3(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 3
    assert "no CUDA device, so nothing was measured; --dry-run" in capsys.readouterr().err


def test_the_limits_of_the_parts_fit_into_eight_minutes():
    assert sum(part.limit_s for part in parts.PARTS) <= parts.LIMIT_S <= 8 * 60


@pytest.mark.parametrize(
    ("words", "said"), [(["--parts", "stepz"], "--parts stepz: known are simulator"), (["--limit-s", "0"], "--limit-s 0")]
)
def test_bad_arguments_end_with_2(words, said, capsys):
    assert command.main([*words, "--dry-run"]) == 2
    assert said in capsys.readouterr().err


def test_peaks_are_those_of_the_data_sheets():
    assert peak_flops_per_s("NVIDIA H200") == 989.4e12
    assert peak_flops_per_s("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops_per_s("NVIDIA GeForce RTX 3060") is None


def test_the_toy_steps_count_flops_as_the_plan_does():
    found = training.steps(TOY, nothing)
    rows = found["rows"]
    assert len(rows) == 2 + 2 * len(training.KINDS)
    assert not found["left_out"]
    assert rows["stepper"]["flop_ratio"] == 1
    assert rows["sequence_before 0.5"]["flop_ratio"] == 0.5
    assert all(row["energy"]["joules_per_step"] is not None or row["energy"]["reason"] for row in rows.values())


def test_attention_of_every_backend_is_that_of_explicit_products():
    found = training.attention(TOY, nothing)
    assert set(found["error"]) == {"explicit", "sdpa", "flash", "math"}
    assert max(found["error"].values()) < 1e-5


def test_a_replayed_step_gives_the_gradients_of_its_new_tokens():
    found = training.graphs(TOY, nothing)
    assert found["equal_bits"]
    assert found["reason"] == "CUDA graphs are for CUDA"


def test_the_simulator_part_sees_a_value_that_differs(monkeypatch):
    assert all(sum(row["different"].values()) == 0 for row in simulator.measure(TOY, nothing)["sizes"].values())

    def wrong(graph: Any, inputs: Any, **settings: Any) -> Any:
        found = fixed_point.simulate(graph, inputs, **settings)
        if settings.get("record"):
            calls.append(0)
            if len(calls) % 2 == 0:  # the device's run, not the CPU's
                found.spikes["layer2"][0, 5, 3] ^= 1
        return found

    calls: list[int] = []
    monkeypatch.setattr(simulator, "simulate", wrong)
    (row,) = simulator.measure(TOY, nothing)["sizes"].values()
    assert row["different"] == {"lava": 1, "chip": 1}


def sleeps(setting: Setting, emit: Any) -> dict[str, Any]:
    emit({"half": 1})
    time.sleep(600)
    return {"half": 1, "whole": 2}


def fails(setting: Setting, emit: Any) -> dict[str, Any]:
    emit({"half": 1})
    raise ValueError("of its own making")


def test_a_part_is_stopped_at_its_limit():
    begin = time.monotonic()
    stopped = running.run_part(parts.Part("sleeps", "", 60.0, sleeps), Setting("cpu", True, False, seconds=1.0))
    assert time.monotonic() - begin < 300  # it would sleep for 600
    assert stopped["status"] == "stopped at its limit"


def test_what_was_handed_on_before_the_limit_is_kept():
    ours, theirs = Pipe(duplex=False)
    theirs.send({"found": {"half": 1}})
    record: dict[str, Any] = {"status": running.STOPPED, "found": {}}
    running._listen(ours, time.monotonic() + 0.05, record)
    assert record == {"status": "stopped at its limit", "found": {"half": 1}}
    theirs.close()
    running._listen(ours, time.monotonic() + 60, record)
    assert record["status"] == "failed"
    assert "out of memory" in record["error"]


def test_a_part_that_fails_keeps_what_it_had():
    failed = running.run_part(parts.Part("fails", "", 60.0, fails), Setting("cpu", True, False, seconds=300.0))
    assert failed["status"] == "failed"
    assert failed["found"] == {"half": 1}
    assert failed["error"].startswith("ValueError: of its own making (test_bench_gpu.py:")


def test_what_the_file_has_is_not_measured_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu.jsonl"
    runs: list[str] = []

    def run(part: parts.Part, setting: Setting) -> dict[str, Any]:
        runs.append(part.name)
        status = "failed" if part.name == "attention" and len(runs) < 3 else "done"
        return {"part": part.name, "status": status, "found": {}, "wall_s": 1.0, "error": "no"}

    monkeypatch.setattr(command, "run_part", run)
    words = ["--dry-run", "--parts", "simulator,attention", "--out", str(out)]
    assert command.main(words) == 1
    with out.open("a", encoding="utf-8") as file:
        file.write('{"part": "memory", "sta')  # cut short by a crash
    assert command.main(words) == 0
    assert runs == ["simulator", "attention", "attention"]
    assert "measured before" in capsys.readouterr().err
    assert command.main([*words, "--again"]) == 0
    assert runs[3:] == ["simulator", "attention"]


def test_a_file_of_another_run_is_refused_and_kept(tmp_path, capsys):
    out = tmp_path / "gpu.jsonl"
    text = json.dumps({"header": {"device": "NVIDIA H200"}}) + "\n"
    out.write_text(text, encoding="utf-8")
    assert command.main(["--dry-run", "--out", str(out)]) == 2
    assert "is of another run" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == text


def test_a_wheel_that_cannot_be_had_is_named(tmp_path: Path):
    with pytest.raises(wheels.WheelError, match="no wheel of no such name at all for Python"):
        wheels.pack(tmp_path, "3.12", ("no such name at all",))


@pytest.mark.soak
def test_a_dry_run_of_all_parts_with_compilation(tmp_path):
    out = tmp_path / "gpu.jsonl"
    assert command.main(["--dry-run", "--out", str(out)]) == 0
    assert len(out.read_text(encoding="utf-8").splitlines()) == 1 + len(parts.PARTS)
