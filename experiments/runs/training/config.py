"""The settings of one training run; what Hydra composes from `configs/train.yaml`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experiments.runs.claim import RESUME
from experiments.runs.hydra_app import ConfigError
from hardware.names import as_file_name
from hardware.text import short
from sparse_update.data.corpus import DataConfig
from sparse_update.data.records import Corpus
from sparse_update.gates.config import GateConfig
from sparse_update.growth.settings import GrowthConfig, check_growth
from sparse_update.loop.assembly import check_bags
from sparse_update.loop.records import TrainerConfig
from sparse_update.loop.schedules import check_batches, check_partial
from sparse_update.objectives.examples.settings import TaskConfig
from sparse_update.objectives.settings import ObjectiveConfig
from sparse_update.parallel.settings import MeshConfig
from sparse_update.transformer import ModelConfig
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import SubsetConfig


@dataclass
class TrainConfig:
    """One training run."""

    run: str = ""
    """Folder of the run; empty: runs/train/STREAM-ARM-MODEL-sSEED."""
    arm: str = ""
    """Name of the arm in tables; empty: the gate's, with the subset's after a plus where there is one; on tasks the
    objective's before it."""
    stream: str = ""
    """Name of the data stream in tables; empty: "clean", or "noisy" with garbage in it; on tasks, theirs."""
    seed: int = 0
    """Weights, order of the data and random choices."""
    resume: bool | str = True
    """What a run in the folder means: true goes on from whatever is there, and begins where nothing was saved yet; auto
    does so too, and begins an unfinished run anew whose settings have changed since; false refuses a folder with a run."""
    progress: bool = True
    """A progress bar on standard error."""
    idle_s: float = 0.0
    """Seconds of idle power measured before training, where there is a meter; shown beside the joules, 0 measures none."""
    zeus: bool = False
    """Zeus beside our meters, as a second opinion (pip install 'spikegate[energy-check]')."""
    init: str = ""
    """Short for trainer.init_from: run folder or checkpoint whose weights the run starts from."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    task: TaskConfig = field(default_factory=TaskConfig)

    def __post_init__(self) -> None:
        if self.resume not in RESUME:
            raise ValueError(f"resume is {short(self.resume)}; it is false, true or auto")
        if not 0 <= self.idle_s < math.inf:
            raise ValueError(f"idle_s is {self.idle_s}; a window is finite and not negative")
        if self.init and self.trainer.init_from not in ("", self.init):
            raise ValueError(f"init = {self.init} and trainer.init_from = {self.trainer.init_from}: give one of them")
        self.trainer.init_from = self.init = self.init or self.trainer.init_from
        if self.init and self.growth.kind != "none":
            raise ValueError(
                f"init = {self.init} with growth.kind = {self.growth.kind}: a model that starts from weights has its "
                "blocks already; leave one of them out"
            )
        check_growth(self.growth, self.model.layers, self.gate, self.subset)
        self._check_tasks()

    def _check_tasks(self) -> None:
        if not self.objective.on_tasks:
            if self.task.tasks:
                raise ValueError(
                    f"task.tasks = {short(str(self.task.tasks))} with objective.kind = {self.objective.kind}, which "
                    "trains on "
                    "text: objective=instruct or objective=rl trains on tasks"
                )
            return
        if not self.task.tasks:
            raise ValueError(
                f"objective.kind = {self.objective.kind} trains on tasks: task=sums, or task.tasks=[sums:1-2,sorting]"
            )
        refused = {
            "gate.unit = auto": self.gate.unit == "auto",
            "gate.replay = forgotten": self.gate.replay == "forgotten",
            "trainer.length_schedule": bool(self.trainer.length_schedule),
            "trainer.bags": bool(self.trainer.bags),
            "trainer.batch_schedule": bool(self.trainer.batch_schedule),
            "trainer.vocabulary": bool(self.trainer.vocabulary),
            "trainer.fast": self.trainer.fast,
            "trainer.prequential_every": bool(self.trainer.prequential_every),
            "trainer.measure_bias": self.trainer.measure_bias,
        }
        if found := [name for name, given in refused.items() if given]:
            raise ValueError(
                f"{', '.join(found)} with objective.kind = {self.objective.kind}: its rows are questions, not "
                "running text; "
                "leave it out"
            )

    @property
    def stream_name(self) -> str:
        if self.objective.on_tasks:
            return self.stream or self.task.label
        return self.stream or ("noisy" if self.data.garbage_fraction > 0 else "clean")

    @property
    def arm_name(self) -> str:
        if self.arm:
            return self.arm
        if self.trainer.fast:
            return "fast" if self.gate.unit == "none" and self.growth.kind == "none" else f"{self._arm}+fast"
        return self._arm

    @property
    def _arm(self) -> str:
        more = [self.subset.name] * (self.subset.kind != "all") + [self.growth.name] * (self.growth.kind != "none")
        mask = self.optim.mask
        more += [mask.kind if mask.name == "none" else mask.name] * (mask.kind != "none") + ["bags"] * bool(
            self.trainer.bags
        )
        more += ["batches"] * bool(self.trainer.batch_schedule)
        if self.trainer.vocabulary:
            more += ["vocabulary" if self.trainer.vocabulary_order == "frequent" else "random_vocabulary"]
        if self.objective.on_tasks:  # the objective comes first, and a gate where there is one
            return "+".join([self.objective.label, *([self.gate.name] if self.gate.unit != "none" else []), *more])
        return "+".join([self.gate.name, *more])

    @property
    def folder(self) -> Path:
        name = f"{self.stream_name}-{self.arm_name}-{self.model.name}-s{self.seed}"
        return Path(self.run) if self.run else Path("runs/train") / as_file_name(name)


MAY_DIFFER = {"run", "resume", "progress", "idle_s", "zeus", "model.vocab_size", "trainer.component_times"}
MAY_DIFFER |= {f"trainer.{name}" for name in ("checkpoint_every_s", "keep_checkpoints", "keep_best", "checkpoint_beside")}
MAY_DIFFER |= {f"mesh.{name}" for name in ("name", "kind", "processes", "tensor", "backend", "timeout_s", "restarts")}
"""Settings that do not make another run: a resumed one may have others."""


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises ConfigError for CUDA where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"trainer.device = {name}, but torch {torch.__version__} sees no CUDA device: use cpu or auto")
    return device


def check_vocabulary(cfg: TrainConfig, corpus: Corpus) -> int:
    """The model's vocabulary, which must hold the corpus's."""
    wanted = cfg.model.vocab_size or corpus.vocab_size
    if wanted < corpus.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {wanted} cannot hold the {corpus.vocab_size} tokens of corpus {corpus.name}: leave it at 0"
        )
    return wanted


def check_size(cfg: TrainConfig, corpus: Corpus) -> None:
    if cfg.objective.on_tasks:
        return
    try:
        cfg.trainer.check_context(cfg.model.context)
        if cfg.trainer.bags:
            check_bags(cfg.gate, cfg.subset, cfg.trainer.bags)
        if cfg.trainer.vocabulary:
            check_partial(cfg.gate, cfg.subset, cfg.trainer, check_vocabulary(cfg, corpus))
        if cfg.trainer.batch_schedule:
            check_batches(cfg.gate, cfg.trainer.batch_schedule)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    windows = (len(corpus.train_tokens) - 1) // cfg.model.context
    largest = max(cfg.trainer.batch_sizes)
    if windows < largest:
        named = "trainer.batch_windows" if largest == cfg.trainer.batch_windows else "trainer.batch_schedule"
        raise ConfigError(
            f"corpus {corpus.name} has {len(corpus.train_tokens)} training tokens, {windows} windows of model.context = "
            f"{cfg.model.context}, fewer than one batch ({named}: {largest} windows): "
            "lower one of them, or give more text"
        )
