"""How few synaptic operations cost how much loss: `python -m experiments.activity RUN`.

Turns a trained run's residual stream to axes in which it is sparse, fine-tunes it towards falling shares of synaptic
operations (of the dense multiply-accumulates of all mapped layers, head included), converts each result, and measures it
on held-out text: float with gates, quantised twin, simulated. Beside it stand controls of the same extra steps, seeds
and batches: plain float training (its learning rate chosen on text that is neither trained on nor held out), that model
in W8A8, and float training with pruning alone.

Every point is a folder under --out with a record; the same command goes on where it stopped. Last line: JSON.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.deploy import layer_record, load_run
from experiments.plain_json import dump_line, write_json
from experiments.runs import RunError, git_state, read_json
from neuro.calibration import calibrate
from neuro.compatibility import analyse
from neuro.conversion.graded import convert
from neuro.deployed import deploy
from neuro.training.basis import Stream, sparse_axes, turn_heads
from neuro.training.insert import GateConfig, Gates, insert_thresholds
from neuro.training.loop import FineTuner, Moment, TrainReport, TrainSettings
from sparse_update.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from sparse_update.data.corpus import Corpus, val_windows
from sparse_update.data.sources import CorpusError
from sparse_update.data.stream import WindowStream
from sparse_update.evaluation import evaluate
from sparse_update.transformer import Block, Transformer

SELECTION_SHARE = 0.05  # of the training text, at its end: recipes and rates are chosen there
STREAM_SEED = 1000  # added to a point's seed: other windows than the run saw first
PRUNING = 1.15  # share of weights kept = PRUNING x sqrt(target): half of the saving comes from weights, half from events
SAVE_EVERY = 200
OPTIMIZERS = ("adamw", "muon")
MUON = 4.0  # Muon's rate over AdamW's
GOAL_NATS = 0.05
LOOKS = {"gated": ("o-", "thresholds and pruning"), "pruned": ("s", "pruned only"), "float": ("D", "float control in W8A8")}


@dataclass
class Frontier:
    """What to run. `targets`: shares to reach. `controls`: (optimizer, rate) pairs, from which the float control's is
    chosen. `lr`: of gated models, whose arithmetic changes most: they want the rate of training from scratch. Rates are
    AdamW's; with "muon" the blocks' matrices train with Muon at MUON times that.
    """

    run: str
    out: str = ""
    targets: tuple[float, ...] = (0.35, 0.25, 0.18, 0.12, 0.08)
    seeds: tuple[int, ...] = (0,)
    steps: int = 1000
    batch: int = 16
    lr: float = 4e-3
    optimizer: str = "muon"
    controls: tuple[tuple[str, float], ...] = (("adamw", 1e-3), ("muon", 2.5e-4), ("muon", 1e-3))
    threshold_lr: float = 0.03
    anneal_until: float = 0.5
    pruning: float = PRUNING
    distil: float = 0.0
    one_sided: bool = False
    turn: bool = True
    from_scratch: bool = False
    eval_tokens: int = 32768
    calibration_tokens: int = 8192

    def __post_init__(self) -> None:
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

    def settings(self, target: float | None, lr: float, *, pruned: bool) -> TrainSettings:
        """A point's training settings: `target` None is a control."""
        return TrainSettings(
            steps=self.steps,
            lr=lr,
            threshold_lr=self.threshold_lr,
            anneal_until=self.anneal_until,
            prune_until=self.anneal_until,
            target_share=target if not pruned else None,
            weight_density=self.density(target) if target is not None else 1.0,
            distil_weight=self.distil if target is not None else 0.0,
            quantise_last=0.1 if target is not None and not pruned else 0.0,
        )


@dataclass(frozen=True)
class Text:
    """Batches to train on, windows to choose by, windows to judge by (both int64 (N, T + 1))."""

    stream: Callable[[int], WindowStream]
    selection: Tensor
    held_out: Tensor


def split_text(corpus: Corpus, context: int, eval_tokens: int) -> Text:
    """The training text without its end, its end, and the held-out works."""
    cut = round(len(corpus.train_tokens) * (1 - SELECTION_SHARE))
    tail = torch.from_numpy(np.asarray(corpus.train_tokens[cut:], dtype=np.int64))
    windows = min(256, (len(tail) - 1) // context)
    if windows < 1:
        raise CorpusError(f"corpus {corpus.name}: the last {SELECTION_SHARE:.0%} is shorter than a window of {context}")
    starts = torch.linspace(0, len(tail) - context - 1, windows).long()
    selection = torch.stack([tail[s : s + context + 1] for s in starts])
    shorter = dataclasses.replace(corpus, train_tokens=corpus.train_tokens[:cut])
    judged = val_windows(corpus, context, eval_tokens)
    return Text(lambda seed: WindowStream(shorter, context, STREAM_SEED + seed), selection, judged)


def add_gates(model: Transformer, example: Tensor, *, one_sided: bool = False) -> Gates:
    """A gate of its own before every linear layer, head included; behind the squared ReLU one threshold for all."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    usual = GateConfig(two_sided=not one_sided)
    hidden = {name: GateConfig(two_sided=False, shared=True) for name in names if name.endswith("fc2")}
    mixed = {name: GateConfig() for name in names if name.endswith(".o")}  # attention output has no preferred sign
    return insert_thresholds(model, names, example, default=usual, special=hidden | mixed)


def turn_axes(model: Transformer, tokens_BT: Tensor, seed: int = 0) -> None:
    """Turn the residual stream and every head's values to axes in which they are sparse, in place: the same function.

    Raises ValueError for tied embeddings, which a turn would have to change in two ways.
    """
    seen: dict[nn.Module, Tensor] = {}
    blocks = [block for block in model.blocks if isinstance(block, Block)]

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[module] = args[0].reshape(-1, args[0].shape[-1])

    norms: list[nn.Module] = [*(norm for block in blocks for norm in (block.norm1, block.norm2)), model.norm]
    outputs = [block.attn.o for block in blocks]
    handles = [module.register_forward_pre_hook(keep) for module in (*norms, *outputs)]
    with torch.no_grad():
        model(tokens_BT)
    for handle in handles:
        handle.remove()
    rows_ND = torch.cat([F.rms_norm(seen[norm], seen[norm].shape[-1:]) for norm in norms])
    readers = [
        (norm, linears)
        for block in blocks
        for norm, linears in (
            (block.norm1, [block.attn.q, block.attn.k, block.attn.v]),
            (block.norm2, [block.mlp.fc1]),
        )
    ]
    writers = [linear for block in blocks for linear in (block.attn.o, block.mlp.fc2)]
    Stream([model.embed], writers, [*readers, (model.norm, [model.head])]).turn(sparse_axes(rows_ND, seed=seed))
    for block in blocks:
        heads = seen[block.attn.o].chunk(block.attn.heads, dim=-1)
        axes = [sparse_axes(head.contiguous(), steps=150, seed=seed) for head in heads]
        turn_heads(block.attn.v, block.attn.o, axes)


def load_point(run: str | Path, point: str | Path) -> Transformer:
    """The fine-tuned model of a finished point, gates included, in eval mode."""
    model, _, _, _ = load_run(Path(run))
    saved = load_checkpoint(Path(point) / "checkpoint")
    if saved.meta["gated"]:
        add_gates(model, torch.zeros(1, model.cfg.context, dtype=torch.int64), one_sided=saved.meta["one_sided"])
    model.load_state_dict(saved.model)
    return model.eval()


class Points:
    """Runs the points of a `Frontier`, each in a folder of its own."""

    def __init__(self, cfg: Frontier) -> None:
        self.cfg = cfg
        self.start, corpus, _, self.trained = load_run(Path(cfg.run))
        self.start.requires_grad_(True)
        self.text = split_text(corpus, self.start.cfg.context, cfg.eval_tokens)

    def all(self) -> list[dict[str, Any]]:
        """Every point of every seed, finished ones read from their folders."""
        found = []
        tuned = {how: self.control(how, self.cfg.seeds[0]) for how in self.cfg.controls}
        best = min(tuned, key=lambda how: tuned[how]["selection_nats"])
        for seed in self.cfg.seeds:
            control = self.control(best, seed)
            found.append(control)
            for target in self.cfg.targets:
                found.append(self.point(f"gated-{target:g}", target, seed, self.cfg.lr, pruned=False))
            if self.cfg.pruning:
                least = min(self.cfg.targets)
                found.append(self.point(f"pruned-{least:g}", least, seed, self.cfg.lr, pruned=True))
            for record in found:
                if record["seed"] == seed:
                    record["delta_nats"] = record["simulated_nats"] - control["float_nats"]
                    record["delta_float_nats"] = record["float_nats"] - control["float_nats"]
        return found

    def control(self, how: tuple[str, float], seed: int) -> dict[str, Any]:
        """The float model, trained further by that optimizer at that rate."""
        return self.point(f"float-{how[0]}-{how[1]:g}", None, seed, how[1], pruned=False, optimizer=how[0])

    def point(
        self, name: str, target: float | None, seed: int, lr: float, *, pruned: bool, optimizer: str = ""
    ) -> dict[str, Any]:
        """One model, trained and measured; read back where it is finished. Raises RunError for other settings there."""
        folder = self.cfg.folder / f"{name}-s{seed}"
        optimizer = optimizer or self.cfg.optimizer
        own = {"target": target, "seed": seed, "lr": lr, "pruned": pruned, "optimizer": optimizer}
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
            "kind": "pruned" if pruned else "float" if target is None else "gated",
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
        model = copy.deepcopy(self.start)
        if cfg.from_scratch:
            model._initialise()
        stream = self.text.stream(seed)

        def batches(step: int) -> tuple[Tensor, Tensor]:
            tokens = stream.read(step * cfg.batch, cfg.batch).tokens
            return tokens[:, :-1], tokens[:, 1:]

        gates = None
        if target is not None and cfg.turn and not cfg.from_scratch:
            turn_axes(model, torch.cat([batches(step)[0] for step in range(4)]), seed)
        if target is not None and not pruned:
            gates = add_gates(model, batches(0)[0][:4], one_sided=cfg.one_sided)
        settings = cfg.settings(target, own["lr"], pruned=pruned)
        if pruned:
            settings.prune_score = "magnitude"
        tuner = FineTuner(
            model,
            batches,
            settings,
            loss=next_token_loss,
            gates=gates,
            optimizer=lambda groups: optimizers(model, groups, own["optimizer"]),
            teacher=copy.deepcopy(self.start) if settings.distil_weight else None,
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


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
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


def summary(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, one row a name: share, loss difference to the float control of the same seed, its largest."""
    rows = []
    for name in dict.fromkeys(p["name"] for p in points):
        group = [p for p in points if p["name"] == name]
        deltas = [p["delta_nats"] for p in group]
        rows.append(
            {
                "name": name,
                "kind": group[0]["kind"],
                "seeds": len(group),
                "share": statistics.fmean(p["share"] for p in group),
                "delta_nats": statistics.fmean(deltas),
                "delta_nats_each": deltas,
                "delta_float_nats": statistics.fmean(p["delta_float_nats"] for p in group),
                "simulated_nats": statistics.fmean(p["simulated_nats"] for p in group),
                "quantised_nats": statistics.fmean(p["quantised_nats"] for p in group),
                "float_nats": statistics.fmean(p["float_nats"] for p in group),
            }
        )
    return rows


def qualifying(rows: Sequence[dict[str, Any]], limit: float = GOAL_NATS) -> float | None:
    """Smallest share of all rows whose mean loss difference is within `limit`; None if there is none."""
    return min((row["share"] for row in rows if row["delta_nats"] <= limit), default=None)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The frontier as text; losses in nats per token on held-out text."""
    lines = [f"{'model':<16}{'seeds':>6}{'synops':>9}{'float':>9}{'quantised':>11}{'simulated':>11}{'vs control':>12}"]
    for r in rows:
        lines.append(
            f"{r['name']:<16}{r['seeds']:>6}{r['share']:>9.1%}{r['float_nats']:>9.4f}{r['quantised_nats']:>11.4f}"
            f"{r['simulated_nats']:>11.4f}{r['delta_nats']:>+12.4f}"
        )
    return "\n".join(lines)


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss difference over share of synaptic operations; the goal is the grey corner."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.axvspan(0, 12, ymax=1, color="0.93", zorder=0)
    ax.axhline(GOAL_NATS, color="0.6", lw=0.8)
    for kind, (look, label) in LOOKS.items():
        some = sorted((r for r in rows if r["kind"] == kind), key=lambda r: r["share"])
        if some:
            ax.plot([100 * r["share"] for r in some], [r["delta_nats"] for r in some], look, label=label)
    ax.set_xlim(left=0)
    ax.set_xlabel("synaptic operations, % of dense multiply-accumulates")
    ax.set_ylabel("simulated loss less float control, nats per token")
    ax.legend(frameon=False)
    figure.savefig(path, dpi=150)


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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m experiments.activity", description="loss against synaptic operations")
    made.add_argument("run", help="folder of a finished training run")
    made.add_argument("--out", default="", help="folder of the points (default: RUN/activity)")
    made.add_argument("--targets", type=numbers, default=Frontier.targets, help="shares of dense operations, by comma")
    made.add_argument("--seeds", type=integers, default=Frontier.seeds, help="by comma (default: 0)")
    made.add_argument("--steps", type=int, default=Frontier.steps, help="further steps of every model (default: 1000)")
    made.add_argument("--batch", type=int, default=Frontier.batch, help="windows a step (default: 16)")
    made.add_argument("--optimizer", choices=OPTIMIZERS, default="muon", help="of gated models (default: muon)")
    made.add_argument("--lr", type=float, default=Frontier.lr, help="AdamW's rate for gated models (default: 4e-3)")
    made.add_argument(
        "--controls",
        type=pairs,
        default=Frontier.controls,
        help="OPTIMIZER:RATE by comma, tried for the float control",
    )
    made.add_argument("--threshold-lr", type=float, default=Frontier.threshold_lr, help="(default: 0.03)")
    made.add_argument("--anneal-until", type=float, default=Frontier.anneal_until, help="share of the steps (default: 0.5)")
    made.add_argument(
        "--pruning", type=float, default=PRUNING, help="weights kept = this x sqrt(target); 0: no pruning (default: 1.15)"
    )
    made.add_argument("--distil", type=float, default=0.0, help="weight of distillation from RUN (default: 0)")
    made.add_argument("--one-sided", action="store_true", help="ReLU after the norms instead of two-sided thresholds")
    made.add_argument("--no-turn", dest="turn", action="store_false", help="leave the residual stream's axes as trained")
    made.add_argument("--from-scratch", action="store_true", help="train from random weights instead")
    made.add_argument("--eval-tokens", type=int, default=Frontier.eval_tokens, help="held-out tokens (default: 32768)")
    made.add_argument("--calibration-tokens", type=int, default=Frontier.calibration_tokens, help="(default: 8192)")
    made.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    return made


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def pairs(text: str) -> tuple[tuple[str, float], ...]:
    found = tuple((name, float(rate)) for name, rate in (word.split(":") for word in text.split(",")))
    if not all(name in OPTIMIZERS and rate > 0 for name, rate in found):
        raise ValueError(text)
    return found


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 done, 2 settings or folders that cannot be used."""
    args = vars(parser().parse_args(argv))
    threads = args.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    try:
        cfg = Frontier(**args)
        points = Points(cfg).all()
    except (ValueError, RunError, CorpusError) as error:
        print(f"activity: {error}", file=sys.stderr)
        return 2
    rows = summary(points)
    document = {
        "run": cfg.run,
        "steps": cfg.steps,
        "from_scratch": cfg.from_scratch,
        "goal_nats": GOAL_NATS,
        "synops_fraction_at_0.05": qualifying(rows),
        "rows": rows,
    }
    write_json(cfg.folder / "frontier.json", document | {"points": points})
    picture(rows, cfg.folder / "frontier.png")
    print(table(rows))
    print(dump_line(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
