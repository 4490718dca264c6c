"""What the tracker wrote, read back through TensorBoard's own reader and line by line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from experiments.views.hparam_rows import run_row
from experiments.views.run_files import not_finite, truncate
from experiments.views.tracking import Tracker


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0, "images": 0})
    events.Reload()
    return events


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def hparams_data(folder: Path, tag: str) -> plugin_data_pb2.HParamsPluginData:
    content = read(folder).SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content)


def test_one_call_writes_a_line_and_its_scalars(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"loss_nats": 5.5, "keep_fraction": 0.5, "val_loss_nats": None, "gate/threshold": 1.5, "odd": 2})
        tracker.log(2, {"loss_nats": 5.0, "val_loss_nats": 5.25})
    assert lines(tmp_path)[0] == {
        "step": 1,
        "loss_nats": 5.5,
        "keep_fraction": 0.5,
        "val_loss_nats": None,
        "gate/threshold": 1.5,
        "odd": 2,
    }
    assert scalars(tmp_path, "train/loss_nats") == [(1, 5.5), (2, 5.0)]
    assert scalars(tmp_path, "val/loss_nats") == [(2, 5.25)]
    expected = {"train/loss_nats", "val/loss_nats", "gate/keep_fraction", "gate/threshold", "other/odd"}
    assert set(read(tmp_path).Tags()["scalars"]) == expected


def test_custom_scalar_layout_is_there(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"loss_nats": 5.5})
    tensor = read(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(tensor.string_val[0])
    assert [category.title for category in layout.category] == ["gate against dense", "what the gate saved"]
    tags = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    assert {"val/loss_nats", "gate/keep_fraction", "cost/flops", "cost/reference_s", "saved/flops_share"} <= set(tags)


def test_a_resumed_run_has_no_double_points(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        for step in range(1, 8):
            tracker.log(step, {"loss_nats": 10.0 - step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss')  # killed in the middle of a line
    with Tracker(tmp_path, resume_step=4) as tracker:
        for step in range(5, 11):
            tracker.log(step, {"loss_nats": 20.0 - step})
    expected = [(s, 10.0 - s) for s in range(1, 5)] + [(s, 20.0 - s) for s in range(5, 11)]
    assert [(line["step"], line["loss_nats"]) for line in lines(tmp_path)] == expected
    assert scalars(tmp_path, "train/loss_nats") == expected
    assert len(read(tmp_path).Tensors("custom_scalars__config__")) == 1


def test_a_resume_from_nothing_drops_all_points(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"loss_nats": 9.0})
    with Tracker(tmp_path, resume_step=0) as tracker:
        tracker.log(1, {"loss_nats": 8.0})
    assert scalars(tmp_path, "train/loss_nats") == [(1, 8.0)]
    assert [line["loss_nats"] for line in lines(tmp_path)] == [8.0]


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"loss_nats": 9.0})
    with pytest.raises(FileExistsError, match="resume it, or choose another folder"):
        Tracker(tmp_path)


def test_numbers_that_are_not_finite_are_seen(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"loss_nats": 9.0})
        tracker.log(2, {"loss_nats": math.nan, "flops": math.inf})
    assert lines(tmp_path)[1] == {"step": 2, "loss_nats": "nan", "flops": "inf"}
    assert scalars(tmp_path, "health/not_finite") == [(2, 2.0)]
    assert math.isnan(scalars(tmp_path, "train/loss_nats")[1][1])
    truncate(tmp_path / "metrics.jsonl", 2)
    assert not_finite(tmp_path / "metrics.jsonl") == 2


def test_steps_only_go_forward_and_a_step_has_one_point(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log(5, {"loss_nats": 9.0})
        tracker.log(5, {"loss_nats": 9.0, "val_loss_nats": 8.0})
        with pytest.raises(ValueError, match="step 4 after step 5"):
            tracker.log(4, {"loss_nats": 9.0})
    assert scalars(tmp_path, "train/loss_nats") == [(5, 9.0)]
    assert scalars(tmp_path, "val/loss_nats") == [(5, 8.0)]


SETTINGS = {
    "optim.lr": 0.008,
    "trainer.batch_windows": 32,
    "gate.signal": "ngram",
    "gate.policy": "band",
    "gate.ngram_orders": [1, 2],
    "trainer.length_schedule": None,
    "gate.name": "surprise",
}


def test_a_run_has_one_row_with_all_its_settings_in_its_own_folder(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log(3, {"loss_nats": 9.0})
        tracker.hparams(run_row("clean", "surprise", 0, "runs/a", SETTINGS), {"loss_nats": 1.75, "energy_j": None})
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    start = hparams_data(tmp_path, "session_start_info").session_start_info
    assert start.group_name == "clean surprise s0 [runs/a]"
    texts = {key: value.string_value for key, value in start.hparams.items() if value.HasField("string_value")}
    numbers = {key: value.number_value for key, value in start.hparams.items() if value.HasField("number_value")}
    assert texts == {
        "kind": "run", "stream": "clean", "arm": "surprise", "seed": "0", "gate.signal": "ngram", "gate.policy": "band",
        "gate.ngram_orders": "1 2", "trainer.length_schedule": "",
    }  # fmt: skip
    assert numbers == {"optim.lr": 0.008, "trainer.batch_windows": 32.0}
    assert scalars(tmp_path, "Result/loss_nats") == [(3, 1.75)]
    tags = read(tmp_path).Tags()
    assert "Result/energy_j" not in tags["scalars"]
    assert min(tags["scalars"]) == "Result/loss_nats", "TensorBoard shows the first five by name"
    assert "_hparams_/experiment" not in tags["tensors"], "the columns are for the comparison, or for TensorBoard itself"


def test_text_histogram_and_figure(tmp_path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(1, 1))
    FigureCanvasAgg(picture)
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"loss_nats": 9.0})
        tracker.text("provenance", "| joule | source |\n|---|---|\n| 1 | a paper |")
        tracker.histogram("gate/surprise_nats", [1.0, 2.0, math.nan, 3.0], 1)
        tracker.figure("pareto", picture)
    events = read(tmp_path)
    assert b"a paper" in events.Tensors("provenance/text_summary")[0].tensor_proto.string_val[0]
    assert events.Histograms("gate/surprise_nats")[0].histogram_value.num == 3
    assert events.Images("pareto")[0].step == 1


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        truncate(path, 5)
