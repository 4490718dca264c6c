"""Fine-tune a module for few events: thresholds, an event budget, pruning, distillation and 8 bits in one loop.

    gates = insert_thresholds(model, report.mapped, tokens)
    report = fine_tune(model, batches, TrainSettings(steps=1000, target_share=0.12), gates=gates, loss=loss)

`batches(i)` gives step i's (inputs, targets), always the same for the same i, so that a run resumes exactly.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuro.analysis.tracing import split_example
from neuro.training.distil import distillation_loss
from neuro.training.insert import Gates
from neuro.training.penalty import Controller, ControllerConfig, EventBudget, annealed
from neuro.training.pruning import Pruner, density_at
from neuro.training.quantise import Quantised

Batches = Callable[[int], tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]
Groups = list[dict[str, Any]]
Factory = Callable[[Groups], "Optimizer | Sequence[Optimizer]"]


@dataclass
class TrainSettings:
    """One fine-tuning run.

    `target_share`: synaptic operations per dense multiply-accumulate to reach, None for no event penalty; the target
    falls until `anneal_until` of the steps. `weight_density`: share of the gated layers' weights kept in the end,
    pruned between `prune_from` and `prune_until` of the steps, every `prune_every`. `quantise_last`: share of the steps,
    at the end, in 8-bit arithmetic. `distil_weight`: share of the loss that is distillation, if there is a teacher.
    """

    steps: int = 1000
    lr: float = 2e-3
    threshold_lr: float = 5e-2
    weight_decay: float = 0.1
    warmup: float = 0.05
    final_lr: float = 0.02
    gradient_clip: float = 1.0
    target_share: float | None = None
    anneal_until: float = 0.6
    weight_density: float = 1.0
    prune_from: float = 0.05
    prune_until: float = 0.6
    prune_every: int = 10
    prune_score: str = "value"
    quantise_last: float = 0.1
    distil_weight: float = 0.0
    temperature: float = 1.0
    calibration_batches: int = 4
    controller: ControllerConfig = field(default_factory=ControllerConfig)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.threshold_lr < 0 or self.prune_every < 1 or self.calibration_batches < 1:
            raise ValueError(
                f"steps {self.steps}, lr {self.lr}, threshold_lr {self.threshold_lr}, prune_every {self.prune_every}, "
                f"calibration_batches {self.calibration_batches}: positive (threshold_lr may be 0)"
            )
        for name in ("warmup", "final_lr", "anneal_until", "prune_from", "prune_until", "quantise_last", "distil_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share, 0..1")
        if self.target_share is not None and not self.target_share > 0:
            raise ValueError(f"target_share is {self.target_share}; it lies above 0")
        if not 0 < self.weight_density <= 1:
            raise ValueError(f"weight_density is {self.weight_density}; it lies above 0 and up to 1")


@dataclass(frozen=True)
class Moment:
    """One step as it went: loss in nats (task part), share of synaptic operations, its target and weight, density."""

    step: int
    loss: float
    share: float
    target: float
    penalty: float
    density: float


@dataclass(frozen=True)
class TrainReport:
    """What a run reached: `rates` and `densities` per layer, the last share, and every step's `Moment`."""

    steps: int
    share: float
    rates: dict[str, float]
    densities: dict[str, float]
    history: tuple[Moment, ...]


def adamw(groups: Groups) -> Optimizer:
    """The default optimizer."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def parameter_groups(model: nn.Module, gates: Gates, settings: TrainSettings) -> Groups:
    """Matrices with weight decay, the other parameters without, thresholds with a rate of their own."""
    raw = {id(gate.raw) for gate in gates.thresholds}
    own = [p for p in model.parameters() if id(p) not in raw and p.requires_grad]
    groups = [
        {"params": [p for p in own if p.dim() >= 2], "lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": [p for p in own if p.dim() < 2], "lr": settings.lr, "weight_decay": 0.0},
        {
            "params": [g.raw for g in gates.thresholds if g.raw.requires_grad],
            "lr": settings.threshold_lr,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def rate_at(progress: float, settings: TrainSettings) -> float:
    """Factor on every learning rate: linear warm-up, then a cosine to `final_lr`. The rule of
    `sparse_update.weights.settings.schedule`; a test holds the two together."""
    if progress < settings.warmup:
        return progress / settings.warmup
    done = (progress - settings.warmup) / max(1e-9, 1 - settings.warmup)
    return settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class FineTuner:
    """A run that can be stopped after any step and gone on with, bit for bit.

    Args:
        model: any nn.Module; changed in place. batches: step -> (inputs, targets); inputs as `neuro.calibrate` takes.
        settings: the run. loss: (output, targets) -> scalar. gates: from `insert_thresholds`; none for a control.
        teacher: another module of the same outputs (logits), for distillation; kept in eval mode.
        optimizer: parameter groups -> one optimizer or several, which share the groups among them.
        budget: how events are priced, where layers run more than once per token or are mapped without a gate.

    Raises ValueError for settings that need gates or a teacher when there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        settings: TrainSettings,
        *,
        loss: Loss,
        gates: Gates | None = None,
        teacher: nn.Module | None = None,
        optimizer: Factory = adamw,
        budget: EventBudget | None = None,
        prune: dict[str, nn.Linear] | None = None,
    ) -> None:
        self.model, self.batches, self.settings, self.loss = model, batches, settings, loss
        self.gates = gates or Gates()
        if settings.target_share is not None and not self.gates.layers:
            raise ValueError("target_share needs gates: insert_thresholds(model, names, example)")
        if settings.distil_weight and teacher is None:
            raise ValueError(f"distil_weight is {settings.distil_weight}, but there is no teacher")
        self.teacher = teacher.eval().requires_grad_(False) if teacher is not None else None
        self.budget = budget or (EventBudget(self.gates) if self.gates.layers else None)
        linears = prune if prune is not None else self.gates.linears
        self.pruner: Pruner | None = None
        if settings.weight_density < 1:
            self.pruner = Pruner(linears, settings.prune_score, gates)
        self.quantised = Quantised(self.gates.linears)
        self.controller = Controller(settings.controller)
        made = optimizer(parameter_groups(model, self.gates, settings))
        self.optimizers = [made] if isinstance(made, Optimizer) else list(made)
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["first_lr"] = group["lr"]
        raw = {id(gate.raw) for gate in self.gates.thresholds}
        self._clipped = [p for p in model.parameters() if id(p) not in raw]  # the penalty must not shrink the task's step
        self.step = 0
        self.first_share: float | None = None
        self.history: list[Moment] = []

    def run(self, until: int | None = None, progress: Callable[[Moment], None] | None = None) -> TrainReport:
        """Steps up to `until` (default: all); `progress` is called after each."""
        until = self.settings.steps if until is None else min(until, self.settings.steps)
        self.model.train()
        while self.step < until:
            moment = self._one()
            self.history.append(moment)
            if progress is not None:
                progress(moment)
        if self.step == self.settings.steps:
            self.quantised.detach()
            self.model.eval()
        return self.report()

    def report(self) -> TrainReport:
        """Where the run stands."""
        densities = {n: float((w.weight != 0).float().mean()) for n, w in self.gates.linears.items()}
        share = self.history[-1].share if self.history else math.nan
        rates = self.budget.rates() if self.budget else {}
        return TrainReport(self.step, share, rates, densities, tuple(self.history))

    def _one(self) -> Moment:
        s, done = self.settings, self.step / self.settings.steps
        if s.quantise_last and done >= 1 - s.quantise_last and self.gates.layers and not self.quantised.attached:
            examples = [self.batches(max(0, self.step - 1 - i))[0] for i in range(s.calibration_batches)]
            self.quantised.calibrate(self.model, examples, self.gates)
        self._prune(done)
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = group["first_lr"] * rate_at((self.step + 1) / s.steps, s)
        inputs, targets = self.batches(self.step)
        args, kwargs = split_example(inputs)
        output = self.model(*args, **kwargs)
        task = self.loss(output, targets)
        total = task
        if self.teacher is not None and s.distil_weight:
            with torch.no_grad():
                taught = self.teacher(*args, **kwargs)
            total = (1 - s.distil_weight) * task + s.distil_weight * distillation_loss(output, taught, s.temperature)
        share, target, weight = math.nan, math.nan, 0.0
        if self.budget is not None:
            found = self.budget.share()
            share = float(found.detach())
            if s.target_share is not None:
                self.first_share = share if self.first_share is None else self.first_share
                target = annealed(done, max(self.first_share, s.target_share), s.target_share, s.anneal_until)
                weight = self.controller.update(max(share, 1e-9), target)
                total = total + weight * found
        if not math.isfinite(float(total.detach())):
            raise FloatingPointError(f"step {self.step}: the loss is {float(total.detach())}; lower lr ({s.lr})")
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        if self.pruner is not None:
            self.pruner.observe()
        if s.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self._clipped, s.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.pruner is not None:
            self.pruner.apply()
        moment = Moment(self.step, float(task.detach()), share, target, weight, self.pruner.density if self.pruner else 1.0)
        self.step += 1
        return moment

    def _prune(self, done: float) -> None:
        s = self.settings
        if self.pruner is None or self.step % s.prune_every or not s.prune_from < done:
            return
        density = density_at(done, s.prune_from, s.prune_until, s.weight_density)
        if density < self.pruner.density or done <= s.prune_until + s.prune_every / s.steps:
            self.pruner.prune_to(density)
            self._count_synapses()

    def _count_synapses(self) -> None:
        if self.budget is not None:
            masks = self.pruner.masks if self.pruner is not None else {}
            known = all(layer.name in masks for layer in self.gates.layers)
            self.budget.refresh(masks if known else None)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: tensors, numbers and strings only, as copies."""
        return copy.deepcopy(
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "controller": self.controller.state_dict(),
                "pruner": self.pruner.state_dict() if self.pruner is not None else None,
                "scales": self.quantised.scales,
                "first_share": self.first_share,
                "history": [vars(m) for m in self.history],
                "rng": torch.get_rng_state(),
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken, with the same model, settings and batches."""
        state = copy.deepcopy(state)
        if (state["pruner"] is None) != (self.pruner is None) or len(state["optimizers"]) != len(self.optimizers):
            raise ValueError("this state was written with other settings (pruning or optimizers)")
        self.model.load_state_dict(state["model"])
        for optimizer, part in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(part)
        self.controller.load_state_dict(state["controller"])
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])
        if state["scales"]:
            self.quantised.attach(state["scales"])
        self._count_synapses()
        self.step, self.first_share = state["step"], state["first_share"]
        self.history = [Moment(**m) for m in state["history"]]
        torch.set_rng_state(state["rng"])


def fine_tune(
    model: nn.Module,
    batches: Batches,
    settings: TrainSettings,
    *,
    loss: Loss,
    gates: Gates | None = None,
    teacher: nn.Module | None = None,
    optimizer: Factory = adamw,
    progress: Callable[[Moment], None] | None = None,
) -> TrainReport:
    """All steps of a `FineTuner`; the model is changed in place and left in eval mode."""
    tuner = FineTuner(model, batches, settings, loss=loss, gates=gates, teacher=teacher, optimizer=optimizer)
    return tuner.run(progress=progress)
