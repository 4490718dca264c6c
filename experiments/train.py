"""Train one arm: `python -m experiments.train gate=surprise experiment=noisy`, or `spikegate train ...`."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from experiments.comparison.accounts import measured_energy
from experiments.comparison.settings import experiment_settings
from experiments.runs.folder import RunError, new_record, read_json
from experiments.runs.hydra_app import ConfigError, run_app
from experiments.runs.plain_json import write_json
from experiments.views.hparam_rows import run_row
from experiments.views.live import BlockUpdates, Savings
from experiments.views.rasters import surprise_figure
from experiments.views.tracking import Tracker, hparam_metrics, training_energy_markdown
from hardware.meters.meter import Meter, Reading, measure_idle
from hardware.meters.zeus import ZeusCheck, compare_all
from sparse_update.clock.cost import ComponentTimes, ComponentTimesError, Step, locked
from sparse_update.clock.timing import Component, extend, measure
from sparse_update.data.corpus import DataConfig, load_corpus
from sparse_update.data.records import Corpus, CorpusError
from sparse_update.data.regimes import held_out, held_out_starts, make_stream
from sparse_update.data.stream import document_at
from sparse_update.gates.config import GateConfig
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.checkpoint import CheckpointError, load_checkpoint
from sparse_update.loop.evaluation import by_difficulty, by_document, start_from, surprise_of, token_losses
from sparse_update.loop.recorder import Listeners
from sparse_update.loop.records import RunResult, StepReport, TrainerConfig, TrainingDiverged, compiling
from sparse_update.signals import SignalError
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.lowrank import FACTOR, PeersError
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import SubsetConfig

EXPECTED = (RunError, CorpusError, CheckpointError, ComponentTimesError, TrainingDiverged, SignalError, PeersError)


@dataclass
class TrainConfig:
    """One training run."""

    run: str = ""
    """Folder of the run; empty: runs/train/STREAM-ARM-MODEL-sSEED."""
    arm: str = ""
    """Name of the arm in tables; empty: the gate's, with the subset's after a plus where there is one."""
    stream: str = ""
    """Name of the data stream in tables; empty: "clean", or "noisy" with garbage in it."""
    seed: int = 0
    """Weights, order of the data and random choices."""
    resume: bool = False
    """Continue the run in its folder from its checkpoint."""
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
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.idle_s < math.inf:
            raise ValueError(f"idle_s is {self.idle_s}; a window is finite and not negative")
        if self.init and self.trainer.init_from not in ("", self.init):
            raise ValueError(f"init = {self.init} and trainer.init_from = {self.trainer.init_from}: give one of them")
        self.trainer.init_from = self.init = self.init or self.trainer.init_from

    @property
    def stream_name(self) -> str:
        return self.stream or ("noisy" if self.data.garbage_fraction > 0 else "clean")

    @property
    def arm_name(self) -> str:
        if self.arm:
            return self.arm
        return self.gate.name if self.subset.kind == "all" else f"{self.gate.name}+{self.subset.name}"

    @property
    def folder(self) -> Path:
        name = f"{self.stream_name}-{self.arm_name}-{self.model.name}-s{self.seed}"
        return Path(self.run) if self.run else Path("runs/train") / name


def train(cfg: TrainConfig) -> dict[str, Any]:
    """Run one arm in its folder and return its record, the content of `result.json`."""
    folder = cfg.folder
    device = pick_device(cfg.trainer.device)
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    _claim(folder, cfg)
    record = new_record("train", stream=cfg.stream_name, arm=cfg.arm_name, seed=cfg.seed)
    if cfg.resume:
        record["started"] = read_json(folder / "run.json").get("started", record["started"])
    corpus = load_corpus(cfg.data)
    _check_size(cfg, corpus)
    cfg.model.vocab_size = check_vocabulary(cfg, corpus)
    times = component_times(cfg, device)
    record |= {"component_times_sha256": times.sha256, "corpus_sha256": corpus.sha256}
    write_json(folder / "run.json", record)
    resolved = asdict(cfg)
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
    times.save(folder / "component_times.json")
    try:
        result = _run(cfg, corpus, times, device, folder, resolved)
    except BaseException as error:
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        write_json(folder / "run.json", record)
        raise
    write_json(folder / "run.json", record | {"status": result["status"]})
    return result


def _claim(folder: Path, cfg: TrainConfig) -> None:
    """Refuse to write over a run, or to resume what is not there or was another run."""
    there = (folder / "run.json").exists()
    if there and not cfg.resume:
        raise ConfigError(f"{folder} already holds a run: resume=true continues it, run=FOLDER takes another folder")
    if cfg.resume:
        if not there:
            raise ConfigError(f"resume=true, but {folder} holds no run: name its folder with run=FOLDER")
        before = yaml.safe_load((folder / "config.yaml").read_text())
        now = asdict(cfg)
        differ = [key for key in _flat(before) if key not in _MAY_DIFFER and _flat(before)[key] != _flat(now).get(key)]
        if differ:
            raise ConfigError(
                f"resume=true, but the run in {folder} had other settings for {', '.join(sorted(differ))}: "
                "give the same ones, or start a new run with run=FOLDER"
            )
    folder.mkdir(parents=True, exist_ok=True)


_MAY_DIFFER = {"run", "resume", "progress", "idle_s", "zeus", "model.vocab_size", "trainer.component_times"}
_MAY_DIFFER |= {"trainer.checkpoint_every_s"}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


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


def component_times(cfg: TrainConfig, device: torch.device) -> ComponentTimes:
    """The table the run is timed with: its own when resumed, the shared one, or one measured now.

    A shared table that does not exist yet is measured and written for the runs that follow.
    """
    own = cfg.folder / "component_times.json"
    shared = Path(cfg.trainer.component_times) if cfg.trainer.component_times else None
    if cfg.resume and own.exists():
        return ComponentTimes.load(own)
    if shared is None:
        return _measure(cfg, device)
    with locked(shared):
        if shared.exists():
            times = ComponentTimes.load(shared)
            times.check(cfg.model, cfg.optim)
            return times
        times = _measure(cfg, device)
        times.save(shared)
    return times


def _measure(cfg: TrainConfig, device: torch.device) -> ComponentTimes:
    say(cfg, "measuring component times")
    times = measure(
        cfg.model,
        cfg.optim,
        device,
        cfg.trainer.batch_windows,
        cfg.trainer.precision,
        compiling(cfg.trainer, device),
        progress=lambda text: say(cfg, f"  {text}"),
    )
    if times.unsteady:
        say(
            cfg,
            f"  careful: component times spread by {times.unsteady:.0%}, so the machine is busy. Arms still compare, since",
        )
        say(cfg, "  they share one table, but a reference second is not one of an idle machine")
    return times


def _extend(
    cfg: TrainConfig,
    device: torch.device,
    times: ComponentTimes,
    steps: Sequence[Step],
    components: Mapping[str, Component],
) -> ComponentTimes:
    """`times` with what it lacks: from the shared table where another arm measured it, measured now otherwise; kept in
    both."""
    own = cfg.folder / "component_times.json"
    shared = Path(cfg.trainer.component_times) if cfg.trainer.component_times else own

    def more() -> ComponentTimes:
        found = times
        if shared.exists():
            there = ComponentTimes.load(shared)
            if there.sha256 == times.sha256:
                found = times.merged(there)
        return extend(
            found, cfg.model, cfg.optim, device, steps, components, progress=lambda text: say(cfg, f"measuring {text}")
        )

    with locked(shared):
        found = more()
        if not shared.exists() or ComponentTimes.load(shared).sha256 == times.sha256:
            found.save(shared)
    found.save(own)
    return found


def _check_size(cfg: TrainConfig, corpus: Corpus) -> None:
    for length, _ in cfg.trainer.lengths():
        if cfg.model.context % length:
            raise ConfigError(
                f"trainer.length_schedule: {length} does not divide the model's context {cfg.model.context}: windows are "
                "cut into equal parts"
            )
    windows = (len(corpus.train_tokens) - 1) // cfg.model.context
    if windows < cfg.trainer.batch_windows:
        raise ConfigError(
            f"corpus {corpus.name} has {len(corpus.train_tokens)} training tokens, {windows} windows of model.context = "
            f"{cfg.model.context}, fewer than one batch (trainer.batch_windows = {cfg.trainer.batch_windows}): "
            "lower one of them, or give more text"
        )


def _run(
    cfg: TrainConfig,
    corpus: Corpus,
    times: ComponentTimes,
    device: torch.device,
    folder: Path,
    resolved: dict[str, Any],
) -> dict[str, Any]:
    torch.manual_seed(cfg.seed)
    cfg.model.attention = times.attention if cfg.model.attention == "auto" else cfg.model.attention
    model = Transformer(cfg.model).to(device)
    if cfg.trainer.init_from and not cfg.resume:
        start_from(model, cfg.trainer.init_from)
    stream = make_stream(corpus, cfg.data, cfg.model.context, cfg.seed)
    windows = held_out(corpus, cfg.data, cfg.model.context, cfg.trainer.eval_tokens or None)
    meta = {
        "config": resolved,
        "model": asdict(cfg.model),
        "tokenizer": corpus.tokenizer.record(),
        "corpus_sha256": corpus.sha256,
    }
    bits_per_nat = {
        name: part[:, 1:].numel() / corpus.count_bytes(part[:, 1:]) / math.log(2) for name, part in windows.items()
    }
    resumed = load_checkpoint(folder / "checkpoint") if cfg.resume else None
    with Tracker(folder, resume_step=int(resumed.meta["step"]) if resumed else None) as tracker, _bar(cfg) as bar:

        def on_report(report: StepReport) -> None:
            updates.note(report.step, trainer.updates.subset.active)
            tracker.log(report.step, _scalars(report, cfg) | savings.scalars())
            bar.update(max(0.0, min(1.0, trainer.budget.progress) * bar.total - bar.n))
            bar.set_postfix_str(
                f"loss {report.loss_nats:.3f}, kept {report.keep_fraction:.0%}, "
                f"{report.tokens / max(report.wall_s, 1e-9):,.0f} tokens/s"
            )

        def on_evaluation(report: StepReport, losses: dict[str, float]) -> None:
            line = _scalars(report, cfg) | savings.scalars()
            line |= {"val_loss_nats": losses["val"], "val_bits_per_byte": losses["val"] * bits_per_nat["val"]}
            line |= {f"held_out/{name}": loss for name, loss in losses.items() if name != "val"}
            tracker.log(report.step, line)
            if trainer.gate.last_score_N is not None:
                tracker.histogram("gate/surprise_nats", trainer.gate.last_score_N, report.step)
                tracker.figure("surprise", surprise_figure(trainer.gate.last_score_N), report.step)
            updates.note(report.step, trainer.updates.subset.active)
            if cfg.subset.kind != "all":
                tracker.figure("blocks updated", updates.figure(), report.step)

        trainer = make_trainer(
            model,
            Arm(cfg.gate, cfg.subset, cfg.optim),
            cfg.trainer,
            Text(stream, windows, corpus.known_tokens),
            Prices(times, lambda table, steps, components: _extend(cfg, device, table, steps, components)),
            Place(folder, meta),
            cfg.seed,
            Listeners(on_report, on_evaluation),
        )
        savings, updates = Savings(trainer), BlockUpdates(model)
        if resumed is not None:
            trainer.resume(resumed)
        else:
            tracker.text("config", f"```\n{yaml.safe_dump(resolved, sort_keys=False)}```")
        idle = measure_idle(cfg.idle_s) if cfg.idle_s else ()
        with Meter(idle=idle) as meter, ZeusCheck() if cfg.zeus else nullcontext() as check:
            result = trainer.run()
        document = _document(cfg, corpus, model, result, meter.readings, device, windows, bits_per_nat)
        document["energy_check"] = [] if check is None else compare_all(meter.readings, check.readings)
        if result.finished:
            document["val_split"] = _split(cfg, corpus, model, windows["val"])
            tracker.text("energy", training_energy_markdown(document))
            settings = experiment_settings(resolved)
            row = run_row(cfg.stream_name, cfg.arm_name, cfg.seed, str(cfg.folder), settings)
            tracker.hparams(row, hparam_metrics(document))
    if result.finished:
        write_json(folder / "result.json", document)
    else:
        print(
            f"interrupted at step {result.step}; the same command with resume=true run={folder} continues it",
            file=sys.stderr,
        )
    return document


def _scalars(report: StepReport, cfg: TrainConfig) -> dict[str, float | int | None]:
    return {
        "tokens": report.tokens,
        "reference_s": report.reference_s,
        "wall_s": report.wall_s,
        "loss_nats": None if math.isnan(report.loss_nats) and not report.skipped else report.loss_nats,
        "lr": report.learning_rate_factor * cfg.optim.lr,
        "keep_fraction": report.keep_fraction,
        "flops": report.flops,
        "tokens_per_s": report.tokens / max(report.wall_s, 1e-9),
        "train/gradient_norm": report.gradient_norm,
        "gate/active_weight_fraction": report.active_fraction,
        "health/skipped_steps": report.skipped,
        **{f"source/{name}": share for name, share in report.kept_share.items()},
        **report.notes,
    }


def _document(
    cfg: TrainConfig,
    corpus: Corpus,
    model: Transformer,
    result: RunResult,
    readings: Sequence[Reading],
    device: torch.device,
    windows: Mapping[str, torch.Tensor],
    bits_per_nat: Mapping[str, float],
) -> dict[str, Any]:
    peak, kind = peak_bytes(device)
    return {
        "status": "finished" if result.finished else "interrupted",
        "folder": str(cfg.folder),
        "stream": cfg.stream_name,
        "arm": cfg.arm_name,
        "seed": cfg.seed,
        "loss_nats": result.val_loss_nats,
        "bits_per_byte": result.val_loss_nats * bits_per_nat["val"],
        "held_out": {
            name: {"loss_nats": loss, "bits_per_byte": loss * bits_per_nat[name], "tokens": windows[name][:, 1:].numel()}
            for name, loss in result.held_out.items()
        },
        "prequential": _prequential(result),
        "gate_decisions": [dict(decision) for decision in result.gate_decisions],
        "budget_reference_s": cfg.trainer.budget_reference_s,
        "tokens": result.tokens,
        "steps": result.step,
        "windows_offered": result.windows_offered,
        "flops": result.flops,
        "reference_s": result.reference_s,
        "gate_reference_s": result.gate_reference_s,
        "wall_s": result.wall_s,
        "compile_s": result.compile_s,
        "peak_bytes": peak,
        "peak_bytes_kind": kind,
        "optimizer_bytes": result.optimizer_bytes,
        "gradient_bytes": result.gradient_bytes,
        "update_bytes": result.update_bytes,
        **measured_energy(readings, cfg.resume),
        "keep_fraction": result.keep_fraction,
        "source_keep": result.kept_share,
        "skipped_steps": result.skipped,
        "params": sum(p.numel() for name, p in model.named_parameters() if FACTOR not in name),  # of the merged model
        "val_tokens": windows["val"][:, 1:].numel(),
        "corpus": corpus.name,
    }


def _split(cfg: TrainConfig, corpus: Corpus, model: Transformer, windows_NT1: torch.Tensor) -> dict[str, Any]:
    """Loss of the set that the run is judged by, from easy to hard tokens and by document; off the clock."""
    loss_NT = token_losses(model, windows_NT1)
    surprise_NT = surprise_of(windows_NT1, torch.from_numpy(corpus.train_tokens.astype(np.int64)), cfg.model.vocab_size)
    starts = held_out_starts(corpus, cfg.data, cfg.model.context, cfg.trainer.eval_tokens or None)["val"]
    places = starts[:, None] + 1 + np.arange(loss_NT.shape[1])
    document_NT = torch.from_numpy(document_at(corpus.val_offsets, places))
    return {
        "difficulty": by_difficulty(loss_NT, surprise_NT),
        "documents": by_document(loss_NT, document_NT, corpus.val_names),
    }


def _prequential(result: RunResult) -> dict[str, Any] | None:
    """Losses before training on what came next, measured off the clock; None where the run took none."""
    if not result.prequential:
        return None
    mean = sum(loss for _, loss, _ in result.prequential) / len(result.prequential)
    return {"loss_nats": mean, "on_the_clock": False, "points": [list(point) for point in result.prequential]}


def peak_bytes(device: torch.device) -> tuple[int, str]:
    """Largest memory so far and what was counted: the process on a CPU, torch's allocations on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "CUDA memory allocated"
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale, "resident set of the process"


def _bar(cfg: TrainConfig) -> Any:
    """What of the budget is spent: reference seconds, or tokens where those are the budget."""
    from tqdm import tqdm

    tokens, seconds = cfg.trainer.budget_offered_tokens, cfg.trainer.budget_reference_s
    return tqdm(
        total=tokens or round(seconds, 1),
        desc=f"{cfg.stream_name} {cfg.arm_name}",
        unit="tokens" if tokens else "ref s",
        bar_format="{desc}: {percentage:3.0f}%|{bar:20}| {n:,.0f}/{total:,.0f} {unit} "
        "[{elapsed}, {remaining} left{postfix}]",
        disable=not cfg.progress,
        mininterval=2.0,
    )


def say(cfg: TrainConfig, text: str) -> None:
    if cfg.progress:
        print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `spikegate train`; see `run_app` for exit codes."""
    return run_app("train", TrainConfig, train, argv, expected=EXPECTED)


if __name__ == "__main__":
    sys.exit(main())
