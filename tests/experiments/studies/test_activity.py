"""The frontier experiment on a model of seconds: points, controls, resuming, and the numbers of its summary."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import deploy
from experiments.runs.plain_json import write_json
from experiments.studies import activity, frontier
from sparse_update.data.corpus import DataConfig, load_corpus
from sparse_update.data.records import CorpusError
from sparse_update.loop.checkpoint import save_checkpoint
from sparse_update.loop.evaluation import evaluate
from sparse_update.transformer import ModelConfig, Transformer
from tests.experiments.console import document as printed

WORDS = ["--steps", "12", "--batch", "4", "--targets", "0.3", "--controls", "adamw:1e-3", "--eval-tokens", "512"]
WORDS += ["--calibration-tokens", "256"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training run, as `experiments.train` leaves it, of a model that was never trained."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    (folder / "text").mkdir()
    for i in range(12):
        (folder / "text" / f"{i}.txt").write_bytes(rng.integers(97, 105, 2000).astype(np.uint8).tobytes())
    data = DataConfig(name="files", path=str(folder / "text"))
    corpus = load_corpus(data)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(width=16, layers=1, heads=2, context=32, vocab_size=corpus.vocab_size))
    for name, value in model.named_parameters():
        if name.endswith(("attn.o.weight", "mlp.fc2.weight")):
            torch.nn.init.normal_(value, std=0.1)
    meta = {"config": {"data": asdict(data)}, "corpus_sha256": corpus.sha256, "model": asdict(model.cfg)}
    save_checkpoint(folder / "checkpoint", model.state_dict(), {}, meta)
    write_json(folder / "run.json", {"kind": "train", "status": "finished", "stream": "clean", "arm": "dense", "seed": 0})
    return folder


def test_the_frontier_end_to_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert activity.main([str(run), *WORDS]) == 0
    out, err = capsys.readouterr()
    assert "at the edge of the rates tried" in err  # of a single one
    found = printed(out)
    rows = {row["kind"]: row for row in found["rows"]}
    assert set(rows) == {"float", "gated", "pruned"}
    assert rows["float"]["delta_float_nats"] == 0
    assert rows["gated"]["share"] < rows["float"]["share"]
    assert rows["pruned"]["share"] <= rows["float"]["share"]
    for row in rows.values():
        assert row["delta_nats"] == pytest.approx(row["simulated_nats"] - rows["float"]["float_nats"])
    assert (run / "activity" / "frontier.png").stat().st_size > 1000
    assert "vs control" in out

    # every point again from its folder: the model is the one that was measured, and nothing is trained twice
    point = run / "activity" / "gated-0.3-s0"
    record = json.loads((point / "point.json").read_text())
    model = deploy.load_run(point)[0]
    points = frontier.Points(frontier.Frontier(str(run), eval_tokens=512))
    assert evaluate(model, points.text.held_out) == pytest.approx(record["float_nats"], abs=1e-6)
    zeros = [float((layer.weight == 0).float().mean()) for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert max(zeros) > 0.1
    synops = sum(layer["synops_per_token"] for layer in record["layers"])
    macs = sum(layer["dense_macs_per_token"] for layer in record["layers"])
    assert record["share"] == pytest.approx(synops / macs)
    deployed = deploy.deploy(deploy.DeployConfig(run=str(point), eval_tokens=512, calibration_tokens=256))
    assert deployed["arm"] == "gated-0.3"
    assert deployed["loss_float_nats"] == pytest.approx(record["float_nats"], abs=1e-6)
    assert deployed["loss_simulated_nats"] == pytest.approx(record["simulated_nats"], abs=2e-3)  # calibrated on other text
    before = (point / "point.json").stat().st_mtime_ns
    assert activity.main([str(run), *WORDS]) == 0
    assert printed(capsys.readouterr().out) == found
    assert (point / "point.json").stat().st_mtime_ns == before

    assert activity.main([str(run), *WORDS, "--batch", "5"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_broken_off_point_goes_on_where_it_stood(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def points(out: str) -> frontier.Points:
        return frontier.Points(
            frontier.Frontier(str(run), str(tmp_path / out), steps=12, batch=4, eval_tokens=512, calibration_tokens=256)
        )

    straight = points("straight").point("gated", 0.3, 0, 4e-3, pruned=False)
    monkeypatch.setattr(frontier, "SAVE_EVERY", 5)
    save, saved = frontier.save_checkpoint, []

    def once(*given: object) -> Path:
        if saved:
            raise KeyboardInterrupt
        saved.append(save(*given))  # type: ignore[arg-type]
        return saved[0]

    monkeypatch.setattr(frontier, "save_checkpoint", once)
    with pytest.raises(KeyboardInterrupt):
        points("broken").point("gated", 0.3, 0, 4e-3, pruned=False)
    monkeypatch.setattr(frontier, "save_checkpoint", save)
    resumed = points("broken").point("gated", 0.3, 0, 4e-3, pruned=False)
    for key in ("float_nats", "simulated_nats", "share", "selection_nats", "rates", "densities"):
        assert resumed[key] == straight[key], key


def test_text_to_choose_by_is_neither_trained_on_nor_judged(run: Path) -> None:
    points = frontier.Points(frontier.Frontier(str(run), eval_tokens=512))
    trained = bytes(points.text.stream(0).corpus.train_tokens.astype(np.uint8))
    judged = {bytes(window.numpy().astype(np.uint8)) for window in points.text.held_out}
    assert len(points.text.selection) > 16
    for window in points.text.selection:
        text = bytes(window.numpy().astype(np.uint8))
        assert text not in trained
        assert text not in judged
    with pytest.raises(CorpusError, match="lower --eval-tokens"):
        frontier.Points(frontier.Frontier(str(run), eval_tokens=1_000_000))


def test_summary_and_goal() -> None:
    def point(name: str, seed: int, share: float, delta: float) -> dict[str, object]:
        nats = dict.fromkeys(("float_nats", "quantised_nats", "simulated_nats", "delta_float_nats"), 1.5)
        return {"name": name, "kind": "gated", "seed": seed, "share": share, "delta_nats": delta, **nats}

    rows = activity.summary([point("a", 0, 0.1, 0.04), point("a", 1, 0.12, 0.05), point("b", 0, 0.05, 0.06)])
    assert [row["share"] for row in rows] == pytest.approx([0.11, 0.05])
    assert activity.qualifying(rows) == pytest.approx(0.11)
    assert activity.qualifying(rows, 0.01) is None
    low, high = rows[0]["delta_interval"]  # t with one degree of freedom: 12.706 standard errors of 0.005
    assert (low, high) == pytest.approx((0.045 - 12.706 * 0.005, 0.045 + 12.706 * 0.005), rel=1e-3)
    assert rows[1]["delta_interval"] is None


def test_distillation_comes_with_its_own_control(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--distil", "0.5", "--teacher", "control", "--pruning", "0", "--out", str(tmp_path / "kd")]
    assert activity.main([str(run), *words]) == 0
    rows = {row["kind"]: row for row in printed(capsys.readouterr().out)["rows"]}
    assert set(rows) == {"float", "distilled", "gated"}
    assert rows["distilled"]["float_nats"] != rows["float"]["float_nats"]
    assert rows["distilled"]["delta_nats"] == pytest.approx(
        rows["distilled"]["simulated_nats"] - rows["float"]["float_nats"]
    )
    with pytest.raises(ValueError, match="start, control"):
        frontier.Frontier(str(run), teacher="nobody")


def test_bad_words_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert activity.main([str(run), "--targets", "0"]) == 2
    assert "above 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        activity.main([str(run), "--controls", "sgd:0.1"])
    assert activity.main([str(run / "nowhere")]) == 2
    assert "no such file" in capsys.readouterr().err
