"""What a run is told (`TrainerConfig`) and what it tells (`StepReport`, `RunResult`)."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from sparse_update.growth.vocabulary import ORDERS

PRECISIONS = ("auto", "fp32", "bf16")
COMPILES = ("auto", "on", "off")
COMPILE_REPAID_S = 30.0
"""About what the first compilation takes on two CPU cores; later ones come from torch's cache in a few seconds."""


class Stage(NamedTuple):
    """A stretch of a run whose steps have one shape."""

    share: float
    """of the budget, from which it holds"""
    windows: int
    """of a step on single tokens"""
    length: int
    """tokens of a sequence"""
    bag: int
    """tokens of a position"""
    vocabulary: int
    """tokens that are predicted; 0 for all"""


@dataclass
class TrainerConfig:
    """Budget, batch and habits of a run. Raises ValueError for values that cannot train."""

    budget_reference_s: float = 80.0
    """What the run may spend, in reference seconds (counted work times the prices of the table below); the schedule decays
    over it."""
    budget_offered_tokens: int = 0
    """If set, the run ends when the stream has offered that many tokens, and progress is counted in them; reference
    seconds are still counted. For one pass over the same fixed stream by every arm."""
    batch_windows: int = 32
    accumulate: int = 1
    """Parts that each process cuts its windows of a batch into and goes through one after the other, so that it holds the
    activations of one part only; the step is taken on the mean of their gradients."""
    recompute: bool = False
    """Whether each block keeps its input alone and runs its forward once more in the backward: less memory, about a third
    more work, the same losses to the bit. For steps by autograd."""
    length_schedule: str = ""
    """Sequence-length warm-up, "32@0.2,64@0.5": length 32 until 0.2 of the budget, 64 until 0.5, then the model's
    context. A window is cut into shorter ones, so a step keeps its number of tokens."""
    batch_schedule: str = ""
    """Batch-size warm-up, "4@0.1,8@0.3": steps of 4 windows until 0.1 of the budget, of 8 until 0.3, then `batch_windows`.
    The windows and their order stay those of every other run."""
    batch_rate_power: float = 0.5
    """Of a step of b windows the learning rate is multiplied by (b / batch_windows) to this power: 0.5 is the square-root
    rule of adaptive optimizers (Malladi et al. 2022, arXiv 2205.10287), 0 leaves the rate alone."""
    bags: str = ""
    """Token superposition, "2@0.3" or "4@0.2,2@0.4": positions are bags of 4 neighbouring tokens until 0.2 of the budget,
    of 2 until 0.4, then single tokens. A step keeps its number of positions, so it reads 4 times as many windows."""
    vocabulary: str = ""
    """Vocabulary order, "256@0.3,1024@0.6": 256 tokens are predicted until 0.3 of the budget, 1024 until 0.6, then all;
    other targets have no loss until then. All tokens are read from the first step on."""
    vocabulary_order: str = "frequent"
    """Which tokens come first: "frequent", the commonest of the training text | "random", drawn by the seed."""
    fast: bool = False
    """Let the run choose growth, short sequences at first and the gate, where they are left at their defaults (`fast.py`);
    what it chose and why is in its record."""
    init_from: str = ""
    """Run folder or checkpoint whose weights the run starts from (not its optimizer)."""
    precision: str = "auto"
    """"fp32" | "bf16" | "auto": bf16 on a GPU, fp32 on a CPU; whichever measures faster on a CPU where component times are
    measured."""
    compile: str = "auto"
    """"on" | "off" | "auto": torch.compile on a GPU; on a CPU not, and where component times are measured and the budget
    is at least 30 reference seconds, if it measures faster."""
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    component_times: str = ""
    """Empty or "shipped": the table that comes with the package, so that budgets are the same on every machine. "measured":
    measured by the run on its machine, kept in its folder. A path: a table shared by the arms, measured by the first."""
    eval_tokens: int = 32768
    """Held-out tokens per evaluation and held-out set, spread over all held-out documents; 0 takes all."""
    evaluations: int = 8
    """Evaluations along the run, the last one at its end; none of them is on the clock."""
    prequential_every: int = 0
    """Windows of the stream between prequential losses, measured before the run trains on them and off the clock; 0:
    none."""
    prequential_windows: int = 32
    measure_bias: bool = False
    """At evaluations, the cosine per layer between the step's gradient and the exact one (off the clock)."""
    log_every_steps: int = 10
    checkpoint_every_s: float = 60.0
    """Wall seconds between checkpoints, at least; one is always written at the end and when interrupted."""
    keep_checkpoints: int = 2
    """Checkpoints that stay, the newest among them: where a file of it is damaged, the one before steps in."""
    keep_best: bool = False
    """Whether the checkpoint with the lowest held-out loss stays too, in `checkpoints/best`."""
    checkpoint_beside: bool = True
    """Whether checkpoints are written while training goes on, out of a copy in memory; off: training stands still."""
    stop_after_skipped: int = 20
    """Consecutive steps with a loss or gradient that is not finite before the run gives up."""

    def __post_init__(self) -> None:
        if self.budget_reference_s <= 0:
            raise ValueError(f"trainer.budget_reference_s = {self.budget_reference_s}: must be positive")
        if self.batch_windows < 1 or self.log_every_steps < 1 or self.evaluations < 1:
            raise ValueError("trainer.batch_windows, log_every_steps and evaluations must be at least 1")
        if self.keep_checkpoints < 1 or not self.checkpoint_every_s >= 0:
            raise ValueError(
                f"trainer.keep_checkpoints = {self.keep_checkpoints}, checkpoint_every_s = {self.checkpoint_every_s}: at "
                "least one checkpoint, and not below 0 s"
            )
        if self.accumulate < 1:
            raise ValueError(f"trainer.accumulate = {self.accumulate}: must be at least 1 (1 takes the batch at once)")
        if self.precision not in PRECISIONS:
            raise ValueError(f"trainer.precision = {self.precision!r}: one of {', '.join(PRECISIONS)}")
        if self.compile not in COMPILES:
            raise ValueError(f"trainer.compile = {self.compile!r}: one of {', '.join(COMPILES)}")
        if self.eval_tokens < 0 or self.threads < 0 or self.budget_offered_tokens < 0 or self.prequential_every < 0:
            raise ValueError(
                "trainer.eval_tokens, threads, budget_offered_tokens and prequential_every must not be negative"
            )
        if self.prequential_every and not 1 <= self.prequential_windows <= self.prequential_every:
            raise ValueError(
                f"trainer.prequential_windows = {self.prequential_windows}: must lie in 1..trainer.prequential_every = "
                f"{self.prequential_every}"
            )
        if not 0 <= self.batch_rate_power <= 1:
            raise ValueError(
                f"trainer.batch_rate_power = {self.batch_rate_power}: must lie in [0, 1] (0.5: the square-root rule)"
            )
        if self.vocabulary_order not in ORDERS:
            raise ValueError(f"trainer.vocabulary_order = {self.vocabulary_order!r}: one of {', '.join(ORDERS)}")
        self.lengths(), self.bag_sizes(), self.batches()
        if self.predicted() and self.bags:
            raise ValueError(
                f"trainer.vocabulary = {self.vocabulary} with trainer.bags = {self.bags}: the loss of a bag is over all "
                "tokens; set one of them"
            )

    def lengths(self) -> list[tuple[int, float]]:
        """(length, share of the budget until which it holds), rising. Raises ValueError for a schedule that is none."""
        return _stages("length_schedule", self.length_schedule, "LENGTH@SHARE, for instance 32@0.2,64@0.5", "lengths")

    def length_at(self, progress: float, context: int) -> int:
        return next((length for length, share in self.lengths() if progress < share), context)

    def batches(self) -> list[tuple[int, float]]:
        """(windows of a step, share of the budget until which it takes so many), rising. Raises ValueError for a schedule
        that is none."""
        return _stages("batch_schedule", self.batch_schedule, "WINDOWS@SHARE, for instance 4@0.1,8@0.3", "numbers")

    def batch_at(self, progress: float) -> int:
        """Windows of the step at `progress`; on bags of tokens it takes as many times more."""
        return next((windows for windows, share in self.batches() if progress < share), self.batch_windows)

    def rate_at(self, progress: float) -> float:
        """Factor on the learning rate for the size of the batch at `progress`; 1.0 for `batch_windows`."""
        return float((self.batch_at(progress) / self.batch_windows) ** self.batch_rate_power)

    @property
    def batch_sizes(self) -> list[int]:
        """Every number of windows that a step may take, rising."""
        return sorted({self.batch_windows, *(windows for windows, _ in self.batches())})

    def predicted(self) -> list[tuple[int, float]]:
        """(tokens that are predicted, share of the budget until which they are), rising. Raises ValueError for a schedule
        that is none."""
        return _stages("vocabulary", self.vocabulary, "TOKENS@SHARE, for instance 256@0.3", "numbers")

    def vocabulary_at(self, progress: float) -> int:
        """Tokens that the step at `progress` predicts; 0 for all of them."""
        return next((tokens for tokens, share in self.predicted() if progress < share), 0)

    def bag_sizes(self) -> list[tuple[int, float]]:
        """(tokens of a bag, share of the budget until which it holds), rising. Raises ValueError for a schedule that is
        none."""
        return _stages("bags", self.bags, "SIZE@SHARE, for instance 2@0.3", "sizes")

    def bag_at(self, progress: float) -> int:
        return next((size for size, share in self.bag_sizes() if progress < share), 1)

    def stages(self, context: int) -> list[Stage]:
        """The shapes of a run's steps, by the share of the budget from which each holds, rising."""
        schedules = (*self.lengths(), *self.bag_sizes(), *self.batches(), *self.predicted())
        starts = sorted({0.0, *(share for _, share in schedules if share < 1)})
        return [self._stage(share, context) for share in starts]

    def _stage(self, at: float, context: int) -> Stage:
        return Stage(at, self.batch_at(at), self.length_at(at, context), self.bag_at(at), self.vocabulary_at(at))

    def check_context(self, context: int) -> None:
        """Raise ValueError for lengths that do not divide the context, and bags that do not tile a length."""
        for length, _ in self.lengths():
            if context % length:
                raise ValueError(
                    f"trainer.length_schedule: {length} does not divide the model's context {context}: windows are "
                    "cut into equal parts"
                )
        for at in self.stages(context):
            if at.length % at.bag:
                raise ValueError(
                    f"trainer.bags: from {at.share:g} of the budget on, bags of {at.bag} tokens do not tile sequences of "
                    f"{at.length}: take a size that divides their length"
                )


def _stages(name: str, text: str, form: str, what: str) -> list[tuple[int, float]]:
    """The stages of a schedule "NUMBER@SHARE,...". Raises ValueError for one that is none."""
    found: list[tuple[int, float]] = []
    for piece in filter(None, text.split(",")):
        try:
            number, share = piece.split("@")
            found.append((int(number), float(share)))
        except ValueError:
            raise ValueError(f"trainer.{name}: {piece!r} is not {form}") from None
    shares = [0.0, *(share for _, share in found)]
    if any(not a < b <= 1 for a, b in itertools.pairwise(shares)) or any(n < 1 for n, _ in found):
        raise ValueError(f"trainer.{name} = {text!r}: {what} from 1 on, shares rising within (0, 1]")
    return found


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
    kept_share: Mapping[str, float] = field(default_factory=dict)
    """Share of the offered windows kept so far, by source."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """The gate's own numbers, and at evaluations the objective's: the bias by layer, the share of questions solved."""
    empty: int = 0
    """Steps that had nothing to learn and updated nothing."""


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
    """Of it, everything beside the steps: scoring, proxies, probes, filters."""
    wall_s: float
    compile_s: float
    """Wall seconds of the first step where it is compiled, not in `wall_s`; 0.0 otherwise."""
    val_loss_nats: float
    held_out: Mapping[str, float]
    """Loss per token in nats on each held-out set; "val" is the headline."""
    keep_fraction: float
    kept_share: dict[str, float]
    skipped: int
    optimizer_bytes: int
    """Largest optimizer state over the steps, bytes of allocated tensors."""
    gradient_bytes: int
    """Largest gradients over the steps."""
    update_bytes: int
    """Largest sum of both."""
    prequential: Sequence[tuple[int, float, str]]
    """(offered tokens, loss in nats before training on what follows, its main source)"""
    gate_decisions: Sequence[Mapping[str, Any]] = ()
    """What a gate that decides while training decided, and why."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """What else the model was judged by at the end, by name; larger is better."""
    empty: int = 0
    """Steps that had nothing to learn and updated nothing."""
    interrupted_by: str = ""
    """The signal that ended it before its time, "SIGINT" or "SIGTERM"."""
    checkpoints: Mapping[str, Any] = field(default_factory=dict)
    """What this process saved, and what training waited for it (`keeper.Keeper.account`)."""


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
