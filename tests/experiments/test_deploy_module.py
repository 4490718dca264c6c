"""`spikegate deploy module=... data=...`: any module on any samples, judged by hand too, taken up again, and refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from experiments import deploy
from tests.experiments.console import document as printed

SOURCE = '''
import torch
from torch import nn

def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

class Steps(nn.Module):
    """Answers at every step of a stream."""
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
    def forward(self, x):
        return self.b(torch.relu(self.a(x)))

def steps():
    torch.manual_seed(1)
    return Steps()

def steps_first():
    model = steps()
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model
        def forward(self, x):
            return self.inner(x).transpose(0, 1), None
    return Turned()

def tokens():
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 3))

def number():
    return 3

def unmapped():
    return nn.Sequential(nn.Softmax(dim=-1))

def diverged():
    model = network()
    model[0].weight.data.fill_(1e38)
    return model
'''
WORDS = ["progress=false", "profiles=[loihi1_davies2018,digital45_int8_sram]", "placing_samples=4"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is worked in, with `netmod.py` and arrays."""
    (tmp_path / "netmod.py").write_text(SOURCE)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 6)).astype(np.float32)
    np.savez(tmp_path / "flat.npz", x=x, y=rng.integers(0, 3, 60), x_train=rng.normal(size=(40, 6)).astype(np.float32))
    stream = rng.normal(size=(30, 5, 6)).astype(np.float32)
    np.savez(tmp_path / "stream.npz", x=stream, y=rng.integers(0, 3, 30), x_train=stream + 1)
    np.savez(tmp_path / "each.npz", x=stream, y=rng.integers(0, 3, (30, 5)), x_train=stream)
    np.savez(tmp_path / "values.npz", x=stream, y=rng.normal(size=(30, 5, 3)), x_train=stream)
    np.savez(tmp_path / "tokens.npz", x=rng.integers(0, 9, (50, 4)), y=rng.integers(0, 3, 50))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("netmod", None)


def deployed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[dict[str, Any], str]:
    assert deploy.main([*WORDS, *words]) == code, capsys.readouterr().err
    shown = capsys.readouterr()
    return (printed(shown.out) if not code else {}), shown.out + shown.err


def arrays(name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(name) as opened:
        return opened["x"], opened["y"]


@pytest.mark.parametrize("route", ["graded", "sigma_delta", "rate"])
def test_every_route_is_judged_as_by_hand(route: str, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, shown = deployed(capsys, "module=netmod:network", "path=flat.npz", f"route={route}", f"out={own / route}")
    x, y = arrays("flat.npz")
    import netmod  # type: ignore[import-not-found]

    model: nn.Module = netmod.network()
    logits = model(torch.from_numpy(x)).detach().numpy()
    assert found["accuracy"]["float"]["value"] == pytest.approx((logits.argmax(axis=1) == y).mean())
    matrix = np.zeros((3, 3), int)
    np.add.at(matrix, (y, logits.argmax(axis=1)), 1)
    assert found["confusion"]["float"] == matrix.tolist()
    simulated = np.array(found["confusion"]["simulated"])
    assert np.trace(simulated) / 60 == pytest.approx(found["accuracy"]["simulated"]["value"])
    assert found["less_float"]["simulated"]["value"] == pytest.approx(
        found["accuracy"]["simulated"]["value"] - found["accuracy"]["float"]["value"]
    )
    assert found["agreement"]["simulated"] >= 0.9
    assert found["macs_per_sample"] == found["mapped_macs_per_sample"] == 6 * 16 + 16 * 3
    assert found["mapped_mac_share"] == 1
    assert found["cores"] >= 2
    assert found["samples"] == 60
    energies = {one["profile"]: one for one in found["energy"]}
    dense = energies["digital45_int8_sram"]
    assert dense["per"] == "sample"
    assert 0 < dense["low_j"] <= dense["mid_j"] <= dense["high_j"]
    assert "modelled" in shown
    assert "Horowitz" in shown
    board = EventAccumulator(str(own / route)).Reload()
    assert {"confusion", "spike raster", "core utilisation"} <= set(board.Tags()["images"])
    page = (own / route / "deployment.html").read_text()
    assert page.count("<svg") == 3
    assert "http" not in page.split("<main>")[0].replace("http-equiv", "")


def test_the_same_command_again_shows_what_is_there(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["module=netmod:network", "data=arrays", "path=flat.npz"]
    found, _ = deployed(capsys, *words)
    folder = own / "runs/deploy/network-arrays-graded"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}
    again, shown = deployed(capsys, *words, "threads=1")
    assert again == found
    assert "nothing to do" in shown
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}

    _, shown = deployed(capsys, *words, "seed=4", code=2)
    assert "seed was 0, is 4" in shown
    arrays_were = (own / "flat.npz").read_bytes()
    x, y = arrays("flat.npz")
    np.savez(own / "flat.npz", x=x + 1, y=y, x_train=x)
    _, shown = deployed(capsys, *words, code=2)
    assert "path has changed" in shown
    (own / "flat.npz").write_bytes(arrays_were)

    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
    made_anew, _ = deployed(capsys, *words)
    assert made_anew["accuracy"] == found["accuracy"]
    (folder / "run.json").write_text(json.dumps({"kind": "train", "status": "finished"}))
    _, shown = deployed(capsys, *words, code=2)
    assert "already holds a train run" in shown


def test_weights_come_from_a_file(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(7)
    other = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    save_file(other.state_dict(), own / "w.safetensors")
    words = ["module=netmod:network", "path=flat.npz", "weights=w.safetensors"]
    found, _ = deployed(capsys, *words)
    x, y = arrays("flat.npz")
    by_hand = (other(torch.from_numpy(x)).argmax(dim=1).numpy() == y).mean()
    assert found["accuracy"]["float"]["value"] == pytest.approx(by_hand)

    state = other.state_dict()
    spoilt: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "has no 'extra'": lambda: state | {"extra": torch.zeros(1)},
        r"'0.bias' has shape (2,)": lambda: state | {"0.bias": torch.zeros(2)},
        "lacks 2.bias": lambda: {key: value for key, value in state.items() if key != "2.bias"},
    }
    for message, make in spoilt.items():
        save_file(make(), own / "w.safetensors")
        _, shown = deployed(capsys, *words, "out=new", code=2)
        assert message in shown
    (own / "w.safetensors").write_bytes((own / "w.safetensors").read_bytes()[:50])
    assert "cut short" in deployed(capsys, *words, "out=new", code=2)[1]
    assert "a .safetensors file is read" in deployed(capsys, *words[:2], "weights=w.pt", code=2)[1]
    assert not (own / "new" / "deploy.json").exists()


def test_streams_are_read_out_by_step_and_by_sample(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import netmod

    x, y = arrays("stream.npz")
    out = netmod.steps()(torch.from_numpy(x)).detach()
    for how, by_hand in (("mean", out.mean(1)), ("last", out[:, -1]), ("max", out.max(1).values)):
        words = ["module=netmod:steps", "path=stream.npz", f"readout={how}", f"out={how}"]
        found, _ = deployed(capsys, *words)
        assert found["accuracy"]["float"]["value"] == pytest.approx((by_hand.argmax(1).numpy() == y).mean())
        assert found["macs_per_sample"] == 5 * (6 * 16 + 16 * 3)
        assert found["time_steps_per_sample"] == 5
    turned, _ = deployed(capsys, "module=netmod:steps_first", "path=stream.npz", "readout=max", "step_axis=0", "out=turned")
    assert turned["accuracy"]["float"] == found["accuracy"]["float"]

    each, _ = deployed(capsys, "module=netmod:steps", "path=each.npz", "out=each", "route=sigma_delta")
    right = out.argmax(-1).numpy() == arrays("each.npz")[1]
    assert each["accuracy"]["float"]["value"] == pytest.approx(right.mean())
    assert "bootstrap" in each["accuracy"]["float"]["method"]
    assert np.sum(each["confusion"]["float"]) == 150

    values, shown = deployed(capsys, "module=netmod:steps", "path=values.npz", "out=values")
    target = arrays("values.npz")[1].astype(np.float32)
    nrmse = np.sqrt(((out.numpy() - target) ** 2).mean()) / target.std()
    assert values["nrmse"]["float"]["value"] == pytest.approx(nrmse, rel=1e-5)
    assert values["nrmse"]["float"]["low"] < nrmse < values["nrmse"]["float"]["high"]
    assert values["confusion"]["float"] is None
    assert "NRMSE" in shown


def test_tokens_stay_whole_numbers(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = deployed(capsys, "module=netmod:tokens", "path=tokens.npz", "calibration_samples=20")
    import netmod

    x, y = arrays("tokens.npz")
    logits = netmod.tokens()(torch.from_numpy(x[20:]))
    assert found["accuracy"]["float"]["value"] == pytest.approx((logits.argmax(1).numpy() == y[20:]).mean())
    assert found["samples"] == 30
    assert "set the ranges" in found["notes"][0]


REFUSED = {
    "no such function": (["module=netmod:nothing"], 2, "has no nothing"),
    "no such module": (["module=nomod:x"], 2, "no module nomod"),
    "no module": (["module=number"], 2, "written PACKAGE:FUNCTION"),
    "no torch module": (["module=netmod:number"], 2, "returns int; a trained torch.nn.Module"),
    "no file": (["module=netmod:network", "path=none.npz"], 2, "no such file"),
    "damaged file": (["module=netmod:network", "path=netmod.py"], 2, "not readable as .npz, or cut short"),
    "unknown key": (["module=netmod:network", "pth=flat.npz"], 2, "unknown configuration key 'pth'"),
    "unknown data": (["module=netmod:network", "data=imagenet"], 2, "it is one of arrays, events, digits"),
    "unknown route": (["module=netmod:network", "route=magic"], 2, "route is"),
    "steps against one answer": (["module=netmod:steps", "path=stream.npz"], 1, "readout=mean, sum, last or max"),
    "other width": (["module=netmod:network", "path=tokens.npz", "scale=1", "calibration_samples=9"], 1, "does not run"),
    "tokens into floats": (["module=netmod:network", "path=tokens.npz", "calibration_samples=9"], 1, "scale= makes floats"),
    "nothing maps": (["module=netmod:unmapped", "path=flat.npz"], 1, "nothing that the graded route can map"),
    "diverged": (["module=netmod:diverged", "path=flat.npz"], 1, "NaN or infinite"),
    "odd readout": (["module=netmod:network", "readout=median"], 2, "readout is median"),
    "no sample to place": (["module=netmod:network", "batch=0"], 2, "batch is 0"),
    "no such profile": (["module=netmod:network", "profiles=[nope]"], 2, "no name 'nope'; shipped names: digital45"),
    "no such chip": (["module=netmod:network", "chip=loihi9"], 2, "no name 'loihi9'; shipped names: loihi1"),
    "no path": (["module=netmod:network", "path="], 2, "data=arrays needs the file: path=FILE.npz"),
    "scale of other data": (["module=netmod:network", "data=digits", "scale=2", "path="], 2, "scale=2 is for data=arrays"),
    "no step": (["module=netmod:network", "data=events", "path=flat.npz"], 2, "data=events needs step_us="),
    "out is a file": (["module=netmod:network", "out=netmod.py"], 2, "netmod.py cannot be written to (File exists)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_deployed_is_said(name: str, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, code, message = REFUSED[name]
    given = [*words] if any(word.startswith(("path=", "pth=")) for word in words) else [*words, "path=flat.npz"]
    _, shown = deployed(capsys, *given, code=code)
    assert message in shown
    assert "Traceback" not in shown
    assert not list(own.rglob("deploy.json"))
    assert not (own / "runs/deploy").exists() or not list((own / "runs/deploy").iterdir())


def test_a_refusal_keeps_what_a_folder_held(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "mine").mkdir()
    (own / "mine/notes.txt").write_text("keep")
    deployed(capsys, "module=netmod:diverged", "path=flat.npz", "out=mine", code=1)
    assert (own / "mine/notes.txt").read_text() == "keep"


def test_the_help_of_a_deployment_names_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "spikegate deploy module=PACKAGE:FUNCTION data=NAME" in shown
    assert "eval_tokens:" in shown
    assert deploy.main(["module=a:b", "data=digits", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "spikegate deploy run=RUN" in shown
    assert "batch:" in shown
