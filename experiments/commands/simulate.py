"""`spikegate simulate GRAPH INPUT --out FILE`: run a graph file on one of three simulators, write what it did.

Files are described in neuro/README.md. Everything is checked before anything runs, and the result appears whole or not
at all.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.commands.inputs import add_input_arguments, check_device, read_inputs
from experiments.runs.output import add_json_argument, entry, finish
from neuro.graph import FILE_SUFFIX, GraphError, SpikingGraph, load_graph

if TYPE_CHECKING:
    from neuro.simulators.activity import Activity

HELP = "run a graph file on a simulator"
BACKENDS = ("fixed_point", "lava", "snntorch")
LAVA_TIMEOUT_S = 120.0
EVERYTHING = "all"


class UsageError(ValueError):
    """Arguments that do not go together."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("graph", type=Path, help=f"NAME{FILE_SUFFIX}")
    add_input_arguments(parser)
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help="simulator (default: fixed_point, ours)")
    parser.add_argument(
        "--mode",
        choices=("lava", "chip", "xylo"),
        default=None,
        help="arithmetic (default: xylo for a graph of Xylo, else lava; snntorch computes in float)",
    )
    parser.add_argument("--out", type=Path, required=True, help="NAME.npz, the result")
    parser.add_argument(
        "--record",
        default="spikes",
        help=f"what to keep of every step: {EVERYTHING}, or names and POPULATION.NAME with commas (default: spikes)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="fixed_point: a value that leaves its register is an error, not a count"
    )
    parser.add_argument(
        "--timeout", type=float, default=None, metavar="S", help=f"lava: limit in seconds (default: {LAVA_TIMEOUT_S:g})"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="fixed_point: processes that share the run (1)"
    )
    parser.add_argument(
        "--by",
        choices=("batch", "populations"),
        default=None,
        help="with --processes: share out samples (batch), or the populations of the graph (default: batch)",
    )
    parser.add_argument("--device", default=None, help="fixed_point, snntorch: cpu or cuda (default: cpu)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit codes: 0 done; 1 the simulation failed; 2 the command, the graph or the input is wrong."""
    from neuro.simulators.fixed_point import FixedPointOverflow
    from neuro.simulators.inputs import InputError, checked_inputs
    from neuro.simulators.lava.client import LavaError
    from neuro.simulators.ranks import RankError
    from neuro.simulators.results import ResultFileError, save_result
    from neuro.simulators.snntorch_backend import SnnTorchUnavailable
    from neuro.simulators.support import default_mode

    try:
        _check_options(args)
        _check_out(args)
        graph = load_graph(args.graph)
        mode = args.mode or default_mode(graph, args.backend)
        _check_kinds(graph, args.backend, mode)
        inputs, steps = read_inputs(graph, args.input, args.steps)
        if inputs:
            checked_inputs(graph, inputs)
        start = time.perf_counter()
        activity = _simulate(args, graph, inputs, mode, steps)
        seconds = time.perf_counter() - start
        extra = {
            "backend": args.backend,
            "strict": args.strict,
            "graph": args.graph.name,
            "graph_sha256": hashlib.sha256(args.graph.read_bytes()).hexdigest(),
            "outputs": list(graph.outputs),
            "seconds": seconds,
        }
        save_result(activity, args.out, extra)
    except (OSError, GraphError, InputError, UsageError, ResultFileError, SnnTorchUnavailable) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
    except (FixedPointOverflow, LavaError, RankError, MemoryError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 1
    sent = {name: int(np.count_nonzero(activity.spikes[name].cpu().numpy())) for name in graph.outputs}
    left = {
        name: total
        for name, counts in activity.populations.items()
        if (total := sum(getattr(counts, key) for key in _LEFT))
    }
    print(f"{args.graph.name}: {activity.batch} samples x {activity.steps} steps, {activity.ran_on}, mode {activity.mode}")
    for name, count in sent.items():
        print(f"  {name}: {count} messages")
    for name, count in left.items():
        print(f"  {name}: {count} values left their register (wrapped, clipped or passed on; --strict stops at the first)")
    for note in activity.notes:
        print(f"  note: {note}")
    finish(
        {
            "out": args.out,
            "backend": args.backend,
            "ran_on": activity.ran_on,
            "mode": activity.mode,
            "batch": activity.batch,
            "steps": activity.steps,
            "messages": sent,
            "left_registers": left,
            "seconds": seconds,
        },
        "simulate",
    )
    return 0


_LEFT = ("saturations_v", "wraps_u", "wraps_sum", "wide_a", "wide_v")


def _check_options(args: argparse.Namespace) -> None:
    """Refuse every pair of options that contradict each other."""
    from neuro.simulators.support import MODES

    modes = MODES[args.backend]
    if args.mode is not None and args.mode not in modes:
        instead = "leave --mode out" if args.backend == "snntorch" else f"use --mode {modes[0]}, or --backend fixed_point"
        raise UsageError(f"backend {args.backend} has no mode {args.mode}, it has {', '.join(modes)}; {instead}")
    if args.strict and args.backend != "fixed_point":
        raise UsageError(f"backend {args.backend} checks no register; --strict goes with --backend fixed_point")
    if args.timeout is not None and args.backend != "lava":
        raise UsageError("--timeout goes with --backend lava, which may hang; the others end by themselves")
    if args.timeout is not None and not 0 < args.timeout < float("inf"):
        raise UsageError(f"--timeout is {args.timeout:g} s; give a positive number of seconds")
    if args.processes < 1:
        raise UsageError(f"--processes is {args.processes}; a whole number from 1 is needed")
    if args.processes > 1 and (args.backend != "fixed_point" or args.device not in (None, "cpu")):
        raise UsageError("--processes goes with --backend fixed_point on the CPU")
    if args.by is not None and args.processes == 1:
        raise UsageError(f"--by {args.by} says how several processes share a run; give --processes 2 or more")
    if args.device is not None and args.backend == "lava":
        raise UsageError("--device goes with fixed_point and snntorch; Lava runs on the CPU")
    if args.device is not None:
        check_device(args.device)


def _check_out(args: argparse.Namespace) -> None:
    """Refuse, before anything runs, a place that the result could not go to."""
    if args.out.suffix != ".npz" or args.out.is_dir():
        raise UsageError(f"--out is {args.out}; a result is a file NAME.npz")
    if not args.out.parent.is_dir():
        raise UsageError(f"--out is {args.out}; the folder {args.out.parent} does not exist, make it first")
    read = [path.resolve() for path in (args.graph, args.input) if path is not None]
    if args.out.resolve() in read:
        raise UsageError(f"--out is {args.out}, which is also read; give another name")


def _check_kinds(graph: SpikingGraph, backend: str, mode: str) -> None:
    from neuro.simulators.support import MODES, refusals

    found = refusals(graph, backend, mode)
    if found:
        rest = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        others = [m for m in MODES["fixed_point"] if (backend, mode) != ("fixed_point", m)]
        instead = next((m for m in reversed(others) if not refusals(graph, "fixed_point", m)), None)
        remedy = f"; --backend fixed_point --mode {instead} runs this graph" if instead else ""
        raise UsageError(f"backend {backend}, mode {mode}: {found[0]}{rest}{remedy}")


def _simulate(
    args: argparse.Namespace, graph: SpikingGraph, inputs: dict[str, np.ndarray], mode: str, steps: int | None
) -> Activity:
    from neuro.simulators import fixed_point, snntorch_backend
    from neuro.simulators.activity import RECORD_ALL
    from neuro.simulators.lava import client as lava_client

    record = RECORD_ALL if args.record == EVERYTHING else tuple(name for name in args.record.split(",") if name)
    if args.backend == "lava":
        return lava_client.run(graph, inputs, record=record, timeout_s=args.timeout or LAVA_TIMEOUT_S, steps=steps)
    if args.backend == "snntorch":
        return snntorch_backend.run(graph, inputs, record=record, device=args.device, steps=steps)
    if args.processes > 1:
        from neuro.simulators.ranks import Ranks, partition

        if args.by == "populations":
            partition(graph, args.processes)  # refuses before processes are started
        with Ranks(args.processes) as ranks:
            return ranks.simulate(
                graph, inputs, by=args.by or "batch", mode=mode, strict=args.strict, record=record, steps=steps
            )
    return fixed_point.simulate(
        graph, inputs, mode=mode, strict=args.strict, record=record, device=args.device, steps=steps
    )


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.commands.simulate`."""
    own = argparse.ArgumentParser(prog="spikegate simulate", description=HELP)
    add_arguments(own)
    return run(own.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
