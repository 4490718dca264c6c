"""The points of an activity frontier: gated models and their float controls, each trained, converted and measured.

Every point is a folder with a record and a checkpoint; what is finished is read back, what was interrupted goes on.
`python -m experiments.studies.activity` runs and draws them; `spikegate deploy run=POINT` puts one on the simulated chip.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.deploy import layer_record, load_run
from experiments.runs.folder import RunError, git_state, read_json
from experiments.runs.gated import add_gates, restore, turn_axes
from experiments.runs.plain_json import write_json
from neuro.analysis.compatibility import analyse
from neuro.conversion.calibration import calibrate
from neuro.conversion.graded import convert
from neuro.deployment.deployed import deploy
from neuro.training.loop import FineTuner, Moment, TrainReport, TrainSettings
from sparse_update.data.corpus import cut_at, val_starts, val_windows
from sparse_update.data.records import Corpus, CorpusError
from sparse_update.data.stream import WindowStream
from sparse_update.loop.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from sparse_update.loop.evaluation import evaluate
from sparse_update.transformer import Transformer

SELECTION_WINDOWS = 256  # at most, of the held-out works: recipes and rates are chosen there, and nothing is judged
STREAM_SEED = 1000  # added to a point's seed: other windows than the run saw first
PRUNING = 1.15  # share of weights kept = PRUNING x sqrt(target): half of the saving comes from weights, half from events
SAVE_EVERY = 200
OPTIMIZERS = ("adamw", "muon")
MUON = 4.0  # Muon's rate over AdamW's
TEACHERS = ("start", "control")


@dataclass
class Frontier:
    """What to run. `targets`: shares to reach. `controls`: (optimizer, rate) pairs, from which the float control's is
    chosen. `lr`: of gated models, whose arithmetic changes most: they want the rate of training from scratch. Rates are
    AdamW's; with "muon" the blocks' matrices train with Muon at MUON times that. `distil`: share of the loss that is
    distillation from `teacher`: "start" (the run) or "control" (the float control of the same seed).
    """

    run: str
    out: str = ""
    targets: tuple[float, ...] = (0.35, 0.25, 0.18, 0.12, 0.08)
    seeds: tuple[int, ...] = (0,)
    steps: int = 1000
    batch: int = 16
    lr: float = 4e-3
    optimizer: str = "muon"
    controls: tuple[tuple[str, float], ...] = (("adamw", 1e-3), ("muon", 1e-3), ("muon", 2e-3), ("muon", 4e-3))
    threshold_lr: float = 0.03
    anneal_until: float = 0.5
    pruning: float = PRUNING
    distil: float = 0.0
    teacher: str = "start"
    one_sided: bool = False
    turn: bool = True
    from_scratch: bool = False
    eval_tokens: int = 32768
    calibration_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.teacher not in TEACHERS:
            raise ValueError(f"teacher is {self.teacher!r}; one of {', '.join(TEACHERS)}")
        if not self.targets or not all(0 < t <= 1 for t in self.targets):
            raise ValueError(f"targets are {list(self.targets)}: shares of the dense operations, above 0 and up to 1")
        if self.steps < 1 or self.batch < 1 or self.eval_tokens < 1 or self.calibration_tokens < 1 or not self.seeds:
            raise ValueError("steps, batch, eval_tokens and calibration_tokens are at least 1, and there is a seed")

    @property
    def folder(self) -> Path:
        """Where the points go."""
        return Path(self.out) if self.out else Path(self.run) / "activity"

    def density(self, target: float) -> float:
        """Share of weights kept for a target."""
        return min(1.0, self.pruning * target**0.5) if self.pruning else 1.0

    def settings(self, target: float | None, lr: float, *, pruned: bool, distilled: bool) -> TrainSettings:
        """A point's training settings: `target` None is a control."""
        return TrainSettings(
            steps=self.steps,
            lr=lr,
            threshold_lr=self.threshold_lr,
            anneal_until=self.anneal_until,
            prune_until=self.anneal_until,
            target_share=target if not pruned else None,
            weight_density=self.density(target) if target is not None else 1.0,
            distil_weight=self.distil if distilled else 0.0,
            quantise_last=0.1 if target is not None and not pruned else 0.0,
        )


@dataclass(frozen=True)
class Text:
    """Batches to train on, windows to choose by, windows to judge by (both int64 (N, T + 1))."""

    stream: Callable[[int], WindowStream]
    selection: Tensor
    held_out: Tensor


def split_text(corpus: Corpus, context: int, eval_tokens: int) -> Text:
    """The training text, and windows of the held-out works: `eval_tokens` to judge by, up to 256 others to choose by.

    The end of the training text would not do to choose by: the run has seen it, and a small rate forgets it least.
    Raises CorpusError where nothing is left to choose by.
    """
    judged = set(val_starts(corpus, context, eval_tokens).tolist())
    others = [start for start in val_starts(corpus, context).tolist() if start not in judged]
    if not others:
        raise CorpusError(
            f"corpus {corpus.name}: all {len(judged)} held-out windows of {context} are judged by, none is left to choose "
            "a learning rate by; lower --eval-tokens"
        )
    keep = min(SELECTION_WINDOWS, len(others))
    chosen = np.asarray([others[(2 * i + 1) * len(others) // (2 * keep)] for i in range(keep)])
    return Text(
        lambda seed: WindowStream(corpus, context, STREAM_SEED + seed),
        cut_at(corpus.val_tokens, chosen, context),
        val_windows(corpus, context, eval_tokens),
    )


class Points:
    """Runs the points of a `Frontier`, each in a folder of its own."""

    def __init__(self, cfg: Frontier) -> None:
        self.cfg = cfg
        self.start, corpus, _, self.trained = load_run(Path(cfg.run))
        self.start.requires_grad_(True)
        self.text = split_text(corpus, self.start.cfg.context, cfg.eval_tokens)
        self.best = cfg.controls[0]

    def all(self) -> list[dict[str, Any]]:
        """Every point of every seed, finished ones read from their folders."""
        found = []
        tuned = {how: self.control(how, self.cfg.seeds[0]) for how in self.cfg.controls}
        self.best = min(tuned, key=lambda how: tuned[how]["selection_nats"])
        rates = [rate for optimizer, rate in tuned if optimizer == self.best[0]]
        if self.best[1] in (min(rates), max(rates)):
            name = control_name(self.best)
            say(f"the best control, {name}, is at the edge of the rates tried: a better one may lie beyond")
        for seed in self.cfg.seeds:
            control = self.control(self.best, seed)
            found.append(control)
            if self.cfg.distil:
                found.append(self.control(self.best, seed, distilled=True))
            for target in self.cfg.targets:
                found.append(self.point(f"gated-{target:g}", target, seed, self.cfg.lr, pruned=False))
            if self.cfg.pruning:
                least = min(self.cfg.targets)
                name = f"pruned-to-{self.cfg.density(least):.2g}"  # of the weights; there is no share to reach
                found.append(self.point(name, least, seed, self.cfg.lr, pruned=True))
            for record in found:
                if record["seed"] == seed:
                    record["delta_nats"] = record["simulated_nats"] - control["float_nats"]
                    record["delta_float_nats"] = record["float_nats"] - control["float_nats"]
        return found

    def control(self, how: tuple[str, float], seed: int, *, distilled: bool = False) -> dict[str, Any]:
        """The float model, trained further by that optimizer at that rate."""
        name = control_name(how)
        if distilled:
            name = name.replace("float", "distilled", 1)
        return self.point(name, None, seed, how[1], pruned=False, optimizer=how[0], distilled=distilled)

    def point(
        self,
        name: str,
        target: float | None,
        seed: int,
        lr: float,
        *,
        pruned: bool,
        optimizer: str = "",
        distilled: bool | None = None,
    ) -> dict[str, Any]:
        """One model, trained and measured; read back where it is finished.

        `target`: share of synaptic operations per dense multiply-accumulate, None for a float control. `pruned`: no
        thresholds, only the weights' density that belongs to `target`. `lr`: AdamW's. `distilled`: by default wherever
        the frontier distils and there is a target. In the record losses are in nats per token, `train_s` in seconds.
        Raises RunError where the folder was made with other settings.
        """
        folder = self.cfg.folder / f"{name}-s{seed}"
        optimizer = optimizer or self.cfg.optimizer
        if distilled is None:
            distilled = bool(self.cfg.distil) and target is not None
        own = {"target": target, "seed": seed, "lr": lr, "pruned": pruned, "optimizer": optimizer, "distilled": distilled}
        same = {k: v for k, v in dataclasses.asdict(self.cfg).items() if k not in ("targets", "seeds", "controls", "out")}
        same |= own
        if (folder / "point.json").exists():
            record = read_json(folder / "point.json")
            if record["settings"] != same:
                raise RunError(f"{folder} was made with other settings; choose another folder with --out")
            return record
        model, report, seconds = self._train(name, folder, same)
        record = {
            "name": name,
            "kind": "pruned" if pruned else "gated" if target is not None else "distilled" if distilled else "float",
            "target": target,
            "seed": seed,
            "lr": lr,
            "settings": same,
            "selection_nats": evaluate(model, self.text.selection),
            "train_s": seconds,
            "git": git_state(),
            **self._measure(model, seed),
        }
        if report is not None:
            record |= {"rates": report.rates, "densities": report.densities}
        write_json(folder / "point.json", record)
        say(
            f"{name} seed {seed}: selection {record['selection_nats']:.4f}, held out {record['float_nats']:.4f} float, "
            f"{record['simulated_nats']:.4f} simulated, {record['share']:.1%} of dense operations, {seconds:.0f} s"
        )
        return record

    def _train(self, name: str, folder: Path, own: Mapping[str, Any]) -> tuple[Transformer, TrainReport | None, float]:
        target, seed, pruned = own["target"], own["seed"], own["pruned"]
        cfg, start = self.cfg, time.perf_counter()
        torch.manual_seed(seed)
        model = Transformer(self.start.cfg) if cfg.from_scratch else copy.deepcopy(self.start)
        stream = self.text.stream(seed)

        def batches(step: int) -> tuple[Tensor, Tensor]:
            tokens = stream.read(step * cfg.batch, cfg.batch).tokens
            return tokens[:, :-1], tokens[:, 1:]

        gates = None
        if target is not None and cfg.turn and not cfg.from_scratch:
            turn_axes(model, torch.cat([batches(step)[0] for step in range(4)]), seed)
        if target is not None and not pruned:
            gates = add_gates(model, batches(0)[0][:4], one_sided=cfg.one_sided)
        settings = cfg.settings(target, own["lr"], pruned=pruned, distilled=own["distilled"])
        if pruned:
            settings.prune_score = "magnitude"
        tuner = FineTuner(
            model,
            batches,
            settings,
            loss=next_token_loss,
            gates=gates,
            optimizer=lambda groups: optimizers(model, groups, own["optimizer"]),
            teacher=self._teacher(seed) if settings.distil_weight else None,
            prune={n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)} if pruned else None,
        )
        meta = {"gated": gates is not None, "one_sided": cfg.one_sided, "name": name, "seed": seed}
        try:
            tuner.load_state_dict(load_checkpoint(folder / "checkpoint").state)
            say(f"{name} seed {seed}: goes on at step {tuner.step}")
        except CheckpointError:
            if (folder / "checkpoint").exists():
                raise
        while tuner.step < settings.steps:
            report = tuner.run(until=tuner.step + SAVE_EVERY, progress=progress(name, settings.steps))
            save_checkpoint(folder / "checkpoint", model.state_dict(), tuner.state_dict(), meta)
        return model.eval(), report if gates is not None else None, time.perf_counter() - start

    def _teacher(self, seed: int) -> Transformer:
        if self.cfg.teacher == "start":
            return copy.deepcopy(self.start)
        teacher = copy.deepcopy(self.start)
        restore(teacher, self.cfg.folder / f"{control_name(self.best)}-s{seed}" / "checkpoint")
        return teacher

    def _measure(self, model: Transformer, seed: int) -> dict[str, Any]:
        cfg, windows = self.cfg, self.text.held_out
        rows = max(1, cfg.calibration_tokens // model.cfg.context)
        training = self.text.stream(seed).read(0, rows).tokens[:, :-1]
        report = analyse(model, training[:1])
        plan = convert(model, calibrate(model, training.split(16)), report)
        simulated = deploy(model, plan)
        loss = evaluate(simulated, windows)
        counts = simulated.counts()
        mapped = [c for c in counts if not c.host]
        tokens = windows[:, 1:].numel()
        return {
            "float_nats": evaluate(model, windows),
            "quantised_nats": evaluate(deploy(model, plan, "quantised"), windows),
            "simulated_nats": loss,
            "tokens": tokens,
            "synops_per_token": sum(c.synops for c in mapped) / tokens,
            "dense_macs_per_token": sum(c.dense_macs for c in mapped) / tokens,
            "share": sum(c.synops for c in mapped) / sum(c.dense_macs for c in mapped),
            "mapped_mac_share": report.mac_share,
            "layers": [layer_record(c, tokens) for c in mapped],
            "wraps": sum(h.wraps for h in simulated.health()),
        }


def control_name(how: tuple[str, float]) -> str:
    """Of the float control trained by that optimizer at that rate."""
    return f"float-{how[0]}-{how[1]:g}"


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, a scalar: logits float (..., V), targets int64 (...)."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def optimizers(model: Transformer, groups: list[dict[str, Any]], name: str) -> list[torch.optim.Optimizer]:
    """ "adamw", or "muon": torch.optim.Muon for the matrices of the blocks and AdamW for all else, as runs are trained."""
    blocks = {id(p) for p in model.blocks.parameters() if p.dim() == 2 and name == "muon"}
    made: list[torch.optim.Optimizer] = []
    rest = []
    for group in groups:
        matrices = [p for p in group["params"] if id(p) in blocks]
        others = [p for p in group["params"] if id(p) not in blocks]
        if matrices:
            made.append(torch.optim.Muon(matrices, lr=MUON * group["lr"], weight_decay=group["weight_decay"]))
        if others:
            rest.append({**group, "params": others})
    return [*made, torch.optim.AdamW(rest, betas=(0.9, 0.98))]


def progress(name: str, steps: int) -> Callable[[Moment], None]:
    """A line on stderr every 100 steps."""
    start = time.perf_counter()

    def show(m: Moment) -> None:
        if m.step % 100 == 99 or m.step == steps - 1:
            say(
                f"{name} {m.step + 1}/{steps}: loss {m.loss:.4f}, share {m.share:.3f} (target {m.target:.3f}), "
                f"weights {m.density:.2f}, {time.perf_counter() - start:.0f} s"
            )

    return show


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
