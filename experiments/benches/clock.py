"""`spikegate bench clock`: measures what a shipped table of component times is made of.

It times every kind of step and every kind of scoring at several sizes and batches, in turn (`hardware.meters.ratios`), in
CPU seconds of one thread: time that other processes take is not counted. `bench clock_fit` finds the price of each counted
unit of work (`sparse_update/clock/work.py`) and a factor for each kind of sparse step, and prints predicted over measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from experiments.benches.gate import load_model
from experiments.runs.output import add_json_argument, entry, finish
from hardware.meters.ratios import InTurn, Until
from sparse_update.clock.cost import Step
from sparse_update.clock.timing import Setting, step_probe
from sparse_update.data.dedup import METHODS, flops_per_token, is_new, keys_of
from sparse_update.gates.config import GateConfig
from sparse_update.gates.deciding.auto import OBSERVE, AutoGate
from sparse_update.gates.gate import GateContext
from sparse_update.loop.checkpoint import save_checkpoint
from sparse_update.signals import SignalContext, make_signal
from sparse_update.step.plan import PLAIN, StepPlan
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.lowrank import adapt
from sparse_update.weights.masking import MaskConfig
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import Active, Subset, SubsetConfig

CPU = torch.device("cpu")
ROUNDS = (7, 60)
"""Fewest and most rounds of one setting."""
BESIDE = 4
"""Steps that share one measurement of the plain one."""
SETTINGS = (
    ("tiny", 256, 8, "all"),
    ("small", 256, 2, "all"),
    ("tiny", 256, 32, "some"),
    ("mid", 256, 4, "some"),
    ("tiny", 2048, 4, "few"),
)
"""Model, vocabulary, batch, which steps."""
SUBSETS = {
    "strips": SubsetConfig(kind="blocks", active_fraction=0.25),
    "columns": SubsetConfig(kind="block_columns", active_fraction=0.25),
    "layers": SubsetConfig(kind="layers", active_fraction=0.34),
    "signs": SubsetConfig(kind="blocks", active_fraction=0.25, inactive="sign"),
    "lora": SubsetConfig(kind="lora"),
}
FEW = ("plain", "engine", "rows", "sequences")
CHANGES = "changes"
"""The steps of `changes` alone."""
SOME = (*FEW, "rows_exact", "bypass", "strips")


@dataclass(frozen=True)
class Timed:
    """One step to be timed: its name here, the step, its optimizer, and how it is taken."""

    name: str
    step: Step
    optim: OptimConfig
    variant: str


def steps(cfg: ModelConfig, batch: int, which: str, attention: str, compiled: bool) -> Iterator[Timed]:
    """Every step of one setting; the plain one by autograd comes first."""
    length, half = cfg.context, cfg.context // 2
    tail = "_compiled" if compiled else ""
    plans = {
        "engine": StepPlan(want=frozenset()),
        "rows": StepPlan(rows=half),
        "rows_exact": StepPlan(rows=round(0.6 * length), rows_exact=True),
        "sequences": StepPlan(sequences=max(1, batch // 2)),
        "bypass": StepPlan(bypass=half),
        "bypass_quarter": StepPlan(bypass=length // 4),
        "bypass_keys": StepPlan(bypass=half, bypass_keys=True),
        "dw_rows": StepPlan(dw_rows=0.25),
        "sample": StepPlan(sample=tuple((4 + 4 * (i + 1) // cfg.layers) / 8 for i in range(cfg.layers)), dw_rows=0.5),
        "skip_rate": StepPlan(skip_rate=0.5),
        "want": StepPlan(want=frozenset({"entropy"})),
        "want_update": StepPlan(want=frozenset({"update"})),
    }
    muon = OptimConfig(name="muon")
    plain = Step(PLAIN, None, batch, length)
    yield Timed("plain", plain, muon, f"autograd{tail}")
    if which in ("all", CHANGES):
        yield from changes(batch, length, cfg.vocab_size, f"autograd{tail}")
    if which == CHANGES:
        return
    for name, plan in plans.items():
        if which == "all" or name in (SOME if which == "some" else FEW):
            yield Timed(name, Step(plan, None, batch, length), muon, f"engine{tail}")
    for name, subset in SUBSETS.items():
        if which == "all" or (which == "some" and name == "strips"):
            yield Timed(name, Step(PLAIN, active_of(cfg, subset), batch, length), muon, f"engine{tail}")
    if which == "all":
        for name in ("adamw", "sign"):
            yield Timed(f"plain_{name}", plain, OptimConfig(name=name), f"autograd{tail}")


def changes(batch: int, length: int, vocabulary: int, variant: str) -> Iterator[Timed]:
    """Steps on bags of tokens, for a part of the vocabulary, and steps whose updates are masked; by autograd."""
    muon = OptimConfig(name="muon")
    for bag in (2, 4):
        yield Timed(f"bag_{bag}", Step(StepPlan(bag=bag), None, bag * batch, length // bag), muon, variant)
    for part in (8, 2):
        plan = StepPlan(vocabulary=vocabulary // part)
        yield Timed(f"vocabulary_1/{part}", Step(plan, None, batch, length), muon, variant)
    for kind in ("random", "agreement", "surprise"):
        masked = OptimConfig(name="muon", mask=MaskConfig(kind=kind))
        yield Timed(f"mask_{kind}", Step(PLAIN, None, batch, length), masked, variant)


def active_of(cfg: ModelConfig, subset: SubsetConfig) -> Active:
    """The active weights of a subset's first turn."""
    with torch.random.fork_rng(devices=[]):
        model = Transformer(cfg)
        if subset.kind == "lora":
            adapt(model, subset, 0)
    return Subset(model, subset, 0).active


def cpu_seconds(use: Callable[[], object]) -> float:
    """CPU seconds of the whole process, all its threads."""
    start = time.process_time()
    use()
    return time.process_time() - start


def measure_setting(
    cfg: ModelConfig, batch: int, which: str, attention: str, compiled: bool, limit_s: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """CPU milliseconds of each step and round, and its ratio to the plain step: typical, low, high, verdict."""
    probes: dict[str, Callable[[], float]] = {}
    for timed in steps(cfg, batch, which, attention, compiled):
        setting = Setting(cfg, timed.optim, CPU, attention, "fp32", compiled, timed.variant)
        probes[timed.name] = functools.partial(cpu_seconds, step_probe(setting, timed.step, timed.name))
    until = Until(least_rounds=ROUNDS[0], most_rounds=ROUNDS[1], most_s=limit_s, beside=BESIDE)
    measured = InTurn(probes, "plain", until, threads=1).run(say)
    ratios = {name: {**ratio.to_dict(), "typical": ratio.typical} for name, ratio in measured.ratios.items()}
    ms = {name: [1000 * seconds for seconds in values] for name, values in measured.seconds.items()}
    return {"ms": ms, "ratios": ratios, "machine": asdict(measured.machine), "rounds": measured.rounds}


SCORING: dict[str, tuple[str, dict[str, Any]]] = {
    "signal[ngram]": ("ngram", {}),
    "signal[novelty]": ("novelty", {}),
    "signal[duplicates]": ("duplicates", {}),
    "signal[fresh]": ("fresh", {}),
    "signal[containment]": ("containment", {}),
    "signal[tiny]": ("tiny", {}),
    "signal[early_exit]": ("early_exit", {}),
    "signal[excess]": ("excess", {}),
    "signal[excess:before]": ("excess", {"before": True}),
    "signal[lagging]": ("lagging", {}),
    "signal[lagging:before]": ("lagging", {"before": True}),
    "signal[learning_progress:copies]": ("learning_progress", {"between": "copies"}),
}
"""Key of a component -> signal and options that make it."""
SCORED_WINDOWS = 32


def scoring(cfg: ModelConfig, folder: Path) -> dict[str, tuple[Callable[[], object], int]]:
    """Every component beside the steps at one model size: key -> (call, its counted operations)."""
    torch.manual_seed(0)
    model = Transformer(cfg)
    save_checkpoint(folder / "checkpoint", dict(model.state_dict()), {}, {"model": asdict(cfg), "step": 0})
    known = torch.randint(0, cfg.vocab_size, (1 << 16,))
    context = SignalContext(
        cfg.vocab_size, cfg.context, model=model, reference=str(folder / "checkpoint"), known_tokens=known
    )
    found: dict[str, tuple[Callable[[], object], int]] = {}
    for key, (name, options) in SCORING.items():
        signal = make_signal(name, context, options)
        if signal.cost_key != key:
            raise ValueError(f"signal {name} with {options} is priced under {signal.cost_key}, not {key}")
        found[key] = signal.probe(SCORED_WINDOWS), signal.flops(SCORED_WINDOWS)
    generator = np.random.default_rng(0)
    for method in METHODS:
        tokens = generator.integers(0, cfg.vocab_size, (SCORED_WINDOWS, cfg.context + 1))

        def use(method: str = method, tokens: np.ndarray = tokens) -> None:
            seen: set[int] = set()
            for row in keys_of(tokens, method).tolist():
                is_new(row, seen)

        found[f"dedup[{method}]"] = use, tokens.size * flops_per_token(method)
    stream = SimpleNamespace()
    gate = AutoGate(GateConfig(name="auto", unit="auto"), stream, GateContext(cfg.vocab_size, cfg.context, 0, model=model))
    observe = gate.components()[OBSERVE]
    found[OBSERVE] = observe.make(), observe.flops
    return found


def measure_scoring(cfg: ModelConfig) -> dict[str, list[float]]:
    """CPU picoseconds of one counted operation of each component, round by round."""
    rounds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        calls = scoring(cfg, Path(folder))
        for turn in range(7):
            for key, (call, flops) in calls.items():
                seconds = cpu_seconds(call)
                if turn >= 2:
                    rounds.setdefault(key, []).append(1e12 * seconds / flops)
    return rounds


def measure_all(arguments: argparse.Namespace) -> int:
    document: dict[str, Any] = {"settings": [], "torch": torch.__version__, "threads": 1, "processor": platform.machine()}
    if arguments.out.exists():
        document = json.loads(arguments.out.read_text())
    for mode in arguments.modes.split(","):
        for model, vocab, batch, which in SETTINGS:
            which = arguments.only or which
            key = {"model": model, "vocab": vocab, "batch": batch, "mode": mode, "attention": arguments.attention}
            if any(all(s[k] == v for k, v in key.items()) for s in document["settings"]):
                continue
            cfg = load_model(model, vocab)
            found = measure_setting(
                cfg, batch, which, arguments.attention, mode == "compiled", arguments.limit_s,
                functools.partial(_say, f"{model} {vocab} {batch} {mode}"),
            )  # fmt: skip
            document["settings"].append({**key, "which": which, **found})
            arguments.out.write_text(json.dumps(document) + "\n")
            plain = found["ms"]["plain"]
            median = statistics.median(plain)
            print(f"{model} b{batch} v{vocab} {mode}: plain {min(plain):.1f} ms at best, {median:.1f} median")
            for name, ratio in found["ratios"].items():
                ends = "" if ratio["low"] is None else f"{ratio['low']:.3f} .. {ratio['high']:.3f}"
                typical = "noisy" if ratio["median"] is None else f"{ratio['median']:.3f}"
                print(f"  {name:<16} {typical:>7} {ends}", flush=True)
    finish({"settings": len(document["settings"]), "torch": document["torch"]}, "bench-clock", file=arguments.out)
    return 0


def _say(where: str, text: str) -> None:
    print(f"{where}: {text}", file=sys.stderr, flush=True)


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m experiments.bench clock --help`."""
    parser = argparse.ArgumentParser(prog="spikegate bench clock", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file; settings that it holds are not measured again")
    parser.add_argument("--modes", default="eager", help="eager, compiled, or both divided by a comma")
    parser.add_argument("--attention", default="explicit", help="explicit (the default) or sdpa")
    parser.add_argument("--limit-s", type=float, default=600.0, help="wall seconds after which a setting is done (600)")
    parser.add_argument("--only", default="", choices=[CHANGES], help="of each setting only these steps and the plain one")
    parser.add_argument("--scoring", action="store_true", help="scoring and filters instead of steps")
    add_json_argument(parser)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not given.scoring:
        return measure_all(given)
    found = {name: measure_scoring(load_model(name, 256)) for name in ("tiny", "mid")}
    given.out.write_text(json.dumps(found) + "\n")
    for size, rounds in found.items():
        for key, values in rounds.items():
            print(f"{size} {key}: {min(values):.1f} at best, {statistics.median(values):.1f} median, ps an operation")
    finish({"sizes": list(found), "torch": torch.__version__}, "bench-clock", file=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
