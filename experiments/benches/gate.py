"""`python -m experiments.bench gate`: what each kind of sparse step costs, beside its counted FLOPs and its products alone.

All steps run in one process in turn (`hardware.meters.ratios`), each with its optimizer's step. Times are ratios to the
fastest dense step found here: a plain GPT step, autograd on our model, and our own written-out step, each with and without
torch.compile. conversion = (1 - time ratio) / (1 - FLOP ratio). Scoring before the forward is not part of a step: its cost
stands in the table of component times.

Beside each conversion stands its bound, from measured rates of products. The matrix products of each kind of step (fused
attention among them) are called again with nothing around them, as arms of the same run; p is their time over that of the
reference step, p0 that of the reference's own products. A step that lost exactly the time of the products that it leaves
out would take 1 - p0 + p of the reference: that is the bound of its time ratio, and (p0 - p) / (1 - FLOP ratio) that of its
conversion. It is below 1 where the products that are left out run faster than an average FLOP of a step, and it lies with
the size of the products, not with what stands around them. It is no bound of nature: a kind that leaves out work around
the products too (norms, softmax, moments) can pass it. Target: token rows, blocks and layers reach 0.95 of their bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments.benches import ratios
from experiments.benches.gating.counted import Request, instructions_of_a_step
from experiments.benches.gating.products import Pool, Recording, record, replay
from experiments.benches.gating.steps import EXTRA, KINDS, Arm, How, Steps, bf16_pays, names
from experiments.runs.output import add_json_argument, entry, finish
from hardware.meters.ratios import InTurn, Measured, Probe, Ratio, Until
from sparse_update.step.flops import plan_flops
from sparse_update.step.kernels import can_compile
from sparse_update.transformer import ModelConfig

MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"
TARGET = 0.95
"""Share of the bound of its conversion that a kind in `JUDGED` should reach."""
JUDGED = ("token_rows", "blocks", "layers")
DENSE_ROUNDS = 7
"""Rounds among the dense steps at most: they only choose the reference."""
PRODUCTS = "products of "
DEFAULTS = {"most_s": 1200.0, "beside": 3}
HEADLINE = ("targets", "conversion", "reference", "machine", "interrupted")


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spikegate bench gate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="small", help="a name from configs/model (default: small)")
    parser.add_argument("--batch", type=int, default=8, help="windows of a dense step (default: 8)")
    parser.add_argument(
        "--vocab", type=int, default=256, help="vocabulary where the model's file gives none (default: 256, bytes)"
    )
    ratios.add_arguments(parser, **DEFAULTS)
    ratios.add_clock_argument(parser)
    parser.add_argument("--rates", default="0.5,0.25", help="kept shares (default: 0.5,0.25)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "auto"), default="auto", help="auto: the faster dense step's"
    )
    parser.add_argument("--compile", choices=("on", "off", "auto"), default="auto", help="auto: where a compiler is found")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"any of {', '.join(KINDS + EXTRA)}; or all")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--block-rows", type=int, default=128, help="granularity of weight blocks (default: 128)")
    parser.add_argument(
        "--instructions", action="store_true",
        help="also count the instructions of eager steps, by perf or valgrind where one of them can (slow)",
    )  # fmt: skip
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
    print_table(document, bench)
    finish(document, "bench-gate", headline=HEADLINE)
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
    """The measurement; `document()` is valid at any time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rates = [float(text) for text in options.rates.split(",") if text]
        if not self.rates or any(not 0 < r <= 1 for r in self.rates):
            raise ValueError(f"--rates {options.rates}: shares in (0, 1], divided by commas")
        self.kinds = list(KINDS + EXTRA) if options.kinds == "all" else options.kinds.split(",")
        if unknown := set(self.kinds) - set(KINDS + EXTRA):
            raise ValueError(f"--kinds {', '.join(sorted(unknown))}: known are {', '.join(KINDS + EXTRA)}")
        if options.batch < 1:
            raise ValueError(f"--batch {options.batch}: must be at least 1")
        self.until = ratios.until(options)
        self.cfg = load_model(options.model, options.vocab)
        if options.threads:
            torch.set_num_threads(options.threads)
        name = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(name)
        ratios.check_clock(options.clock, self.device)
        self.compiled = options.compile == "on" or (options.compile == "auto" and can_compile(self.device))
        self.interrupted = False
        self.steps = Steps(self.cfg, options.batch, self.device, options.block_rows)
        self.flops: dict[str, list[int]] = {}
        self.instructions: dict[str, dict[str, Any] | None] = {}
        """Of a step by its name; None where nothing here counts them."""
        self.dense: InTurn | None = None
        self.gated: InTurn | None = None
        self.how = How()

    # measuring

    def measure(self) -> None:
        """The dense steps, of which the fastest is the reference; then every kind of step and its products beside it."""
        variants = {name: self.steps.dense(name) for name in names(self._precisions(), self.compiled)}
        probes = {name: self._probe(step) for name, step in variants.items()}
        few = Until(
            **{**asdict(self.until), "most_rounds": min(self.until.most_rounds, DENSE_ROUNDS), "beside": len(probes)}
        )
        self.dense = InTurn(probes, next(iter(probes)), few, torch.get_num_threads())
        dense = self.dense.run(lambda text: ratios.say(f"dense steps: {text}"))
        reference, ours = self._fastest(dense), self._fastest(dense, "stepper/")
        _, attention, precision, mode = ours.split("/")
        self.how = How(attention, precision, mode == "compiled")
        arms = {f"{kind} {rate:g}": self.steps.arm(kind, rate, self.how) for kind in self.kinds for rate in self.rates}
        found = {name: self._arm_probe(name, arm) for name, arm in arms.items()} | self._products(reference)
        self.gated = InTurn({reference: probes[reference], **found}, reference, self.until, torch.get_num_threads())
        self.gated.run(lambda text: ratios.say(f"gated steps: {text}"))
        if self.options.instructions:
            for name in ("dense 1", *arms):
                ratios.say(f"instructions: {name}")
                self.instructions[name] = self._counted(*name.split(" "))

    def _probe(self, step: Callable[[], object]) -> Probe:
        return ratios.probe(step, self.device, self.options.clock)

    def _precisions(self) -> tuple[str, ...]:
        if self.options.precision != "auto":
            return (self.options.precision,)
        return ("fp32", "bf16") if self.device.type != "cpu" or bf16_pays() else ("fp32",)

    @staticmethod
    def _fastest(dense: Measured, start: str = "") -> str:
        medians = {name: dense.median_s(name) for name in dense.seconds if name.startswith(start)}
        return min(medians, key=lambda name: medians[name])

    def _arm_probe(self, name: str, arm: Arm) -> Probe:
        """Seconds of one step and its share of the choice of weights; the mean over a cycle where turns differ."""
        step = self._probe(arm.step)
        turns = [0]

        def once() -> float:
            moved = 0.0
            if arm.turn is not None:
                turn, turns[0] = arm.turn, turns[0] + 1
                moved = self._probe(lambda: turn(turns[0]))() / arm.every
                arm.step()  # the first step with fresh state allocates it: once in `every` steps, not in each
            seconds = step()
            self.flops.setdefault(name, []).append(arm.flops())
            return seconds + moved

        return once if arm.cycle == 1 else lambda: statistics.fmean(once() for _ in range(arm.cycle))

    def _products(self, reference: str) -> dict[str, Probe]:
        """The products of the reference and of every kind alone, as further arms."""
        pool = Pool()
        eager = How(self.how.attention, self.how.precision)
        found = {"dense": [record(self.steps.dense(f"{reference.rpartition('/')[0]}/eager"), pool)]}
        for kind in self.kinds:
            for rate in self.rates:
                found[f"{kind} {rate:g}"] = _recordings(self.steps.arm(kind, rate, eager), pool)
        return {PRODUCTS + name: self._replayed(recordings) for name, recordings in found.items()}

    def _counted(self, kind: str, rate: str) -> dict[str, Any] | None:
        options, how = self.options, self.how
        found = instructions_of_a_step(
            Request(asdict(self.cfg), options.batch, options.block_rows, how.attention, kind, float(rate), 1)
        )
        return None if found is None else asdict(found)

    def _replayed(self, recordings: list[Recording]) -> Probe:
        whole = self._probe(replay(*recordings))
        return lambda: whole() / len(recordings)

    # report

    def document(self) -> dict[str, Any]:
        """What was measured, as JSON types."""
        dense = None if self.dense is None else self.dense.measured()
        gated = None if self.gated is None else self.gated.measured()
        steps: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in self.kinds}
        for kind in self.kinds:
            for rate in self.rates:
                if gated is not None and (row := self._row(gated, f"{kind} {rate:g}")):
                    steps[kind][f"{rate:g}"] = row
        conversion = {
            kind: {rate: {key: row[key] for key in ("conversion", "bound", "of_bound")} for rate, row in rates.items()}
            for kind, rates in steps.items()
        }
        dense_flops = plan_flops(self.cfg, self.options.batch).total
        typical = gated.median_s(gated.base) if gated is not None and gated.seconds[gated.base] else None
        return {
            "targets": _targets(steps),
            "conversion": conversion,
            "reference": None if gated is None else gated.base,
            "reference_ms": None if typical is None else 1000 * typical,
            "machine": None if gated is None else asdict(gated.machine),
            "dense_gflop": dense_flops / 1e9,
            "gflop_per_s": None if typical is None else dense_flops / 1e9 / typical,
            "gated_steps_run": self.how.name,
            "model": asdict(self.cfg),
            "batch": self.options.batch,
            "clock": self.options.clock,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "interrupted": self.interrupted,
            "instructions": self.instructions,
            "step": steps,
            "dense": None if dense is None else dense.to_dict(),
            "gated": None if gated is None else gated.to_dict(),
        }

    def _row(self, gated: Measured, name: str) -> dict[str, Any] | None:
        """One kind at one rate; None where it was not reached."""
        ratio, own = gated.ratios.get(name), gated.ratios.get(PRODUCTS + name)
        whole = gated.ratios.get(f"{PRODUCTS}dense")
        if ratio is None or name not in self.flops:
            return None
        flop_ratio = statistics.fmean(self.flops[name]) / plan_flops(self.cfg, self.options.batch).total
        conversion = ratios.converted(ratio, flop_ratio)
        bound = bound_of(whole, own, flop_ratio)
        reached = None
        if conversion["median"] is not None and bound["conversion"]:
            reached = conversion["median"] / bound["conversion"]
        return {
            "time": ratio.to_dict(), "flop_ratio": flop_ratio, "conversion": conversion["median"],
            "conversion_best": conversion["best"], "conversion_interval": [conversion["low"], conversion["high"]],
            "bound": bound["conversion"], "bound_interval": [bound["low"], bound["high"]],
            "bound_time_ratio": bound["time"], "of_bound": reached,
        }  # fmt: skip


def _recordings(arm: Arm, pool: Pool) -> list[Recording]:
    """The products of an arm's steps, over a cycle of its turns."""
    found = []
    for turn in range(arm.cycle):
        if arm.turn is not None:
            arm.turn(turn)
        found.append(record(arm.step, pool))
    return found


def bound_of(whole: Ratio | None, own: Ratio | None, flop_ratio: float) -> dict[str, float | None]:
    """The bound that the products' rates give, see the module: of the time ratio, of the conversion, and ends of the
    latter's interval (those of both times added up, the cautious way). Null where a time is missing or too noisy, or no
    FLOPs are saved.

    Args:
        whole, own: time of the products of the reference and of the kind, over the reference's step.
    """
    nothing: dict[str, float | None] = dict.fromkeys(("time", "conversion", "low", "high"))
    if whole is None or own is None or whole.median is None or own.median is None or flop_ratio >= 1:
        return nothing
    left = 1 - flop_ratio
    low, high = (whole.low or 0.0) - (own.high or 0.0), (whole.high or 0.0) - (own.low or 0.0)  # settled: both are there
    time, conversion = 1 - whole.median + own.median, (whole.median - own.median) / left
    return {"time": time, "conversion": conversion, "low": low / left, "high": high / left}


def _targets(steps: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What each judged kind reached of its bound; "too noisy" where it cannot be said."""
    found = []
    for kind in JUDGED:
        for rate, row in steps.get(kind, {}).items():
            reached = row["of_bound"]
            verdict = "too noisy" if reached is None else "met" if reached >= TARGET else "missed"
            found.append({"of": f"{kind} {rate}", "of_bound": reached, "target": TARGET, "verdict": verdict})
    return found


def print_table(document: dict[str, Any], bench: Bench) -> None:
    """The document for people."""
    model = document["model"]
    print(
        f"model {model['name']}: width {model['width']}, {model['layers']} layers, context {model['context']}, "
        f"vocabulary {model['vocab_size']}; batch {document['batch']}, {document['device']}"
    )
    dense = document["dense"]
    if dense is not None:
        print(f"  {'dense step':<34}{'median ms':>11}{'best ms':>9}")
        for name, seconds in sorted(dense["median_s"].items(), key=lambda pair: pair[1]):
            mark = "  <- reference" if name == document["reference"] else ""
            print(f"  {name:<34}{1000 * seconds:>11.1f}{1000 * dense['best_s'][name]:>9.1f}{mark}")
    print(
        f"  {'gated step':<20}{'rate':>6}{ratios.HEADER}{'FLOPs':>8}{'conversion':>12}{'best':>7}{'bound':>7}{'of it':>7}"
    )
    gated = None if bench.gated is None else bench.gated.measured()
    for kind, rates in document["step"].items():
        for rate, row in rates.items():
            assert gated is not None
            print(
                f"  {kind:<20}{rate:>6}{ratios.columns(gated.ratios[f'{kind} {rate}'])}{row['flop_ratio']:>8.3f}"
                f"{ratios.shown(row['conversion']):>12}{ratios.shown(row['conversion_best']):>7}"
                f"{ratios.shown(row['bound']):>7}{ratios.shown(row['of_bound']):>7}"
            )
    if gated is not None:
        print(f"  {ratios.legend(gated, bench.options.clock)}")
        print("  bound: the conversion of a step that saves exactly its products' measured time")
    for name, counted in document["instructions"].items():
        said = "not counted here" if counted is None else f"{counted['count']:,} by {counted['by']}"
        print(f"  instructions of an eager step, {name}: {said}")
    for target in document["targets"]:
        reached = "" if target["of_bound"] is None else f"{target['of_bound']:.2f}, "
        print(f"  {target['of']}: {reached}target {target['target']} of the bound: {target['verdict']}")
