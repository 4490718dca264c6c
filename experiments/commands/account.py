"""`spikegate account GRAPH INPUT`: counts, cores, joules, time and break-even of any graph on an input, in one table.

The graph is run on the fixed-point simulator. What is counted and what is modelled stands in the table, with the source.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.commands.inputs import add_input_arguments, check_device, read_inputs
from experiments.commands.refusal import refuse
from experiments.runs.output import add_json_argument, entry, finish
from experiments.views.terminal import account_text, terminal_width
from hardware.datafile import DataFileError
from hardware.placement import DoesNotFit
from neuro.graph import FILE_SUFFIX, GraphError, load_graph

HELP = "counts, cores, joules, time and break-even of a graph on an input"
HEADLINE = ("graph", "samples", "steps", "chip", "chips", "cores", "per_sample", "energy_j", "time_us", "break_even_factor")
EVERY = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("graph", type=Path, help=f"NAME{FILE_SUFFIX}")
    add_input_arguments(parser)
    parser.add_argument(
        "--chip",
        default=None,
        help="loihi1, loihi2, xylo_audio2 (or xylo), xylo_audio3, xylo_imu, or a chip file (default: loihi2, or xylo for"
        " its kinds)",
    )
    parser.add_argument("--chips", type=int, default=None, help="chips there are (default: as many as it takes)")
    parser.add_argument(
        "--profile",
        action="append",
        default=None,
        metavar="NAME",
        help=f"energy profile, by name or file; may be repeated; {EVERY}: every shipped one (default: every one of a chip)",
    )
    parser.add_argument(
        "--reference",
        default="digital45_int8_sram",
        metavar="NAME",
        help="dense profile of the dense equivalent and of the break-even (default: digital45_int8_sram)",
    )
    parser.add_argument(
        "--zeros",
        choices=("auto", "stored"),
        default="auto",
        help="zeros of dense projections: auto leaves them out where they are more than a quarter; stored counts them",
    )
    parser.add_argument(
        "--mode", choices=("lava", "chip", "xylo"), default=None, help="arithmetic (default: xylo for its kinds, else lava)"
    )
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cpu)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit codes: 0 done; 1 the chips do not hold the graph; 2 the command, a file or the input is wrong."""
    from hardware.energy.profile import list_profiles
    from neuro.accounting.account import graph_account
    from neuro.simulators.inputs import InputError

    try:
        if args.chips is not None and args.chips < 1:
            raise ValueError(f"--chips is {args.chips}; at least 1 is needed")
        if args.device is not None:
            check_device(args.device)
        graph = load_graph(args.graph)
        inputs, steps = read_inputs(graph, args.input, args.steps)
        found = graph_account(
            graph,
            inputs,
            chip=args.chip,
            chips=args.chips,
            profiles=list_profiles() if args.profile and EVERY in args.profile else args.profile,
            reference=args.reference,
            zeros=args.zeros,
            mode=args.mode,
            steps=steps,
            device=args.device,
        )
    except DoesNotFit as failure:
        return refuse("account", failure)
    except (OSError, GraphError, InputError, DataFileError, ValueError) as error:
        print(f"account: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"account: {error}; give fewer samples, or fewer steps with --steps", file=sys.stderr)
        return 1
    placed = found.placement
    print(account_text(found, args.graph.name, terminal_width()))
    heads = {
        "graph": args.graph.name,
        "graph_sha256": hashlib.sha256(args.graph.read_bytes()).hexdigest(),
        "chip": placed.chip if placed is not None else found.pools.chip if found.pools is not None else None,
        "chips": None if placed is None else placed.chips,
        "cores": None if placed is None else len(placed.cores),
        "energy_j": {
            " ".join(filter(None, (one.report.profile, one.dense))): list(one.per_sample_j) for one in found.energies
        },
        "time_us": {latency.rates: list(latency.token.to("us")) for latency in found.latencies},
        "break_even_factor": {
            often: {one.chip: one.factor for one in compared} for often, compared in found.break_evens.items()
        },
    }
    finish(heads | found.to_dict(), "account", headline=HEADLINE)
    return 0


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.commands.account`."""
    own = argparse.ArgumentParser(prog="spikegate account", description=HELP)
    add_arguments(own)
    return run(own.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
