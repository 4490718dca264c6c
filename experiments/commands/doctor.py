"""`spikegate doctor [GRAPH]`: what stands between this machine and a Loihi board."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.runs.output import add_json_argument, finish
from hardware.boards.loihi import probe
from hardware.datafile import DataFileError

HELP = "what stands between this machine and a Loihi board"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("graph", type=Path, nargs="?", default=None, help="a NAME.graph.npz: does it fit the board too?")
    parser.add_argument("--chip", default="loihi2", help="chip of the board (default: loihi2)")
    parser.add_argument("--chips", type=int, default=None, help="chips of the board")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit codes: 0 the report is printed, whatever it says; 2 the graph or the chip cannot be read."""
    from neuro.graph import GraphError, load_graph
    from neuro.graph.demand import layer_demands

    try:
        demands = None if args.graph is None else layer_demands(load_graph(args.graph))
        report = probe(demands=demands, chip=args.chip, chips=args.chips)
    except (GraphError, DataFileError, OSError) as error:
        print(f"doctor: {error}", file=sys.stderr)
        return 2
    print(report)
    finish(report.to_dict(), "doctor")
    return 0
