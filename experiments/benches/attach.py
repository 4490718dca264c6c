"""`python -m experiments.bench attach`: what a gate on somebody's own model costs and saves, beside the plain model.

All steps run in one process in turn, each on a copy of the model with its optimizer's step. The plain step is measured
before and after the others of a round; a ratio is the median over rounds of an arm's time over their mean. conversion =
(1 - time ratio) / (1 - FLOP ratio), where torch's counter counts the products of both. Memory is that of a process for
each model, beside what the gate promises (`experiments.benches.attach_memory`).
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from experiments.benches.attach_arms import ARMS, BLOCKS, MODELS, Arm, Shape, build, count_flops, tokens
from experiments.benches.attach_memory import Peak, peak_apart
from experiments.runs.folder import git_state, versions
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from experiments.runs.progress import Bar
from sparse_update.step.kernels import can_compile

SLOWEST_KEPT = 1.03
"""Time of an attached step that keeps everything, at most, over the plain one."""
CONVERSION = {"transformer": 0.85, "llama": 0.75}
"""Share of the counted saving that token rows should turn into time, at least."""
MEMORY_WITHIN = 0.05
"""How far measured memory may be from what was promised."""
WARM_UP = 5
"""Rounds that are not counted: compilation, first state of the optimizer, backwards that a gate still checks."""


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spikegate bench attach", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)} (default: both)")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (default: 9)")
    parser.add_argument("--compile", choices=("on", "off", "auto"), default="auto", help="auto: where a compiler is found")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: seconds of this process, for machines that are shared",
    )
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
    print_table(document)
    file = None if options.out is None else write_json(options.out, document)
    finish(document, "bench-attach", file=file, headline=HEADLINE)
    return 130 if bench.interrupted else 0


HEADLINE = ("targets", "shape", "clock", "rounds", "threads", "device", "interrupted")


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
        if options.rounds < 1:
            raise ValueError(f"--rounds {options.rounds}: must be at least 1")
        device = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(device)
        if options.clock == "cpu" and self.device.type != "cpu":
            raise ValueError(f"--clock cpu with --device {device}: seconds of the processor say nothing about that")
        if options.threads:
            torch.set_num_threads(options.threads)
        compiled = options.compile == "on" or (options.compile == "auto" and can_compile(self.device))
        self.cells = [Cell(name, mode) for name in self.models for mode in ((False, True) if compiled else (False,))]
        self.plain_ms: dict[str, list[float]] = {}
        self.arm_ms: dict[tuple[str, str], list[float]] = {}
        self.ratios: dict[tuple[str, str], list[float]] = {}
        self.flops: dict[tuple[str, str], int] = {}
        self.peaks: dict[tuple[str, str], Peak] = {}
        self.interrupted = False

    # measuring

    def measure(self) -> None:
        """FLOPs and times of every cell, then the memory of every model."""
        for cell in self.cells:
            self._measure_cell(cell)
        arms = {"plain": None, "blocks 0.25": BLOCKS}
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
            for name, arm in {"plain": plain, **arms}.items():
                self.flops[cell.model, name] = count_flops(arm)
        rounds = self.options.rounds
        with Bar(cell.name, (rounds + WARM_UP) * (len(arms) + 2), "steps") as bar:
            for turn in range(rounds + WARM_UP):
                found: dict[str, float] = {}
                before = self._time(plain)
                bar.advance(note="warm-up" if turn < WARM_UP else f"round {turn - WARM_UP + 1} of {rounds}")
                for name in [*arms] if turn % 2 == 0 else [*arms][::-1]:
                    found[name] = self._time(arms[name])
                    bar.advance()
                after = self._time(plain)
                bar.advance()
                if turn >= WARM_UP:
                    self.plain_ms.setdefault(cell.name, []).extend((before, after))
                    for name, milliseconds in found.items():
                        self.arm_ms.setdefault((cell.name, name), []).append(milliseconds)
                        self.ratios.setdefault((cell.name, name), []).append(2 * milliseconds / (before + after))

    def _time(self, arm: Arm) -> float:
        clock = time.process_time if self.options.clock == "cpu" else time.perf_counter
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = clock()
        arm.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1000 * (clock() - start)

    # report

    def document(self) -> dict[str, Any]:
        """What was measured, as JSON types."""
        cells = {cell.name: self._cell(cell) for cell in self.cells if cell.name in self.plain_ms}
        memory: dict[str, dict[str, Any]] = {name: {} for name in self.models}
        for (name, arm), found in self.peaks.items():
            memory[name][arm] = found.to_dict()
        return {
            "targets": self._targets(cells, memory),
            "cells": cells,
            "flops": {f"{model}/{arm}": count for (model, arm), count in self.flops.items()},
            "memory": memory if self.peaks else {},
            "shape": asdict(self.shape),
            "rounds": self.options.rounds,
            "clock": self.options.clock,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor(),
            "versions": {**versions(), "transformers": _transformers()},
            "git": git_state(),
            "interrupted": self.interrupted,
        }

    def _cell(self, cell: Cell) -> dict[str, Any]:
        arms: dict[str, Any] = {}
        for name in ARMS:
            ratios = self.ratios[cell.name, name]
            time_ratio = statistics.median(ratios)
            flop_ratio = self.flops[cell.model, name] / self.flops[cell.model, "plain"]
            arms[name] = {
                "ms": statistics.median(self.arm_ms[cell.name, name]),
                "time_ratio": time_ratio,
                "quartiles": _quartiles(ratios),
                "flop_ratio": flop_ratio,
                "conversion": (1 - time_ratio) / (1 - flop_ratio) if flop_ratio < 1 else None,
            }
        plain = self.plain_ms[cell.name]
        return {"plain_ms": statistics.median(plain), "plain_quartiles_ms": _quartiles(plain), "arms": arms}

    def _targets(self, cells: dict[str, Any], memory: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        found = []
        for cell, record in cells.items():
            for name, arm in record["arms"].items():
                if arm["conversion"] is None:
                    value, wanted, met = arm["time_ratio"], f"<= {SLOWEST_KEPT}", arm["time_ratio"] <= SLOWEST_KEPT
                    what = "time over plain"
                else:
                    least = CONVERSION[cell.split("/")[0]]
                    value, wanted, met = arm["conversion"], f">= {least}", arm["conversion"] >= least
                    what = "conversion"
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


def _quartiles(values: list[float]) -> list[float]:
    """Lower and upper quartile; the value itself, twice, where there is one."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _transformers() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def print_table(document: dict[str, Any]) -> None:
    """The document for people."""
    s = document["shape"]
    print(f"{s['layers']} blocks of width {s['width']}, hidden {s['hidden']}, {s['heads']} heads, vocabulary {s['vocab']}")
    print(
        f"{s['batch']} x {s['length']} tokens; {document['threads']} threads, {document['device']}; "
        f"{document['clock']} clock"
    )
    print(f"  {'step':<32}{'ms':>9}{'time':>8}{'quartiles':>16}{'FLOPs':>8}{'conversion':>12}")
    for cell, record in document["cells"].items():
        low, high = record["plain_quartiles_ms"]
        spread = f"{low:.0f} .. {high:.0f} ms"
        print(f"  {cell + ' plain':<32}{record['plain_ms']:>9.1f}{1:>8.3f}{spread:>16}{1:>8.3f}")
        for name, arm in record["arms"].items():
            low, high = arm["quartiles"]
            share = "" if arm["conversion"] is None else f"{arm['conversion']:.2f}"
            print(
                f"  {cell + ' ' + name:<32}{arm['ms']:>9.1f}{arm['time_ratio']:>8.3f}{f'{low:.3f} .. {high:.3f}':>16}"
                f"{arm['flop_ratio']:>8.3f}{share:>12}"
            )
    for model, arms in document["memory"].items():
        for name, record in arms.items():
            print(
                f"  {model + ' ' + name:<32}{record['measured'] / 2**20:>9.1f} MiB at the peak, promised "
                f"{record['promised'] / 2**20:.1f}: {record['ratio']:.3f}"
            )
    for target in document["targets"]:
        verdict = "met" if target["met"] else "MISSED"
        print(f"  {target['of']}: {target['what']} {target['value']:.3f}, target {target['target']}: {verdict}")
