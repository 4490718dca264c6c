"""Train one arm: `python -m experiments.train gate=surprise experiment=noisy`, or `spikegate train ...`."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from experiments.hydra_app import ConfigError, run_app
from experiments.plain_json import write_json
from experiments.runs import RunError, new_record, read_json
from experiments.tracking import Tracker, hparam_metrics
from hardware.meters import Meter, Reading, total
from sparse_update.checkpoint import CheckpointError, load_checkpoint
from sparse_update.corpus import Corpus, DataConfig, load_corpus, val_windows
from sparse_update.cost import ComponentTimes, ComponentTimesError, StepKind, measure_components
from sparse_update.gate import GateConfig, SequenceGate, TokenGate
from sparse_update.optimizer import OptimConfig
from sparse_update.sources import CorpusError
from sparse_update.stream import WindowStream
from sparse_update.subset import SubsetConfig
from sparse_update.trainer import RunResult, StepReport, Trainer, TrainerConfig, TrainingDiverged, compiling
from sparse_update.transformer import ModelConfig, Transformer

T = TypeVar("T")
EXPECTED = (RunError, CorpusError, CheckpointError, ComponentTimesError, TrainingDiverged)


@dataclass
class TrainConfig:
    """One training run."""

    run: str = ""
    """Folder of the run; empty: runs/train/STREAM-ARM-MODEL-sSEED."""
    stream: str = ""
    """Name of the data stream in tables; empty: "clean", or "noisy" with garbage in it."""
    seed: int = 0
    """Weights, order of the data and random choices."""
    resume: bool = False
    """Continue the run in its folder from its checkpoint."""
    progress: bool = True
    """A progress bar on standard error."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    @property
    def stream_name(self) -> str:
        return self.stream or ("noisy" if self.data.garbage_fraction > 0 else "clean")

    @property
    def arm(self) -> str:
        return self.gate.name if self.subset.kind == "all" else f"{self.gate.name}+{self.subset.name}"

    @property
    def folder(self) -> Path:
        name = f"{self.stream_name}-{self.arm}-{self.model.name}-s{self.seed}"
        return Path(self.run) if self.run else Path("runs/train") / name


def train(cfg: TrainConfig) -> dict[str, Any]:
    """Run one arm in its folder and return its record, the content of `result.json`."""
    folder = cfg.folder
    device = pick_device(cfg.trainer.device)
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    _claim(folder, cfg)
    record = new_record("train", stream=cfg.stream_name, arm=cfg.arm, seed=cfg.seed)
    if cfg.resume:
        record["started"] = read_json(folder / "run.json").get("started", record["started"])
    corpus = load_corpus(cfg.data)
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


_MAY_DIFFER = {"run", "resume", "progress", "model.vocab_size", "trainer.component_times", "trainer.checkpoint_every_s"}


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
    if shared is not None and shared.exists():
        times = ComponentTimes.load(shared)
        times.check(cfg.model, cfg.trainer.batch_windows, cfg.optim)
        return times
    kinds = [StepKind.of(cfg.gate, cfg.subset)]
    if shared is not None:  # the arms that may follow
        kinds += [StepKind.of(gate, cfg.subset) for gate in (GateConfig(), *shipped("gate", GateConfig))]
        kinds += [StepKind.of(cfg.gate, subset) for subset in shipped("subset", SubsetConfig)]
    kinds = list({(kind.key, kind.gate.signal): kind for kind in reversed(kinds)}.values())
    say(cfg, "measuring component times")
    times = measure_components(
        cfg.model,
        cfg.trainer.batch_windows,
        kinds,
        cfg.optim,
        device,
        cfg.trainer.precision,
        compiling=compiling(cfg.trainer, device),
        progress=lambda text: say(cfg, f"  {text}"),
    )
    if times.unsteady:
        say(
            cfg,
            f"  careful: component times spread by {times.unsteady:.0%}, so the machine is busy. Arms still compare, since",
        )
        say(cfg, "  they share one table, but a reference second is not one of an idle machine")
    if shared is not None:
        times.save(shared)
    return times


def shipped(group: str, schema: type[T]) -> list[T]:
    """The settings that `configs/GROUP` ships."""
    folder = files("configs").joinpath(group)
    found = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return [schema(**yaml.safe_load(f.read_text())) for f in found]


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
    stream = WindowStream(corpus, cfg.model.context, cfg.seed, garbage_fraction=cfg.data.garbage_fraction)
    sequences = SequenceGate(cfg.gate, stream, corpus.vocab_size, seed=cfg.seed + 1)
    held_out = val_windows(corpus, cfg.model.context, cfg.trainer.eval_tokens or None)
    meta = {
        "config": resolved,
        "model": asdict(cfg.model),
        "tokenizer": corpus.tokenizer.record(),
        "corpus_sha256": corpus.sha256,
    }
    targets = held_out[:, 1:]
    bits_per_nat = targets.numel() / corpus.count_bytes(targets) / math.log(2)
    resumed = load_checkpoint(folder / "checkpoint") if cfg.resume else None
    with Tracker(folder, resume_step=int(resumed.meta["step"]) if resumed else None) as tracker, _bar(cfg) as bar:

        def on_report(report: StepReport) -> None:
            tracker.log(report.step, _scalars(report, cfg))
            bar.update(max(0.0, report.reference_s - bar.n))
            bar.set_postfix_str(
                f"loss {report.loss_nats:.3f}, kept {report.keep_fraction:.0%}, "
                f"{report.tokens / max(report.wall_s, 1e-9) / 1000:.0f}k tokens/s"
            )

        def on_evaluation(report: StepReport, loss: float) -> None:
            line = _scalars(report, cfg) | {"val_loss_nats": loss, "val_bits_per_byte": loss * bits_per_nat}
            tracker.log(report.step, line)
            if sequences.last_surprise_N is not None:
                tracker.histogram("gate/surprise_nats", sequences.last_surprise_N, report.step)

        trainer = Trainer(
            model,
            sequences,
            TokenGate(cfg.gate, seed=cfg.seed + 2),
            StepKind.of(cfg.gate, cfg.subset),
            cfg.optim,
            cfg.trainer,
            times,
            held_out,
            folder,
            cfg.seed,
            meta,
            on_report,
            on_evaluation,
        )
        if resumed is not None:
            trainer.resume(resumed)
        else:
            tracker.text("config", f"```\n{yaml.safe_dump(resolved, sort_keys=False)}```")
        with Meter() as meter:
            result = trainer.run()
        document = _document(cfg, corpus, model, result, meter.readings, device, held_out.shape[0], bits_per_nat)
        if result.finished:
            tracker.hparams(
                {
                    "stream": cfg.stream_name,
                    "arm": cfg.arm,
                    "seed": cfg.seed,
                    "model": cfg.model.name,
                    "keep": cfg.gate.keep_fraction,
                },
                hparam_metrics(document),
            )
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
    }


def _document(
    cfg: TrainConfig,
    corpus: Corpus,
    model: Transformer,
    result: RunResult,
    readings: Sequence[Reading],
    device: torch.device,
    held_out_windows: int,
    bits_per_nat: float,
) -> dict[str, Any]:
    joules = total(readings) if readings and not cfg.resume else None
    reasons = [f"{r.source}: {r.reason}" for r in readings if r.joules is None]
    if cfg.resume:
        reasons = ["the run was resumed: no meter saw all of it", *reasons]
    peak, kind = peak_bytes(device)
    return {
        "status": "finished" if result.finished else "interrupted",
        "folder": str(cfg.folder),
        "stream": cfg.stream_name,
        "arm": cfg.arm,
        "seed": cfg.seed,
        "loss_nats": result.val_loss_nats,
        "bits_per_byte": result.val_loss_nats * bits_per_nat,
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
        "energy_j": joules,
        "energy_reason": None if joules is not None else "not measured: " + "; ".join(reasons),
        "keep_fraction": result.keep_fraction,
        "source_keep": result.kept_share,
        "skipped_steps": result.skipped,
        "params": sum(p.numel() for p in model.parameters()),
        "val_tokens": held_out_windows * cfg.model.context,
        "corpus": corpus.name,
    }


def peak_bytes(device: torch.device) -> tuple[int, str]:
    """Largest memory so far and what was counted: the process on a CPU, torch's allocations on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "CUDA memory allocated"
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale, "resident set of the process"


def _bar(cfg: TrainConfig) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=round(cfg.trainer.budget_reference_s, 1),
        desc=f"{cfg.stream_name} {cfg.arm}",
        unit="ref s",
        bar_format="{desc}: {percentage:3.0f}%|{bar:20}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}, {postfix}]",
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
