"""Every named method, gate, subset or optimizer, found on disk: it trains, resumes to the same bits, serialises."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
from dataclasses import asdict
from importlib.resources import files

import numpy as np
import pytest
import torch
import yaml

from sparse_update.clock.cost import ComponentTimes, identity
from sparse_update.data.corpus import DataConfig, load_corpus, val_windows
from sparse_update.data.stream import WindowStream
from sparse_update.gates.config import GateConfig
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.checkpoint import load_checkpoint, save_checkpoint
from sparse_update.loop.evaluation import evaluate, start_from
from sparse_update.loop.recorder import Listeners
from sparse_update.loop.records import TrainerConfig
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.masking import MaskConfig
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import SubsetConfig

MODEL = {"width": 16, "layers": 3, "heads": 2, "context": 16, "vocab_size": 256, "attention": "explicit"}
SMALL = {
    "gate": {"pool_windows": 16, "ngram_bits": 12, "vcas_every": 4, "sensitivity_at": 0.3},
    "subset": {"change_every_steps": 3},
    "optim": {"galore_rank": 3, "galore_every_steps": 4},
    "mask": {},
}
STEPS, STOP = 14, 6


def shipped(group):
    """Our own settings and those of published methods, which Hydra finds on a second search path."""
    folders = [folder for root in ("", "published") if (folder := files("configs").joinpath(root, group)).is_dir()]
    found = sorted((f for folder in folders for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return [(group, file.name.removesuffix(".yaml"), yaml.safe_load(file.read_text())) for file in found]


METHODS = [*shipped("gate"), *shipped("subset"), *shipped("optim"), *shipped("mask")]
PEERS = {"lora": ("peft",), "galore": ("galore_torch", "transformers")}
"""Libraries of the extra `peers` that a method needs."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    for i in range(8):
        (folder / f"{i}.txt").write_bytes(bytes(generator.integers(97, 110, 700).astype(np.uint8)))
    return load_corpus(DataConfig(name="files", path=str(folder)))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A checkpoint as a training run leaves it, for methods that need a reference model."""
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(7)
    model = Transformer(ModelConfig(**MODEL))
    save_checkpoint(folder / "checkpoint", dict(model.state_dict()), {}, {"model": asdict(model.cfg), "step": 0})
    return str(folder)


def measured(table, steps, components):
    """Every other step costs a plain one's time, scoring costs nothing."""
    return table.extended({**{step.key: 10.0 for step in steps}, **dict.fromkeys(components, 0.0)}, 10.0)


def build(corpus, folder, group, settings, reference, times=None):
    given = {"gate": {}, "subset": {}, "optim": {}, "mask": {}}
    given[group] = {**{k: v for k, v in SMALL[group].items() if k not in settings or group == "gate"}, **settings}
    if group == "subset":
        known = SubsetConfig.__dataclass_fields__
        given[group] |= {k: v for k, v in {"change_every_steps": 3, "block_rows": 4, "look_steps": 1}.items() if k in known}
    if given["gate"].get("signal") == "excess":
        given["gate"]["reference"] = reference
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**MODEL))
    ms = {"forward": 4.0, "backward_dx": 3.0, "backward_dw": 2.0, "optimizer": 1.0}
    table = ComponentTimes(ms, {}, "explicit", "fp32", "autograd", False, 4, identity(model.cfg, OptimConfig()), {})
    reports = []
    trainer = make_trainer(
        model,
        Arm(
            GateConfig(**given["gate"]),
            SubsetConfig(**given["subset"]),
            OptimConfig(**given["optim"], mask=MaskConfig(**given["mask"])),
        ),
        TrainerConfig(budget_reference_s=STEPS * 0.010 + 1e-6, batch_windows=4, log_every_steps=1, evaluations=2),
        Text(WindowStream(corpus, 16, seed=0), {"val": val_windows(corpus, 16, 256)}),
        Prices(times or table, measured),
        Place(folder, {"method": settings["name"]}),
        0,
        Listeners(reports.append),
    )
    return trainer, reports


@pytest.mark.parametrize(("group", "name", "settings"), METHODS, ids=[f"{group}-{name}" for group, name, _ in METHODS])
def test_a_named_method_trains_resumes_bit_exactly_and_serialises(corpus, tmp_path, reference, group, name, settings):
    for library in PEERS.get(name, ()):
        if not importlib.util.find_spec(library):
            pytest.skip(f"needs {library}")
    assert settings["name"] == name
    whole, whole_reports = build(corpus, tmp_path / "whole", group, settings, reference)
    before = [p.detach().clone() for p in whole.updates.model.parameters()]
    expected = whole.run()
    assert expected.finished
    assert expected.step > STOP
    assert np.isfinite(expected.val_loss_nats)
    assert any(not torch.equal(a, b) for a, b in zip(before, whole.updates.model.parameters(), strict=False))
    plain = Transformer(ModelConfig(**MODEL))
    start_from(plain, tmp_path / "whole")  # whatever the method, its checkpoint is a plain model
    assert evaluate(plain, whole.records.held_out["val"]) == pytest.approx(expected.val_loss_nats, abs=1e-5)

    cut, cut_reports = build(corpus, tmp_path / "cut", group, settings, reference)
    cut.records.listeners.on_report = lambda report: (
        cut_reports.append(report),
        os.kill(os.getpid(), signal.SIGINT) if report.step == STOP else None,
    )
    assert cut.run().step == STOP
    saved = load_checkpoint(tmp_path / "cut" / "checkpoint")
    assert {"optimizer", "gate", "subset", "counters", "rng", "generator"} <= set(saved.state)
    json.dumps(saved.meta)

    again, again_reports = build(corpus, tmp_path / "cut", group, settings, reference, cut.budget.clock.times)
    torch.manual_seed(99)
    again.resume(tmp_path / "cut" / "checkpoint")
    found = again.run()
    for key in (
        "step",
        "tokens",
        "flops",
        "reference_s",
        "val_loss_nats",
        "kept_share",
        "windows_offered",
        "windows_scored",
    ):
        assert getattr(found, key) == getattr(expected, key), key
    assert [r.loss_nats for r in cut_reports + again_reports] == [r.loss_nats for r in whole_reports]
    for (label, a), b in zip(again.updates.model.named_parameters(), whole.updates.model.parameters(), strict=True):
        assert torch.equal(a, b), label


def test_the_published_methods_are_there():
    names = {name for _, name, _ in METHODS}
    assert {
        "selective_backprop", "rho_loss", "rho1", "infobatch", "importance", "vcas", "random_ltd", "surprise_ltd", "dropbp",
        "exact_head", "dense", "random", "surprise", "random_tokens", "surprise_tokens",
    } <= names  # fmt: skip


def test_a_published_mask_or_trainer_names_its_source():
    places = [f for group in ("mask", "trainer") for f in files("configs").joinpath("published", group).iterdir()]
    assert {place.name for place in places} >= {"magma.yaml", "skip_update.yaml", "superposition.yaml"}
    for place in places:
        first = next(line for line in place.read_text().splitlines() if not line.startswith("# @"))
        assert re.search(r"arXiv 2\d{3}\.\d{5}", first)


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, name, _ in METHODS if group == "gate"])
def test_a_method_opens_with_its_rule(group, name):
    places = [files("configs").joinpath(root, group, f"{name}.yaml") for root in ("", "published")]
    (place,) = (place for place in places if place.is_file())  # a name stands in one of them
    first = place.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20
