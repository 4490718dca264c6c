"""A graph on a Loihi 2 board: checked before anything starts, run by the Lava worker, compared with our simulator.

It needs Lava's closed extension and a board (`spikegate doctor` lists what is missing). It was tested against a stand-in of
the extension; nobody ran it on a board yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hardware.boards.loihi import find_route, require_board
from hardware.text import listed
from neuro.graph import PORTS, SpikingGraph
from neuro.graph.demand import layer_demands
from neuro.simulators.activity import Activity, Comparison, compare, recorded
from neuro.simulators.fixed_point import simulate
from neuro.simulators.inputs import Integers, checked_run
from neuro.simulators.lava.client import LavaUnsupported, LavaWorker, activity_of, unsupported

BOARD_TIMEOUT_S = 900.0  # a queue for the board and the boot are in it


@dataclass(frozen=True)
class BoardRun:
    """What a board did, beside what the simulator says it should have done.

    Attributes:
        activity: messages of the outputs and what else was asked for; `ran_on` names the board; without counts.
        comparison: simulator (expected) against board (got), value by value.
        offset: steps by which the board's series lies behind the simulator's in the comparison: adapters between host and
            neuro cores may take a step each. 0 where no shift makes all values equal.
        profile: of the last sample: "power" in watts, "time" in microseconds, "activity" as counts per core; each a number,
            a list or None where the extension did not tell.
    """

    activity: Activity
    comparison: Comparison
    offset: int
    profile: Mapping[str, Mapping[str, Any]]


def run_on_board(
    graph: SpikingGraph,
    inputs: Mapping[str, Integers],
    *,
    record: Iterable[str] = ("spikes",),
    mode: str = "chip",
    chip: str = "loihi2",
    chips: int | None = None,
    env: Mapping[str, str] | None = None,
    worker: LavaWorker | None = None,
    timeout_s: float = BOARD_TIMEOUT_S,
    max_offset: int = 3,
    steps: int | None = None,
) -> BoardRun:
    """Run a graph on the board that the environment names, and compare it with our simulator.

    Args:
        graph, inputs, steps: as `fixed_point.simulate`.
        record: "spikes" and states, as in `simulate`; what arrives at a port cannot be read from a board, and messages of
            inputs need not be.
        mode: of the simulator to compare with, "chip" or "lava".
        chip, chips: the board's, for the placement that is checked first.
        env: the environment that names board and route, by default this process's; the worker gets this process's.
        worker: default one of its own, ended afterwards.
        timeout_s: limit on the whole call.
        max_offset: largest shift in steps that the comparison tries.

    Raises:
        BoardUnavailable: something that can be probed is missing; holds the list, with remedies. Nothing was started.
        LavaUnsupported: a part of the graph, or of `record`, that Lava or the board has nothing for.
        LavaError: the route, the extension or the run failed; its own text is in it.
        InputError, GraphError: as `simulate`.
    """
    values, batch, length = checked_run(graph, inputs, steps, device="cpu")
    wanted = {
        name: sorted(names)
        for name, names in recorded(graph, record).items()
        if names and graph.population(name).kind != "input"
    }
    lacking = unsupported(graph) + tuple(
        f"{name}.{variable} cannot be read from a board; record spikes and states"
        for name, names in wanted.items()
        for variable in names
        if variable in PORTS[graph.population(name).kind] or variable == "spikes2"
    )
    if lacking:
        raise LavaUnsupported(listed(lacking, limit=400, between="; "))
    require_board(env, demands=layer_demands(graph), chip=chip, chips=chips)
    route = find_route(env)
    board = {**asdict(route), "route": route.kind}
    own = worker if worker is not None else LavaWorker(timeout_s=timeout_s)
    try:
        samples, profile = own.exchange(
            graph, values, wanted, {"board": board, "fault": "", "batch": batch, "steps": length}, timeout_s
        )
    finally:
        if worker is None:
            own.close()
    activity = activity_of(graph, samples, ran_on=route.name, mode="")
    ours = simulate(graph, values, mode=mode, record=record, steps=steps)
    comparison, offset = compare_shifted(ours, activity, max_offset)
    return BoardRun(activity, comparison, offset, profile)


def compare_shifted(expected: Activity, got: Activity, max_offset: int) -> tuple[Comparison, int]:
    """Compare, the second result also taken up to `max_offset` steps later.

    Returns:
        The comparison with the smallest shift that makes all values equal, and the shift; without one, that of shift 0.
    """
    plain = compare(expected, got)
    for offset in range(1, min(max_offset, expected.steps - 1) + 1):
        if plain.equal:
            break
        shifted = compare(_part(expected, 0, expected.steps - offset), _part(got, offset, got.steps))
        if shifted.equal:
            return shifted, offset
    return plain, 0


def _part(activity: Activity, begin: int, end: int) -> Activity:
    spikes = {name: value[:, begin:end] for name, value in activity.spikes.items()}
    states = {name: {key: value[:, begin:end] for key, value in kept.items()} for name, kept in activity.states.items()}
    return Activity(spikes, states, activity.batch, end - begin, activity.ran_on, mode=activity.mode)
