"""Runs graphs in Lava: `python worker.py SESSION`, under Python 3.10 with lava-nc 0.10.0.

SESSION is a JSON object: the folder, the prefix of shared memory, the number of the pipe for replies, and folders to look
in for a Loihi extension. Each line at stdin is a request (JSON): a graph file, an npz of inputs (batch, steps, size) per
input population, a folder for the results, and for each population the variables to record. Each sample runs in a network
of its own, since Lava has no batch; its arrays go to `sample<i>.npz` under "population/variable". Each request gets one
line of reply. After an error the worker ends: what a failed Lava leaves behind is not to be used again.

Shared memory segments bear the prefix, so that whoever started this process can remove them by name. When the starter
dies, this process ends with its whole group.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
import threading
import traceback
import types
from pathlib import Path

import numpy as np
from guard import (
    allocate_at_once,
    collect_by_hand,
    end_with_failure,
    forget_processes,
    look_for_models_once,
    name_shared_memory,
    report_errors_of_models,
    requests_until_the_end,
)


def load_graph_module():
    """The project's package of graphs: it needs numpy only, and the package around it needs a newer Python.

    So a bare package stands in for `neuro`, over the same folder, without its __init__.py.
    """
    package = types.ModuleType("neuro")
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["neuro"] = package
    return importlib.import_module("neuro.graph")


def wiring(graph, kinds, populations: dict, synapses: list, record: dict) -> tuple:
    """What a recorder is to keep: ([(key, size)] of messages, [(key, Var)], [output ports] of each message)."""
    from builder import flat

    messages, variables, sources = [], [], []
    for name, wanted in record.items():
        for variable in wanted:
            key = name + "/" + variable
            if variable in kinds[graph.population(name).kind].states:
                variables.append((key, getattr(populations[name], variable)))
                continue
            messages.append((key, graph.population(name).size))
            if variable == "spikes":
                sources.append([populations[name].s_out])
            elif variable == "spikes2":
                sources.append([populations[name].s2_out])
            else:  # a port: what all its projections deliver together
                sources.append([flat(d.a_out) for p, d in synapses if (p.target, p.port) == (name, variable)])
    return messages, variables, sources


def run_sample(graph, inputs: dict, sample: int, record: dict, path: str, fault: str, steps: int) -> None:
    """Build, run for all steps, stop; the recorder has then written `path`."""
    from builder import build
    from lava.magma.core.run_conditions import RunSteps
    from lava.magma.core.run_configs import Loihi2SimCfg
    from recorder import make_recorder

    kinds = sys.modules["neuro.graph.kinds"].KINDS
    populations, synapses = build(graph, kinds, inputs, sample)
    messages, variables, sources = wiring(graph, kinds, populations, synapses, record)
    recorder = make_recorder(messages, variables, steps, path, fault)
    for index, ports in enumerate(sources):
        for port in ports:
            port.connect(getattr(recorder, "port%d" % index))
    done = threading.Event()
    end_with_failure(recorder, done)
    # No stop() after an error: it would wait for processes that wait for each other. The caller ends this process.
    recorder.run(condition=RunSteps(num_steps=steps), run_cfg=Loihi2SimCfg(select_tag="fixed_pt"))
    done.set()
    recorder.stop()
    del populations, synapses, recorder
    forget_processes()


def answer(load_graph, request: dict) -> dict:
    """Run one request and say what came of it beside the files: {} for a simulation, what a board told otherwise."""
    graph = load_graph(request["graph"])
    with np.load(request["inputs"], allow_pickle=False) as archive:
        inputs = {name: archive[name] for name in graph.inputs}
    path = os.path.join(request["folder"], "sample%d.npz")
    told = {}
    for sample in range(request["batch"]):
        if request.get("board"):
            from board import run_on_board

            told = run_on_board(graph, inputs, sample, request["record"], path % sample, request["board"], request["steps"])
        else:
            run_sample(graph, inputs, sample, request["record"], path % sample, request["fault"], request["steps"])
    return told


def kind_of(error: BaseException) -> str:
    """The word by which whoever started this process tells errors apart."""
    name = type(error).__name__
    if name in ("NotInLava", "NotOnBoard", "NoRoute"):
        return name
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "SharedMemoryFull"
    broken = isinstance(error, (EOFError, ConnectionError)) or "Exception(s) occurred" in str(error)
    return "PartFailed" if broken else "LavaFailed"


def main() -> None:
    session = json.loads(sys.argv[1])
    sys.path[1:1] = session["paths"]
    name_shared_memory(session["shared_memory_prefix"])
    lines = requests_until_the_end(session["shared_memory_prefix"], session["folder"])
    report_errors_of_models()
    look_for_models_once()
    allocate_at_once(session["shared_memory_limit"])
    import recorder  # noqa: F401  with most of Lava

    load_graph = load_graph_module().load_graph
    collect_by_hand()
    while True:
        try:
            reply = {"done": answer(load_graph, json.loads(lines.get()))}
        except BaseException as error:
            traceback.print_exc()
            sys.stderr.flush()
            reply = {"error": kind_of(error), "text": str(error)}
        os.write(session["reply"], (json.dumps(reply) + "\n").encode())
        if "error" in reply:
            os._exit(1)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
