"""The hparams table of runs and their comparison, read back the way TensorBoard's own plugin reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from experiments.comparison.collection import collect
from experiments.comparison.settings import experiment_settings
from experiments.views.hparam_rows import run_row
from experiments.views.tracking import Tracker, hparam_metrics, write_comparison
from tests.experiments.comparison.records import arm_record, deployed_record

NAMED = {"run": "somewhere", "stream": "noisy", "progress": True, "data": {"garbage_fraction": 0.3}}


def train(top: Path, arm: str, seed: int, loss: float, lr: float = 0.008, **gate: Any) -> None:
    """A finished run as `experiments.train` leaves it."""
    folder = top / f"{arm}-{seed}"
    gate = {"name": arm, "signal": "none", "policy": "band", "keep_fraction": 1.0, "noise_cut": 0.0} | gate
    config = {**NAMED, "arm": arm, "seed": seed, "gate": gate, "optim": {"lr": lr}, "trainer": {"batch_windows": 16}}
    result = arm_record(loss, folder=str(folder))
    with Tracker(folder) as tracker:
        tracker.log(1, {"loss_nats": loss, "val_loss_nats": loss, "reference_s": 1.0})
        row = run_row("noisy", arm, seed, str(folder), experiment_settings(config))
        tracker.hparams(row, hparam_metrics(result))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    info = {"schema": 1, "kind": "train", "status": "finished", "stream": "noisy", "arm": arm, "seed": seed}
    (folder / "run.json").write_text(json.dumps(info | {"component_times_sha256": "a" * 64}))
    (folder / "result.json").write_text(json.dumps(result))


def hparams_table(logdir: Path) -> tuple[list[str], list[str], dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """Columns in TensorBoard's order, its metrics, and per row its settings and its metrics."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(logdir))
    context = backend_context.Context(TBContext(data_provider=provider))
    metadata = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(RequestContext(), "", True, metadata, [])
    request = api_pb2.ListSessionGroupsRequest(slice_size=100, allowed_statuses=[api_pb2.STATUS_SUCCESS])
    handler = list_session_groups.Handler(
        request_context=RequestContext(), backend_context=context, experiment_id="", request=request
    )
    answer = handler.run()
    settings, metrics = {}, {}
    for group in answer.session_groups:
        fields = {key: value.WhichOneof("kind") for key, value in group.hparams.items()}
        settings[group.name] = {key: getattr(group.hparams[key], kind) for key, kind in fields.items()}
        metrics[group.name] = {value.name.tag: value.value for value in group.metric_values}
    columns = [info.name for info in experiment.hparam_infos]
    return columns, [info.name.tag for info in experiment.metric_infos], settings, metrics


def deploy(top: Path) -> None:
    folder = top / "surprise-0" / "deploy"
    folder.mkdir()
    info = {"schema": 1, "kind": "deploy", "status": "finished", "stream": "noisy", "arm": "surprise", "seed": 0}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "deploy.json").write_text(json.dumps(deployed_record()))


def test_every_thing_has_one_row_named_by_stream_arm_and_seed(tmp_path: Path) -> None:
    train(tmp_path, "dense", 0, 1.75)
    train(tmp_path, "surprise", 0, 1.70, lr=0.004, signal="ngram", keep_fraction=0.7, noise_cut=0.2)
    deploy(tmp_path)
    write_comparison(tmp_path / "comparison" / "tensorboard", collect([tmp_path]), {}, {}, beside=2)
    names = {
        f"noisy dense s0 [{tmp_path}/dense-0]",
        f"noisy surprise s0 [{tmp_path}/surprise-0]",
        f"noisy surprise s0 deployed [{tmp_path}/surprise-0/deploy]",
    }
    columns, metrics, settings, values = hparams_table(tmp_path)
    assert set(settings) == names
    differ = ["arm", "gate.keep_fraction", "gate.noise_cut", "gate.signal", "kind", "optim.lr"]
    assert columns[: len(differ)] == differ, "what differs comes first"
    assert {"gate.policy", "trainer.batch_windows", "seed", "stream", "data.garbage_fraction"} <= set(columns)
    assert "gate.name" not in columns, "the arm says it"
    assert not {"run", "progress"} & set(columns)
    for name, row in settings.items():
        surprise = "surprise" in name
        expected = {"optim.lr": 0.004 if surprise else 0.008, "gate.signal": "ngram" if surprise else "none"}
        assert row | expected | {"gate.policy": "band", "trainer.batch_windows": 16.0, "stream": "noisy"} == row, name
    assert metrics[0] == "Result/loss_nats"
    losses = sorted(round(row["Result/loss_nats"], 4) for row in values.values())
    assert losses == [1.70, 1.72, 1.75]
    (chip,) = (row for row in values.values() if "Result/energy_nj_per_token" in row)
    assert chip["Result/energy_nj_per_token"] == pytest.approx(2000.0)
    alone = hparams_table(tmp_path / "comparison" / "tensorboard")
    assert set(alone[2]) == names, "the comparison's own folder has the same rows"


def test_a_mean_over_seeds_is_a_row_of_its_own_with_what_the_seeds_share(tmp_path: Path) -> None:
    for seed in (0, 1):
        train(tmp_path, "dense", seed, 1.75 + 0.1 * seed, lr=0.008 / (1 + seed))
    out = tmp_path / "comparison"
    write_comparison(out / "tensorboard", collect([tmp_path]), {}, {})
    _, _, settings, values = hparams_table(tmp_path)
    mean = f"noisy dense mean of s0 to s1 [{out}]"
    assert set(settings) == {mean, *(f"noisy dense s{s} [{tmp_path}/dense-{s}]" for s in (0, 1))}
    assert settings[mean]["trainer.batch_windows"] == 16.0
    assert "optim.lr" not in settings[mean]
    assert values[mean]["Result/loss_nats"] == pytest.approx(1.8)


def test_runs_without_a_comparison_have_a_column_for_every_setting(tmp_path: Path) -> None:
    train(tmp_path, "dense", 0, 1.75, replay_fraction=0.0)
    train(tmp_path, "surprise", 0, 1.70, replay_fraction=0.25)
    columns, metrics, settings, _ = hparams_table(tmp_path)
    assert columns[:2] == ["arm", "gate.replay_fraction"]
    assert set(columns) == {key for row in settings.values() for key in row}
    assert metrics[0].startswith("Result/")
