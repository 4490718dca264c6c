"""`spikegate import FILE`: a NIR file, or a `.net` file of lava-dl, as an integer graph.

Of a NIR file our integers where they ride along, else its nodes converted; a `.net` file holds the chip's integers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.commands.refusal import refuse
from experiments.runs.output import add_json_argument, entry, finish
from hardware.chips.pooled import FAMILIES, list_pooled
from hardware.placement import DoesNotFit
from neuro.exchange.nir.library import NirFileError, NirUnavailable, NotInNir
from neuro.graph import FILE_SUFFIX, ArchiveError, GraphError, SpikingGraph, save_graph
from neuro.graph.archive import read_array

HELP = "read a NIR or lava-dl .net file into a graph"
NET = ".net"
# What belongs to one of the two forms, with the values that say it was not given.
OF_NODES = {
    "nodes": False, "dt": None, "steps": None, "reset": "zero", "pools": "auto", "pieces": "1", "calibration": None,
    "headroom_bits": 0.5, "messages": None, "input_scale": 1.0, "input_range": (0, 1), "chip": "loihi",
}  # fmt: skip
OF_LOIHI = {"pools": "auto", "pieces": "1", "headroom_bits": 0.5, "input_range": (0, 1)}
OF_NET = {"reset_interval": None, "input_shape": None, "input_bits": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("file", type=Path, help="NAME.nir, or NAME.net")
    parser.add_argument("--out", type=Path, default=None, help=f"NAME{FILE_SUFFIX} (default: beside the file)")
    parser.add_argument("--nodes", action="store_true", help="convert the nodes, though integers ride along")
    parser.add_argument(
        "--chip",
        choices=("loihi", *FAMILIES, *list_pooled()),
        default="loihi",
        help="nodes: whose integers (default: loihi); xylo is xylo_audio2",
    )
    parser.add_argument("--dt", type=float, default=None, metavar="S", help="nodes: seconds of a step (default: 1e-4)")
    parser.add_argument(
        "--steps", type=int, default=None, help="nodes: length of a sample; IF and biases need it (default: any length)"
    )
    parser.add_argument(
        "--reset",
        choices=("zero", "subtract"),
        default="zero",
        help="nodes: what a spike does to v (default: zero)",
    )
    parser.add_argument(
        "--pools",
        choices=("auto", "fold", "own"),
        default="auto",
        help="nodes: pools in the kernels behind them, or layers of graded sums; auto: where it halves synapses (default)",
    )
    parser.add_argument(
        "--pieces",
        choices=("1", "2", "auto"),
        default="1",
        help="nodes: synapses per weight of a matrix; auto: as the spikes on the calibration need (default: 1)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        default=None,
        metavar="FILE.npy",
        help="nodes: inputs (samples, steps, *shape of the Input), as those to come (default: made up where needed)",
    )
    parser.add_argument(
        "--headroom-bits",
        type=float,
        default=0.5,
        metavar="BITS",
        help="nodes: free above the largest v (default: 0.5)",
    )
    parser.add_argument(
        "--messages",
        type=Path,
        default=None,
        metavar="FILE.npz",
        help="nodes: also write the calibration as the graph's messages, for `spikegate simulate` and `spikegate account`",
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
    net = args.file.suffix == NET
    if option := _given(args, OF_NODES if net else OF_NET):
        other = "NIR" if net else NET
        print(f"import: {option} belongs to {other} files, and {args.file} is none; leave it out", file=sys.stderr)
        return 2
    if net:
        return _run_net(args)
    from neuro.conversion.spiking.description import NotConvertible
    from neuro.exchange.nir.loading import load_with_notes
    from neuro.exchange.nir.reading import carried_graph, has_integers

    try:
        out = _out(args)
        if args.dt is not None and not args.dt > 0:
            raise GraphError(f"--dt is {args.dt}; a step is longer than 0 s")
        if args.steps is not None and not args.steps > 0:
            raise GraphError(f"--steps is {args.steps}; a sample has at least 1 step")
        if not 0 < args.input_scale < float("inf"):
            raise GraphError(f"--input-scale is {args.input_scale}; a finite number above 0 is needed")
        if args.chip != "loihi" and (given := _given(args, OF_LOIHI)):
            raise GraphError(f"{given} belongs to Loihi, and the chip is {args.chip}; leave it out")
        if args.messages is not None and args.calibration is None:
            raise GraphError("--messages writes the calibration as messages; give one with --calibration FILE.npy")
        found = load_with_notes(args.file)
        if has_integers(found.graph) and not args.nodes:
            if args.messages is not None:
                raise GraphError("--messages belongs to converted nodes, and the file has integers; --nodes converts it")
            graph, how = carried_graph(found.graph, str(args.file)), "integers"
            save_graph(graph, out)
        else:
            graph, how = _from_nodes(args, found.graph, found.notes, out), "nodes"
    except DoesNotFit as failure:
        return refuse("import", failure)
    except (NotInNir, NotConvertible) as error:
        print(f"import: {args.file}: {error}", file=sys.stderr)
        return 1
    except (OSError, GraphError, NirFileError, NirUnavailable) as error:
        print(f"import: {error}", file=sys.stderr)
        return 2
    return _done(graph, out, how)


def _given(args: argparse.Namespace, absent: Mapping[str, Any]) -> str:
    """The first of some options that was given, "" where none was."""
    for name, value in absent.items():
        found = getattr(args, name)
        if (tuple(found) if isinstance(found, list) else found) != value:
            return f"--{name.replace('_', '-')}"
    return ""


def _from_nodes(args: argparse.Namespace, found: Any, notes: Sequence[str], out: Path) -> SpikingGraph:
    import torch

    from neuro.exchange.nir.converting import from_nir

    low, high = args.input_range
    given = None if args.calibration is None else torch.from_numpy(_samples(args.calibration))
    network: Any
    if args.chip != "loihi":
        network, given = _onto_xylo(args, found, notes, given)
        _write(args, network, given, out)
        return network.graph
    network = from_nir(
        found,
        dt_s=args.dt,
        steps=args.steps,
        reset=args.reset,
        pools=args.pools,
        calibration=given,
        pieces=args.pieces if args.pieces == "auto" else int(args.pieces),
        input_scale=args.input_scale,
        input_range=(low, high),
        headroom_bits=args.headroom_bits,
        notes=notes,
    )
    _write(args, network, given, out)
    return network.graph


def _onto_xylo(args: argparse.Namespace, found: Any, notes: Sequence[str], given: Any) -> tuple[Any, Any]:
    """The conversion, and the calibration in the network's order."""
    from dataclasses import replace

    import neuro
    from neuro.exchange.nir.describing import describe
    from neuro.exchange.nir.library import DT_S

    described = describe(found, args.dt or DT_S, reset=args.reset)
    description = replace(described.description, notes=(*notes, *described.description.notes))
    shape = described.input.shape
    if given is not None and tuple(given.shape[2:]) != shape:
        form = ", ".join(map(str, shape))
        raise GraphError(f"the calibration has shape {tuple(given.shape)}; (samples, steps, {form}) is needed")
    given = None if given is None else described.input.arranged(given)
    network = neuro.to_xylo(description, chip=args.chip, calibration=given, steps=args.steps, input_scale=args.input_scale)
    return network, given


def _write(args: argparse.Namespace, network: Any, given: Any, out: Path) -> None:
    """The graph, and the calibration as its messages where asked for: both or none."""
    messages = None if args.messages is None or given is None else network.present(given)
    if messages is None:
        save_graph(network.graph, out)
    else:
        partial = args.messages.with_name(f".{args.messages.name}.partial.npz")
        try:
            np.savez_compressed(partial, **{name: value.numpy() for name, value in messages.items()})
            save_graph(network.graph, out)
            partial.replace(args.messages)
        finally:
            partial.unlink(missing_ok=True)
    print(network.table())


def _samples(path: Path) -> np.ndarray:
    """float64 inputs of a .npy file; GraphError where it holds anything else."""
    try:
        values = read_array(path)
    except ArchiveError as error:
        raise GraphError(f"{path}: no array of numpy: {error}") from error
    if values.dtype.kind not in "biuf" or values.ndim < 3 or not values.size:
        raise GraphError(f"{path}: one array of numbers (samples, steps, ...) is needed, as numpy.save writes it")
    if not np.isfinite(values).all():
        raise GraphError(f"{path}: holds NaN or infinity")
    return values.astype(np.float64)


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
