"""The loop around a model of one's own: batch, forward, loss, backward, optimizer, until the counted seconds are spent.

Plain training is the loop that anybody would write by hand, to the last bit. Evaluations are off the clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hardware.text import short
from sparse_update.clock.cost import ComponentTimesError
from sparse_update.library.attach import Gate, attach
from sparse_update.library.linear import GateError
from sparse_update.loop.checkpoint import Checkpoint, CheckpointError, Snapshot, snapshot
from sparse_update.loop.interrupt import Interruption
from sparse_update.loop.records import TrainingDiverged
from sparse_update.loop.saving.keeper import Keeper
from sparse_update.nested import get_rng_state, set_rng_state
from sparse_update.own.arms import OwnArm
from sparse_update.own.batches import Batches, held_out, seed_all
from sparse_update.own.clock import OwnClock, Part
from sparse_update.own.prices import Prices
from sparse_update.own.task import TaskError, UserTask, check_labels, outcome, to_device


@dataclass
class OwnTrainerConfig:
    """Budget and habits of a run. Raises ValueError for values that cannot train."""

    budget_reference_s: float = 0.0
    """What the run may spend, in counted seconds."""
    evaluations: int = 8
    """Evaluations along the run, the last one at its end; none of them is on the clock."""
    log_every_steps: int = 10
    checkpoint_every_s: float = 60.0
    """Wall seconds between checkpoints, at least; one is always written at the end and when interrupted."""
    keep_checkpoints: int = 2
    """Checkpoints that stay, the newest among them."""
    stop_after_skipped: int = 20
    """Consecutive steps with a loss that is not finite before the run gives up."""
    learning_rate: float = 0.0
    """Of the optimizer's first group, the others in proportion; 0 takes what the optimizer was made with."""
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.budget_reference_s >= 0 or self.learning_rate < 0:
            raise ValueError(
                f"budget_reference_s = {self.budget_reference_s}, learning_rate = {self.learning_rate}: not below 0"
            )
        if self.evaluations < 1 or self.log_every_steps < 1 or self.stop_after_skipped < 1 or self.keep_checkpoints < 1:
            raise ValueError("evaluations, log_every_steps, stop_after_skipped and keep_checkpoints must be at least 1")


@dataclass
class OwnTally:
    """Totals since the start of a run, all of them kept in checkpoints."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluations: int = 0
    wall_s: float = 0.0
    """Of the steps; evaluations and checkpoints apart."""
    plain_steps: int = 0
    plain_wall_s: float = 0.0
    """Of the steps that were not counted as they ran: counting takes time of its own."""
    held_out: float = math.nan
    held_out_tokens: int = 0
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last report."""
    concluded: float = -1.0
    """The budget, once it is spent and the model was judged for the last time."""

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, list(value) if key == "losses" else value)


Tell = Callable[["OwnTrainer", bool], None]
"""Called every `log_every_steps` steps with False, and after each evaluation with True."""


class OwnTrainer:
    """One arm of a task, from its seed to the end of its budget.

    Args:
        task, arm, seed: what is trained, how, and where its draws start.
        prices: the table of the comparison.
        cfg: budget and habits.
        folder: of the run; its checkpoint is FOLDER/checkpoint.
        meta: put into every checkpoint.
        tell: hears of reports and evaluations.
        resumed: the checkpoint to go on from.
        written: files of the run's folder that `tell` writes, and their bytes so far.

    Raises TaskError for parts that cannot be used, GateError for a model that cannot be gated so.
    """

    def __init__(
        self,
        task: UserTask,
        arm: OwnArm,
        seed: int,
        prices: Prices,
        cfg: OwnTrainerConfig,
        folder: Path,
        meta: Mapping[str, Any],
        tell: Tell = lambda trainer, evaluated: None,
        resumed: Checkpoint | None = None,
        written: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self.task, self.arm, self.seed, self.cfg = task, arm, seed, cfg
        self.folder, self.meta, self.tell, self.written = folder, dict(meta), tell, written
        self._records: dict[str, int] = {}
        self.keeper = Keeper(folder, cfg.checkpoint_every_s, cfg.keep_checkpoints, records=lambda: self._records)
        self.interrupted_by = ""
        self.device = pick(cfg.device)
        seed_all(seed)
        self.model = task.make_model(seed, self.device)
        self.gate = make_gate(task, self.model, arm, seed)
        if self.gate is not None:
            look_around(task, self.model, self.gate, seed, self.device)
        if resumed is not None:
            load_weights(self.model, resumed)
        if resumed is not None and self.gate is not None:
            self.gate.load_state_dict(resumed.state["gate"])
        self.optimizer = task.make_optimizer(self.parameters())
        if self.gate is not None:
            self.gate.adopt(self.optimizer)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        if cfg.learning_rate:
            self.rates = [rate * cfg.learning_rate / self.rates[0] for rate in self.rates]
        self.batches = Batches(task, seed)
        self.clock = OwnClock(prices, arm, self.model, self.gate, self.optimizer)
        self.tally = OwnTally()
        if resumed is not None:
            self._resume(resumed)

    def parameters(self) -> list[nn.Parameter]:
        """What is updated now."""
        if self.gate is not None:
            return self.gate.parameters()
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def progress(self) -> float:
        """Share of the budget that is spent."""
        return self.clock.reference_s / self.cfg.budget_reference_s

    @property
    def keep_fraction(self) -> float:
        """Share of what was offered that was trained on."""
        pool = None if self.gate is None else self.gate.pool
        return self.arm.keep_fraction(pool.kept if pool else 0, pool.offered if pool else 0)

    def run(self) -> bool:
        """Train until the budget is spent; False where Ctrl-C or SIGTERM came first. A checkpoint is written either way.

        Raises TrainingDiverged for a loss that stays non-finite, TaskError, ComponentTimesError for a budget below one
        step.
        """
        if self.tally.concluded == self.cfg.budget_reference_s:  # it ended after its last checkpoint
            return True
        try:
            return self._run()
        finally:
            self.keeper.close()

    def _run(self) -> bool:
        self.keeper.start_watch()
        source = iter(self.batches)
        if self.gate is not None:
            source = self.gate.filter(self.batches, losses=losses_of(self.task))
        with Interruption() as interruption:
            while not interruption.asked:
                start = time.perf_counter()
                with self.clock.filtering():
                    batch = next(source)
                batch = to_device(batch, self.device)
                key = self.clock.key(batch)
                if self.clock.reference_s + self.clock.step_s(key) > self.cfg.budget_reference_s:
                    break
                self._take(batch, key)
                self._watch(time.perf_counter() - start)
                if self.tally.step % self.cfg.log_every_steps == 0:
                    self.tell(self, False)
                    self.tally.losses = []
                if self.progress < 1 and self.progress >= (self.tally.evaluations + 1) / self.cfg.evaluations:
                    self.evaluate()
                if self.keeper.due() and not self.tally.skipped_in_a_row:
                    self.keeper.save(self._taken)
            interrupted, self.interrupted_by = interruption.asked, interruption.by
            if not interrupted:
                self._check_budget()
                self.evaluate()
                self.tally.concluded = self.cfg.budget_reference_s
            self.save()
        return not interrupted

    def _take(self, batch: Any, key: str) -> None:
        self._set_rates()
        with self.clock.counted(key) as part:
            loss, tokens = step(self.task, self.model, self.gate, self.optimizer, batch, part, self.progress)
        tally = self.tally
        tally.step += 1
        tally.tokens += tokens
        tally.losses.append(loss)
        finite = math.isfinite(loss)
        tally.skipped += not finite
        tally.skipped_in_a_row = 0 if finite else tally.skipped_in_a_row + 1
        if tally.skipped_in_a_row >= self.cfg.stop_after_skipped:
            raise TrainingDiverged(
                f"arm {self.arm.name}, seed {self.seed}: the loss was not finite in {tally.skipped_in_a_row} steps in a "
                f"row (step {tally.step}, {loss}): lower the learning rate, or look at the data and the model's outputs"
            )

    def _watch(self, seconds: float) -> None:
        self.tally.wall_s += seconds
        if not self.clock.last_counted:
            self.tally.plain_steps += 1
            self.tally.plain_wall_s += seconds

    def _set_rates(self) -> None:
        factor = 1.0 if self.task.schedule is None else float(self.task.schedule(min(1.0, self.progress)))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _check_budget(self) -> None:
        if not self.tally.step:
            raise ComponentTimesError(
                f"a budget of {self.cfg.budget_reference_s:g} counted seconds buys not one step: raise it"
            )

    def evaluate(self) -> None:
        """Judge the model on all held-out batches, off the clock."""
        self.tally.held_out, self.tally.held_out_tokens = judge(self.task, self.model, self.seed, self.device)
        self.tally.evaluations += 1
        self.tell(self, True)

    # checkpoints

    def save(self) -> None:
        """Write the checkpoint, atomically, and return when it is there. Raises CheckpointError where it cannot be."""
        self.keeper.save_now(self._taken)

    def _taken(self, copied: bool) -> Snapshot:
        try:
            self._records = dict(self.written())
        except OSError as error:
            raise CheckpointError(f"{self.keeper.target}: {error}") from error
        state = {
            "optimizer": self.optimizer.state_dict(),
            "gate": None if self.gate is None else self.gate.state_dict(),
            "batches": self.batches.state_dict(),
            "clock": self.clock.state_dict(),
            "tally": self.tally.state_dict(),
            "rng": get_rng_state(),
        }
        whole = self.model.state_dict()
        weights = {name: value for name, value in whole.items() if isinstance(value, Tensor)}
        state["extra"] = {name: value for name, value in whole.items() if name not in weights}
        about = {"step": self.tally.step, "prices_sha256": self.clock.prices.sha256, "records": self._records}
        return snapshot(weights, state, {**self.meta, **about}, copied=copied)

    def _resume(self, found: Checkpoint) -> None:
        state = found.state
        if found.meta.get("prices_sha256") != self.clock.prices.sha256:
            raise CheckpointError(
                f"{found.folder} was written under another table of prices: its clock would jump. Resume with the "
                "component_times.json of the run's own folder"
            )
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError, GateError) as error:
            raise CheckpointError(
                f"{found.folder} holds the optimizer of other parameters ({short(error)}): the task has changed since"
            ) from None
        self.batches.load_state_dict(state["batches"])
        self.clock.load_state_dict(state["clock"])
        self.tally.load_state_dict(state["tally"])
        set_rng_state(state["rng"])


def step(
    task: UserTask,
    model: nn.Module,
    gate: Gate | None,
    optimizer: torch.optim.Optimizer | None,
    batch: Any,
    part: Part,
    progress: float = 0.0,
) -> tuple[float, int]:
    """One step, its parts shown to `part`: (loss in nats, tokens of the batch). A loss that is not finite moves nothing;
    without an optimizer it ends with the backward.

    Raises TaskError for labels that the model has no outputs for.
    """
    with part("forward"):
        found = outcome(task, model, batch)
    if found.labels is not None and found.labels.device.type == "cpu":
        check_labels(found)
    with part("loss"):
        if gate is None:
            loss = found.mean()
        else:
            loss = gate.loss(found.logits, found.labels, tokens=_tokens(batch, found))
    value = float(loss.detach())
    if not loss.requires_grad:
        raise TaskError("the loss has no graph: does the model run under torch.no_grad, or is it all frozen?")
    if math.isfinite(value):
        with part("backward"):
            loss.backward()
    if optimizer is None:
        return value, found.tokens
    if math.isfinite(value):
        with part("optimizer"):
            optimizer.step()
        if gate is not None:
            with part("gate"):
                gate.step(optimizer, progress=progress)
    optimizer.zero_grad()
    return value, found.tokens


def _tokens(batch: Any, found: Any) -> Tensor | None:
    """Inputs (B, T) of the loss's rows, for signals that look at them; None where they do not show."""
    if found.labels is None:
        return None
    if isinstance(batch, Tensor):
        batch = batch[:, :-1]
    elif isinstance(batch, Mapping):
        batch = batch.get("input_ids")
    elif isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    right = isinstance(batch, Tensor) and batch.shape == found.labels.shape and not batch.is_floating_point()
    return batch if right else None


@torch.no_grad()
def judge(task: UserTask, model: nn.Module, seed: int, device: torch.device) -> tuple[float, int]:
    """(mean held-out loss in nats, tokens that it is of). Raises TaskError for held-out batches without a label."""
    training = model.training
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    try:
        for batch in held_out(task, seed):
            found = outcome(task, model, to_device(batch, device))
            if found.labels is not None and found.labels.device.type == "cpu":
                check_labels(found)
            loss, tokens = found.sum_and_count()
            total, count = total + loss, count + tokens
    finally:
        model.train(training)
    if not count:
        raise TaskError("held_out has no token with a label: nothing can be judged by it")
    return float(total) / count, count


def make_gate(task: UserTask, model: nn.Module, arm: OwnArm, seed: int) -> Gate | None:
    """The arm's gate on the model, its draws those of the run's seed; the task's reference where the arm asks for one."""
    if arm.config is None:
        return None
    cfg = replace(arm.config, seed=arm.config.seed + seed)
    cfg.method = arm.config.method
    if cfg.before.anneal_fraction and not cfg.total_steps:
        cfg.total_steps = 1  # how far it is, the loop says itself
    asks = cfg.before.signal == "excess" or (cfg.backward.unit != "none" and cfg.backward.signal == "excess")
    return attach(model, cfg, reference=task.reference if asks else None)


def look_around(task: UserTask, model: nn.Module, gate: Gate, seed: int, device: torch.device) -> None:
    """Let a gate that drops rows have its first look at the model, on the first batch of the data, and leave no trace: a
    process that resumes looks again, and its steps must not be others for that."""
    if gate.cfg.backward.unit == "none":
        return
    generators, state = get_rng_state(), gate.state_dict()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        step(task, model, gate, None, to_device(next(iter(Batches(task, seed))), device), lambda part: nullcontext())
    finally:
        model.zero_grad()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        gate.load_state_dict(state)
        set_rng_state(generators)


def losses_of(task: UserTask) -> Callable[[nn.Module, Any], Tensor]:
    """How a scoring forward takes the losses of a batch: as the task does, (B, T), NaN for a token without a label."""

    def losses(model: nn.Module, batch: Any) -> Tensor:
        found = outcome(task, model, to_device(batch, next(model.parameters()).device))
        return found.each()

    return losses


def load_weights(model: nn.Module, found: Checkpoint) -> None:
    """Raises CheckpointError where the checkpoint is of another model."""
    try:
        model.load_state_dict({**found.model, **found.state["extra"]})
    except RuntimeError as error:
        raise CheckpointError(
            f"{found.folder} is of another model ({short(error)}): the task's model has changed since"
        ) from None


def pick(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises TaskError for CUDA where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TaskError(f"device = {name}, but torch {torch.__version__} sees no CUDA device: use cpu or auto")
    return device
