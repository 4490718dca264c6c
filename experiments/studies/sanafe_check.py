"""`python -m experiments.studies.sanafe_check`: a spiking network here and in SANA-FE: counts, energy, time.

Optional. SANA-FE (GPL-3.0) runs in a process and an environment of its own, which `make energy-check` makes or
SPIKEGATE_ENERGY_PYTHON names; nothing of it is imported here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs.output import add_json_argument, entry, finish
from hardware.chips.chip import load_chip
from hardware.energy.account import account, load_profile
from hardware.energy.counts import Counts
from hardware.interpreters import find_interpreter
from hardware.latency.estimate import estimate
from hardware.latency.rates import load_rates
from hardware.placement import Placement, place
from hardware.placement.routing import layer_traffic
from neuro.graph import Population, Projection, SpikingGraph
from neuro.graph.demand import layer_demands
from neuro.simulators.activity import Activity
from neuro.simulators.fixed_point import simulate

VARIABLE = "SPIKEGATE_ENERGY_PYTHON"
ENVIRONMENT = ".venv-energy"
WORKER = Path(__file__).with_name("sanafe_worker.py")
INPUT_RATE, THRESHOLD = 0.2, 150
PROFILE = "loihi1_sanafe"


class SanafeError(RuntimeError):
    """SANA-FE is not there, or did not answer."""


def sanafe_python() -> Path:
    """The interpreter that has SANA-FE.

    Raises:
        SanafeError: there is none; the message says how to make one.
    """
    return find_interpreter(VARIABLE, ENVIRONMENT, "SANA-FE", f"`make energy-check` makes {ENVIRONMENT}", SanafeError)


def network(inputs: int, width: int, seed: int = 0) -> SpikingGraph:
    """Two integrate-and-fire layers: no leak, current forgotten each step, even integer weights, as both sides have it."""
    rng = np.random.default_rng(seed)
    populations = [Population("x", "input", inputs)]
    projections = []
    for layer in (1, 2):
        size = populations[-1].size
        weight = 2 * np.clip(np.rint(rng.normal(4, 20, (width, size))), -127, 127).astype(np.int32)
        populations.append(Population(f"layer{layer}", "lif", width, {"du": 4095, "dv": 0, "vth": THRESHOLD}))
        projections.append(Projection(f"w{layer}", populations[-2].name, populations[-1].name, "a_in", weight))
    return SpikingGraph(tuple(populations), tuple(projections), (populations[-1].name,))


def placed(graph: SpikingGraph, activity: Activity) -> Placement:
    """On Loihi 1 with the measured traffic, inputs on cores of their own as SANA-FE has them."""
    demands = [dataclasses.replace(demand, on_chip=True) for demand in layer_demands(graph, activity)]
    return place(demands, "loihi1")


def counted(graph: SpikingGraph, activity: Activity) -> list[Counts]:
    """One record per population; inputs compute nothing. A token is a step."""
    found = []
    for population in graph.populations:
        work = activity.populations.get(population.name)
        incoming = graph.incoming(population.name)
        found.append(
            Counts(
                population.name,
                tokens=activity.batch * activity.steps,
                synops=sum(activity.projections[p.name].synops for p in incoming),
                events=sum(activity.projections[p.name].events for p in incoming),
                neuron_updates_active=work.updates_active if work and incoming else 0,
                neuron_updates_inactive=work.updates_inactive if work and incoming else 0,
                dense_macs=sum(p.weight.size for p in incoming) * activity.batch * activity.steps,
                weight_bytes=sum(p.weight.size for p in incoming),
                graded=False,
                payload_bits=1,
            )
        )
    return found


def run_sanafe(graph: SpikingGraph, placement: Placement, spikes: np.ndarray, timeout_s: float = 300.0) -> dict[str, Any]:
    """The same network, placement and input (steps, inputs) in SANA-FE; its result as the worker prints it.

    Raises:
        SanafeError: no interpreter, no answer in time, or an answer that is none.
    """
    mesh = load_chip("loihi1").mesh
    assert mesh is not None
    layers: list[dict[str, Any]] = []
    for population in graph.populations:
        slots = [placement.cores[n].slot for n in placement.core_of(population.name)]
        cores = [divmod(slot, mesh.cores_per_tile) for slot in slots]
        entry: dict[str, Any] = {"name": population.name, "size": population.size, "core": cores}
        if population.kind == "input":
            entry["spikes"] = spikes.T.tolist()
        else:
            (projection,) = graph.incoming(population.name)
            weight = projection.weight.T.reshape(-1).tolist()
            entry |= {"threshold": THRESHOLD, "source": projection.source, "weight": weight}
        layers.append(entry)
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({"steps": len(spikes), "layers": layers}), encoding="utf-8")
        command = [str(sanafe_python()), str(WORKER), str(job)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=folder)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SanafeError(f"SANA-FE did not run: {error}") from error
    if done.returncode:
        raise SanafeError(
            f"SANA-FE failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
        )
    try:
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise SanafeError(f"SANA-FE printed no result: {done.stdout[-200:]!r}") from error
    return result


def check(inputs: int, width: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """Both sides of one network: counts, joules and seconds.

    Raises:
        SanafeError: as in :func:`run_sanafe`.
    """
    graph = network(inputs, width, seed)
    spikes = (np.random.default_rng(seed + 1).random((steps, inputs)) < INPUT_RATE).astype(np.int8)
    activity = simulate(graph, {"x": spikes[None]}, record=("spikes",))
    placement, counts = placed(graph, activity), counted(graph, activity)
    theirs = run_sanafe(graph, placement, spikes)
    report = account(counts, load_profile(PROFILE), placement=placement)
    groups = report.by_group()
    span = estimate(counts, placement, load_rates(PROFILE)).step * steps
    fired = {name: int((activity.spikes[name] != 0).sum()) for name in theirs["fired"] if name in activity.spikes}
    ours_counts = {"synops": sum(c.synops for c in counts), **_on_the_mesh(counts, placement)}
    ours_counts |= {f"spikes {name}": n for name, n in fired.items()}
    their_counts = {"synops": theirs["spikes"], "messages": theirs["packets_sent"], "hops": theirs["hops"]}
    their_counts |= {f"spikes {name}": theirs["fired"][name] for name in fired}
    energy = {
        name: {"ours_j": list(groups[ours]), "sanafe_j": theirs["energy"][key]}
        for name, ours, key in (
            ("synapse", "synapse", "synapse"),
            ("neuron", "neuron", "soma"),
            ("traffic", "traffic", "network"),
        )
    }
    dynamic = report.dynamic_j
    return {
        "cores": len(placement.cores),
        "counts_equal": ours_counts == their_counts,
        "counts": {"ours": ours_counts, "sanafe": their_counts},
        "energy": energy | {"total": {"ours_j": list(dynamic), "sanafe_j": theirs["energy"]["total"]}},
        "energy_inside_interval": dynamic[0] <= theirs["energy"]["total"] <= dynamic[2],
        "time": {"ours_s": list(span.to("s")), "sanafe_s": theirs["sim_time"]},
        "time_inside_interval": span.to("s")[0] <= theirs["sim_time"] <= span.to("s")[2],
    }


def _on_the_mesh(counts: Sequence[Counts], placement: Placement) -> dict[str, int]:
    """Messages, one per receiving core, and their hops."""
    mesh = load_chip("loihi1").mesh
    assert mesh is not None
    flows = layer_traffic(placement, mesh)
    sent = [(c.events, flows[c.layer]) for c in counts if c.layer in flows]
    messages = round(sum(events * flow.deliveries for events, flow in sent))
    return {"messages": messages, "hops": round(sum(events * (flow.hops_ew + flow.hops_ns) for events, flow in sent))}


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Print both sides and the JSON line. Exit code 0 when the counts are equal, 1 when not, 3 without SANA-FE."""
    parser = argparse.ArgumentParser(prog="spikegate study sanafe_check", description=str(__doc__).split("\n\n")[0])
    for name, default in (("inputs", 64), ("width", 128), ("steps", 100), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    add_json_argument(parser)
    args = parser.parse_args(argv)
    try:
        found = check(args.inputs, args.width, args.steps, args.seed)
    except SanafeError as error:
        print(f"sanafe_check: {error}", file=sys.stderr)
        return 3
    for key, value in found["counts"]["ours"].items():
        print(f"{key:<16} {value:>14,} {found['counts']['sanafe'][key]:>14,}")
    for key, value in found["energy"].items():
        low, mid, high = (1e6 * joules for joules in value["ours_j"])
        print(f"{key:<16} {mid:>11.4g} uJ ({low:.4g} to {high:.4g}) {1e6 * value['sanafe_j']:>11.4g} uJ")
    low, mid, high = (1e6 * seconds for seconds in found["time"]["ours_s"])
    print(f"{'time':<16} {mid:>11.4g} us ({low:.4g} to {high:.4g}) {1e6 * found['time']['sanafe_s']:>11.4g} us")
    finish(found, "sanafe_check")
    return 0 if found["counts_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
