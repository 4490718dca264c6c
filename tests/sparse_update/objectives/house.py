"""A trainer on tasks whose prices are made up, in reference milliseconds: a step costs 10, the reading of prompts or a tile
1, a token of a row 0.02."""

from __future__ import annotations

import torch

from sparse_update.clock.cost import ComponentTimes, identity
from sparse_update.data.tokens import ByteTokenizer
from sparse_update.gates.config import GateConfig
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.recorder import Listeners
from sparse_update.loop.records import TrainerConfig
from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.examples.settings import TaskConfig
from sparse_update.parallel.single import ALONE
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import SubsetConfig

MODEL = {"width": 32, "layers": 2, "heads": 2, "context": 48, "vocab_size": 256, "attention": "explicit"}
SUMS = {"tasks": ["sums:1-2"], "form": "short", "judged": 12, "new_tokens": 4}


def priced(times, steps, components):
    generated = {key: 0.02 if key.startswith("generate[row") else 1.0 for key in components}
    found = {**{times.key(step): 10.0 for step in steps}, **generated}
    return times.extended({key: value for key, value in found.items() if not times.has(key)}, 10.0)


def examples_of(context=MODEL["context"], seed=0, **settings):
    return Examples(TaskConfig(**{**SUMS, **settings}), ByteTokenizer(), context, seed)


def model_of(**shape):
    torch.manual_seed(0)
    return Transformer(ModelConfig(**{**MODEL, **shape}))


def build(
    objective, stream, examples, folder, steps=6, windows=4, gate=None, subset=None, mesh=ALONE, model=None, seed=0, **cfg
):
    """A trainer by `objective(given)`, and what it reports."""
    model = model or model_of()
    ms = {"forward": 4.0, "backward_dx": 3.0, "backward_dw": 2.0, "optimizer": 1.0}
    table = ComponentTimes(ms, {}, "explicit", "fp32", "autograd", False, windows, identity(model.cfg, OptimConfig()), {})
    settings = {"budget_reference_s": steps * 0.010 + 1e-6, "batch_windows": windows, "log_every_steps": 1}
    settings |= {"evaluations": 1, "checkpoint_every_s": 1e9, **cfg}
    reports: list = []
    trainer = make_trainer(
        model,
        Arm(gate=gate or GateConfig(), subset=subset or SubsetConfig()),
        TrainerConfig(**settings),
        Text(stream, {name: rows.tokens_NT1 for name, rows in examples.held_out.items()}),
        Prices(table, priced),
        Place(folder),
        seed,
        Listeners(reports.append),
        objective=objective,
        mesh=mesh,
    )
    return trainer, reports
