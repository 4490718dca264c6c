"""`spikegate import FILE`: a NIR file, or a `.net` file of lava-dl, as an integer graph.

Of a NIR file our integers where they ride along, else its nodes converted; a `.net` file holds the chip's integers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.runs.output import add_json_argument, entry, finish
from neuro.exchange.nir.library import NirFileError, NirUnavailable, NotInNir
from neuro.graph import FILE_SUFFIX, GraphError, SpikingGraph, save_graph

HELP = "read a NIR or lava-dl .net file into a graph"
NET = ".net"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("file", type=Path, help="NAME.nir, or NAME.net")
    parser.add_argument("--out", type=Path, default=None, help=f"NAME{FILE_SUFFIX} (default: beside the file)")
    parser.add_argument("--nodes", action="store_true", help="convert the nodes, though integers ride along")
    parser.add_argument("--dt", type=float, default=None, metavar="S", help="nodes: seconds of a step (default: 1e-4)")
    parser.add_argument(
        "--steps", type=int, default=None, help="nodes: length of a sample; IF and biases need it (default: any length)"
    )
    parser.add_argument("--input-scale", type=float, default=1.0, help="nodes: value of one unit of an input (default: 1)")
    parser.add_argument(
        "--input-range", type=int, nargs=2, default=(0, 1), metavar=("LOW", "HIGH"), help="nodes: of inputs (default: 0 1)"
    )
    parser.add_argument(
        "--reset-interval", type=int, default=None, metavar="STEPS", help=".net: steps between resets (none)"
    )
    parser.add_argument(
        "--input-shape", type=int, nargs="+", default=None, metavar="N", help=".net without an input layer: C Y X"
    )
    parser.add_argument(
        "--input-bits", type=int, default=0, help=".net: width of messages that enter; 0 for spikes (default)"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit codes: 0 done; 1 the nodes have no integer counterpart; 2 the command or the file is wrong."""
    if args.file.suffix == NET:
        return _run_net(args)
    from neuro.conversion.lif import NotConvertible
    from neuro.exchange.nir.reading import carried_graph, from_nir, has_integers, load_nir

    try:
        out = _out(args)
        if args.dt is not None and not args.dt > 0:
            raise GraphError(f"--dt is {args.dt}; a step is longer than 0 s")
        found = load_nir(args.file)
        if has_integers(found) and not args.nodes:
            graph, how, table = carried_graph(found, str(args.file)), "integers", ""
        else:
            low, high = args.input_range
            network = from_nir(found, dt_s=args.dt, steps=args.steps, input_scale=args.input_scale, input_range=(low, high))
            graph, how, table = network.graph, "nodes", network.table()
        save_graph(graph, out)
    except (NotInNir, NotConvertible) as error:
        print(f"import: {args.file}: {error}", file=sys.stderr)
        return 1
    except (OSError, GraphError, NirFileError, NirUnavailable) as error:
        print(f"import: {error}", file=sys.stderr)
        return 2
    if table:
        print(table)
    return _done(graph, out, how)


def _out(args: argparse.Namespace) -> Path:
    return args.out or args.file.with_name(args.file.name.removesuffix(".nir").removesuffix(NET) + FILE_SUFFIX)


def _done(graph: SpikingGraph, out: Path, how: str) -> int:
    sizes = ", ".join(f"{p.name} {p.kind} {p.size}" for p in graph.populations)
    print(f"{out}: from its {how}: {sizes}")
    document = {"out": out, "from": how, "populations": len(graph.populations), "outputs": list(graph.outputs)}
    finish(document, "import")
    return 0


def _run_net(args: argparse.Namespace) -> int:
    from neuro.exchange.hdf5 import Hdf5Unavailable
    from neuro.exchange.netx import NetxFileError, NotInNetx, load_netx

    out = _out(args)
    shape, bits, interval = args.input_shape, args.input_bits, args.reset_interval
    try:
        graph = load_netx(args.file, reset_interval=interval, input_shape=shape, input_bits=bits)
        save_graph(graph, out)
    except NotInNetx as error:
        print(f"import: {error}", file=sys.stderr)
        return 1
    except (OSError, GraphError, NetxFileError, Hdf5Unavailable) as error:
        print(f"import: {error}", file=sys.stderr)
        return 2
    return _done(graph, out, "layers")


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.commands.importing`."""
    own = argparse.ArgumentParser(prog="spikegate import", description=HELP)
    add_arguments(own)
    return run(own.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
