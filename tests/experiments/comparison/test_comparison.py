"""Run folders made by hand -> Comparison -> table, JSON, verdicts, picture, TensorBoard."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.compare import CompareConfig, main, write
from experiments.comparison.collection import collect
from experiments.comparison.statistics import paired_test
from experiments.comparison.targets import frontier, times_to_dense
from experiments.runs.hydra_app import ConfigError
from experiments.views.energy_figure import Point, pareto, points
from experiments.views.figures import figure
from experiments.views.tables import markdown, table
from experiments.views.tracking import MOST_SELECTED, boards, write_comparison

RunMaker = Callable[..., Path]


def arm_record(loss: float, **changes: Any) -> dict[str, Any]:
    return {
        "loss_nats": loss,
        "bits_per_byte": loss / math.log(2),
        "tokens": 1_000_000,
        "flops": 2.5e12,
        "reference_s": 20.0,
        "wall_s": 22.0,
        "peak_bytes": 500_000_000,
        "energy_j": None,
        "energy_reason": "not measured: no meter",
        "keep_fraction": 0.5,
        "source_keep": {"text": 0.6},
        "params": 200_000,
        "val_tokens": 65_536,
    } | changes


def deployed_record(**changes: Any) -> dict[str, Any]:
    common = {"kind": "modelled", "lower_bound": True, "unknown": ["static: no time model"], "tokens": 4096}
    chip = {"profile": "loihi1_sanafe", "low_j": 1e-6, "mid_j": 2e-6, "high_j": 3e-6, "source": "SANA-FE 2025"}
    digital = {
        "profile": "digital45_int8_sram",
        "low_j": 4e-7,
        "mid_j": 5e-7,
        "high_j": 6e-7,
        "source": "Horowitz 2014",
    }
    return {
        "arm": "surprise",
        "loss_float_nats": 1.70,
        "loss_quantised_nats": 1.71,
        "loss_simulated_nats": 1.72,
        "val_tokens": 65_536,
        "mapped_mac_share": 0.98,
        "events_per_token": 1200.0,
        "synops_per_token": 40_000.0,
        "macs_per_token": 100_000.0,
        "neuron_updates_per_token": 2000.0,
        "max_payload_bits": 14,
        "saturations": 0,
        "wraps": 0,
        "ran_on": "simulated (ours, lava)",
        "energy": [
            common | chip | {"labels": ["hypothetical: binary-spike constants applied to graded payloads"]},
            common | digital | {"labels": []},
        ],
    } | changes


@pytest.fixture
def make_run(tmp_path: Path) -> RunMaker:
    def make(arm: str, loss: float | str, *, seed: int = 0, stream: str = "clean", name: str = "", **info: Any) -> Path:
        changes = info.pop("result", {})
        folder = tmp_path / (name or f"{stream}-{arm}-{seed}")
        folder.mkdir()
        record = {"schema": 1, "kind": "train", "status": "finished", "stream": stream, "arm": arm, "seed": seed}
        record |= {"component_times_sha256": "a" * 64, "started": f"2026-01-0{seed + 1}T00:00:00"} | info
        (folder / "run.json").write_text(json.dumps(record))
        number = loss if isinstance(loss, float) else 0.0
        (folder / "result.json").write_text(json.dumps(arm_record(number, **changes) | {"loss_nats": loss}))
        curve = [{"step": i, "reference_s": 2.0 * i, "val_loss_nats": number + 3.0 / (1 + i)} for i in range(11)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve) + '{"step": 11, "re')
        return folder

    return make


@pytest.fixture
def make_deployment(tmp_path: Path) -> RunMaker:
    def make(*, stream: str = "clean", name: str = "deploy", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        record = deployed_record(**changes)
        info = {"schema": 1, "kind": "deploy", "status": "finished", "stream": stream, "arm": record["arm"], "seed": 0}
        (folder / "run.json").write_text(json.dumps(info))
        (folder / "deploy.json").write_text(json.dumps(record))
        return folder

    return make


def test_json_has_the_agreed_form(tmp_path: Path, make_run: RunMaker, make_deployment: RunMaker) -> None:
    for arm, loss in (("surprise", 1.7), ("random", 1.8), ("dense", 1.75)):
        make_run(arm, loss)
    make_deployment()
    document = json.loads(json.dumps(collect([tmp_path]).to_json()))
    assert document["schema"] == 1
    assert list(document["streams"]["clean"]) == ["dense", "random", "surprise", "deployed"]
    dense = document["streams"]["clean"]["dense"]
    assert {key: dense[key] for key in arm_record(1.75)} == arm_record(1.75)
    assert (dense["n"], dense["seeds"], dense["interval"]) == (1, [0], None)
    assert document["streams"]["clean"]["deployed"] == deployed_record()
    assert document["excluded"] == []


def test_one_seed_is_a_demonstration_and_no_test(tmp_path: Path, make_run: RunMaker) -> None:
    make_run("dense", 1.75)
    make_run("surprise", 1.70)
    comparison = collect([tmp_path])
    assert "n = 1, a demonstration" in table(comparison)
    assert comparison.verdicts() == ["clean: surprise against dense: 0.0500 nats lower; n = 1: no test possible."]


def test_several_seeds_give_interval_and_paired_test(tmp_path: Path, make_run: RunMaker) -> None:
    for seed, shift in enumerate((0.0, 0.1, 0.2)):  # the seed moves both arms: only pairing sees the difference
        make_run("dense", 1.75 + shift, seed=seed)
        make_run("surprise", 1.70 + shift + 0.001 * seed, seed=seed, result={"energy_j": 10.0 if seed else None})
    comparison = collect([tmp_path])
    document = comparison.to_json()
    arm = document["streams"]["clean"]["dense"]
    assert (arm["n"], arm["seeds"]) == (3, [0, 1, 2])
    assert arm["loss_nats"] == pytest.approx(1.85)
    assert arm["interval"]["loss_nats"][1] - 1.85 == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert document["streams"]["clean"]["surprise"]["energy_j"] is None
    assert "measured in 2 of 3 runs" in document["streams"]["clean"]["surprise"]["energy_reason"]
    (sentence,) = comparison.verdicts()
    assert sentence.startswith("clean: surprise beats dense: yes; 0.0490 nats lower")
    assert "n = 3, one-sided paired t" in sentence
    assert "[1.6" in table(comparison)


def test_bad_runs_are_named_and_left_out(tmp_path: Path, make_run: RunMaker) -> None:
    make_run("dense", 1.75)
    make_run("surprise", 1.70, name="unfinished", status="interrupted")
    make_run("surprise", 1.70, name="older", schema=0)
    make_run("surprise", "nan", name="diverged")
    make_run("surprise", 1.70, name="no-result")
    (tmp_path / "no-result" / "result.json").unlink()
    make_run("surprise", 1.70, name="torn")
    (tmp_path / "torn" / "run.json").write_text('{"schema": 1, "ki')
    (tmp_path / "no-run-json").mkdir()
    (tmp_path / "no-run-json" / "metrics.jsonl").write_text("")
    make_run("dense", 1.60, name="z-again", started="2026-02-01T00:00:00")
    comparison = collect([tmp_path])
    assert list(comparison.streams["clean"].arms) == ["dense"]
    assert comparison.streams["clean"].arms["dense"].loss.mean == 1.75  # the earlier of the doubles
    reasons = {Path(item.folder).name: item.reason for item in comparison.excluded}
    assert set(reasons) == {"unfinished", "older", "diverged", "no-result", "torn", "no-run-json", "z-again"}
    assert "interrupted" in reasons["unfinished"]
    assert "schema 0" in reasons["older"]
    assert "loss_nats is nan" in reasons["diverged"]
    assert "double of" in reasons["z-again"]
    assert "seed 0" in reasons["z-again"]
    text = table(comparison)
    assert all(name in text for name in reasons)
    assert any("no verdict" in sentence for sentence in comparison.verdicts())


def test_a_diverged_seed_is_held_against_its_arm(tmp_path: Path, make_run: RunMaker) -> None:
    for seed in range(2):
        make_run("dense", 1.75 + 0.01 * seed, seed=seed)
        make_run("surprise", 1.70, seed=seed)
    make_run("surprise", "inf", seed=2)
    comparison = collect([tmp_path])
    assert comparison.streams["clean"].arms["surprise"].diverged == 1
    assert "1 diverged run(s) of surprise left out, which flatters that arm" in comparison.verdicts()[0]
    assert "2 (1 diverged)" in table(comparison)


def test_different_clocks_and_budgets_are_not_compared(tmp_path: Path, make_run: RunMaker) -> None:
    make_run("dense", 1.75, component_times_sha256="b" * 64)
    make_run("surprise", 1.70)
    make_run("dense", 1.75, stream="noisy", result={"reference_s": 30.0})
    make_run("surprise", 1.70, stream="noisy")
    comparison = collect([tmp_path])
    clock, budget = comparison.verdicts()
    assert "not compared, reference seconds are not one clock (aaaaaaaaaaaa, bbbbbbbbbbbb)" in clock
    assert "not compared, reference seconds from 20 to 30 are not one budget" in budget
    assert "component times differ" in comparison.streams["clean"].notes[0]
    assert "Note: reference seconds do not compare" in table(comparison)


def test_table_labels_bounds_hypotheses_and_missing_meters(
    tmp_path: Path, make_run: RunMaker, make_deployment: RunMaker
) -> None:
    make_run("dense", 1.75)
    readings = [{"source": "NVML", "joules": None, "reason": "no driver"}]
    make_deployment(host_inference_energy=readings, host_inference_j_per_token=None)
    for text in (table(collect([tmp_path])), markdown(collect([tmp_path]))):
        assert ">= 2 uJ" in text
        assert ">= 500 nJ" in text
        assert "hypothetical: binary-spike constants applied to graded payloads" in text
        assert "not in the sum: static: no time model" in text
        assert "NVML: no driver" in text
        assert "0 J" not in text
        for part in ("98.0%", "1,200", "40,000", "+0.0200 against float", "SANA-FE 2025", "modelled", "not measured"):
            assert part in text
    modelled, measured = table(collect([tmp_path])).split("Inference energy per token, measured")
    assert "loihi1_sanafe" in modelled
    assert "loihi1_sanafe" not in measured  # modelled and measured joules never share a table


def test_each_profile_meets_the_loss_of_what_it_evaluates(tmp_path: Path, make_deployment: RunMaker) -> None:
    make_deployment()
    found = {p.profile: p for p in points(collect([tmp_path]).streams["clean"].deployments)}
    assert found["loihi1_sanafe"].loss_nats == 1.72
    assert found["digital45_int8_sram"].loss_nats == 1.71
    assert found["loihi1_sanafe"].hypothetical
    assert found["loihi1_sanafe"].lower_bound


def test_pareto_keeps_what_nothing_beats() -> None:
    def point(joules: float, loss: float) -> Point:
        return Point("p", "a", joules, joules, joules, loss, "modelled", False, False)

    cloud = [point(3, 1.0), point(1, 3.0), point(2, 2.0), point(2, 2.5), point(4, 1.0), point(5, 5.0)]
    beaten = [
        any(q.mid_j <= p.mid_j and q.loss_nats <= p.loss_nats and q != p for q in cloud) for p in cloud
    ]  # by definition, pair by pair
    expected = {(p.mid_j, p.loss_nats) for p, worse in zip(cloud, beaten, strict=True) if not worse}
    assert {(p.mid_j, p.loss_nats) for p in pareto(cloud)} == expected


def ladder(make_run: RunMaker, arm: str, ends: dict[float, list[float]], stream: str = "noisy", **result: Any) -> None:
    """One run per budget and seed, its end loss given."""
    for budget, losses in ends.items():
        for seed, loss in enumerate(losses):
            numbers = {"budget_reference_s": budget, "reference_s": 0.999 * budget, **result}
            make_run(arm, loss, seed=seed, stream=stream, name=f"{stream}-{arm}-{budget}-{seed}", result=numbers)


def test_time_to_the_dense_end_loss_is_interpolated_per_seed(tmp_path: Path, make_run: RunMaker) -> None:
    ladder(make_run, "dense", {20.0: [1.80, 1.82, 1.81], 10.0: [1.9, 1.9, 1.9]})
    ladder(make_run, "surprise", {10.0: [1.84, 1.85, 1.82], 14.0: [1.80, 1.81, 1.79], 20.0: [1.7, 1.7, 1.7]})
    ladder(make_run, "random", {14.0: [1.90, 1.90, 1.90], 20.0: [1.81, 1.80, 1.79]}, keep_fraction=0.51)
    comparison = collect([tmp_path])
    assert comparison.excluded == ()
    stream = comparison.streams["noisy"]
    assert {name: arm.loss.mean for name, arm in stream.arms.items()} == pytest.approx(
        {"dense": 1.81, "random": 1.80, "surprise": 1.7}
    )
    found = {item.arm: item for item in times_to_dense(stream)}
    # surprise: seed 0 reaches 1.80 at 14; seed 1: 1.82 three quarters of the way; seed 2: 1.81 a third of the way
    expected = {0: 14.0, 1: 13.0, 2: 10 + 4 / 3}
    assert dict(found["surprise"].times) == pytest.approx({s: 0.999 * t for s, t in expected.items()})
    assert found["surprise"].ratio is not None
    assert found["surprise"].ratio.mean == pytest.approx(sum(expected.values()) / 60)
    assert set(found["surprise"].against) == {"dense", "random"}
    # random: seed 0 never gets to 1.80, so its largest budget stands for it
    assert found["random"].never == (0,)
    assert found["random"].ratio is None
    assert found["surprise"].bounded == ("random",)
    random_time = {0: 20.0, 1: 14 + 6 * 0.8, 2: 14 + 6 * 9 / 11}
    test = paired_test([0.999 * t for t in expected.values()], [0.999 * t for t in random_time.values()])
    assert found["surprise"].against["random"].p == pytest.approx(test.p)
    said = comparison.verdicts()
    assert any("noisy: surprise takes 0.639" in sentence and "(n = 3)" in sentence for sentence in said)
    assert any("random does not reach the dense end loss with seed(s) 0" in sentence for sentence in said)
    assert "10 s: 1.8367; 14 s: 1.8000; 20 s: 1.7000" in table(comparison)
    document = json.loads(json.dumps(comparison.to_json()))
    assert document["time_to_dense"]["noisy"]["surprise"]["share_of_dense"]["n"] == 3
    assert len(figure(comparison).axes) == 1


def test_a_bound_is_called_a_bound(tmp_path: Path, make_run: RunMaker) -> None:
    ladder(make_run, "dense", {20.0: [1.80, 1.80]})
    ladder(make_run, "surprise", {10.0: [1.79, 1.85], 20.0: [1.7, 1.7]})
    (found,) = times_to_dense(collect([tmp_path]).streams["noisy"])
    assert found.at_most == (0,)
    assert found.times[0] == pytest.approx(9.99)
    assert "seed(s) 0: at most" in " ".join(collect([tmp_path]).verdicts())


def test_a_gate_stands_against_random_at_its_own_rate_and_all_cheap_controls(tmp_path: Path, make_run: RunMaker) -> None:
    rates = {"dense": 1.0, "dense_near": 1.0, "random_50": 0.5, "random_25": 0.25, "a_50": 0.51, "b_33": 0.33}
    for arm, rate in rates.items():
        for seed in range(2):
            make_run(arm, 1.8 + 0.01 * seed + 0.001 * rate, seed=seed, result={"keep_fraction": rate})
    against = [sentence.split(";")[0].split(": ", 1)[1] for sentence in collect([tmp_path]).verdicts()]
    tested = {tuple(part.split(":")[0].split(" beats ")) for part in against}
    assert tested == {
        ("a_50", "dense"),
        ("a_50", "dense_near"),
        ("a_50", "random_50 at the same rate"),
        ("b_33", "dense"),
        ("b_33", "dense_near"),
        ("b_33", "random_50"),
        ("b_33", "random_25"),
    }


def test_other_held_out_text_has_its_own_table(tmp_path: Path, make_run: RunMaker) -> None:
    for arm, known in (("dense", 1.9), ("surprise", 1.95)):
        for seed in range(2):
            sets = {"val": {"loss_nats": 1.7}, "known": {"loss_nats": known + 0.01 * seed}}
            make_run(arm, 1.7, seed=seed, result={"held_out": sets})
    comparison = collect([tmp_path])
    text = table(comparison)
    assert "other held-out text" in text
    assert "(+0.0500)" in text
    assert comparison.to_json()["streams"]["clean"]["surprise"]["held_out"]["known"]["loss_nats"] == pytest.approx(1.955)


def test_the_frontier_compares_with_random_at_equal_flops(tmp_path: Path, make_run: RunMaker) -> None:
    def arm(name: str, flops: float, losses: list[float]) -> None:
        for seed, loss in enumerate(losses):
            numbers = {"flops": flops, "prequential": {"loss_nats": loss}}
            make_run(name, 1.8, seed=seed, stream="drift", name=f"{name}-{seed}", result=numbers)

    arm("dense", 8e12, [2.00, 2.02])
    arm("random_50", 4e12, [2.10, 2.13])
    arm("surprise_50", 5e12, [2.05, 2.07])
    arm("surprise_25", 2e12, [2.20, 2.20])
    comparison = collect([tmp_path])
    found = {point.arm: point for point in frontier(comparison.streams["drift"])}
    test = found["surprise_50"].against_random
    assert test is not None
    line = [2.10 - 0.25 * 0.10, 2.13 - 0.25 * 0.11]
    assert test.difference == pytest.approx(((2.05 - line[0]) + (2.07 - line[1])) / 2)
    assert found["surprise_25"].against_random is None, "below the least random FLOPs nothing is extrapolated"
    assert [name for name, point in found.items() if point.on_frontier] == [
        "surprise_25",
        "random_50",
        "surprise_50",
        "dense",
    ]
    arm("worse", 6e12, [2.3, 2.3])
    again = {point.arm: point.on_frontier for point in frontier(collect([tmp_path]).streams["drift"])}
    assert again["worse"] is False
    assert any("surprise_50: +0.0500 nats prequential at 62% of the dense FLOPs" in s for s in comparison.verdicts())
    assert "prequential loss against FLOPs" in table(comparison)
    assert len(figure(comparison).axes) == 2


def test_files_picture_and_tensorboard(tmp_path: Path, make_run: RunMaker, make_deployment: RunMaker) -> None:
    for arm, loss in (("dense", 1.75), ("random", 1.8), ("surprise", 1.7)):
        for seed in range(2):
            make_run(arm, loss + 0.01 * seed, seed=seed)
    make_deployment()
    make_deployment(name="deploy-other-conversion")
    comparison = collect([tmp_path])
    assert len(comparison.to_json()["deployments"]) == 2
    assert len(figure(comparison).axes) == 2
    out = tmp_path / "comparison"
    write(comparison, out)
    write(comparison, out)  # a second time replaces, and adds no double run
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "comparison.svg").read_text()
    assert "## Stream clean" in (out / "comparison.md").read_text()
    board = out / "tensorboard"
    runs = {str(path.parent.relative_to(board)) for path in board.rglob("events.out.tfevents.*")}
    deployed = {"clean/deployed surprise", "clean/deployed surprise 2"}
    assert runs == {".", "clean/dense", "clean/random", "clean/surprise", *deployed}
    top = EventAccumulator(str(board)).Reload()
    assert top.Tags()["images"] == ["comparison"]
    assert {"custom_scalars__config__", "comparison/text_summary", "energy per token/text_summary"} <= set(
        top.Tags()["tensors"]
    )
    arm = EventAccumulator(str(board / "clean" / "dense")).Reload()
    assert arm.Scalars("val_loss_nats_by_reference_ms/clean")[-1].step == 20_000
    assert arm.Scalars("hparam/loss_nats")[0].value == pytest.approx(1.755)
    energy = EventAccumulator(str(board / "clean" / "deployed surprise")).Reload()
    assert [e.value for e in energy.Scalars("energy_nj_per_token/mid")] == pytest.approx([2000.0, 500.0])
    assert len(collect([tmp_path]).excluded) == 0  # the comparison's own folder is no run


def test_command_prints_table_verdicts_and_json_last(
    tmp_path: Path, make_run: RunMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("dense", 1.75)
    make_run("surprise", 1.70)
    assert main([f"folder={tmp_path}", "tensorboard=false"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert any(line.startswith("clean: surprise against dense") for line in printed)


def test_nothing_to_compare_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main([f"folder={tmp_path / 'empty'}"]) == 1
    assert "no finished run" in capsys.readouterr().err
    assert main([f"folder={tmp_path / 'absent'}"]) == 1
    assert "is not a folder" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="give folder=FOLDER"):
        CompareConfig()


def test_unknown_key_in_a_fresh_process_from_another_folder(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    script = f"import sys; sys.path.insert(0, {str(root)!r}); from experiments.compare import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, "foldr=runs/demo"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip() == (
        "compare: unknown configuration key 'foldr'; did you mean folder? (--cfg job prints all of them)"
    )
    assert list(tmp_path.iterdir()) == []  # Hydra leaves nothing behind


def test_the_set_up_of_a_sweep_is_named_and_left_out(tmp_path: Path, make_run: RunMaker) -> None:
    make_run("dense", 1.75)
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / "tuning").mkdir()
    make_run("dense", 5.9, stream="clock", name="clock")
    make_run("dense", 1.9, stream="tuning dense 0", name="tuning/dense-0")
    comparison = collect([tmp_path])
    assert list(comparison.streams) == ["clean"]
    assert {Path(item.folder).name for item in comparison.excluded} == {"clock", "tuning"}
    assert list(collect([tmp_path / "tuning"]).streams) == ["tuning dense 0"]
    (tmp_path / "sweep.json").unlink()
    assert "clock" in collect([tmp_path]).streams, "only a sweep has a set-up"


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_is_no_wider_than_the_terminal(
    width: int, tmp_path: Path, make_run: RunMaker, make_deployment: RunMaker
) -> None:
    reason = "NVML: no NVIDIA driver answers (NVML Shared Library Not Found); RAPL: /sys/class/powercap does not exist"
    for arm, loss in (("dense", 1.75), ("random", 1.8), ("surprise", 1.7)):
        for seed in range(2):
            make_run(arm, loss + 0.01 * seed, seed=seed, result={"energy_reason": f"not measured: {reason}"})
    source = "SANA-FE 8951ab0, arch/loihi.yaml (fitted to Loihi silicon; IEEE TCAD 2025)"
    energy = [deployed_record()["energy"][0] | {"source": source}]
    make_deployment(energy=energy)
    make_deployment(name="deploy-other-conversion", arm="dense", energy=energy)
    comparison = collect([tmp_path])
    text = table(comparison, width)
    assert max(map(len, text.splitlines())) <= width
    flowing = " ".join(text.split())
    for part in (source if width > 80 else "SANA-FE", "surprise, deployed", "1.7050 [1.6415, 1.7685]", ">= 2 uJ", "40,000"):
        assert part in flowing, part
    assert flowing.count(f"Energy: measured in 0 of 6 runs; {reason}.") == 1
    assert flowing.count("not in the sum: static: no time model") == 1
    assert "Other remarks: as above." in text
    whole = table(comparison).splitlines()
    assert any(line.startswith("  surprise, deployed") and line.endswith(">= 2 uJ") for line in whole), "one line, no limit"


def test_a_board_of_twenty_runs_is_ticked_at_once(tmp_path: Path, make_run: RunMaker) -> None:
    for i in range(20):
        make_run("dense" if not i else f"surprise_{i}", 1.75 + 0.001 * i)
    comparison = collect([tmp_path])
    alone = write_comparison(tmp_path / "alone", comparison, {}, {})
    assert len(boards(alone)) == 21
    shared = write_comparison(tmp_path / "shared", comparison, {}, {}, beside=20)
    assert len(boards(shared)) + 20 <= MOST_SELECTED
    make_run("dense", 1.76, seed=1)
    again = write_comparison(tmp_path / "again", collect([tmp_path]), {}, {}, beside=21)
    assert {path.name for path in boards(again)} == {"again", "dense"}, "a mean over seeds stands in no run"


def test_differences_without_a_test_do_not_flood_the_terminal(
    tmp_path: Path, make_run: RunMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(12):
        make_run("dense" if not i else f"surprise_{i}", 1.75 + 0.001 * i)
    for seed in (1, 2):
        make_run("dense", 1.75 + 0.01 * seed, seed=seed)
        make_run("surprise_1", 1.70 + 0.01 * seed, seed=seed)
    assert main([f"folder={tmp_path}", "tensorboard=false"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("clean: ")]
    assert [line.split(":")[1] for line in printed] == [" surprise_1 beats dense"]
    document = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert len(document["verdicts"]) == 11
    page = (tmp_path / "comparison" / "comparison.html").read_text()
    assert "<summary>10 differences without a test" in page
    assert page.index("beats dense: <span") < page.index("<details>")
    assert 'class="no">no</span> test possible' not in page
