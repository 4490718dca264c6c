"""`spikegate deploy route=lif`: networks of snnTorch's neurons, judged as snnTorch runs them, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import deploy
from neuro.graph import load_graph
from tests.experiments.console import document as printed

snntorch = pytest.importorskip("snntorch")

SOURCE = '''
import snntorch
import torch
from torch import nn

def layers():
    torch.manual_seed(0)
    made = nn.Linear(12, 10), nn.Linear(10, 3)
    with torch.no_grad():
        for layer in made:
            layer.weight.mul_(4)
    return made

def chain():
    a, b = layers()
    return nn.Sequential(a, snntorch.Leaky(beta=0.9, init_hidden=True), b, snntorch.Leaky(beta=0.9, init_hidden=True))

class Loop(nn.Module):
    """States handed on, steps first in what it returns."""
    def __init__(self):
        super().__init__()
        self.a, self.b = layers()
        self.one, self.two = snntorch.Leaky(beta=0.9), snntorch.Leaky(beta=0.9)

    def forward(self, x):
        v, w = self.one.reset_mem(), self.two.reset_mem()
        found = []
        for step in x.unbind(1):
            s, v = self.one(self.a(step), v)
            s, w = self.two(self.b(s), w)
            found.append(s)
        return torch.stack(found), torch.stack(found)

def loop():
    return Loop()

def dense():
    return nn.Sequential(*layers())
'''
WORDS = ["progress=false", "route=lif", "profiles=[loihi1_davies2018,digital45_int8_sram]", "readout=sum"]
STEPS = 9


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "spikemod.py").write_text(SOURCE)
    rng = np.random.default_rng(0)
    spikes = (rng.random((50, STEPS, 12)) < 0.4).astype(np.float32)
    y = rng.integers(0, 3, 40)
    np.savez(tmp_path / "spikes.npz", x=spikes[:40], y=y, x_train=spikes[40:])
    values = rng.random((50, 12)).astype(np.float32)
    np.savez(tmp_path / "values.npz", x=values[:40], y=y, x_train=values[40:])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("spikemod", None)


def deployed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[dict[str, Any], str]:
    assert deploy.main([*WORDS, *words]) == code, capsys.readouterr().err
    shown = capsys.readouterr()
    return (printed(shown.out) if not code else {}), shown.out + shown.err


def test_a_chain_and_a_loop_are_judged_as_snntorch_runs_them(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import spikemod  # type: ignore[import-not-found]

    found, shown = deployed(capsys, "module=spikemod:chain", "path=spikes.npz", "out=chain")
    with np.load("spikes.npz") as opened:
        x, y = torch.from_numpy(opened["x"]), opened["y"]
    with torch.no_grad():
        counts = spikemod.Loop()(x)[0].sum(0).numpy()
    assert found["accuracy"]["float"]["value"] == pytest.approx((counts.argmax(1) == y).mean())
    assert np.trace(np.array(found["confusion"]["simulated"])) / 40 == found["accuracy"]["simulated"]["value"]
    assert found["agreement"]["simulated"] >= 0.9
    assert found["macs_per_sample"] == 12 * 10 + 10 * 3
    assert found["cores"] >= 1
    assert found["layers"][0]["kind"] == "lif_general"
    assert "lif_general" in shown
    assert load_graph("chain/plan/network.graph.npz").populations[0].kind == "input"
    page = (own / "chain" / "deployment.html").read_text()
    assert page.count("<svg") == 3

    looped, _ = deployed(capsys, "module=spikemod:loop", "path=spikes.npz", "out=loop", "step_axis=0")
    for key in ("accuracy", "confusion", "synops_per_sample", "cores"):
        assert looped[key] == found[key]


def test_values_become_currents_of_so_many_bits(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["module=spikemod:chain", "path=values.npz", f"lif.time_steps={STEPS}", "lif.pieces=auto"]
    fine, _ = deployed(capsys, *words, "lif.input_bits=8", "out=fine")
    coarse, _ = deployed(capsys, *words, "lif.input_bits=2", "out=coarse")
    assert fine["agreement"]["quantised"] >= 0.95 > coarse["agreement"]["quantised"]
    assert fine["settings"]["input_bits"] == 8
    assert fine["sample_shape"] == [STEPS, 12]
    again, shown = deployed(capsys, *words, "lif.input_bits=8", "out=fine")
    assert again["accuracy"] == fine["accuracy"]
    assert "nothing to do" in shown


REFUSED = {
    "no stream": (["module=spikemod:chain", "path=values.npz"], 1, "lif.time_steps=T"),
    "no whole numbers": (["module=spikemod:chain", "path=values.npz", "lif.time_steps=4"], 1, "lif.input_bits=8"),
    "no neurons": (["module=spikemod:dense", "path=spikes.npz"], 1, "cannot be converted"),
    "one bit": (["module=spikemod:chain", "path=spikes.npz", "lif.input_bits=1"], 2, "lif.input_bits is 1"),
    "three pieces": (["module=spikemod:chain", "path=spikes.npz", "lif.pieces=3"], 2, "lif.pieces is '3'"),
    "unknown key": (["module=spikemod:chain", "path=spikes.npz", "lif.steps=3"], 2, "unknown configuration key"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_deployed_is_said(name: str, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, code, message = REFUSED[name]
    _, shown = deployed(capsys, *words, code=code)
    assert message in shown
    assert "Traceback" not in shown
    assert not list(own.rglob("deploy.json"))
