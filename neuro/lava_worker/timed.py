"""Times one graph in Lava: `python timed.py REQUEST`, under Python 3.10 with lava-nc 0.10.0.

REQUEST is a JSON file: "graph", a file of `save_graph`; "input", an npz with "x" (batch, steps, neurons); "steps" of one
run; "least_s"; "clock", "wall", or "cpu" for the seconds of all processes of the network together; "facts", a file, into
which go {"first_s": seconds of the first run, "versions": {"lava-nc": version}}. Then every line at stdin is answered by a
line `SECONDS x`: the median of one run, over runs of at least `least_s` seconds.

Lava has no batch: the first sample is run, over and over. The network is started once, without monitors; its output is
read by a sink, so that every step takes place.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ENDING_S = 4.0


def build(request: dict):
    """(facts, a function that runs all steps once, one that stops the network)."""
    from builder import build as processes_of
    from lava.magma.core.run_conditions import RunSteps
    from lava.magma.core.run_configs import Loihi2SimCfg
    from lava.proc.io.sink import RingBuffer
    from worker import load_graph_module

    graph = load_graph_module().load_graph(request["graph"])
    with np.load(request["input"], allow_pickle=False) as archive:
        data = {graph.inputs[0]: archive["x"][:1].astype(np.int32)}
    populations, _ = processes_of(graph, sys.modules["neuro.graph.kinds"].KINDS, data, 0)
    out = populations[graph.outputs[0]]
    sink = RingBuffer(shape=out.s_out.shape, buffer=8)
    out.s_out.connect(sink.a_in)
    steps, config = RunSteps(num_steps=request["steps"]), Loihi2SimCfg(select_tag="fixed_pt")

    def run() -> None:
        sink.run(condition=steps, run_cfg=config)

    begin = time.perf_counter()
    run()
    return {"first_s": time.perf_counter() - begin, "versions": {"lava-nc": version("lava-nc")}}, run, sink.stop


def cpu_s() -> float:
    """Seconds of a processor that this session's living processes have had, to a hundredth or so each (`man 5 proc`)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == os.getpid():
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def median_s(call, least_s: float, clock) -> float:
    """Median seconds of one call, over calls of at least `least_s` seconds."""
    seconds: list = []
    while not seconds or sum(seconds) < least_s:
        begin = clock()
        call()
        seconds.append(clock() - begin)
    return statistics.median(seconds)


def end_whole_group() -> None:
    """By force: a network that does not stop would wait for ever."""
    os.killpg(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Build, write the facts, answer until stdin ends, stop."""
    os.setsid()
    answers, sys.stdout = sys.stdout, sys.stderr
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        facts, call, stop = build(request)
        Path(request["facts"]).write_text(json.dumps(facts))
        clock = {"wall": time.perf_counter, "cpu": cpu_s}[request["clock"]]
        for _ in sys.stdin:
            print("SECONDS", median_s(call, request["least_s"], clock), file=answers, flush=True)
        timer = threading.Timer(ENDING_S, end_whole_group)
        timer.daemon = True
        timer.start()
        stop()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        end_whole_group()


if __name__ == "__main__":
    main()
