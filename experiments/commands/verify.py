"""`spikegate verify GRAPH [INPUT]`: our integer simulator against Lava, xylosim, Akida or a board: equal, or what differs.

Every state is compared at every step. With a folder, every graph file under it, on random input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.runs.output import add_json_argument, entry, finish
from neuro.graph import FILE_SUFFIX, GraphError, SpikingGraph, load_graph
from neuro.graph.kinds import XYLO_KINDS

if TYPE_CHECKING:
    import torch

    from neuro.simulators.activity import Comparison
    from neuro.simulators.lava.client import LavaWorker

HELP = "our simulator against Lava, xylosim, Akida's software (or a board): equal, or the first value that differs"
TIMEOUT_S = 300.0
BOARD_STATES = ("spikes", "u", "v")  # what a board is asked for; states are compared where the graph has them
AKIDA_RANDOM = 63
RANDOM_BITS = 16  # wider payloads can leave Lava's int32 sums, where it is not defined


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("target", type=Path, metavar="GRAPH", help=f"one NAME{FILE_SUFFIX}, or a folder such as RUN/deploy")
    parser.add_argument(
        "input",
        type=Path,
        nargs="?",
        default=None,
        metavar="INPUT",
        help="NAME.npz, one integer array (batch, steps, size) per input population (default: random)",
    )
    parser.add_argument("--steps", type=int, default=64, help="time steps of random input per graph (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the random input (default: 0)")
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT_S, metavar="S", help=f"limit per graph in seconds (default: {TIMEOUT_S:g})"
    )
    parser.add_argument(
        "--chip",
        choices=("loihi", "xylo", "akida"),
        default=None,
        help="whose peer: Lava, xylosim, or the akida package for graded graphs (default: Lava; for Xylo's kinds xylosim)",
    )
    parser.add_argument("--board", action="store_true", help="on the Loihi board that the environment names (see doctor)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit codes as `verify`."""
    return verify(
        args.target,
        args.steps,
        args.seed,
        input_path=args.input,
        timeout_s=args.timeout,
        board=getattr(args, "board", False),
        chip=getattr(args, "chip", None),
    )


def verify(
    target: Path,
    steps: int = 64,
    seed: int = 0,
    *,
    input_path: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    board: bool = False,
    chip: str | None = None,
) -> int:
    """Run every graph of `target` on both, and print what came of it; the last line of stdout is JSON.

    Args:
        target: a folder, or one graph file.
        steps, seed: of the random input, where no file is given.
        input_path: an npz for one graph file.
        timeout_s: limit on the other side's run of each graph, in seconds.
        board: compare with the board that the environment names, instead of Lava on the CPU.
        chip: "loihi", "xylo" or "akida", whose peers are Lava, xylosim and the akida package; None: Lava or, for Xylo's
            kinds, xylosim.

    Returns:
        0 equal in every value; 1 not, or the peer failed; 2 a wrong argument, graph or input.
    """
    from hardware import BoardUnavailable
    from neuro.simulators.akida.process import AkidaError
    from neuro.simulators.inputs import InputError, checked_run
    from neuro.simulators.lava.client import LavaError, LavaWorker
    from neuro.simulators.results import ResultFileError, load_inputs
    from neuro.simulators.xylo.client import XyloSimError

    paths = [target] if target.is_file() else sorted(target.rglob(f"*{FILE_SUFFIX}"))
    problem = _problem(target, paths, steps, input_path, timeout_s)
    if problem:
        print(f"verify: {problem}", file=sys.stderr)
        return 2
    graphs: dict[str, dict[str, Any]] = {}
    try:
        with LavaWorker(timeout_s=timeout_s) as worker:
            for path in paths:
                graph = load_graph(path)
                given = random_inputs(graph, steps, seed) if input_path is None else load_inputs(input_path, graph)
                alone = None if graph.inputs else steps  # neurons that their biases drive
                values, _, steps = checked_run(graph, given, alone)  # a file brings its own number
                if chip == "xylo" or (chip is None and is_xylo(graph)):
                    result, document = _in_xylosim(graph, values, timeout_s)
                elif chip == "akida":
                    result, document = _in_akida(graph, values, input_path is None, timeout_s)
                else:
                    result, document = (_on_board if board else _in_lava)(graph, values, alone, worker, timeout_s)
                name = path.name.removesuffix(FILE_SUFFIX)
                if name in graphs:
                    name = path.relative_to(target).as_posix().removesuffix(FILE_SUFFIX)
                print(f"{name}: {result} ({document['expected']} against {document['got']})")
                for line in document.get("limits", {}).values():
                    print(f"{name}: {line}")
                graphs[name] = {**_document(result), **document}
    except (GraphError, InputError, ResultFileError, OSError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    except (LavaError, BoardUnavailable, XyloSimError, AkidaError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 1
    equal = all(each["equal"] for each in graphs.values())
    total = sum(each["values"] for each in graphs.values())
    if len(graphs) > 1:
        print(f"{len(graphs)} graphs: {f'equal over {total} values' if equal else 'not equal'}")
    finish({"equal": equal, "values": total, "steps": steps, "graphs": graphs}, "verify")
    return 0 if equal else 1


def _problem(target: Path, paths: list[Path], steps: int, input_path: Path | None, timeout_s: float) -> str | None:
    """What is wrong with the arguments, before anything is read."""
    if not target.exists():
        return f"{target} does not exist"
    if not paths:
        return f"{target} holds no *{FILE_SUFFIX}; deploy a run first"
    if input_path is not None and not target.is_file():
        return f"{input_path} belongs to one graph, and {target} is a folder; name one *{FILE_SUFFIX}"
    if steps < 1:
        return f"--steps is {steps}; at least 1 is needed"
    if not 0 < timeout_s < float("inf"):
        return f"--timeout is {timeout_s:g} s; give a positive number of seconds"
    return None


def _in_lava(
    graph: SpikingGraph, values: dict[str, torch.Tensor], steps: int | None, worker: LavaWorker, timeout_s: float
) -> tuple[Comparison, dict[str, Any]]:
    from neuro.simulators.activity import RECORD_ALL, compare
    from neuro.simulators.fixed_point import simulate

    lava = worker.run(graph, values, record=RECORD_ALL, timeout_s=timeout_s, steps=steps)
    ours = simulate(graph, values, record=RECORD_ALL, steps=steps)
    return compare(lava, ours), {"expected": lava.ran_on, "got": ours.ran_on}


def is_xylo(graph: SpikingGraph) -> bool:
    """Whether a graph holds neurons of Xylo."""
    return any(population.kind in XYLO_KINDS for population in graph.populations)


def _in_xylosim(
    graph: SpikingGraph, values: dict[str, torch.Tensor], timeout_s: float
) -> tuple[Comparison, dict[str, Any]]:
    from neuro.simulators.activity import RECORD_ALL, compare
    from neuro.simulators.fixed_point import simulate
    from neuro.simulators.xylo.client import run as run_xylosim

    theirs = run_xylosim(graph, values, timeout_s=timeout_s)
    ours = simulate(graph, values, mode="xylo", record=RECORD_ALL)
    return compare(theirs, ours), {"expected": theirs.ran_on, "got": ours.ran_on, "limits": _limits(graph)}


def _limits(graph: SpikingGraph) -> dict[str, str]:
    """Chip of the family -> whether it holds the network, which xylosim does not ask."""
    from hardware.chips.pooled import list_pooled, load_pooled
    from hardware.placement import DoesNotFit
    from hardware.placement.pooled import place_pooled
    from neuro.graph.demand import pooled_demand

    found = {}
    for chip in list_pooled():
        try:
            placed = place_pooled(pooled_demand(graph), chip)
            found[chip] = f"fits {placed.title}, nearest to its limit in {placed.binding}"
        except DoesNotFit as failure:
            title, short = load_pooled(chip).title, failure.binding
            found[chip] = f"DOES NOT FIT {title}: {short}; `spikegate place --chip {chip}` says what would help"
    return found


def _in_akida(
    graph: SpikingGraph, values: dict[str, torch.Tensor], made_up: bool, timeout_s: float
) -> tuple[Comparison, dict[str, Any]]:
    from neuro.graph.akida import akida_network
    from neuro.simulators.activity import compare
    from neuro.simulators.akida.alignment import ours as ours_in_order
    from neuro.simulators.akida.alignment import with_constants
    from neuro.simulators.akida.client import run as run_akida

    network = akida_network(graph)
    if made_up:  # half of 8 bits, so that what a calibrated network makes of them fits its messages
        values = {name: value.clamp(-AKIDA_RANDOM, AKIDA_RANDOM) for name, value in values.items()}
        values = with_constants(network, values)
    theirs = run_akida(graph, values, timeout_s=timeout_s)
    ours = ours_in_order(graph, network, values)
    return compare(theirs, ours), {"expected": theirs.ran_on, "got": ours.ran_on}


def _on_board(
    graph: SpikingGraph, values: dict[str, torch.Tensor], steps: int | None, worker: LavaWorker, timeout_s: float
) -> tuple[Comparison, dict[str, Any]]:
    from neuro.simulators.lava.board import run_on_board

    found = run_on_board(graph, values, record=BOARD_STATES, worker=worker, timeout_s=timeout_s, steps=steps)
    document = {"expected": "simulated (ours, chip)", "got": found.activity.ran_on}
    return found.comparison, {**document, "offset": found.offset, "profile": found.profile}


def _document(result: Comparison) -> dict[str, Any]:
    return {
        "equal": result.equal,
        "values": result.values,
        "mismatches": result.mismatches,
        "first": result.first,
        "text": str(result),
    }


def random_inputs(graph: SpikingGraph, steps: int, seed: int) -> dict[str, torch.Tensor]:
    """Uniform payloads of the width that each input's projections take, at most 16 bits, int64 (1, steps, size)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in graph.inputs:
        bits = min((p.num_message_bits for p in graph.outgoing(name)), default=8)
        half = 1 << (min(bits, RANDOM_BITS) - 1) if bits else 0
        low, high = (0, 2) if bits == 0 else (0 if is_xylo(graph) else 1 - half, half)
        found[name] = torch.randint(low, max(high, low + 1), (1, steps, graph.population(name).size), generator=generator)
    return found


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.commands.verify`."""
    own = argparse.ArgumentParser(prog="spikegate verify", description=HELP)
    add_arguments(own)
    return run(own.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
