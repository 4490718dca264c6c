"""A small training run on a schedule, priced by the shipped table."""

from __future__ import annotations

import os
import signal

import numpy as np
import torch

from sparse_update.clock.shipped import shipped_table
from sparse_update.data.corpus import DataConfig, load_corpus, val_windows
from sparse_update.data.stream import WindowStream
from sparse_update.gates.config import GateConfig
from sparse_update.growth.settings import GrowthConfig
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.recorder import Listeners
from sparse_update.loop.records import TrainerConfig
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import SubsetConfig

SHAPE = {"width": 16, "layers": 2, "heads": 2, "context": 16, "vocab_size": 256, "attention": "explicit"}
CPU = torch.device("cpu")
BATCH = 8


def write_text(folder):
    """Twelve documents of thirteen letters, the first ones far more often than the last."""
    generator = np.random.default_rng(0)
    share = 0.7 ** np.arange(13)
    for i in range(12):
        letters = generator.choice(np.arange(97, 110), 3000, p=share / share.sum())
        (folder / f"{i}.txt").write_bytes(bytes(letters.astype(np.uint8)))
    return load_corpus(DataConfig(name="files", path=str(folder)))


def build(corpus, folder, steps=20.0, gate=None, subset=None, optim=None, growth=None, compiled=False, seed=0, **kw):
    """A trainer with a budget of so many plain steps of `BATCH` windows, and what it reports."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SHAPE, **kw.pop("shape", {})}))
    cfg, optim, table = model.cfg, optim or OptimConfig(), shipped_table()
    times = table.times(cfg, optim, BATCH, CPU, "fp32", compiled)
    parts = {"objective": kw.pop("objective")} if "objective" in kw else {}
    stream = WindowStream(corpus, 16, seed=0)
    if kw.pop("stream", None):
        del stream.corpus
    settings = {"budget_reference_s": steps * times.dense_ms / 1000, "batch_windows": BATCH, "log_every_steps": 1}
    reports = []
    trainer = make_trainer(
        model,
        Arm(gate or GateConfig(), subset or SubsetConfig(), optim, growth or GrowthConfig()),
        TrainerConfig(**{**settings, "evaluations": 2, **kw}),
        Text(stream, {"val": val_windows(corpus, 16, 512)}),
        Prices(times, lambda found, todo, parts: table.extended(found, cfg, optim, todo, parts)),
        Place(folder),
        seed,
        Listeners(reports.append),
        **parts,
    )
    return trainer, reports


def resumes_to_the_bit(corpus, folder, stop, **given):
    """Run it whole, and interrupted after `stop` steps and resumed, and compare everything."""
    whole, whole_reports = build(corpus, folder / "whole", **given)
    expected = whole.run()
    cut, cut_reports = build(corpus, folder / "cut", **given)
    cut.records.listeners.on_report = lambda report: (
        cut_reports.append(report),
        os.kill(os.getpid(), signal.SIGINT) if report.step == stop else None,
    )
    assert cut.run().step == stop < expected.step
    again, again_reports = build(corpus, folder / "cut", **given)
    torch.manual_seed(99)
    again.resume(folder / "cut" / "checkpoint")
    found = again.run()
    for key in ("step", "tokens", "flops", "reference_s", "val_loss_nats", "windows_offered"):
        assert getattr(found, key) == getattr(expected, key), key
    assert [r.loss_nats for r in cut_reports + again_reports] == [r.loss_nats for r in whole_reports]
    for a, b in zip(again.updates.model.parameters(), whole.updates.model.parameters(), strict=True):
        assert torch.equal(a, b)


def windows_shown(trainer):
    """Windows of each step, in the order in which they are trained on; fills while it runs."""
    seen, take = [], trainer.updates.take

    def watched(batch, step, progress):
        seen.append(batch.window.tolist())
        return take(batch, step, progress)

    trainer.updates.take = watched
    return seen
