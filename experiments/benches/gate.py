"""`python -m experiments.bench gate`: what every kind of sparse step costs, beside its counted FLOPs.

All steps run in one process in turn, each with its optimizer's step. conversion = (1 - time ratio) / (1 - FLOP ratio)
against the fastest dense step found here: a plain GPT step, autograd on our model, and our own written-out step, each with
and without torch.compile. Ratios are medians over rounds of the quotient of neighbouring measurements. Scoring before the
forward is not part of a step: its cost stands in the table of component times.

Shape letters: B batch, T token, S kept sequence, R kept row.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from experiments.benches.nanogpt import PlainGPT
from experiments.runs.output import add_json_argument, entry, finish
from sparse_update.step.backward import Stepper
from sparse_update.step.flops import plan_flops
from sparse_update.step.kernels import can_compile
from sparse_update.step.plan import PLAIN, Choose, Chosen, StepPlan, View
from sparse_update.transformer import ModelConfig, Transformer, token_loss
from sparse_update.weights.optimizer import Optimizer
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import Active, SubsetConfig, choose

KINDS = ("sequence_before", "sequence_after", "token_rows", "bypass", "blocks", "layers", "dw_rows")
EXTRA = ("token_rows_exact", "bypass_keys", "vcas", "layers_frozen")
"""Further kinds, measured with --kinds all or by name. "layers_frozen": embeddings frozen too, so that the backward ends
early."""
MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"
Step = Callable[[], None]


@dataclass
class Arm:
    """One kind of step. `turn` moves the choice of weights on before a step, where there is one to move."""

    step: Step
    flops: Callable[[], int]
    turn: Callable[[int], None] | None = None
    every: int = 1
    """Steps that one choice of weights lasts: the share of `turn` that a step pays."""


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spikegate bench gate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="small", help="a name from configs/model (default: small)")
    parser.add_argument("--batch", type=int, default=16, help="windows of a dense step (default: 16)")
    parser.add_argument(
        "--vocab", type=int, default=256, help="vocabulary where the model's file gives none (default: 256, bytes)"
    )
    parser.add_argument("--rounds", type=int, default=11, help="measured rounds (default: 11)")
    parser.add_argument("--rates", default="0.5,0.25", help="kept shares (default: 0.5,0.25)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "auto"), default="auto", help="auto: the faster dense step's"
    )
    parser.add_argument("--compile", choices=("on", "off", "auto"), default="auto", help="auto: where a compiler is found")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"any of {', '.join(KINDS + EXTRA)}; or all")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--block-rows", type=int, default=128, help="granularity of weight blocks (default: 128)")
    add_json_argument(parser)
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON line. Exit code 0, 2 for bad arguments, 130 when interrupted (what is there is
    printed)."""
    options = arguments_parser().parse_args(argv)
    try:
        bench = Bench(options)
    except ValueError as error:
        print(f"bench gate: {error}", file=sys.stderr)
        return 2
    try:
        bench.measure()
    except KeyboardInterrupt:
        bench.interrupted = True
        print("interrupted: what was measured so far follows", file=sys.stderr)
    document = bench.document()
    print_table(document)
    finish(document, "bench-gate")
    return 130 if bench.interrupted else 0


def load_model(name: str, vocab: int) -> ModelConfig:
    """A shape from configs/model; ValueError for an unknown name."""
    path = MODELS / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"--model {name}: known are {', '.join(sorted(p.stem for p in MODELS.glob('*.yaml')))}")
    raw = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k in ModelConfig.__dataclass_fields__}
    cfg = ModelConfig(**raw)
    cfg.vocab_size = cfg.vocab_size or vocab
    return cfg


class Bench:
    """The measurement; `document()` is valid after any number of rounds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rates = [float(text) for text in options.rates.split(",") if text]
        if not self.rates or any(not 0 < r <= 1 for r in self.rates):
            raise ValueError(f"--rates {options.rates}: shares in (0, 1], divided by commas")
        self.kinds = list(KINDS + EXTRA) if options.kinds == "all" else options.kinds.split(",")
        if unknown := set(self.kinds) - set(KINDS + EXTRA):
            raise ValueError(f"--kinds {', '.join(sorted(unknown))}: known are {', '.join(KINDS + EXTRA)}")
        if options.batch < 1 or options.rounds < 1:
            raise ValueError(f"--batch {options.batch}, --rounds {options.rounds}: must be at least 1")
        self.cfg = load_model(options.model, options.vocab)
        if options.threads:
            torch.set_num_threads(options.threads)
        name = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(name)
        self.compiled = options.compile == "on" or (options.compile == "auto" and can_compile(self.device))
        self.interrupted = False
        self.dense_ms: dict[str, list[float]] = {}
        self.arm_ms: dict[str, list[float]] = {}
        self.turn_ms: dict[str, list[float]] = {}
        self.flops: dict[str, list[int]] = {}
        self.reference = ""
        self.base_ms: list[float] = []
        self.precision, self.attention, self.mode = "fp32", "explicit", False
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        shape = (options.batch, self.cfg.context + 1)
        tokens = torch.randint(0, self.cfg.vocab_size, shape, generator=generator).to(self.device)
        self.x, self.y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.models = {a: self._model(a) for a in ("explicit", "sdpa")}
        self.optim = OptimConfig(lr=1e-5)
        self.optimizers = {a: Optimizer(m, Active.everything(m), self.optim) for a, m in self.models.items()}

    def _model(self, attention: str) -> Transformer:
        model = Transformer(ModelConfig(**{**asdict(self.cfg), "attention": attention})).to(self.device)
        with torch.no_grad():
            for p in model.parameters():  # nothing at zero, as after some training
                p.add_(0.02 * torch.randn_like(p))
        return model

    # dense variants

    def dense_variants(self) -> dict[str, Step]:
        """Every dense step worth naming, by name: what / attention / precision / compiled or eager."""
        precisions = ("fp32", "bf16") if self.options.precision == "auto" else (self.options.precision,)
        if self.options.precision == "auto" and self.device.type == "cpu" and not _bf16_pays():
            precisions = ("fp32",)
        found: dict[str, Step] = {}
        for precision in precisions:
            for mode in ("eager", "compiled") if self.compiled else ("eager",):
                found[f"plain gpt/sdpa/{precision}/{mode}"] = self._plain(precision, mode == "compiled")
                for attention in ("explicit", "sdpa"):
                    tail = f"{attention}/{precision}/{mode}"
                    found[f"autograd/{tail}"] = self._autograd(attention, precision, mode == "compiled")
                    found[f"stepper/{tail}"] = self._stepped(attention, precision, mode == "compiled", PLAIN)
        return found

    def _cast(self, precision: str) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def _plain(self, precision: str, compiled: bool) -> Step:
        cfg = self.cfg
        model = PlainGPT(cfg.width, cfg.layers, cfg.heads, cfg.context, cfg.vocab_size, cfg.hidden_ratio).to(self.device)
        run = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), weight_decay=0.1, fused=True)

        def step() -> None:
            with self._cast(precision):
                loss = run(self.x, self.y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def _autograd(self, attention: str, precision: str, compiled: bool) -> Step:
        model, optimizer = self.models[attention], self.optimizers[attention]
        run = torch.compile(model) if compiled else model

        def step() -> None:
            with self._cast(precision):
                loss = token_loss(run(self.x), self.y).mean()
            loss.backward()
            optimizer.step(0.5)

        return step

    def _stepped(
        self,
        attention: str,
        precision: str,
        compiled: bool,
        plan: StepPlan,
        choose_after: Choose | None = None,
        batch: int = 0,
        bypass_BR: Tensor | None = None,
        optimizer: Optimizer | None = None,
    ) -> Step:
        model = self.models[attention]
        stepper = Stepper(model, torch.bfloat16 if precision == "bf16" else None, compiled)
        optimizer = optimizer or self.optimizers[attention]
        x, y = (self.x[:batch], self.y[:batch]) if batch else (self.x, self.y)
        generator = torch.Generator().manual_seed(0)

        def step() -> None:
            found = stepper.step(
                x, y, plan, optimizer.active, choose=choose_after, bypass_BR=bypass_BR, generator=generator
            )
            optimizer.set_gradients(found.gradients)
            optimizer.step(0.5)

        return step

    # gated steps

    def arm(self, kind: str, rate: float) -> Arm:
        """The step of one kind at one kept share, by the fastest of our dense settings."""
        batch, length, layers = len(self.x), self.cfg.context, self.cfg.layers
        rows, sequences = max(1, round(rate * length)), max(1, round(rate * batch))
        if kind in ("blocks", "layers", "layers_frozen"):
            return self._subset_arm(kind, rate)
        if kind == "sequence_before":
            return self._plan_arm(PLAIN, batch=sequences)
        if kind == "sequence_after":
            return self._plan_arm(StepPlan(sequences=sequences), _top_sequences(sequences))
        if kind in ("token_rows", "token_rows_exact"):
            return self._plan_arm(StepPlan(rows=rows, rows_exact=kind == "token_rows_exact"), _top_rows(rows))
        if kind in ("bypass", "bypass_keys"):
            draws = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :rows]
            through = draws.sort(1).values.to(self.device)
            return self._plan_arm(StepPlan(bypass=rows, bypass_keys=kind == "bypass_keys"), bypass_BR=through)
        if kind == "vcas":
            shares = tuple(rate ** ((layers - layer) / layers) for layer in range(layers))
            return self._plan_arm(StepPlan(sample=shares, dw_rows=rate))
        return self._plan_arm(StepPlan(dw_rows=rate))

    def _plan_arm(
        self, plan: StepPlan, choose_after: Choose | None = None, batch: int = 0, bypass_BR: Tensor | None = None
    ) -> Arm:
        step = self._stepped(self.attention, self.precision, self.mode, plan, choose_after, batch, bypass_BR)
        total = plan_flops(self.cfg, batch or len(self.x), plan).total
        return Arm(step, lambda: total)

    def _subset_arm(self, kind: str, rate: float) -> Arm:
        model = self.models[self.attention]
        cfg = SubsetConfig(
            kind="blocks" if kind == "blocks" else "layers",
            active_fraction=rate,
            block_rows=min(self.options.block_rows, max(1, round(self.cfg.width * rate))),
            train_embeddings=kind != "layers_frozen",
        )
        optimizer = Optimizer(model, choose(model, cfg, 0, 0), self.optim)
        step = self._stepped(self.attention, self.precision, self.mode, PLAIN, optimizer=optimizer)
        return Arm(
            step,
            lambda: plan_flops(self.cfg, len(self.x), PLAIN, optimizer.active).total,
            lambda turn: optimizer.activate(choose(model, cfg, turn, 0)),
            cfg.change_every_steps,
        )

    # measuring

    def measure(self) -> None:
        variants = self.dense_variants()
        dropped: set[str] = set()
        for turn in range(min(self.options.rounds, 7) + 2):
            _say(f"dense steps: round {turn - 1} of {min(self.options.rounds, 7)}" if turn > 1 else "dense steps: warm-up")
            for name in _order(list(variants), turn):
                if name in dropped:
                    continue
                milliseconds = self._time(variants[name])
                if turn == 0:
                    _say(f"  {name}: first step {milliseconds / 1000:.1f} s")
                elif turn > 1:
                    self.dense_ms.setdefault(name, []).append(milliseconds)
        medians = {name: statistics.median(ms) for name, ms in self.dense_ms.items()}
        self.reference = min(medians, key=lambda n: medians[n])
        ours = min((n for n in medians if n.startswith("stepper/")), key=lambda n: medians[n])
        _, self.attention, self.precision, mode = ours.split("/")
        self.mode = mode == "compiled"
        arms = {f"{kind} {rate:g}": self.arm(kind, rate) for kind in self.kinds for rate in self.rates}
        base = variants[self.reference]
        for turn in range(self.options.rounds + 2):
            for number, name in enumerate(_order(list(arms), turn)):
                arm = arms[name]
                if turn > 1:
                    _say(f"round {turn - 1} of {self.options.rounds}: {number + 1} of {len(arms)}, {name}")
                if arm.turn is not None:
                    moved = self._time(functools.partial(arm.turn, turn))
                    if turn > 1:
                        self.turn_ms.setdefault(name, []).append(moved / arm.every)
                    arm.step()  # the first step with fresh state allocates it: once in `every` steps, not in each
                milliseconds = self._time(arm.step)
                beside = self._time(base) if turn > 1 else 0.0
                if turn == 0:
                    _say(f"  {name}: first step {milliseconds / 1000:.1f} s")
                if turn > 1:
                    self.arm_ms.setdefault(name, []).append(milliseconds / beside)
                    self.base_ms.append(beside)
                    self.flops.setdefault(name, []).append(arm.flops())

    def _time(self, step: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1000 * (time.perf_counter() - start)

    # report

    def document(self) -> dict[str, Any]:
        """What was measured, as JSON types."""
        dense_flops = plan_flops(self.cfg, len(self.x)).total
        steps: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in self.kinds}
        base = statistics.median(self.base_ms) if self.base_ms else float("nan")
        for name, ratios in self.arm_ms.items():
            kind, rate = name.split(" ")
            moved = statistics.median(self.turn_ms[name]) / base if name in self.turn_ms else 0.0
            typical = statistics.fmean if kind == "layers_frozen" else statistics.median  # its cost follows the turn
            time_ratio = typical(ratios) + moved
            flop_ratio = statistics.fmean(self.flops[name]) / dense_flops
            steps[kind][rate] = {
                "time_ratio": time_ratio,
                "flop_ratio": flop_ratio,
                "conversion": (1 - time_ratio) / (1 - flop_ratio) if flop_ratio < 1 else float("nan"),
                "spread": _spread(ratios),
            }
        return {
            "step": steps,
            "dense": {name: statistics.median(ms) for name, ms in self.dense_ms.items()},
            "dense_spread": {name: _spread(ms) for name, ms in self.dense_ms.items()},
            "reference": self.reference,
            "reference_ms": base,
            "dense_gflop": dense_flops / 1e9,
            "gflop_per_s": dense_flops / 1e6 / base,
            "gated_steps_run": f"{self.attention}/{self.precision}/{'compiled' if self.mode else 'eager'}",
            "model": asdict(self.cfg),
            "batch": len(self.x),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "rounds": min((len(r) for r in self.arm_ms.values()), default=0),
            "interrupted": self.interrupted,
        }


def _top_sequences(count: int) -> Choose:
    return lambda view: Chosen(sequences_S=view.loss_BT.mean(1).topk(count).indices.sort().values)


def _top_rows(count: int) -> Choose:
    def choose_rows(view: View) -> Chosen:
        return Chosen(rows_SR=view.loss_BT.topk(count, dim=1).indices.sort(dim=1).values)

    return choose_rows


def _bf16_pays() -> bool:
    """Whether the processor multiplies bfloat16 in hardware; elsewhere it is emulated, several times slower than
    float32."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text() or "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _order(names: list[str], turn: int) -> list[str]:
    return names if turn % 2 == 0 else names[::-1]


def _spread(values: list[float]) -> float:
    """Interquartile range over the median; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_table(document: dict[str, Any]) -> None:
    """The document for people."""
    model = document["model"]
    print(
        f"model {model['name']}: width {model['width']}, {model['layers']} layers, context {model['context']}, "
        f"vocabulary {model['vocab_size']}; batch {document['batch']}, {document['threads']} threads, {document['device']}"
    )
    print(f"  {'dense step':<34}{'ms':>9}{'spread':>9}")
    for name, milliseconds in sorted(document["dense"].items(), key=lambda pair: pair[1]):
        mark = "  <- reference" if name == document["reference"] else ""
        print(f"  {name:<34}{milliseconds:>9.1f}{document['dense_spread'][name]:>8.0%}{mark}")
    print(f"  {'gated step':<20}{'rate':>6}{'time':>8}{'FLOPs':>8}{'conversion':>12}{'spread':>8}")
    for kind, rates in document["step"].items():
        for rate, row in rates.items():
            print(
                f"  {kind:<20}{rate:>6}{row['time_ratio']:>8.3f}{row['flop_ratio']:>8.3f}{row['conversion']:>12.2f}"
                f"{row['spread']:>7.0%}"
            )
