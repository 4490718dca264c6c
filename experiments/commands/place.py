"""`spikegate place GRAPH --chip loihi2`: the cores a graph takes, what binds, and what would make it fit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.commands.refusal import refuse
from experiments.runs.output import add_json_argument, entry, finish
from experiments.views.chip_figure import save_chip_figure
from hardware.chips.chip import load_chip
from hardware.chips.pooled import FAMILIES, list_pooled
from hardware.datafile import DataFileError
from hardware.placement import DoesNotFit, LayerDemand, place
from hardware.placement.pooled import place_pooled
from neuro.graph import FILE_SUFFIX, ArchiveError, GraphError, SpikingGraph, load_graph, read_archive
from neuro.graph.demand import layer_demands, pooled_demand
from neuro.simulators.akida.devices import AKIDA_1, AKIDA_1_REASON, map_on
from neuro.simulators.akida.devices import DEVICES as AKIDA_DEVICES
from neuro.simulators.akida.devices import NOTE as AKIDA_NOTE
from neuro.simulators.akida.process import AkidaError

if TYPE_CHECKING:
    from neuro.simulators.activity import Activity

HELP = "put a graph on the cores of a chip"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("graph", type=Path, nargs="+", help=f"NAME{FILE_SUFFIX}, several of them, or a folder of them")
    parser.add_argument(
        "--chip",
        default="loihi2",
        help="loihi1, loihi2, xylo_audio2 (or xylo), xylo_audio3, xylo_imu, akida (all its virtual devices) or one of"
        f" {', '.join(AKIDA_DEVICES)}, or a chip file (default: loihi2)",
    )
    parser.add_argument("--chips", type=int, default=None, help="chips there are (default: as many as it takes)")
    parser.add_argument(
        "--budget", default=None, help="loihi1: nxtf, nengo; loihi2: inferred, inferred-2023, brief (default: the first)"
    )
    parser.add_argument("--split", choices=("fewest", "compiler"), default="fewest", help="how layers are cut")
    parser.add_argument("--encoding", choices=("dense", "sparse"), default=None, help="of synapses (default: the budget's)")
    parser.add_argument("--share", action="store_true", help="let layers share cores")
    parser.add_argument(
        "--input", type=Path, default=None, help="NAME.npz, one array (batch, steps, size) per input: measure the traffic"
    )
    add_json_argument(parser)
    parser.add_argument("--figure", type=Path, default=None, help="write a picture of the chips (.png, .svg, .pdf)")


def run(args: argparse.Namespace) -> int:
    """Exit codes: 0 it fits; 1 it does not; 2 the command or a file is wrong."""
    try:
        if args.chip in (*list_pooled(), *FAMILIES):
            return _pooled(args)
        if args.chip in ("akida", *AKIDA_DEVICES):
            return _akida(args)
        if args.chip in AKIDA_1:
            raise ValueError(f"{args.chip}: {AKIDA_1_REASON}: {', '.join(AKIDA_DEVICES)}")
        chip = load_chip(args.chip)
        demands = _demands(args.graph, args.input)
        result = place(
            demands,
            chip,
            args.chips,
            budget=args.budget,
            split=args.split,
            encoding=args.encoding,
            share=args.share,
        )
    except DoesNotFit as failure:
        return refuse("place", failure)
    except AkidaError as failure:
        print(f"place: {failure}", file=sys.stderr)
        return 1
    except (OSError, DataFileError, GraphError, ValueError) as error:
        print(f"place: {error}", file=sys.stderr)
        return 2
    print(result)
    if args.figure is not None:
        try:
            save_chip_figure(result, args.figure)
        except (OSError, ValueError) as error:
            print(f"place: {args.figure}: {error}", file=sys.stderr)
            return 2
        print(f"figure: {args.figure}")
    finish({"fits": True, **result.to_dict()}, "place")
    return 0


def _pooled(args: argparse.Namespace) -> int:
    """A network of Xylo against its chip's pools."""
    name, graph = _one_graph(args, "has fixed pools")
    found = place_pooled(pooled_demand(graph, name), args.chip)
    print(found)
    finish({"fits": True, **found.to_dict()}, "place")
    return 0


def _akida(args: argparse.Namespace) -> int:
    """A graded network on the virtual devices of the akida package, as its own mapper lays it out."""
    name, graph = _one_graph(args, "is laid out by its makers' own mapper")
    devices = tuple(AKIDA_DEVICES) if args.chip == "akida" else (args.chip,)
    found, version = map_on(graph, devices)
    print(f"{name} on virtual devices of Akida 2.0, laid out by the mapper of akida {version}:")
    for device in found:
        print(f"  {device}")
    print(f"note: {AKIDA_NOTE}")
    fits = any(not device.refused for device in found)
    finish({"fits": fits, "chip": args.chip, "akida": version, "devices": {d.name: d.to_dict() for d in found}}, "place")
    return 0 if fits else 1


def _one_graph(args: argparse.Namespace, has: str) -> tuple[str, SpikingGraph]:
    """Name and graph of a command for a chip without cores; ValueError for what only chips of cores have."""
    core_options = {
        "--chips": args.chips,
        "--budget": args.budget,
        "--encoding": args.encoding,
        "--share": args.share or None,
        "--input": args.input,
        "--figure": args.figure,
    }
    if given := [name for name, value in core_options.items() if value is not None]:
        raise ValueError(f"{given[0]} goes with chips of cores; {args.chip} {has}, so leave it out")
    if len(args.graph) != 1 or args.graph[0].is_dir():
        raise ValueError(f"{args.chip} holds one network; name one *{FILE_SUFFIX}")
    return args.graph[0].name.removesuffix(FILE_SUFFIX), load_graph(args.graph[0])


def _demands(paths: Sequence[Path], inputs: Path | None) -> tuple[LayerDemand, ...]:
    if missing := [str(path) for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{', '.join(missing)}: no such file or folder")
    files = [file for path in paths for file in (sorted(path.rglob(f"*{FILE_SUFFIX}")) if path.is_dir() else [path])]
    if not files:
        raise FileNotFoundError(f"{', '.join(map(str, paths))}: no *{FILE_SUFFIX} in it; export or deploy first")
    if inputs is not None and len(files) > 1:
        raise ValueError(f"--input goes with one graph, {len(files)} were given")
    found: list[LayerDemand] = []
    for file in files:
        graph = load_graph(file)
        prefix = f"{file.name.removesuffix(FILE_SUFFIX)}/" if len(files) > 1 else ""
        found += layer_demands(graph, None if inputs is None else _measure(graph, inputs), prefix)
    return tuple(found)


def _measure(graph: SpikingGraph, path: Path) -> Activity:
    from neuro.simulators.fixed_point import simulate

    try:
        arrays = read_archive(path)
    except ArchiveError as error:
        raise ValueError(f"{path}: not a readable .npz of integer arrays: {error}") from error
    missing = [name for name in graph.inputs if name not in arrays]
    if missing:
        raise ValueError(f"{path}: no array {missing[0]!r}; the graph's inputs are: {', '.join(graph.inputs)}")
    return simulate(graph, {name: arrays[name] for name in graph.inputs}, record=("spikes",))


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.commands.place`."""
    own = argparse.ArgumentParser(prog="spikegate place", description=HELP)
    add_arguments(own)
    return run(own.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
