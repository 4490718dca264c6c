"""The training loop, and nothing but the loop: batch -> step -> report, on a clock of reference seconds."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_update.backward import sparse_step
from sparse_update.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sparse_update.cost import ComponentTimes, ComponentTimesError, StepKind, kept_rows, ngram_flops, step_flops
from sparse_update.gate import SequenceGate, TokenGate
from sparse_update.optimizer import OptimConfig, Optimizer, schedule
from sparse_update.subset import choose
from sparse_update.transformer import Transformer, token_loss

PRECISIONS = ("auto", "fp32", "bf16")
COMPILES = ("auto", "on", "off")
COMPILE_REPAID_S = 30.0
"""About what the first compilation takes on two CPU cores; later ones come from torch's cache in a few seconds."""


@dataclass
class TrainerConfig:
    """Budget, batch and habits of a run. Raises ValueError for values that cannot train."""

    budget_reference_s: float = 40.0
    """What the run may spend, in reference seconds; the schedule decays over it."""
    batch_windows: int = 32
    precision: str = "auto"
    """"fp32" | "bf16" | "auto": bf16 on a GPU, whichever measures faster on a CPU."""
    compile: str = "auto"
    """"on" | "off" | "auto": torch.compile for plain steps on a GPU, and on a CPU where it measures faster and the budget
    is at least 30 reference seconds."""
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    component_times: str = ""
    """Path of a table of component times shared by the arms; empty: measured by the run, kept in its folder."""
    eval_tokens: int = 32768
    """Held-out tokens per evaluation, spread over all held-out documents; 0 takes all."""
    evaluations: int = 8
    """Evaluations along the run, the last one at its end; none of them is on the clock."""
    log_every_steps: int = 10
    checkpoint_every_s: float = 60.0
    """Wall seconds between checkpoints; one is always written at the end and when interrupted."""
    stop_after_skipped: int = 20
    """Consecutive steps with a loss that is not finite before the run gives up."""

    def __post_init__(self) -> None:
        if self.budget_reference_s <= 0:
            raise ValueError(f"trainer.budget_reference_s = {self.budget_reference_s}: must be positive")
        if self.batch_windows < 1 or self.log_every_steps < 1 or self.evaluations < 1:
            raise ValueError("trainer.batch_windows, log_every_steps and evaluations must be at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"trainer.precision = {self.precision!r}: one of {', '.join(PRECISIONS)}")
        if self.compile not in COMPILES:
            raise ValueError(f"trainer.compile = {self.compile!r}: one of {', '.join(COMPILES)}")
        if self.eval_tokens < 0 or self.threads < 0:
            raise ValueError("trainer.eval_tokens and trainer.threads must not be negative")


class TrainingDiverged(RuntimeError):
    """The loss stayed non-finite for too many steps in a row."""


@dataclass(frozen=True)
class StepReport:
    """One logged step. Totals count from the start of the run; `keep_fraction` is the share of offered items trained on."""

    step: int
    tokens: int
    """Tokens that went through a forward."""
    reference_s: float
    wall_s: float
    loss_nats: float
    """Mean over the batch's tokens since the last report."""
    learning_rate_factor: float
    gradient_norm: float
    keep_fraction: float
    active_fraction: float
    flops: int
    skipped: int


@dataclass(frozen=True)
class RunResult:
    """Where a run ended. `finished` is False when it was interrupted (its checkpoint resumes it)."""

    finished: bool
    step: int
    tokens: int
    windows_offered: int
    windows_scored: int
    flops: int
    reference_s: float
    gate_reference_s: float
    wall_s: float
    compile_s: float
    """Wall seconds of the first step where it is compiled, not in `wall_s`; 0.0 otherwise."""
    val_loss_nats: float
    keep_fraction: float
    kept_share: dict[str, float]
    skipped: int
    optimizer_bytes: int


class Trainer:
    """Trains a model on what its gates let through until the budget of reference seconds is spent.

    Args:
        model: on `device` already, with `cfg.attention` resolved.
        sequence_gate, token_gate, optim, subset: the arm.
        times: table of component times; its `precision` is used.
        val_NT1: held-out windows, int64 (N, T + 1), on CPU.
        folder: checkpoints go to `folder/checkpoint`.
        meta: put into every checkpoint (schema, config, tokenizer, ...).
        on_report, on_evaluation: callbacks (step report; step, tokens, reference seconds, loss in nats).
    """

    def __init__(
        self,
        model: Transformer,
        sequence_gate: SequenceGate,
        token_gate: TokenGate,
        kind: StepKind,
        optim: OptimConfig,
        cfg: TrainerConfig,
        times: ComponentTimes,
        val_NT1: Tensor,
        folder: Path,
        seed: int,
        meta: dict[str, Any],
        on_report: Callable[[StepReport], None] = lambda report: None,
        on_evaluation: Callable[[StepReport, float], None] = lambda report, loss: None,
    ) -> None:
        self.device = model.embed.weight.device
        times.check(model.cfg, cfg.batch_windows, optim)
        if cfg.compile != "auto" and (cfg.compile == "on") != times.compiled:
            raise ComponentTimesError(
                f"trainer.compile = {cfg.compile}, but the table of component times was measured "
                f"{'with' if times.compiled else 'without'} torch.compile: measure again, or leave trainer.compile at auto"
            )
        self.model, self.sequence_gate, self.token_gate, self.kind = model, sequence_gate, token_gate, kind
        self.optim, self.cfg, self.times = optim, cfg, times
        self.val_NT1, self.folder, self.seed, self.meta = val_NT1, folder, seed, meta
        self.on_report, self.on_evaluation = on_report, on_evaluation
        self.bf16 = times.precision == "bf16"
        self.turn = 0
        self.active = choose(model, kind.subset, 0, seed)
        self.optimizer = Optimizer(model, self.active, optim)
        self.forward = torch.compile(model) if times.compiled and kind.dense else model
        self.compile_s = 0.0
        self.step = self.tokens = self.flops = self.skipped = self.evaluations = 0
        self.wall_s = 0.0
        self.last_val_loss = float("nan")
        self._losses: list[float] = []
        self._norm = 0.0
        self._skipped_in_a_row = 0
        self._interrupted = False

    # the clock

    @property
    def gate_reference_s(self) -> float:
        scored = self.sequence_gate.windows_scored
        return scored * self.times.ms["ngram_window"] / 1000 if scored else 0.0

    @property
    def reference_s(self) -> float:
        return self.step * self.times.step_s(self.kind) + self.gate_reference_s

    @property
    def progress(self) -> float:
        return self.reference_s / self.cfg.budget_reference_s

    # the loop

    def run(self) -> RunResult:
        """Train from where the state stands. Ctrl-C or SIGTERM: a checkpoint is written, `finished` is False.

        Raises ComponentTimesError for a budget below one step, TrainingDiverged for a loss that stays non-finite.
        """
        mark = time.perf_counter()
        saved = mark
        step_s = self.times.step_s(self.kind)
        if step_s > self.cfg.budget_reference_s:
            raise ComponentTimesError(
                f"trainer.budget_reference_s = {self.cfg.budget_reference_s:g} buys not one step: {self.kind.key} takes "
                f"{step_s:.3g} reference seconds. Raise the budget, or measure again while the machine is idle"
            )
        with self._signals():
            while not self._interrupted:
                batch = self.sequence_gate.next(self.cfg.batch_windows)
                if self.reference_s + step_s > self.cfg.budget_reference_s:
                    break
                self._train(batch.tokens.to(self.device))
                now = time.perf_counter()
                if self.forward is not self.model and not self.compile_s:
                    self.compile_s = now - mark  # the first step compiles: reported apart
                else:
                    self.wall_s += now - mark
                if self.step % self.cfg.log_every_steps == 0:
                    self.on_report(self.report())
                if self.progress >= (self.evaluations + 1) / self.cfg.evaluations and self.progress < 1:
                    self._evaluate()
                if now - saved > self.cfg.checkpoint_every_s:
                    self.save()
                    saved = time.perf_counter()
                mark = time.perf_counter()
            finished = not self._interrupted
            if finished:
                self._evaluate()
            self.save()
        return self.result(finished)

    def _train(self, tokens_BT1: Tensor) -> None:
        x, y = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
        turn = self.step // self.kind.subset.change_every_steps
        if turn != self.turn and self.kind.subset.kind != "all":
            self.turn, self.active = turn, choose(self.model, self.kind.subset, turn, self.seed)
            self.optimizer.activate(self.active)
        if self.kind.dense:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = token_loss(self.forward(x), y).mean()
            loss.backward()
        else:
            sparse = sparse_step(
                self.model, x, y, self.token_gate.rows(), self.active, torch.bfloat16 if self.bf16 else None
            )
            self.optimizer.set_gradients(sparse.gradients)
            loss = sparse.loss_BT.mean()
        self._update(float(loss.detach()))
        self.step += 1
        self.tokens += x.numel()
        rows = kept_rows(self.token_gate.cfg, x.shape[1])
        self.flops += step_flops(self.model.cfg, len(x), rows, None if self.kind.dense else self.active).total

    def _update(self, loss: float) -> None:
        if loss == loss and abs(loss) != float("inf"):
            self._norm = self.optimizer.step(self.progress)
            self._losses.append(loss)
            self._skipped_in_a_row = 0
            return
        self.optimizer.clear()
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.cfg.stop_after_skipped:
            raise TrainingDiverged(
                f"step {self.step}: the loss was {loss} for {self._skipped_in_a_row} steps in a row. Lower optim.lr (now "
                f"{self.optim.lr}) or look at the data; {self.folder / 'checkpoint'} holds the last good state, if any"
            )

    def _evaluate(self) -> None:
        self.last_val_loss = evaluate(self.model, self.val_NT1)
        self.evaluations += 1
        self.on_evaluation(self.report(), self.last_val_loss)

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

    def report(self) -> StepReport:
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
            keep_fraction=self.keep_fraction(),
            active_fraction=self.active.fraction(self.model),
            flops=self.total_flops(),
            skipped=self.skipped,
        )

    def keep_fraction(self) -> float:
        """Share of what was offered that was trained on: windows, times token rows."""
        offered = self.sequence_gate.windows_offered
        windows = float(self.sequence_gate.kept_by_source.sum()) / offered if offered else 1.0
        rows = kept_rows(self.token_gate.cfg, self.model.cfg.context)
        return windows * (rows / self.model.cfg.context if rows else 1.0)

    def total_flops(self) -> int:
        """Counted FLOPs of all steps and of the gate's own scoring."""
        gate = self.sequence_gate
        return self.flops + ngram_flops(gate.windows_scored, self.model.cfg.context, len(gate.cfg.ngram_orders))

    def result(self, finished: bool) -> RunResult:
        return RunResult(
            finished=finished,
            step=self.step,
            tokens=self.tokens,
            windows_offered=self.sequence_gate.windows_offered,
            windows_scored=self.sequence_gate.windows_scored,
            flops=self.total_flops(),
            reference_s=self.reference_s,
            gate_reference_s=self.gate_reference_s,
            wall_s=self.wall_s,
            compile_s=self.compile_s,
            val_loss_nats=self.last_val_loss,
            keep_fraction=self.keep_fraction(),
            kept_share=self.sequence_gate.kept_share(),
            skipped=self.skipped,
            optimizer_bytes=self.optimizer.state_bytes(),
        )

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights that the next step depends on."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "sequence_gate": self.sequence_gate.state_dict(),
            "token_gate": self.token_gate.state_dict(),
            "counters": {
                "step": self.step,
                "tokens": self.tokens,
                "flops": self.flops,
                "skipped": self.skipped,
                "evaluations": self.evaluations,
                "turn": self.turn,
                "wall_s": self.wall_s,
                "last_val_loss": self.last_val_loss,
                "losses": torch.tensor(self._losses, dtype=torch.float64),
                "norm": self._norm,
            },
            "rng": torch.get_rng_state(),
        }

    def save(self) -> Path:
        """Write `folder/checkpoint`, atomically."""
        target = self.folder / "checkpoint"
        meta = {**self.meta, "step": self.step, "component_times_sha256": self.times.sha256}
        save_checkpoint(target, dict(self.model.state_dict()), self.state_dict(), meta)
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
        self.model.load_state_dict(found.model)
        state = found.state
        counters = state["counters"]
        self.turn = int(counters["turn"])
        self.active = choose(self.model, self.kind.subset, self.turn, self.seed)
        self.optimizer.activate(self.active)
        self.optimizer.load_state_dict(state["optimizer"])
        self.sequence_gate.load_state_dict(state["sequence_gate"])
        self.token_gate.load_state_dict(state["token_gate"])
        self.step, self.tokens, self.flops = (int(counters[k]) for k in ("step", "tokens", "flops"))
        self.skipped, self.evaluations = int(counters["skipped"]), int(counters["evaluations"])
        self.wall_s, self.last_val_loss = float(counters["wall_s"]), float(counters["last_val_loss"])
        self._losses, self._norm = counters["losses"].tolist(), float(counters["norm"])
        torch.set_rng_state(state["rng"])


def compiling(cfg: TrainerConfig, device: torch.device) -> str:
    """What to do about torch.compile: "on", "off", or "measure" whether it pays.

    "auto" is on for a GPU; on a CPU it is measured where a C++ compiler is there and the budget can repay the compilation.
    """
    if cfg.compile != "auto":
        return cfg.compile
    if device.type == "cuda":
        return "on"
    found = any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++"))
    return "measure" if found and cfg.budget_reference_s >= COMPILE_REPAID_S else "off"


@torch.no_grad()
def evaluate(model: torch.nn.Module, windows_NT1: Tensor, batch: int = 64) -> float:
    """Mean loss in nats per token over held-out windows, int64 (N, T + 1), in the parameters' own precision."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = 0.0
    for part in windows_NT1.split(batch):
        tokens = part.to(device)
        total += float(token_loss(model(tokens[:, :-1]), tokens[:, 1:]).double().sum())
    model.train(training)
    return total / windows_NT1[:, 1:].numel()
