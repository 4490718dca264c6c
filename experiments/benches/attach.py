"""`python -m experiments.bench attach`: what a gate on somebody's own model costs and saves, beside the plain model.

All steps run in one process in turn (`hardware.meters.ratios`), each on a copy of the model with its optimizer's step.
Ratios are to the plain step, which is measured beside every second arm. conversion = (1 - time ratio) / (1 - FLOP ratio),
where torch's counter counts the products of both. Memory is that of a process for each model, beside what the gate promises
(`experiments.benches.attach_memory`).
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from experiments.benches import ratios
from experiments.benches.attach_arms import ARMS, BLOCKS, MODELS, Arm, Shape, build, count_flops, tokens
from experiments.benches.attach_memory import Peak, peak_apart
from experiments.runs.folder import git_state, versions
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from experiments.runs.progress import Bar
from hardware.meters.ratios import TOO_NOISY, InTurn, Measured, Ratio, processor
from sparse_update.step.kernels import can_compile

SLOWEST_KEPT = 1.03
"""Time of an attached step that keeps everything, at most, over the plain one."""
CONVERSION = {"transformer": 0.85, "llama": 0.75}
"""Share of the counted saving that token rows should turn into time, at least."""
MEMORY_WITHIN = 0.05
"""How far measured memory may be from what was promised."""
PLAIN = "plain"
WARM_UP = 5
"""Rounds that are not counted: compilation, first state of the optimizer, backwards that a gate still checks."""
DEFAULTS = {"most_s": 600.0, "warm_up": WARM_UP}


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spikegate bench attach", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)} (default: both)")
    ratios.add_arguments(parser, **DEFAULTS)
    ratios.add_clock_argument(parser)
    parser.add_argument("--compile", choices=("on", "off", "auto"), default="auto", help="auto: where a compiler is found")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--memory", choices=("on", "off"), default="on", help="whether memory is measured, too")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="also write the whole document there")
    for field in fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help=f"default: {field.default}")
    add_json_argument(parser)
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON line. Exit code 0, 2 for bad arguments, 130 when interrupted (what is there is
    printed)."""
    options = arguments_parser().parse_args(argv)
    try:
        bench = Bench(options)
    except (ValueError, ModuleNotFoundError) as error:
        print(f"bench attach: {error}", file=sys.stderr)
        return 2
    try:
        bench.measure()
    except KeyboardInterrupt:
        bench.interrupted = True
        print("interrupted: what was measured so far follows", file=sys.stderr)
    document = bench.document()
    print_table(document, {name: run.measured() for name, run in bench.runs.items()})
    file = None if options.out is None else write_json(options.out, document)
    finish(document, "bench-attach", file=file, headline=HEADLINE)
    return 130 if bench.interrupted else 0


HEADLINE = ("targets", "shape", "clock", "threads", "device", "interrupted")


@dataclass(frozen=True)
class Cell:
    """One model, eager or compiled."""

    model: str
    compiled: bool

    @property
    def name(self) -> str:
        return f"{self.model}/{'compiled' if self.compiled else 'eager'}"


class Bench:
    """The measurement; `document()` is valid after any number of rounds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shape = Shape(**{field.name: getattr(options, field.name) for field in fields(Shape)})
        self.models = options.models.split(",")
        if unknown := [name for name in self.models if name not in MODELS]:
            raise ValueError(f"--models {unknown[0]}: known are {', '.join(MODELS)}")
        self.until = ratios.until(options)
        device = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(device)
        ratios.check_clock(options.clock, self.device)
        if options.threads:
            torch.set_num_threads(options.threads)
        compiled = options.compile == "on" or (options.compile == "auto" and can_compile(self.device))
        self.cells = [Cell(name, mode) for name in self.models for mode in ((False, True) if compiled else (False,))]
        self.runs: dict[str, InTurn] = {}
        self.flops: dict[tuple[str, str], int] = {}
        self.peaks: dict[tuple[str, str], Peak] = {}
        self.interrupted = False

    # measuring

    def measure(self) -> None:
        """FLOPs and times of every cell, then the memory of every model."""
        for cell in self.cells:
            self._measure_cell(cell)
        arms = {PLAIN: None, "blocks 0.25": BLOCKS}
        if self.options.memory == "on":
            with Bar("memory", len(self.models) * len(arms), "processes") as bar:
                for name in self.models:
                    for arm, config in arms.items():
                        found = peak_apart(name, self.shape, config, self.device, torch.get_num_threads())
                        self.peaks[name, arm] = found
                        bar.advance(note=f"{name}, {arm}")

    def _measure_cell(self, cell: Cell) -> None:
        model = build(cell.model, self.shape, self.device)
        x, y = tokens(self.shape, self.device)
        plain = Arm(copy.deepcopy(model), x, y, None, cell.compiled)
        arms = {name: Arm(copy.deepcopy(model), x, y, config, cell.compiled) for name, config in ARMS.items()}
        if not cell.compiled:  # the counter does not see into compiled code; the products are the same
            for name, arm in {PLAIN: plain, **arms}.items():
                self.flops[cell.model, name] = count_flops(arm)
        probes = {
            name: ratios.probe(one.step, self.device, self.options.clock) for name, one in {PLAIN: plain, **arms}.items()
        }
        self.runs[cell.name] = InTurn(probes, PLAIN, self.until, torch.get_num_threads())
        self.runs[cell.name].run(lambda text: ratios.say(f"{cell.name}: {text}"))

    # report

    def document(self) -> dict[str, Any]:
        """What was measured, as JSON types."""
        cells = {cell.name: self._cell(cell) for cell in self.cells if cell.name in self.runs}
        memory: dict[str, dict[str, Any]] = {name: {} for name in self.models}
        for (name, arm), found in self.peaks.items():
            memory[name][arm] = found.to_dict()
        return {
            "targets": self._targets(cells, memory),
            "cells": cells,
            "flops": {f"{model}/{arm}": count for (model, arm), count in self.flops.items()},
            "memory": memory if self.peaks else {},
            "shape": asdict(self.shape),
            "clock": self.options.clock,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor(),
            "versions": {**versions(), "transformers": _transformers()},
            "git": git_state(),
            "interrupted": self.interrupted,
        }

    def _cell(self, cell: Cell) -> dict[str, Any]:
        found = self.runs[cell.name].measured()
        arms = {name: self._arm(cell, name, ratio) for name, ratio in found.ratios.items()}
        return {"arms": arms, "measured": found.to_dict()}

    def _arm(self, cell: Cell, name: str, ratio: Ratio) -> dict[str, Any]:
        flop_ratio = self.flops[cell.model, name] / self.flops[cell.model, PLAIN]
        conversion = ratios.converted(ratio, flop_ratio)
        return {
            "time": ratio.to_dict(), "flop_ratio": flop_ratio, "conversion": conversion["median"],
            "conversion_best": conversion["best"], "conversion_interval": [conversion["low"], conversion["high"]],
        }  # fmt: skip

    def _targets(self, cells: dict[str, Any], memory: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Each with `met`, null where the time was too noisy to say."""
        found = []
        for cell, record in cells.items():
            for name, arm in record["arms"].items():
                if arm["flop_ratio"] >= 1:
                    value, wanted, what = arm["time"]["median"], f"<= {SLOWEST_KEPT}", "time over plain"
                    met = None if value is None else value <= SLOWEST_KEPT
                else:
                    least = CONVERSION[cell.split("/")[0]]
                    value, wanted, what = arm["conversion"], f">= {least}", "conversion"
                    met = None if value is None else value >= least
                found.append({"of": f"{cell}, {name}", "what": what, "value": value, "target": wanted, "met": met})
        for model, arms in memory.items():
            for name, record in arms.items():
                met = abs(record["ratio"] - 1) <= MEMORY_WITHIN
                wanted = f"within {MEMORY_WITHIN:.0%} of 1"
                what = "memory over promise"
                found.append(
                    {"of": f"{model}, {name}", "what": what, "value": record["ratio"], "target": wanted, "met": met}
                )
        return found


def _transformers() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def print_table(document: dict[str, Any], runs: Mapping[str, Measured]) -> None:
    """The document for people."""
    s = document["shape"]
    print(f"{s['layers']} blocks of width {s['width']}, hidden {s['hidden']}, {s['heads']} heads, vocabulary {s['vocab']}")
    print(
        f"{s['batch']} x {s['length']} tokens; {document['threads']} threads, {document['device']}; "
        f"{document['clock']} clock"
    )
    print(f"  {'step':<32}{ratios.HEADER}{'FLOPs':>8}{'conversion':>12}")
    for cell, record in document["cells"].items():
        found = runs[cell]
        if found.seconds[PLAIN]:
            print(f"  {cell + ' plain':<32}{1000 * found.median_s(PLAIN):>8.1f} ms")
        for name, ratio in found.ratios.items():
            arm = record["arms"][name]
            share = "" if arm["flop_ratio"] >= 1 else ratios.shown(arm["conversion"])
            print(f"  {cell + ' ' + name:<32}{ratios.columns(ratio)}{arm['flop_ratio']:>8.3f}{share:>12}")
        print(f"  {ratios.legend(found, document['clock'])}")
    for model, arms in document["memory"].items():
        for name, record in arms.items():
            print(
                f"  {model + ' ' + name:<32}{record['measured'] / 2**20:>9.1f} MiB at the peak, promised "
                f"{record['promised'] / 2**20:.1f}: {record['ratio']:.3f}"
            )
    for target in document["targets"]:
        verdict = TOO_NOISY if target["met"] is None else "met" if target["met"] else "MISSED"
        print(
            f"  {target['of']}: {target['what']} {ratios.shown(target['value'], 3)}, target {target['target']}: {verdict}"
        )
