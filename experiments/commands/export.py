"""`spikegate export SOURCE --to nir`: integer graphs as NIR files that other simulators read.

SOURCE is a graph file, a folder with a plan (a deployment, or what `save_plan` wrote), or the folder of a training run,
which is calibrated and converted first. A Transformer is no NIR graph: attention, norms and residual adds have no node.
Each segment between two crossings of the host is one, and becomes one file; its scales are in the metadata.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import plain
from neuro.exchange.nir.library import NirFileError, NirUnavailable, NotInNir
from neuro.graph import FILE_SUFFIX, GraphError, SpikingGraph, load_graph

HELP = "write graphs for other simulators (NIR)"
ROUTES = ("graded", "rate")
READERS = ("snntorch", "norse")


class UsageError(ValueError):
    """Arguments that do not go together, or a source that holds no graph."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("source", type=Path, help=f"NAME{FILE_SUFFIX}, a deployment, or the folder of a training run")
    parser.add_argument("--to", choices=("nir",), default="nir", help="form (default: nir)")
    parser.add_argument(
        "--out", type=Path, default=None, help="NAME.nir for a graph, a folder for several (default: beside the source)"
    )
    parser.add_argument(
        "--timing",
        choices=("portable", "literal"),
        default="portable",
        help="portable: edges take no time, as readers have it; literal: a Delay node for every step (default: portable)",
    )
    parser.add_argument("--reader", choices=READERS, default=None, help="refuse what that tool is known to read otherwise")
    parser.add_argument(
        "--skip", action="store_true", help="leave out segments that NIR cannot say, instead of none written"
    )
    parser.add_argument(
        "--route", choices=ROUTES, default="graded", help="training run: conversion; rate: hard reset (default: graded)"
    )
    parser.add_argument("--time-steps", type=int, default=32, help="route rate: steps per token (default: 32)")
    parser.add_argument(
        "--calibration-tokens", type=int, default=8192, help="training run: tokens that set ranges (default: 8192)"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit codes: 0 all written; 1 NIR cannot say something, which is named; 2 the command or a file is wrong."""
    try:
        graphs, single = _graphs(args)
        made, refused = _converted(graphs, args)
        if refused and not (args.skip and made):
            for name, reason in refused.items():
                print(f"export: {name}: {reason}", file=sys.stderr)
            return 1
        written = _write(made, args, single)
    except (OSError, GraphError, UsageError, NirFileError, NirUnavailable) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    for name, path in written.items():
        for note in filter(None, made[name].metadata["spikegate"]["notes"].split("\n")):
            print(f"  note: {name}: {note}")
        print(f"{path}")
    for name, reason in refused.items():
        print(f"  not written: {name}: {reason}")
    finish({"written": written, "refused": refused, "timing": args.timing}, "export")
    return 0


def _converted(
    graphs: dict[str, tuple[SpikingGraph, dict[str, Any] | None]], args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, str]]:
    """NIR graphs by name, and why others are none."""
    from neuro.exchange.nir.readers import problems
    from neuro.exchange.nir.writing import KEY, to_nir

    made: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name, (graph, segment) in graphs.items():
        try:
            found = to_nir(graph, timing=args.timing)
        except NotInNir as error:
            refused[name] = str(error)
            continue
        if args.reader and (reasons := problems(found, args.reader)):
            refused[name] = "; ".join(reasons)
            continue
        if segment is not None:
            found.metadata[KEY]["segment"] = json.dumps(plain(segment))
        made[name] = found
    return made, refused


def _write(made: dict[str, Any], args: argparse.Namespace, single: bool) -> dict[str, Path]:
    from neuro.exchange.nir.writing import write_nir

    if single:
        (name,) = made
        path = args.out or args.source.with_name(f"{name}.nir")
        return {name: write_nir(made[name], path)}
    folder = args.out or args.source / "nir"
    folder.mkdir(parents=True, exist_ok=True)
    return {name: write_nir(graph, folder / f"{name}.nir") for name, graph in made.items()}


def _graphs(args: argparse.Namespace) -> tuple[dict[str, tuple[SpikingGraph, dict[str, Any] | None]], bool]:
    """Graphs by name with the record of their segment, and whether the source is one graph file."""
    source: Path = args.source
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if source.is_file():
        return {source.name.removesuffix(FILE_SUFFIX): (load_graph(source), None)}, True
    plan = _plan(args)
    if args.out is not None and args.out.is_file():
        raise UsageError(f"{args.out} is a file; {len(plan.segments)} segments need a folder")
    found: dict[str, tuple[SpikingGraph, dict[str, Any] | None]] = {}
    for segment in plan.segments:
        fields = asdict(replace(segment, graph=None, headroom=(), fingerprints=()))
        found[segment.name] = (segment.graph, {key: value for key, value in fields.items() if key not in _LEFT_OUT})
    return found, False


_LEFT_OUT = ("graph", "headroom", "fingerprints")


def _plan(args: argparse.Namespace) -> Any:
    """The plan in a folder, or the one that a training run is converted to."""
    from neuro.conversion.plan import PlanFileError, load_plan

    for folder in (args.source, args.source / "plan"):
        if (folder / "plan.json").is_file():
            try:
                return load_plan(folder)
            except PlanFileError as error:
                raise UsageError(str(error)) from error
    if (args.source / "run.json").is_file():
        return _converted_run(args)
    raise UsageError(f"{args.source}: neither a plan nor a training run in it; spikegate deploy writes a plan")


def _converted_run(args: argparse.Namespace) -> Any:
    """A training run, calibrated on its own training stream and converted."""
    from experiments.deploy import load_run
    from experiments.runs.folder import RunError
    from neuro.analysis.compatibility import NothingToMap, analyse
    from neuro.conversion.calibration import calibrate
    from sparse_update.data.records import CorpusError
    from sparse_update.data.regimes import clean_stream
    from sparse_update.loop.checkpoint import CheckpointError

    try:
        model, corpus, data, record = load_run(args.source)
        context, seed = model.cfg.context, record["seed"]
        stream = clean_stream(corpus, data, context, seed)
        training = stream.take(max(1, args.calibration_tokens // context)).tokens[:, :-1]
        report = analyse(model, training[:1], "loihi2")
        calibration = calibrate(model, training.split(16))
        if args.route == "rate":
            from neuro.conversion.rate import RateConfig
            from neuro.conversion.rate import convert as to_rate

            return to_rate(model, calibration, report, RateConfig(time_steps=args.time_steps, reset="hard"))
        from neuro.conversion.graded import convert

        return convert(model, calibration, report)
    except (RunError, CorpusError, CheckpointError, NothingToMap, ValueError) as error:
        raise UsageError(f"{args.source}: {error}") from error


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.commands.export`."""
    own = argparse.ArgumentParser(prog="spikegate export", description=HELP)
    add_arguments(own)
    return run(own.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
