"""Runs one graph in Lava: `python worker.py REQUEST.json`, under Python 3.10 with lava-nc 0.10.0.

The request names a graph file, an npz of inputs (batch, steps, size) per input population, a folder for the results,
and for each population the variables to record. Each sample runs in a network of its own, since Lava has no batch; its
arrays go to `sample<i>.npz` under "population/variable". Errors go to stderr and end the process at once: an
interpreter that held a failed Lava runtime may never leave by itself.

Shared memory segments bear a prefix from the request, so that whoever started this process can remove them by name.
When the starter dies, the pipe on stdin closes, and this process ends with its whole group.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import multiprocessing.shared_memory
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np


def load_graph_module():
    """The project's graph.py, by its path: it needs numpy only, and the package around it needs a newer Python."""
    path = Path(__file__).resolve().parents[1] / "graph.py"
    spec = importlib.util.spec_from_file_location("spikegate_graph", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def name_shared_memory(prefix: str) -> None:
    """Let multiprocessing name its segments `<prefix><random>`; the children inherit it."""
    memory = multiprocessing.shared_memory
    memory._SHM_NAME_PREFIX = "/" + prefix
    memory._SHM_SAFE_NAME_LENGTH = len(prefix) + 13


def end_with_starter(prefix: str, folder: str) -> None:
    """Wait, beside everything else, for stdin to close; then kill the group and remove what it leaves."""
    group = os.getpgid(0)

    def watch() -> None:
        os.read(0, 1)  # not sys.stdin: forked children close that one, and would wait for its lock
        if os.fork():
            return
        os.setsid()  # out of the group that is to end
        os.killpg(group, signal.SIGKILL)
        time.sleep(0.1)
        for path in glob.glob("/dev/shm/" + glob.escape(prefix) + "*"):
            os.unlink(path)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def end_with_failure(process, done: threading.Event) -> None:
    """Look, beside the run, whether a process of Lava's raised or vanished: Lava itself would wait for it for ever."""

    def fail(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
        os._exit(1)

    def watch() -> None:
        while not done.wait(0.05):
            infrastructure = getattr(process.runtime, "_messaging_infrastructure", None)
            for actor in list(infrastructure.actors) if infrastructure is not None else ():
                try:
                    error, code = actor.exception, actor.exitcode
                except ValueError:  # closed: Lava met an error and joins its processes, perhaps for ever
                    time.sleep(0.5)
                    fail("Lava stopped its network after an error\n")
                if error is not None:
                    fail(error[1])
                if code not in (None, 0):
                    fail("a process of the Lava network ended with code %d\n" % code)

    threading.Thread(target=watch, daemon=True).start()


def report_errors_of_models() -> None:
    """Let a process model that raised write its traceback and end at once; in Lava it goes on to wait for its peers."""
    from lava.magma.core.model.py.model import AbstractPyProcessModel

    join = AbstractPyProcessModel.join

    def join_or_end(self) -> None:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        join(self)

    AbstractPyProcessModel.join = join_or_end


def build(graph, inputs: dict, sample: int):
    """Lava processes of a graph: ({population: process}, [(projection, Dense)]), connected."""
    from lava.proc.dense.process import Dense
    from lava.proc.graded.process import GradedReluVec, GradedVec
    from lava.proc.io.source import RingBuffer
    from lava.proc.lif.process import LIF
    from lava.proc.prodneuron.process import ProdNeuron
    from lava.utils.weightutils import SignMode

    kinds = {"lif": LIF, "graded": GradedVec, "graded_relu": GradedReluVec, "product": ProdNeuron}
    populations = {}
    for population in graph.populations:
        if population.kind == "input":
            data = np.ascontiguousarray(inputs[population.name][sample].T, dtype=np.int32)  # RingBuffer: time last
            populations[population.name] = RingBuffer(data=data)
        else:
            populations[population.name] = kinds[population.kind](shape=(population.size,), **population.params)
    synapses = []
    for projection in graph.projections:
        dense = Dense(
            weights=projection.weight,
            weight_exp=projection.weight_exp,
            num_weight_bits=projection.num_weight_bits,
            sign_mode=SignMode[projection.sign_mode.upper()],
            num_message_bits=projection.num_message_bits,
        )
        populations[projection.source].s_out.connect(dense.s_in)
        dense.a_out.connect(getattr(populations[projection.target], projection.port))
        synapses.append((projection, dense))
    return populations, synapses


def run_sample(graph, inputs: dict, sample: int, record: dict, path: str, fault: str) -> None:
    """Build, run for all steps, stop; the recorder has then written `path`."""
    from lava.magma.core.run_conditions import RunSteps
    from lava.magma.core.run_configs import Loihi2SimCfg
    from recorder import make_recorder

    populations, synapses = build(graph, inputs, sample)
    steps = next(iter(inputs.values())).shape[1]
    messages, variables, sources = [], [], []
    for name, wanted in record.items():
        for variable in wanted:
            key = name + "/" + variable
            if variable in ("u", "v"):
                variables.append((key, getattr(populations[name], variable)))
                continue
            messages.append((key, graph.population(name).size))
            if variable == "spikes":
                sources.append([populations[name].s_out])
            else:  # a port: what all its projections deliver together
                sources.append([d.a_out for p, d in synapses if (p.target, p.port) == (name, variable)])
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


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    name_shared_memory(request["shared_memory_prefix"])
    end_with_starter(request["shared_memory_prefix"], request["folder"])
    report_errors_of_models()
    graph = load_graph_module().load_graph(request["graph"])
    with np.load(request["inputs"], allow_pickle=False) as archive:
        inputs = {name: archive[name] for name in graph.inputs}
    for sample in range(next(iter(inputs.values())).shape[0]):
        path = os.path.join(request["folder"], "sample%d.npz" % sample)
        run_sample(graph, inputs, sample, request["record"], path, request["fault"])


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
