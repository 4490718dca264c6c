"""Puts a trainer together from the settings of an arm: every part is made here, and the loop is given it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_update.clock.component import SCORING_FORWARD, Component
from sparse_update.clock.cost import ComponentTimes, ComponentTimesError
from sparse_update.clock.running import Measure, RunClock
from sparse_update.gates.choice import make_gate
from sparse_update.gates.config import GateConfig
from sparse_update.gates.gate import GateContext
from sparse_update.growth.rule import make_growth
from sparse_update.growth.settings import GrowthConfig, check_growth
from sparse_update.loop.budget import Budget
from sparse_update.loop.checkpoint import checkpoint_of
from sparse_update.loop.checkpoints import Checkpoints
from sparse_update.loop.recorder import Listeners, Recorder
from sparse_update.loop.records import TrainerConfig
from sparse_update.loop.schedules import check_batches, check_partial, check_shapes, vocabulary_of
from sparse_update.loop.tally import Tally
from sparse_update.loop.trainer import Trainer
from sparse_update.loop.updates import Updates
from sparse_update.objectives.likelihood import Likelihood
from sparse_update.objectives.objective import Given, Objective
from sparse_update.parallel.checks import check_mesh, check_pieces, check_variant
from sparse_update.parallel.mesh import Mesh
from sparse_update.parallel.sharing import SharedGate
from sparse_update.parallel.single import ALONE
from sparse_update.step.backward import Stepper
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.lowrank import adapt
from sparse_update.weights.optimizer import Optimizer
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import Active, Subset, SubsetConfig
from sparse_update.weights.undo import Undo


@dataclass(frozen=True)
class Arm:
    """What tells the arms of a comparison apart."""

    gate: GateConfig = field(default_factory=GateConfig)
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)


@dataclass(frozen=True, eq=False)
class Text:
    """What is read. `stream`: source of windows; `held_out`: windows by name, int64 (N, T + 1), on the CPU, "val" is the
    headline; `known_tokens`: text that the model knows already, int64 (tokens,), for signals of novelty; `judges`: windows
    that are in none of those sets and never in the stream, int64 (N, T + 1), by which a gate may judge while it trains."""

    stream: Any
    held_out: Mapping[str, Tensor]
    known_tokens: Tensor | None = None
    judges: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Prices:
    """What a step costs: a table of component times, its `precision` is used; and what extends it by steps and components
    that it lacks (without it, a missing entry is an error)."""

    times: ComponentTimes
    measure: Measure | None = None


@dataclass(frozen=True)
class Place:
    """Where a run is kept: checkpoints go to `folder/checkpoint`, with `meta` in them (config, tokenizer, ...), and the
    bytes that were `written` to other files of the folder so far."""

    folder: Path
    meta: Mapping[str, Any] = field(default_factory=dict)
    written: Callable[[], Mapping[str, int]] = dict


def make_trainer(
    model: Transformer,
    arm: Arm,
    cfg: TrainerConfig,
    text: Text,
    prices: Prices,
    place: Place,
    seed: int,
    listeners: Listeners | None = None,
    *,
    objective: Callable[[Given], Objective] = Likelihood,
    mesh: Mesh = ALONE,
) -> Trainer:
    """A trainer of `model`, which is on its device already, with `cfg.attention` resolved.

    Args:
        objective: makes what is minimised, from the parts that were made before it.
        mesh: the processes that train together; each of them assembles the same trainer, on the same stream, and takes its
            share of each step. `trainer.batch_windows` are the windows of all of them.

    Raises:
        ComponentTimesError: for a table of another model or kind of step, or one that lacks what the run may use.
        ValueError: for settings that do not fit one another, MeshError where the mesh cannot train by them.
        CorpusError: where bags of tokens would read the text twice.
    """
    if cfg.fast:
        raise ValueError(
            "trainer.fast: the choice is made before the model is: loop.fast.choose gives the arm and the settings that it "
            "stands for"
        )
    times, device = prices.times, model.embed.weight.device
    _check_table(times, model, arm.optim, cfg)
    check_growth(arm.growth, model.cfg.layers, arm.gate, arm.subset)
    growth = make_growth(arm.growth, model, seed)
    adapted = arm.subset.kind == "lora"
    if adapted:
        check_adapter(arm.gate)
        adapt(model, arm.subset, seed)
    for windows in cfg.batch_sizes:
        check_pieces(mesh, arm.gate, windows, cfg.accumulate)
        check_mesh(mesh, arm.gate, arm.subset, arm.optim, arm.growth, windows, cfg.measure_bias)
    check_variant(mesh, times.variant)
    if cfg.recompute:
        check_recompute(arm.gate, arm.subset, arm.growth, times)
    model.recompute = cfg.recompute
    if cfg.bags:
        check_bags(arm.gate, arm.subset, cfg.bags)
    if arm.optim.base_width and arm.subset.kind != "all":
        raise ValueError(
            f"optim.base_width = {arm.optim.base_width} with subset.kind = {arm.subset.kind}: the rule is for matrices "
            "that are trained whole; use subset=all, or optim.base_width=0"
        )
    if cfg.batch_schedule:
        check_batches(arm.gate, cfg.batch_schedule)
    if cfg.vocabulary:
        check_partial(arm.gate, arm.subset, cfg, model.cfg.vocab_size, mesh)
    subset = Subset(model, arm.subset, seed)
    mesh.prepare(model, partial(_strip_dim, subset, arm.optim))
    stepper = Stepper(model, torch.bfloat16 if times.precision == "bf16" else None, times.compiled, mesh.hold())
    optimizer = Optimizer(model, subset.active, arm.optim, seed, mesh.split)
    every_weight = arm.subset.kind == "all"

    def active() -> Active | None:
        return None if every_weight else subset.active

    clock = RunClock(times, arm.optim, active, cfg.batch_windows, prices.measure, lambda: model.cfg.layers)
    vocabulary = int(getattr(getattr(text.stream, "corpus", None), "vocab_size", model.cfg.vocab_size))
    context = GateContext(
        vocabulary,
        model.cfg.context,
        seed,
        model=model,
        device=device,
        stepper=stepper,
        active=lambda: subset.active,
        step_key=lambda plan, batch, length: clock.key(clock.step(plan, batch, length)),
        reference=str(checkpoint_of(arm.gate.reference)) if arm.gate.reference else "",
        known_tokens=text.known_tokens,
        judges=text.judges,
        undo=Undo(model, optimizer) if every_weight and not mesh.splits_weights else None,
        depths=growth.depths() if growth.grows else (),
        changes_at=arm.growth.until if growth.grows else math.inf,
        mesh=mesh,
    )
    gate = make_gate(arm.gate, text.stream, context)
    budget = Budget(cfg, model.cfg.context, clock, gate, text.stream, growth)
    shared = SharedGate(gate, mesh) if mesh.shards > 1 else None
    order = vocabulary_of(cfg, model.cfg.vocab_size, text.stream, seed)
    given = Given(model, shared or gate, subset, clock, stepper, seed, adapted, cfg.measure_bias, growth.grows, mesh, order)  # type: ignore[arg-type]
    minimised = objective(given)
    if order is not None and not minimised.predicts_parts:
        raise ValueError(
            f"trainer.vocabulary = {cfg.vocabulary} with {type(minimised).__name__}: it knows no steps that predict a part "
            "of the vocabulary; leave trainer.vocabulary empty"
        )
    if cfg.recompute:
        clock.recomputes = True
        clock.add(lambda: {SCORING_FORWARD: Component(cfg.batch_windows, lambda: _forward(model.cfg, device, cfg))})
    clock.add(gate.components, gate)
    clock.add(lambda: _looking(text.stream, cfg.batch_windows), text.stream)
    clock.add(minimised.components, minimised)
    planned = budget.planned()
    if minimised.compiles:
        check_shapes(planned)
    clock.require(planned, clock.components())
    budget.check_text()
    tally = Tally()
    updates = Updates(
        model,
        minimised,
        optimizer,
        subset,
        clock,
        tally,
        mesh,
        cfg.stop_after_skipped,
        place.folder / "checkpoint",
        growth,
        gate.before_growth,
        shared,
        cfg.accumulate,
        cfg.rate_at,
    )
    records = Recorder(cfg, text.held_out, tally, budget, updates, listeners or Listeners(), mesh)
    checkpoints = Checkpoints(place.folder, place.meta, cfg, updates, gate, adapted, mesh, place.written)
    return Trainer(gate, budget, updates, records, checkpoints, mesh)


def _strip_dim(subset: Subset, optim: OptimConfig, name: str) -> int | None:
    """The dimension of a parameter that something chooses along: the strips that are active, or the blocks of a mask."""
    found = subset.strip_dim(name)
    masked = optim.mask.kind != "none" and optim.mask.block_rows and name.startswith("blocks.")
    return 0 if found is None and masked else found


def check_adapter(gate: GateConfig) -> None:
    """Raise ValueError for a gate that looks into the model or changes its step, beside LoRA's factors."""
    if not gate.only_tokens:
        raise ValueError(
            f"subset.kind = lora with gate.unit = {gate.unit!r}, gate.signal = {gate.signal!r}: LoRA runs by autograd, "
            "so gate=dense, or unit sequence by a signal that is asked before the forward (random, ngram, ...)"
        )


def check_bags(gate: GateConfig, subset: SubsetConfig, bags: str) -> None:
    """Raise ValueError for what does not go with steps on bags of tokens."""
    if not gate.only_tokens:
        raise ValueError(
            f"trainer.bags = {bags} with gate.unit = {gate.unit!r}, gate.signal = {gate.signal!r}: a position is a bag of "
            "tokens, whose rows, layers and losses no gate knows; use gate=dense, or unit sequence by a signal that is "
            "asked before the forward (random, ngram, ...)"
        )
    if subset.kind != "all":
        raise ValueError(
            f"trainer.bags = {bags} with subset.kind = {subset.kind}: the step that updates a part of the weights knows no "
            "bags of tokens; use subset=all"
        )


def check_recompute(gate: GateConfig, subset: SubsetConfig, growth: GrowthConfig, times: ComponentTimes) -> None:
    """Raise ValueError for steps that keep what their backward needs whatever `trainer.recompute` says."""
    instead = "Use trainer.accumulate, which holds the activations of a piece of the batch only"
    if gate.unit not in ("none", "sequence", "repeats") or gate.policy == "importance":
        named = f"gate.unit = {gate.unit}" if gate.policy != "importance" else "gate.policy = importance"
        raise ValueError(
            f"trainer.recompute with {named}: its steps are written out or looked into, and keep their activations. Use "
            "gate.unit = sequence, or trainer.recompute=false with fewer windows in a batch"
        )
    if subset.kind != "all":
        raise ValueError(
            f"trainer.recompute with subset.kind = {subset.kind}: these steps are written out and keep their activations. "
            f"{instead}"
        )
    if growth.kind != "none":
        raise ValueError(f"trainer.recompute with growth.kind = {growth.kind}: not tried yet. {instead}")
    if times.variant != "autograd":
        raise ValueError(
            f"trainer.recompute with plain steps by {times.variant}, which the table of component times found fastest: "
            f"use trainer.compile=off and trainer.component_times=shipped. Or: {instead}"
        )


def _forward(shape: ModelConfig, device: torch.device, cfg: TrainerConfig) -> Callable[[], None]:
    """A forward of a batch on a model of that shape, to be timed."""
    model = Transformer(shape).to(device)
    tokens_BT = torch.zeros(cfg.batch_windows, shape.context, dtype=torch.int64, device=device)

    def use() -> None:
        with torch.no_grad():
            model(tokens_BT)

    return use


def _check_table(times: ComponentTimes, model: Transformer, optim: OptimConfig, cfg: TrainerConfig) -> None:
    times.check(model.cfg, optim)
    on = times.variant.endswith("compiled") or times.compiled
    if cfg.compile != "auto" and (cfg.compile == "on") != on:
        raise ComponentTimesError(
            f"trainer.compile = {cfg.compile}, but the table of component times was measured "
            f"{'with' if on else 'without'} torch.compile: measure again, or leave trainer.compile at auto"
        )


def _looking(stream: Any, windows: int) -> dict[str, Component]:
    """The component of a stream that looks at its windows."""
    key = getattr(stream, "cost_key", "")
    return {key: Component(windows, lambda: stream.probe(windows), int(stream.flops(windows)))} if key else {}
