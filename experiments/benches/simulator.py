"""`python -m experiments.bench simulator`: our simulator against Lava in the same run, and against its own matrix products.

Two LIF layers n-n-n, 20 % input, thresholds set so that both layers fire at about 35 %. Times are wall clock per step
and sample, best of several runs on `--threads` threads. Lava runs one sample, already started, without monitors, its
output read by a sink. Ours records the output layer and counts everything.

Two settings of ours are measured, each in a process of its own, as whoever calls `simulate` first meets them: "default"
(`fused=None`: the scan is compiled where one call is long enough to pay for it) and "fused" (`fused=True`: compiled at the
first call). The first call is reported beside the best later one. Targets are those of the default.

The products alone are `torch._int_mm` (int8 with int32 sums) or float32, whichever the simulator takes, on messages that
the network really sends, with nothing around them.

The last line is JSON: {"n256": {"default": {"b1": r, "b256": r, "gemm_fraction": f}, "fused": {...}}, "n1024": {...}}, r
being Lava's time over ours at that batch, f the share of the speed of the products alone at batch 256.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from experiments.benches.peers import report
from experiments.benches.products import products
from experiments.runs.output import add_json_argument, entry, finish
from neuro.graph import Population, Projection, SpikingGraph, save_graph
from neuro.simulators.activity import Activity
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava.client import LavaError, find_python

WIDTHS = (256, 1024)
BATCHES = (1, 256)
TARGETS = {("n256", "b1"): 30, ("n256", "b256"): 500, ("n1024", "b1"): 20, ("n1024", "b256"): 150}
SETTINGS: dict[str, bool | None] = {"default": None, "fused": True}
"""Name -> `fused` of `simulate`."""
INPUT_RATE = 0.2
FIRING = 0.35
# Steps of one timed run at batch 1 and at batch 256; long enough that setting up does not count.
STEPS = {(256, 1): 8000, (256, 256): 128, (1024, 1): 4000, (1024, 256): 48}


def network(n: int, vths: tuple[int, int] = (1, 1), seed: int = 0) -> SpikingGraph:
    """Two LIF layers of n neurons, mixed-sign 8-bit weights, decays 1/4 (u) and 1/8 (v)."""
    rng = np.random.default_rng(seed)
    populations = [Population("x", "input", n)]
    projections = []
    for layer, vth in enumerate(vths):
        weight = 2 * np.clip(np.rint(rng.normal(0, 40, (n, n))), -127, 127).astype(np.int32)
        populations.append(Population(f"layer{layer + 1}", "lif", n, {"du": 1023, "dv": 512, "vth": vth}))
        projections.append(Projection(f"w{layer}", populations[-2].name, populations[-1].name, "a_in", weight))
    return SpikingGraph(tuple(populations), tuple(projections), (populations[-1].name,))


def spikes(n: int, batch: int, steps: int, seed: int = 1) -> torch.Tensor:
    """Binary input, int8 (batch, steps, n)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, steps, n, generator=generator) < INPUT_RATE).to(torch.int8)


def rates(activity: Activity) -> list[float]:
    """Share of updates that fired, per layer."""
    found = []
    for name in ("layer1", "layer2"):
        counts = activity.populations[name]
        found.append(counts.updates_active / (counts.updates_active + counts.updates_inactive))
    return found


def tuned(n: int) -> SpikingGraph:
    """The network with thresholds at which each layer fires at `FIRING`, by bisection, layer by layer."""
    inputs = {"x": spikes(n, 2, 60)}
    vths = [1, 1]
    for layer in (0, 1):
        low, high = 0, 2**17 - 1
        while high - low > 1:
            vths[layer] = (low + high) // 2
            fired = rates(simulate(network(n, (vths[0], vths[1])), inputs, record=()))[layer]
            low, high = (vths[layer], high) if fired > FIRING else (low, vths[layer])
    return network(n, (vths[0], vths[1]))


def best_of(call: Callable[[], object], least_s: float = 2.0, runs: int = 5) -> float:
    """Shortest wall-clock seconds of one call, over at least `runs` calls and `least_s` seconds."""
    shortest, end, count = float("inf"), time.perf_counter() + least_s, 0
    while count < runs or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - begin)
        count += 1
    return shortest


@dataclass(frozen=True)
class Measured:
    """One setting at one batch: seconds of the first call, seconds a step and sample of the best one, and what ran."""

    first_s: float
    step_s: float
    firing: tuple[float, ...]
    synops: int
    peak_mib: float


def measured(graph: SpikingGraph, batch: int, steps: int, fused: bool | None, threads: int, runs: int = 5) -> Measured:
    """Run a setting of `simulate` in this process, which should be a new one: what is compiled stays for the next call."""
    torch.set_num_threads(threads)
    inputs = {"x": spikes(graph.population("x").size, batch, steps)}
    begin = time.perf_counter()
    first = simulate(graph, inputs, fused=fused)
    first_s = time.perf_counter() - begin
    best_s = best_of(partial(simulate, graph, inputs, record=(), fused=fused), runs=runs)
    synops = sum(p.synops for p in first.projections.values())
    return Measured(first_s, best_s / (steps * batch), tuple(rates(first)), synops, peak_mib())


def measured_apart(graph: SpikingGraph, batch: int, steps: int, fused: bool | None, threads: int) -> Measured:
    """`measured` in a process of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, graph, batch, steps, fused, threads).result()


LAVA = """
import sys, time
import numpy as np
sys.path.insert(0, sys.argv[2])
from worker import load_graph_module, report_errors_of_models
from builder import build
graph = load_graph_module().load_graph(sys.argv[1])
kinds = sys.modules["neuro.graph.kinds"].KINDS
from lava.magma.core.run_conditions import RunSteps
from lava.magma.core.run_configs import Loihi2SimCfg
from lava.proc.io.sink import RingBuffer
steps = int(sys.argv[3])
rng = np.random.default_rng(1)
name = graph.inputs[0]
data = {name: (rng.random((1, 64, graph.population(name).size)) < float(sys.argv[4])).astype(np.int32)}
populations, _ = build(graph, kinds, data, 0)
out = populations[graph.outputs[0]]
sink = RingBuffer(shape=out.s_out.shape, buffer=8)
out.s_out.connect(sink.a_in)
config = Loihi2SimCfg(select_tag="fixed_pt")
sink.run(condition=RunSteps(num_steps=4), run_cfg=config)
best = 1e9
for _ in range(int(sys.argv[5])):
    begin = time.perf_counter()
    sink.run(condition=RunSteps(num_steps=steps), run_cfg=config)
    best = min(best, (time.perf_counter() - begin) / steps)
print("SECONDS", best, flush=True)
sink.stop()
"""


def lava_seconds(graph: SpikingGraph, steps: int, repeats: int = 5) -> float:
    """Lava's wall-clock seconds per step, the best of some runs of one started network.

    Raises:
        LavaError: no Lava, or it failed; with its text.
    """
    python = find_python()
    worker = Path(__file__).resolve().parents[2] / "neuro" / "lava_worker"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as folder:
        path = save_graph(graph, Path(folder) / "bench.graph.npz")
        script = Path(folder) / "bench_lava.py"
        script.write_text(LAVA)
        command = [str(python), str(script), str(path), str(worker), str(steps), str(INPUT_RATE), str(repeats)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=folder)
        except subprocess.TimeoutExpired as error:
            raise LavaError("Lava did not finish within 600 s") from error
    for line in done.stdout.splitlines():
        if line.startswith("SECONDS"):
            return float(line.split()[1])
    raise LavaError(f"Lava gave no time; stderr: {done.stderr[-2000:]}")


def products_alone(graph: SpikingGraph, activity: Activity, rows: int) -> tuple[float, str]:
    """Seconds for the two matrix products of one step and sample, nothing else, and the arithmetic they take."""
    both, multiplied, how = products(graph, activity, rows)
    both()
    return best_of(both) / multiplied, how


def peak_mib() -> float:
    """Largest resident memory of this process so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if platform.system() == "Darwin" else peak / 2**10


def _line(n: int, batch: int, steps: int, name: str, ours: Measured, lava_s: float) -> str:
    ratio, target = lava_s / ours.step_s, TARGETS.get((f"n{n}", f"b{batch}"))
    judged = target is not None and name == "default"
    wanted = f", target {target}x: {'met' if ratio >= (target or 0) else 'missed'}" if judged else ""
    return (
        f"n={n} batch {batch}, {name} (fused={SETTINGS[name]}): {ours.step_s * 1e6:.2f} us a step and sample, {ratio:.0f}x"
        f" Lava{wanted}; first call {ours.first_s:.1f} s; firing {' '.join(f'{rate:.2f}' for rate in ours.firing)};"
        f" {ours.synops / (ours.step_s * steps * batch):.2e} synops/s; peak {ours.peak_mib:.0f} MiB"
    )


@entry
def main(argv: Sequence[str]) -> int:
    """Measure, print a table and the JSON line. Exit code 0 when it ran, whatever the numbers; 1 without Lava."""
    parser = argparse.ArgumentParser(prog="spikegate bench simulator", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of ours (default: torch's)")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="n (default: 256 1024)")
    parser.add_argument("--lava-steps", type=int, default=200, help="steps of one timed Lava run (default: 200)")
    parser.add_argument(
        "--steps", type=int, default=None, help="steps of one timed run of ours (default: by width and batch)"
    )
    add_json_argument(parser)
    parser.add_argument("--peers", action="store_true", help="beside float simulators and Lava; --peers --help says how")
    if "--peers" in argv:
        return report.main([word for word in argv if word != "--peers"])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    print(f"{args.threads} threads on {os.cpu_count()} cores, load {load:.1f}, torch {torch.__version__}")
    if load > 1:
        print("note: the machine is busy with other work; these times are upper bounds")
    document: dict[str, dict[str, dict[str, float]]] = {}
    for n in args.widths:
        graph = tuned(n)
        try:
            lava = lava_seconds(graph, args.lava_steps)
        except LavaError as error:
            print(f"bench simulator: {error}", file=sys.stderr)
            return 1
        print(f"n={n}: Lava {lava * 1e3:.3f} ms a step")
        found: dict[str, dict[str, float]] = {name: {} for name in SETTINGS}
        for batch in BATCHES:
            steps = args.steps or STEPS.get((n, batch), 100)
            for name, fused in SETTINGS.items():
                ours = measured_apart(graph, batch, steps, fused, args.threads)
                found[name][f"b{batch}"] = round(lava / ours.step_s, 1)
                print(_line(n, batch, steps, name, ours, lava))
                if batch == max(BATCHES):
                    run = simulate(graph, {"x": spikes(n, batch, steps)}, record=("spikes",))
                    alone, how = products_alone(graph, run, 4096)
                    found[name]["gemm_fraction"] = round(alone / ours.step_s, 3)
                    share = f"{name} runs at {alone / ours.step_s:.2f} of that speed"
                    print(f"n={n}: the products alone ({how}) {alone * 1e6:.2f} us; {share}")
        document[f"n{n}"] = found
    finish(document, "bench-simulator")
    return 0


if __name__ == "__main__":
    sys.exit(main())
