"""`spikegate deploy` on a model of seconds: three routes, intervals, layers one at a time, text, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hardware
from experiments import bench, deploy
from experiments.comparison.accounts import layer_energies
from experiments.comparison.overview import rows
from experiments.comparison.record import Deployment, Stream
from experiments.runs import placed
from experiments.runs.deployment import HeldOut, evenly, held_out_loss
from experiments.runs.plain_json import write_json
from hardware.placement.report import DoesNotFit, Limit
from sparse_update.data.corpus import DataConfig, load_corpus
from sparse_update.loop.checkpoint import save_checkpoint
from sparse_update.loop.evaluation import evaluate
from sparse_update.transformer import ModelConfig, Transformer
from tests.experiments.console import document as printed

WORDS = ["eval_tokens=512", "calibration_tokens=256", "progress=false", "profiles=[digital45_int8_sram]"]


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of training runs, as `experiments.train` leaves them, of models that were never trained."""
    text = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(12):
        (text / f"{i}.txt").write_bytes(rng.integers(97, 105, 2000).astype(np.uint8).tobytes())
    data = DataConfig(name="files", path=str(text))
    corpus = load_corpus(data)

    def make(spoil: Callable[[Transformer], object] = lambda _: None, **shape: Any) -> Path:
        folder = tmp_path_factory.mktemp("run")
        torch.manual_seed(0)
        sizes = {"width": 16, "layers": 1, "heads": 2, "context": 32, "vocab_size": corpus.vocab_size, **shape}
        model = Transformer(ModelConfig(**sizes))
        for name, value in model.named_parameters():
            if name.endswith(("attn.o.weight", "mlp.fc2.weight")):
                torch.nn.init.normal_(value, std=0.1)
        spoil(model)
        meta = {"config": {"data": asdict(data)}, "corpus_sha256": corpus.sha256, "model": asdict(model.cfg)}
        save_checkpoint(folder / "checkpoint", model.state_dict(), {}, meta)
        note = {"kind": "train", "status": "finished", "stream": "clean", "arm": "dense", "seed": 0}
        write_json(folder / "run.json", note)
        return folder

    return make


@pytest.fixture(scope="module")
def run(make_run: Callable[..., Path]) -> Path:
    return make_run()


def deployed(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], str]:
    assert deploy.main([f"run={run}", *WORDS, *words]) == 0
    out = capsys.readouterr().out
    return printed(out), out


ROUTES = {
    "graded": ["conversion.hidden_bits=10"],
    "sigma_delta": ["sigma_delta.input_threshold=2"],
    "rate": ["rate.time_steps=8"],
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_is_measured(route: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / route
    more = ["sensitivity=true", "sensitivity_tokens=64", "layer_tokens=64", "generate=ab:", "generate_tokens=40"]
    more += ["mode_chip_tokens=128"]
    found, shown = deployed(run, capsys, f"out={out}", f"route={route}", *ROUTES[route], *more)
    assert found == json.loads((out / "deploy.json").read_text())
    (key, value) = ROUTES[route][0].partition(".")[2].split("=")
    assert (found["route"], found["settings"][key]) == (route, int(value))

    model, corpus, data, _ = deploy.load_run(run)
    windows = deploy.held_out_sets(corpus, data, 32, 512)["val"]
    assert found["loss_float_nats"] == evaluate(model, windows)  # the loss that training reports, to the last bit
    for name in ("float", "quantised", "simulated"):
        bounds = found[f"loss_{name}_interval"]
        assert bounds["low"] < found[f"loss_{name}_nats"] < bounds["high"]
        assert bounds["mean"] == pytest.approx(found[f"loss_{name}_nats"])
        assert bounds["windows"] == len(windows) == 16
    less = found["delta_simulated"]
    assert less["mean"] == pytest.approx(found["loss_simulated_nats"] - found["loss_float_nats"])
    assert less["low"] < less["mean"] < less["high"]
    # paired: the windows differ far more among each other than the models do on them
    float_ = found["loss_float_interval"]
    assert less["high"] - less["low"] < 0.5 * (float_["high"] - float_["low"])
    assert abs(less["mean"]) < 0.05

    mapped = [layer for layer in found["layers"] if not layer["host"]]
    assert found["synops_per_token"] == pytest.approx(sum(layer["synops_per_token"] for layer in mapped))
    assert found["synops_fraction"] == pytest.approx(found["synops_per_token"] / found["mapped_macs_per_token"])
    assert found["mapped_macs_per_token"] == 12 * 16**2 + 16 * corpus.vocab_size
    names = [error["segment"] for error in found["layer_errors"]]
    assert names == [one["segment"] for one in found["sensitivity"]]
    assert len(names) == (7 if route == "rate" else 6)  # q k v o, the squared MLP as one or two, the head
    assert all(0 < error["relative_rms"] < 0.5 for error in found["layer_errors"])
    assert sum(one["mac_share"] for one in found["sensitivity"]) == pytest.approx(1)
    for one in found["sensitivity"]:
        assert one["delta"]["mean"] == pytest.approx(one["delta_nats"])

    chip = found["mode_chip"]
    assert chip["tokens"] == 128
    assert chip["loss_nats"] == chip["interval"]["mean"]
    assert chip["less_lava"]["mean"] == pytest.approx(chip["less_float"]["mean"], abs=0.05)  # lava is that close to float
    lossy = [note for note in chip["notes"] if "acts on each synapse" in note]
    assert ("weights lose bits" in shown) == bool(lossy)
    assert (route == "rate") == (chip["less_lava"]["mean"] == 0.0)  # exponents of -1 alone
    assert f"mode chip: {chip['loss_nats']:.4f} nats" in shown

    assert set(found["samples"]) == {"float", "deployed"}
    for sample in found["samples"].values():
        assert sample["text"].startswith("ab:")
        assert len(sample["tokens"]) == 40  # goes past the context of 32
    assert "nats, it alone" in shown
    board = EventAccumulator(str(out)).Reload()
    texts = {tag.split("/")[0] for tag in board.Tags()["tensors"]}
    assert {"compatibility", "conversion", "losses", "sensitivity", "samples", "energy"} <= texts


@pytest.mark.parametrize(
    ("chip", "words"),
    [
        ("loihi2", ["conversion.channel_groups=3"]),
        ("loihi2", ["route=sigma_delta"]),
        ("loihi2", ["route=rate", "rate.time_steps=4"]),
        ("loihi1", ["route=rate", "rate.time_steps=4", "rate.reset=hard"]),
    ],
)
def test_cores_time_and_joules_by_layer(
    chip: str, words: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    profiles = "profiles=[loihi1_davies2018,loihi1_sanafe,digital45_int8_sram]"
    found, _ = deployed(run, capsys, f"out={out}", f"chip={chip}", *words, profiles, "layer_tokens=0")
    mapped = {layer["layer"] for layer in found["layers"] if not layer["host"]}
    steps = 4 if "route=rate" in words else 1
    assert {layer["time_steps"] for layer in found["layers"] if not layer["host"]} == {steps}

    placement = found["placement"]
    assert {layer["name"] for layer in placement["layers"]} == mapped
    assert placement["chip"] == chip
    assert placement["cores_used"] == len(placement["cores"]) > 0
    assert placement["measured"]
    for latency in found["latency"]:
        low, mid, high = latency["token_us"]
        assert 0 < low <= mid <= high
        step = latency["step_us"][1]
        assert mid >= step * len(found["health"]) * steps * 0.999  # every segment takes its steps
        assert any("host" in reason for reason in latency["unknown"])
    rates = [latency["rates"] for latency in found["latency"]]
    assert rates == (["loihi2_estimated"] if chip == "loihi2" else ["loihi1_davies2018", "loihi1_sanafe"])

    kinds = {energy["profile"]: energy["kind"] for energy in found["energy"]}
    assert list(kinds.values()).count("extrapolated") == (chip == "loihi2")
    for energy in found["energy"]:
        triples = [triple for groups in energy["by_layer"].values() for triple in groups.values()]
        for i, key in enumerate(("low_j", "mid_j", "high_j")):
            assert math.fsum(triple[i] for triple in triples) == pytest.approx(energy[key])
        static = "static" in energy["by_layer"].get("chip", {})
        assert static == (energy["kind"] == "extrapolated" or energy["profile"].startswith(chip))
        assert static == any(label.startswith("includes static power") for label in energy["labels"])
        assert set(energy["by_layer"]) - {"chip"} == mapped
    assert found["host_energy"]["scope"] == "layers on the host"
    assert [(b["chip"], b["reference"]) for b in found["break_even"]] == [
        (name, "digital45_int8_sram") for name in ("loihi1_davies2018", "loihi1_sanafe")
    ]
    assert found["standings"]

    board = EventAccumulator(str(out)).Reload()
    assert {"core utilisation", "spike raster"} <= set(board.Tags()["images"])
    assert {"placement", "config", "break-even"} <= {tag.split("/")[0] for tag in board.Tags()["tensors"]}
    item = Deployment(str(out), "clean", "dense", 0, found)
    (row,) = rows(Stream("clean", {}, (item,), ()))
    assert row["cores"] == placement["cores_used"]
    assert row["token_us"] == found["latency"][0]["token_us"][1]
    energies, missing = layer_energies(found)
    assert missing == []
    assert {energy.origin for energy in energies} == {"recorded"}


def test_what_does_not_fit_is_said(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*_: object) -> None:
        raise DoesNotFit("the network", Limit("cores", 9, 2), ("more chips",))

    monkeypatch.setattr(placed, "place", full)
    found, _ = deployed(run, capsys, f"out={tmp_path / 'out'}", "layer_tokens=0")
    assert found["placement"] is None
    assert found["latency"] is None
    assert "does not fit: cores 9 of 2" in found["placement_reason"]
    assert "does not fit" in found["latency_reason"]
    assert all("static" not in energy["by_layer"].get("chip", {}) for energy in found["energy"])


def test_a_deployment_that_broke_off_is_made_anew_and_a_finished_one_is_not(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [f"out={out}", "layer_tokens=0", "mode_chip_tokens=0"]
    found, _ = deployed(run, capsys, *words)
    assert deploy.main([f"run={run}", *WORDS, *words]) == 2
    assert "already holds a deployment" in capsys.readouterr().err
    write_json(out / "run.json", json.loads((out / "run.json").read_text()) | {"status": "running"})
    (out / "plan" / "stale.graph.npz").touch()
    again, _ = deployed(run, capsys, *words)
    assert again["loss_simulated_nats"] == found["loss_simulated_nats"]
    assert not (out / "plan" / "stale.graph.npz").exists()
    assert deploy.main([f"run={run}", *WORDS, f"out={run}"]) == 2
    assert "already holds a train run" in capsys.readouterr().err


def test_losses_and_windows() -> None:
    """Against sums by hand: means of windows, and the t-interval of the difference."""
    a, b = HeldOut(2.0, (1.0, 2.0, 3.0), 0.0), HeldOut(1.5, (0.4, 1.6, 2.5), 0.0)
    less = a.less(b)
    assert less["mean"] == pytest.approx(0.5)
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # t(0.975, 2) x sd / sqrt(n)
    assert less["low"] == pytest.approx(0.5 - half)
    assert less["high"] == pytest.approx(0.5 + half)
    assert HeldOut(1.0, (1.0,), 0.0).interval == {"mean": 1.0, "low": None, "high": None, "windows": 1}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(width=8, layers=1, heads=2, context=6, vocab_size=11))
    windows = torch.randint(0, 11, (5, 7))
    told: list[int] = []
    found = held_out_loss(model, windows, told.append, batch=2)
    assert told == [12, 12, 6]
    with torch.no_grad():
        chance = model(windows[:, :-1]).log_softmax(-1).gather(2, windows[:, 1:, None])[..., 0]
    assert found.windows == pytest.approx((-chance).mean(1).tolist(), rel=1e-6)
    assert found.nats == pytest.approx(float(-chance.mean()), rel=1e-6)
    assert evenly(torch.arange(70).view(10, 7), 18)[:, 0].tolist() == [7, 35, 56]
    assert len(evenly(windows, 1)) == 1
    assert torch.equal(evenly(windows, 999), windows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["route=spikes"], "route is 'spikes'; it is one of graded, sigma_delta, rate"),
        (["rate.steps=4"], "unknown configuration key 'rate.steps'; did you mean rate.time_steps"),
        (["rate.time_steps=0"], "time_steps is 0; it lies in 1..1024"),
        (["sigma_delta.input_threshold=200"], "input_threshold is 200; it lies in 0..127"),
        (["calibration_method=guess"], "calibration_method is 'guess'; it is one of percentile, mse"),
        (["percentile=0"], "percentile is 0"),
        (["eval_tokens=0"], "eval_tokens is 0; it must be at least 1"),
        (["temperature=-1"], "temperature is -1"),
    ],
)
def test_wrong_settings_are_refused(
    words: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy.main([f"run={run}", f"out={tmp_path / 'out'}", *WORDS, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def not_a_number(model: Transformer) -> None:
    model.blocks[0].mlp.fc1.weight.data[1, 2] = float("nan")  # type: ignore[union-attr, operator]


def test_what_cannot_be_converted_leaves_no_folder(
    make_run: Callable[..., Path], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chip = (Path(hardware.__file__).parent / "chips/loihi1.yaml").read_text()
    small = tmp_path / "small.yaml"
    small.write_text(chip.replace("name: loihi1", "name: small").replace("cores:\n    value: 128", "cores:\n    value: 2"))
    assert small.read_text() != chip
    for folder, words, message in (
        (make_run(not_a_number), [], "cannot be converted: parameter 'blocks.0.mlp.fc1.weight' holds 1 NaN"),
        (run, [f"chip={small}", "chips=1", "route=rate"], "does not fit: cores"),
        (run, ["chip=loihi1"], "loihi1"),
        (run, ["chip=loihi9"], "loihi9"),
    ):
        out = tmp_path / "out"
        assert deploy.main([f"run={folder}", f"out={out}", *WORDS, *words]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert not out.exists()


@pytest.mark.slow
def test_the_bench_of_conversion(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["conversion", "--run", str(run), "--eval-tokens", "512", "--calibration-tokens", "256", "--rounds", "7"]
    frontier = tmp_path / "frontier.json"
    rows = [{"name": "gated-0.1", "share": 0.11, "delta_nats": 0.04}]
    write_json(frontier, {"run": "r", "steps": 9, "rows": rows, "goal_nats": 0.05, "synops_fraction_at_0.05": 0.11})
    assert bench.main([*words, "--frontier", str(frontier)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = printed(lines[-1])
    assert found["synops_fraction_at_0.05"] == 0.11
    assert found["frontier"]["source"] == str(frontier)
    assert abs(found["delta_nats_w8a8"]) < 0.02
    low, high = found["delta_nats_w8a8_interval"]
    assert low < found["delta_nats_w8a8"] < high
    mapped = 12 * 16**2 + 16 * 256
    assert found["mapped_mac_share"] == pytest.approx(mapped / (mapped + 2 * 32 * 16))
    for key, least in (("tokens_per_s", 0.8), ("generated_tokens_per_s", 0.5)):
        speed = found[key]
        low, high = speed["ratio_interval"]
        assert 0 < low <= high
        assert (speed["ratio"] is None) == (speed["verdict"] == "too noisy")
        assert speed["ratio"] is None or low <= speed["ratio"] <= high
        assert speed["at_least"] == least
        assert speed["target"] == ("met" if low >= least else "missed" if high < least else "too noisy")
    assert "11.0%" in "\n".join(lines)

    assert bench.main([*words, "--frontier-steps", "8", "--targets", "0.3"]) == 0
    short = printed(capsys.readouterr().out)
    assert {row["kind"] for row in short["frontier"]["rows"]} == {"float", "distilled", "gated", "pruned"}
    within = [row["share"] for row in short["frontier"]["rows"] if row["delta_nats"] <= 0.05]
    assert short["synops_fraction_at_0.05"] == (min(within) if within else None)
    assert short["delta_nats_w8a8"] == found["delta_nats_w8a8"]

    assert bench.main([*words, "--frontier-steps", "0"]) == 0
    none = printed(capsys.readouterr().out)
    assert none["synops_fraction_at_0.05"] is None
    assert "not measured" in none["frontier"]["source"]
    write_json(frontier, {"rows": []})
    assert bench.main([*words, "--frontier", str(frontier)]) == 1
    assert "is no frontier.json" in capsys.readouterr().err
