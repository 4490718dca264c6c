"""The training loop, and nothing but the loop: batch -> step -> report, on a clock of reference seconds."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_update.clock.cost import ComponentTimes, ComponentTimesError, Step, optimizer_tag
from sparse_update.clock.timing import Component, Setting, step_probe
from sparse_update.data.regimes import prequential
from sparse_update.gates.bias import cosines
from sparse_update.gates.choice import make_gate
from sparse_update.gates.config import GateConfig
from sparse_update.gates.gate import Gate, GateContext, GatedBatch
from sparse_update.loop.checkpoint import Checkpoint, checkpoint_of, load_checkpoint, save_checkpoint
from sparse_update.loop.evaluation import evaluate, start_from
from sparse_update.loop.records import RunResult, StepReport, TrainerConfig, TrainingDiverged, compiling
from sparse_update.step.backward import Stepper
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import PLAIN, Chosen, SparseStep, StepPlan, View
from sparse_update.transformer import Transformer, token_loss
from sparse_update.weights.lowrank import adapt, apart, merged, restore
from sparse_update.weights.optimizer import Optimizer
from sparse_update.weights.settings import OptimConfig, schedule
from sparse_update.weights.subset import Subset, SubsetConfig

__all__ = [
    "RunResult",
    "StepReport",
    "Trainer",
    "TrainerConfig",
    "TrainingDiverged",
    "compiling",
    "evaluate",
    "start_from",
]


WATCHED = "plain_step_watched"
"""Component key of a plain step that the engine takes for a gate to observe, where others go by compiled autograd."""


def check_adapter(gate: GateConfig) -> None:
    """Raise ValueError for a gate that looks into the model or changes its step, beside LoRA's factors."""
    if not gate.only_tokens:
        raise ValueError(
            f"subset.kind = lora with gate.unit = {gate.unit!r}, gate.signal = {gate.signal!r}: LoRA runs by autograd, "
            "so gate=dense, or unit sequence by a signal that is asked before the forward (random, ngram, ...)"
        )


class Trainer:
    """Trains a model on what its gate lets through until the budget is spent.

    Args:
        model: on its device already, with `cfg.attention` resolved.
        gate, subset, optim: the arm.
        stream: source of windows.
        times: table of component times; its `precision` is used.
        held_out: windows by name, int64 (N, T + 1), on CPU; "val" is the headline.
        folder: checkpoints go to `folder/checkpoint`.
        meta: put into every checkpoint (schema, config, tokenizer, ...).
        context: what the gate gets beside model and stepper: `known_tokens`.
        measure: extends the table by steps and components it lacks; without it a missing entry is an error.
        on_report, on_evaluation: callbacks (step report; step report, loss by held-out set).
    """

    def __init__(
        self,
        model: Transformer,
        gate: GateConfig,
        subset: SubsetConfig,
        optim: OptimConfig,
        cfg: TrainerConfig,
        stream: Any,
        times: ComponentTimes,
        held_out: Mapping[str, Tensor],
        folder: Path,
        seed: int,
        meta: dict[str, Any],
        context: Mapping[str, Any] | None = None,
        measure: Callable[[ComponentTimes, Sequence[Step], Mapping[str, Component]], ComponentTimes] | None = None,
        on_report: Callable[[StepReport], None] = lambda report: None,
        on_evaluation: Callable[[StepReport, dict[str, float]], None] = lambda report, losses: None,
    ) -> None:
        self.device = model.embed.weight.device
        times.check(model.cfg, optim)
        on = times.variant.endswith("compiled") or times.compiled
        if cfg.compile != "auto" and (cfg.compile == "on") != on:
            raise ComponentTimesError(
                f"trainer.compile = {cfg.compile}, but the table of component times was measured "
                f"{'with' if on else 'without'} torch.compile: measure again, or leave trainer.compile at auto"
            )
        context_length = model.cfg.context
        for length, _ in cfg.lengths():
            if context_length % length:
                raise ValueError(
                    f"trainer.length_schedule: {length} does not divide the model's context {context_length}: windows are "
                    "cut into equal parts"
                )
        self.model, self.optim, self.cfg, self.times, self.stream = model, optim, cfg, times, stream
        self.held_out, self.folder, self.seed, self.meta = dict(held_out), folder, seed, meta
        self.measure, self.on_report, self.on_evaluation = measure, on_report, on_evaluation
        self.bf16 = times.precision == "bf16"
        self.stepper = Stepper(model, torch.bfloat16 if self.bf16 else None, times.compiled)
        self.engine = self.stepper
        if (times.variant == "engine_compiled") != times.compiled:
            self.engine = Stepper(model, torch.bfloat16 if self.bf16 else None, times.variant == "engine_compiled")
        self.adapted = subset.kind == "lora"
        if self.adapted:
            check_adapter(gate)
            adapt(model, subset, seed)
        self.subset = Subset(model, subset, seed)
        self.dense_weights = subset.kind == "all"
        self.optimizer = Optimizer(model, self.subset.active, optim)
        vocabulary = int(getattr(getattr(stream, "corpus", None), "vocab_size", model.cfg.vocab_size))
        self.gate: Gate = make_gate(
            gate,
            stream,
            GateContext(
                vocabulary,
                context_length,
                seed,
                model=model,
                device=self.device,
                stepper=self.stepper,
                active=lambda: self.subset.active,
                step_key=lambda plan, batch, length: self.times.key(self._step(plan, batch, length)),
                reference=str(checkpoint_of(gate.reference)) if gate.reference else "",
                **(context or {}),
            ),
        )
        compiled = times.variant == "autograd_compiled" or (self.adapted and times.compiled)
        self.forward = torch.compile(model) if compiled else model
        self.generator = torch.Generator(device=self.device).manual_seed(seed + 3)
        self.uses: Counter[str] = Counter()
        """Steps taken, by key of the table."""
        self.compile_s = 0.0
        self.step = self.tokens = self.flops = self.skipped = self.evaluations = self.next_stretch = 0
        self.wall_s = 0.0
        self.losses: dict[str, float] = {name: float("nan") for name in self.held_out}
        self.points: list[tuple[int, float, str]] = []
        self.peak_gradient = self.peak_optimizer = self.peak_both = 0
        self._losses: list[float] = []
        self._norm = 0.0
        self._skipped_in_a_row = 0
        self._interrupted = False
        self._last: tuple[Tensor, Tensor, StepPlan, Tensor | None] | None = None
        self._require(self._planned(), self._components())

    # the clock

    def _step(self, plan: StepPlan, batch: int, length: int) -> Step:
        tag = optimizer_tag(self.optim)
        tag = "" if tag == self.times.model.get("optimizer", tag) else tag
        return Step(plan, None if self.dense_weights else self.subset.active, batch, length, tag)

    def _shape(self, progress: float) -> tuple[int, int]:
        """(sequences, their length) of the step at `progress`."""
        length = self.cfg.length_at(progress, self.model.cfg.context)
        return self.cfg.batch_windows * (self.model.cfg.context // length), length

    def _planned(self) -> list[Step]:
        context = self.model.cfg.context
        shapes = {
            length: self.cfg.batch_windows * (context // length) for length, _ in (*self.cfg.lengths(), (context, 1.0))
        }
        return [
            self._step(plan, batch, length) for length, batch in shapes.items() for plan in self.gate.plans(batch, length)
        ]

    def _components(self) -> dict[str, Component]:
        found: dict[str, Component] = dict(self.gate.components())
        key = getattr(self.stream, "cost_key", "")
        if key:
            found[key] = (self.cfg.batch_windows, lambda: self.stream.probe(self.cfg.batch_windows))
        if self.gate.cfg.unit == "auto" and self.times.variant == "autograd_compiled":
            found[WATCHED] = (1, self._watched_step)
        return found

    def _watched_step(self) -> Callable[[], None]:
        """A plain step as one that is observed runs: by the engine, which has what is watched at hand."""
        times = self.times
        variant = "engine_compiled" if times.compiled else "engine"
        setting = Setting(self.model.cfg, self.optim, self.device, times.attention, times.precision, variant=variant)
        probe = step_probe(setting, Step(PLAIN, None, self.cfg.batch_windows, self.model.cfg.context), WATCHED)

        def use() -> None:
            probe()

        return use

    def _require(self, steps: Sequence[Step], components: Mapping[str, Component]) -> None:
        """Entries for all of these in the table: measured now where they are missing and can be."""
        missing = [step for step in steps if not self.times.has(self.times.key(step))]
        lacking = {key: use for key, use in components.items() if not self.times.has(key)}
        if (missing or lacking) and self.measure is not None:
            self.times = self.measure(self.times, missing, lacking)
        for key in [self.times.key(step) for step in steps] + list(components):
            self.times.ms_of(key)

    def _seconds(self, step: Step) -> float:
        key = self.times.key(step)
        if not self.times.has(key):
            self._require([step], {})
        return self.times.ms_of(key) / 1000

    @property
    def gate_reference_s(self) -> float:
        extra = Counter(self.gate.uses) + Counter(getattr(self.stream, "uses", Counter()))
        lacking = [key for key in extra if not self.times.has(key)]
        if lacking:
            self._require([], {key: use for key, use in self._components().items() if key in lacking})
        return self.times.seconds(extra)

    @property
    def reference_s(self) -> float:
        return self.times.seconds(self.uses) + self.gate_reference_s

    @property
    def offered_tokens(self) -> int:
        return int(getattr(self.stream, "read_windows", self.gate.windows_offered)) * self.model.cfg.context

    @property
    def progress(self) -> float:
        if self.cfg.budget_offered_tokens:
            return self.offered_tokens / self.cfg.budget_offered_tokens
        return self.reference_s / self.cfg.budget_reference_s

    # the loop

    def run(self) -> RunResult:
        """Train from where the state stands. Ctrl-C or SIGTERM: a checkpoint is written, `finished` is False.

        Raises ComponentTimesError for a budget below one step, TrainingDiverged for a loss that stays non-finite.
        """
        mark = time.perf_counter()
        saved = mark
        by_time = not self.cfg.budget_offered_tokens
        first = self._step(self.gate.plan(self.progress, *self._shape(self.progress)), *self._shape(self.progress))
        if by_time and self._seconds(first) > self.cfg.budget_reference_s:
            raise ComponentTimesError(
                f"trainer.budget_reference_s = {self.cfg.budget_reference_s:g} buys not one step: {self.times.key(first)} "
                f"takes {self._seconds(first):.3g} reference seconds. Raise the budget, or measure again while the "
                "machine is idle"
            )
        with self._signals():
            while not self._interrupted:
                self._preview()
                progress = self.progress
                if not by_time and progress >= 1 and self.gate.waiting < self.cfg.batch_windows:
                    break
                batch = self.gate.next(self.cfg.batch_windows, progress)
                shape = self._shape(progress)
                plan = self.gate.plan(progress, *shape)
                seconds = self._seconds(self._step(plan, *shape))
                if by_time and self.reference_s + seconds > self.cfg.budget_reference_s:
                    break
                self._train(batch, plan, progress, seconds)
                now = time.perf_counter()
                if (self.times.compiled or self.forward is not self.model) and not self.compile_s:
                    self.compile_s = now - mark  # the first step compiles: reported apart
                else:
                    self.wall_s += now - mark
                if self.step % self.cfg.log_every_steps == 0:
                    self.on_report(self.report())
                if self.progress >= (self.evaluations + 1) / self.cfg.evaluations and self.progress < 1:
                    self._evaluate()
                if now - saved > self.cfg.checkpoint_every_s and not self._skipped_in_a_row:
                    self.save()
                    saved = time.perf_counter()
                mark = time.perf_counter()
            finished = not self._interrupted
            if finished:
                self._evaluate()
            self.save()
        return self.result(finished)

    def _train(self, batch: GatedBatch, plan: StepPlan, progress: float, seconds: float) -> None:
        tokens_BT1 = batch.tokens.to(self.device)
        sequences, length = self._shape(progress)
        x_BT = tokens_BT1[:, :-1].reshape(sequences, length)
        y_BT = tokens_BT1[:, 1:].reshape(sequences, length)
        self._last = (x_BT, y_BT, plan, None)
        watched = self.gate.observing and plan == PLAIN and self.dense_weights
        found = self._gradients(batch, plan, x_BT, y_BT)
        loss = float(found.loss_BT.mean())
        self._update(loss, found, progress)
        step = self._step(plan, sequences, length)
        by_engine = watched and self.times.variant == "autograd_compiled"
        self.uses[WATCHED if by_engine else self.times.key(step)] += 1
        self.step += 1
        self.tokens += x_BT.numel()
        self.flops += plan_flops(self.model.cfg, sequences, plan, step.active, length).total
        plain_s = self.times.dense_ms / 1000
        if len(found.loss_BT) != len(batch.tokens):  # the gate thinks in windows
            found = replace(found, loss_BT=found.loss_BT.reshape(len(batch.tokens), -1))
        self.gate.observe(batch, found, progress, seconds / plain_s)
        self._turn()

    def _gradients(self, batch: GatedBatch, plan: StepPlan, x_BT: Tensor, y_BT: Tensor) -> SparseStep:
        """Take the step's gradients: by autograd in place where that is the fastest plain step, else by the engine."""
        observing = self.gate.observing
        autograd = self.times.variant.startswith("autograd")
        weight_B = batch.weight_B
        if weight_B is not None:
            weight_B = weight_B.repeat_interleave(len(x_BT) // len(weight_B)).to(self.device)
        hooked = self.adapted or self.times.variant == "autograd"  # else the engine hands the factors over
        if self.adapted or (plan == PLAIN and self.dense_weights and autograd and (hooked or not observing)):
            run = self.model if observing else self.forward
            with self.gate.tap(self.model), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss_BT = token_loss(run(x_BT), y_BT)
                loss = loss_BT.mean() if weight_B is None else (loss_BT * weight_B[:, None]).mean()
                loss.backward()
            loss_BT = loss_BT.detach()
            return SparseStep(loss_BT, {}, Chosen(), View(loss_BT))
        places = self.gate.bypass(batch, plan)
        if places is not None:
            places = places.reshape(len(x_BT), -1).to(self.device)
        stepper = self.engine if plan == PLAIN and self.dense_weights else self.stepper
        found = stepper.step(
            x_BT,
            y_BT,
            plan,
            self.subset.active,
            choose=self.gate.choose if plan.sequences or plan.rows else None,
            bypass_BR=places,
            skip=self.gate.skip(plan),
            weight_B=weight_B,
            generator=self.generator,
            watched=self.gate.watched if observing else frozenset(),
        )
        self.optimizer.set_gradients(found.gradients)
        self._last = (x_BT, y_BT, plan, places)
        return found

    def _update(self, loss: float, found: SparseStep, progress: float) -> None:
        if math.isfinite(loss) and self._finite():
            self._bytes(self.optimizer.gradient_bytes())
            self.subset.observe(found.gradients, loss)
            norm = self.optimizer.step(progress)
            if math.isfinite(norm):
                self._norm = norm
                self._losses.append(loss)
                self._skipped_in_a_row = 0
                self._bytes(0)
                return
        self.optimizer.clear()
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.cfg.stop_after_skipped:
            what = f"the loss was {loss}" if not math.isfinite(loss) else "the gradient was not finite"
            raise TrainingDiverged(
                f"step {self.step}: {what} for {self._skipped_in_a_row} steps in a row. Lower optim.lr (now "
                f"{self.optim.lr}) or look at the data; {self.folder / 'checkpoint'} holds the last good state, if any"
            )

    def _finite(self) -> bool:
        """Whether every gradient is; moments that met one that is not would never recover."""
        leaves = (*self.optimizer.leaves.values(), *self.optimizer.signed.values())
        sums = [leaf.grad.sum() for leaf in leaves if leaf.grad is not None]
        return not sums or bool(torch.stack(sums).isfinite().all())

    def _turn(self) -> None:
        """Move on to the next choice of weights where it is due."""
        if self.subset.due(self.step, self.progress):
            self.optimizer.activate(self.subset.advance(None))

    def _bytes(self, gradients: int) -> None:
        state = self.optimizer.state_bytes()
        self.peak_gradient = max(self.peak_gradient, gradients)
        self.peak_optimizer = max(self.peak_optimizer, state)
        self.peak_both = max(self.peak_both, gradients + state)

    def _preview(self) -> None:
        """Prequential loss where the stream stands at a new stretch."""
        every = self.cfg.prequential_every
        stretch = self.offered_tokens // self.model.cfg.context // every if every else 0
        if not every or stretch < self.next_stretch:
            return
        self.next_stretch = stretch + 1
        preview = prequential(self.stream, every, self.cfg.prequential_windows)
        self.points.append((self.offered_tokens, evaluate(self.model, preview.batch.tokens), preview.source))

    def _evaluate(self) -> None:
        self.losses = {name: evaluate(self.model, windows) for name, windows in self.held_out.items()}
        self.evaluations += 1
        notes = self._bias() if self.cfg.measure_bias else {}
        self.on_evaluation(self.report(notes), dict(self.losses))

    def _bias(self) -> dict[str, float]:
        if self._last is None or self._last[2].plain:
            return {}
        x_BT, y_BT, plan, places = self._last
        found = cosines(self.stepper, x_BT, y_BT, plan, self.subset.active, self.gate, places, self.seed)
        return {f"bias/{name}": value for name, value in found.items()}

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: object) -> None:
            self._interrupted = True

        before = {}
        for name in (signal.SIGINT, signal.SIGTERM):
            try:
                before[name] = signal.signal(name, stop)
            except ValueError:  # not in the main thread: the caller's own signals stay
                break
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    # records

    def report(self, notes: Mapping[str, float] | None = None) -> StepReport:
        """The state of the run now; the mean loss covers the steps since the last call."""
        loss = sum(self._losses) / len(self._losses) if self._losses else float("nan")
        self._losses = []
        return StepReport(
            step=self.step,
            tokens=self.tokens,
            reference_s=self.reference_s,
            wall_s=self.wall_s,
            loss_nats=loss,
            learning_rate_factor=schedule(min(1.0, self.progress), self.optim),
            gradient_norm=self._norm,
            keep_fraction=self.gate.keep_fraction(),
            active_fraction=self.subset.active.fraction(self.model),
            flops=self.total_flops(),
            skipped=self.skipped,
            kept_share=self.gate.kept_share(),
            notes={**self.gate.notes(), **(notes or {})},
        )

    def total_flops(self) -> int:
        """Counted FLOPs of all steps and of the gate's own scoring."""
        stream = getattr(self.stream, "flops", None)
        return self.flops + self.gate.flops + (int(stream(self.stream.read_windows)) if stream else 0)

    def result(self, finished: bool) -> RunResult:
        return RunResult(
            finished=finished,
            step=self.step,
            tokens=self.tokens,
            windows_offered=self.gate.windows_offered,
            windows_scored=self.gate.windows_scored,
            flops=self.total_flops(),
            reference_s=self.reference_s,
            gate_reference_s=self.gate_reference_s,
            wall_s=self.wall_s,
            compile_s=self.compile_s,
            val_loss_nats=self.losses["val"],
            held_out=dict(self.losses),
            keep_fraction=self.gate.keep_fraction(),
            kept_share=self.gate.kept_share(),
            skipped=self.skipped,
            optimizer_bytes=self.peak_optimizer,
            gradient_bytes=self.peak_gradient,
            update_bytes=self.peak_both,
            prequential=tuple(self.points),
            gate_decisions=tuple(getattr(self.gate, "decisions", ())),
        )

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights that the next step depends on."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "gate": self.gate.state_dict(),
            "subset": self.subset.state_dict(),
            "counters": {
                **{name: getattr(self, name) for name in _COUNTERS},
                "uses": dict(self.uses),
                "wall_s": self.wall_s,
                "held_out": dict(self.losses),
                "points": [list(point) for point in self.points],
                "losses": torch.tensor(self._losses, dtype=torch.float64),
                "norm": self._norm,
            },
            "rng": torch.get_rng_state(),
            "generator": self.generator.get_state(),
            **({"adapted": apart(self.model)} if self.adapted else {}),
        }

    def save(self) -> Path:
        """Write `folder/checkpoint`, atomically."""
        target = self.folder / "checkpoint"
        meta = {**self.meta, "step": self.step, "component_times_sha256": self.times.sha256}
        weights = merged(self.model) if self.adapted else dict(self.model.state_dict())
        save_checkpoint(target, weights, self.state_dict(), meta)
        return target

    def resume(self, checkpoint: Path | Checkpoint) -> None:
        """Take up a checkpoint's exact state.

        Raises:
            ValueError: where the checkpoint was timed with another table of component times.
            CheckpointError: from reading it.
        """
        found = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
        if found.meta.get("component_times_sha256") != self.times.sha256:
            raise ValueError(
                "the checkpoint was written under another table of component times: its clock would jump. Resume with the "
                "component_times.json of the run's own folder"
            )
        state = found.state
        if self.adapted:
            restore(self.model, found.model, state.get("adapted", {}))
        else:
            self.model.load_state_dict(found.model)
        counters = state["counters"]
        self.subset.load_state_dict(state["subset"])
        self.optimizer.activate(self.subset.active)
        self.optimizer.load_state_dict(state["optimizer"])
        self.gate.load_state_dict(state["gate"])
        for name in _COUNTERS:
            setattr(self, name, int(counters[name]))
        self.uses = Counter({str(k): int(v) for k, v in counters["uses"].items()})
        self.wall_s = float(counters["wall_s"])
        self.losses = {str(k): float(v) for k, v in counters["held_out"].items()}
        self.points = [(int(t), float(loss), str(source)) for t, loss, source in counters["points"]]
        self._losses, self._norm = counters["losses"].tolist(), float(counters["norm"])
        torch.set_rng_state(state["rng"])
        self.generator.set_state(state["generator"])


_COUNTERS = (
    "step", "tokens", "flops", "skipped", "evaluations", "next_stretch", "peak_gradient", "peak_optimizer", "peak_both",
    "_skipped_in_a_row",
)  # fmt: skip
