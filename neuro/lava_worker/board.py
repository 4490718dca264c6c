"""A graph on a Loihi 2 board, through Lava's closed extension: the same builder, with adapters at both ends.

What is used of the extension is what Intel's public notebooks and Lava's own sources show: `lava.proc.embedded_io.spike`
(PyToNxAdapter, NxToPyAdapter), `lava.utils.loihi2_profiler` (Loihi2Power, Loihi2ExecutionTime, Loihi2Activity, handed to
Loihi2HwCfg as callbacks), `lava.utils.loihi2_state_probes` (StateProbe, whose time_series holds one neuron after the
other). It was run against a stand-in of these, never against a board. This file only defines things.
"""

from __future__ import annotations

import math
import sys
import threading

import numpy as np

BINARY = ("lif", "lif_reset")
GRADED_BITS = 24  # of an output whose messages are no plain spikes and that feeds nobody who says how wide they are
# Attribute of a profiler -> the name under which it is told; lists and numbers, in the units of the extension.
POWER = {  # watts
    "total_power": "total_w",
    "static_total_power": "static_w",
    "vdd_power": "vdd_w",
    "vddm_power": "vddm_w",
    "vddio_power": "vddio_w",
}
TIME = {  # microseconds
    "avg_time_per_step": "mean_step_us",
    "execution_time_per_step": "execution_us",
    "management_time_per_step": "management_us",
    "host_time_per_step": "host_us",
}
ACTIVITY = {  # counts per core over the run
    "chip_idx": "chip",
    "core_idx": "core",
    "syn_ops": "synops",
    "dendrite_updates": "neuron_updates",
    "spikes_in": "spikes_in",
    "axon_out": "spikes_out",
}


class NoRoute(RuntimeError):
    """The host of the board cannot be reached."""


class NotOnBoard(ValueError):
    """The extension has no model for the neuro cores of something in the graph, or cannot read what was asked for."""


def open_route(board: dict) -> None:
    """Tell Lava where the host is, by its own functions.

    `board`: generation, and either route "slurm" with board or partition, or "ethernet" with host and binary.
    """
    from lava.utils import loihi, slurm

    if not loihi.is_installed():
        raise NoRoute("Lava's Loihi extension is not installed: lava.utils.loihi2_profiler was not found")
    _read_tables_without_empty_lines(slurm)
    generation = loihi.ChipGeneration[board["generation"]]
    try:
        if board["route"] == "slurm":
            loihi.use_slurm_host(partition=board["partition"], board=board["board"], loihi_gen=generation)
        else:
            loihi.use_ethernet_host(host_address=board["host"], host_binary_path=board["binary"], loihi_gen=generation)
    except ValueError as error:
        raise NoRoute(str(error)) from error


def _read_tables_without_empty_lines(slurm) -> None:
    """Lava 0.10 splits what sinfo prints at line ends and fails with IndexError on the empty text after the last one.

    It also compares names of partitions with the star that marks the default one still on, and lets a missing sinfo pass
    as FileNotFoundError.
    """
    if hasattr(slurm, "spikegate_command"):
        return
    slurm.spikegate_command = slurm.try_run_command

    def run(command):
        try:
            rows = [line.split() for line in slurm.spikegate_command(command) if line.strip()]
        except OSError:
            return []
        column = 2 if "-N" in command else 0
        if command[0] == "sinfo":
            rows = [[word.rstrip("*") if place == column else word for place, word in enumerate(row)] for row in rows]
        return [" ".join(row) for row in rows]

    slurm.try_run_command = run


def on_neuro_core(model) -> bool:
    """Whether a process model asks for a neuro core; else it would run on a CPU, and be no board run."""
    from lava.magma.core.resources import Loihi2NeuroCore, NeuroCore

    return any(resource in (NeuroCore, Loihi2NeuroCore) for resource in model.required_resources)


def make_config(owners: dict, callbacks: list):
    """Loihi2HwCfg that puts every part of the graph on neuro cores or refuses; `owners`: process -> what it is."""
    from lava.magma.core.run_configs import Loihi2HwCfg
    from lava.proc.io.source import PySendModelFixed, RingBuffer

    class BoardConfig(Loihi2HwCfg):
        """Lava's own falls back to a Python model, in floating point, where there is none for the chip."""

        def select(self, process, proc_models):
            if process not in owners:
                return super().select(process, proc_models)
            models = [model for model in proc_models if on_neuro_core(model)]
            if not models:
                raise NotOnBoard("%s: the Loihi extension has no model of it for a neuro core" % owners[process])
            return next((model for model in models if "fixed_pt" in model.tags), models[0])

    return BoardConfig(exception_proc_model_map={RingBuffer: PySendModelFixed}, callback_fxs=callbacks)


def message_bits(graph, name: str) -> int:
    """Width of a population's messages on the way to or from the host; 0 for plain spikes."""
    widths = [projection.num_message_bits for projection in graph.outgoing(name)]
    if graph.population(name).kind in BINARY:
        return 0
    return max(widths) if widths else GRADED_BITS


def plain(value):
    """Numbers as JSON holds them: a float, a list of floats, or None for what is absent or no finite number."""
    if value is None:
        return None
    found = [float(each) if math.isfinite(each) else None for each in np.asarray(value, dtype=float).ravel()]
    return found if np.ndim(value) else found[0]


def told(profilers: dict) -> dict:
    """What the profilers measured, as JSON."""
    tables = {"power": POWER, "time": TIME, "activity": ACTIVITY}
    return {
        what: {word: plain(getattr(profilers[what], attribute, None)) for attribute, word in table.items()}
        for what, table in tables.items()
    }


def series(probe, key: str, size: int, steps: int) -> np.ndarray:
    """A state probe's values as int32 (steps, size)."""
    values = np.asarray(probe.time_series)
    if values.size != size * steps:
        raise NotOnBoard("%s: the probe has %d values for %d neurons and %d steps" % (key, values.size, size, steps))
    return values.reshape(size, steps).T.astype(np.int32)


def run_on_board(graph, inputs: dict, sample: int, record: dict, path: str, board: dict, steps: int) -> dict:
    """Build, run for all steps, stop; the arrays are at `path` then, and what the profilers measured is returned."""
    open_route(board)
    from builder import build
    from guard import end_with_failure, forget_processes
    from lava.magma.core.run_conditions import RunSteps
    from lava.proc.embedded_io.spike import NxToPyAdapter, PyToNxAdapter
    from lava.utils.loihi2_profiler import Loihi2Activity, Loihi2ExecutionTime, Loihi2Power
    from lava.utils.loihi2_state_probes import StateProbe
    from recorder import make_recorder

    def entrance(name, process):
        adapter = PyToNxAdapter(shape=process.s_out.shape, num_message_bits=message_bits(graph, name))
        process.s_out.connect(adapter.inp)
        return adapter.out

    kinds = sys.modules["neuro.graph.kinds"].KINDS
    populations, synapses = build(graph, kinds, inputs, sample, entrance)
    messages, exits, probes = [], [], {}
    for name, wanted in record.items():
        population = graph.population(name)
        for variable in wanted:
            key = name + "/" + variable
            if variable in kinds[population.kind].states:
                probes[key] = (StateProbe(getattr(populations[name], variable)), population.size)
            elif variable == "spikes" and population.kind != "input":
                adapter = NxToPyAdapter(shape=(population.size,), num_message_bits=message_bits(graph, name))
                populations[name].s_out.connect(adapter.inp)
                messages.append((key, population.size))
                exits.append(adapter.out)
            else:
                raise NotOnBoard("%s cannot be read from a board; spikes of neurons and their states can" % key)
    recorder = make_recorder(messages, [], steps, path, "")
    for index, port in enumerate(exits):
        port.connect(getattr(recorder, "port%d" % index))
    profilers = {
        "power": Loihi2Power(num_steps=steps),
        "time": Loihi2ExecutionTime(),
        "activity": Loihi2Activity(),
    }
    owners = {populations[p.name]: "population %r (%s)" % (p.name, p.kind) for p in graph.populations if p.kind != "input"}
    owners.update({process: "projection %r (%s)" % (p.name, p.kind) for p, process in synapses})
    config = make_config(owners, [*profilers.values(), *(probe for probe, _ in probes.values())])
    done = threading.Event()
    end_with_failure(recorder, done)
    recorder.run(condition=RunSteps(num_steps=steps), run_cfg=config)
    done.set()
    recorder.stop()
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays.update({key: series(probe, key, size, steps) for key, (probe, size) in probes.items()})
    np.savez(path, **arrays)
    measured = told(profilers)
    del populations, synapses, recorder, owners, config
    forget_processes()
    return measured
