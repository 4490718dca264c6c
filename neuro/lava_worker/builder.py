"""Lava processes of a graph: one per population and per projection, connected, of every kind that Lava 0.10 has.

Populations are flat vectors; a convolution's ports are reshaped at both ends, in C order. This file only defines
things: Lava executes every file that lies beside a process class.
"""

from __future__ import annotations

import numpy as np


class NotInLava(ValueError):
    """The graph holds something that lava-nc 0.10.0 has no fixed-point model for."""


def _plain(params) -> dict:
    return {key: np.array(value) if isinstance(value, np.ndarray) else int(value) for key, value in params.items()}


def make_population(population, lava_name: str, data):
    """The Lava process of one population; `data`: int32 (size, steps) for an input, else None."""
    from lava.proc.graded.process import GradedReluVec, GradedVec, NormVecDelay
    from lava.proc.io.source import RingBuffer
    from lava.proc.lif.process import LIF, LIFReset, TernaryLIF
    from lava.proc.prodneuron.process import ProdNeuron
    from lava.proc.rf.process import RF
    from lava.proc.rf_iz.process import RF_IZ
    from lava.proc.sdn.process import ActivationMode, Delta, Sigma, SigmaDelta

    classes = (RingBuffer, LIF, LIFReset, TernaryLIF, Sigma, Delta, SigmaDelta, GradedVec, GradedReluVec)
    known = {cls.__name__: cls for cls in (*classes, ProdNeuron, NormVecDelay, RF, RF_IZ)}
    params = _plain(population.params)
    if params.pop("corrected", 0):
        raise NotInLava(
            "population %r: the corrected %s is not in lava-nc 0.10.0; set corrected to 0"
            % (population.name, population.kind)
        )
    if lava_name not in known:
        raise NotInLava(
            "population %r (%s): lava-nc 0.10.0 has no fixed-point model of it; run it in mode 'chip' of the simulator"
            % (population.name, population.kind)
        )
    if population.kind == "input":
        return RingBuffer(data=data)
    if population.kind == "sigma_delta":
        params["act_mode"] = ActivationMode.RELU if params.pop("relu") else ActivationMode.UNIT
    if "cum_error" in params:
        params["cum_error"] = bool(params["cum_error"])
    if "sin_decay" in params:
        return make_resonator(known[lava_name], population.size, params)
    thresholds = params.get("vth")
    if not isinstance(thresholds, np.ndarray):
        return known[lava_name](shape=(population.size,), **params)
    process = known[lava_name](shape=(population.size,), **{**params, "vth": 0})
    process.vth.shape = (population.size,)  # Lava's constructor takes one threshold; its model compares neuron by neuron
    process.vth.init = thresholds
    return process


def make_resonator(lava_class, size: int, params: dict):
    """A process of Lava's RF or RF_IZ with these very integers.

    Its constructor takes a period and a decay instead, and rounds what it computes from them down: the period and decay of
    sin_decay and cos_decay 2,896 come out as 2,895 and 2,896.
    """
    process = lava_class(shape=(size,), period=4, alpha=0, vth=params["vth"], state_exp=params["state_exp"], decay_bits=12)
    for variable in (process.sin_decay, process.cos_decay):
        value = params[variable.name]
        if isinstance(value, np.ndarray):
            variable.shape = (size,)
        variable.init = value
    return process


def make_projection(projection):
    """The Lava process of one projection."""
    from lava.proc.conv.process import Conv
    from lava.proc.dense.process import DelayDense, Dense
    from lava.proc.sparse.process import Sparse
    from lava.utils.weightutils import SignMode
    from scipy.sparse import csr_matrix

    weight = np.array(projection.weight, dtype=np.int32)
    if projection.kind == "conv":
        conv = projection.conv
        return Conv(
            weight=weight,
            input_shape=conv.input_shape,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            num_message_bits=projection.num_message_bits,
        )
    common = {
        "weight_exp": projection.weight_exp,
        "num_weight_bits": projection.num_weight_bits,
        "sign_mode": SignMode[projection.sign_mode.upper()],
        "num_message_bits": projection.num_message_bits,
    }
    if projection.kind == "delay_dense":
        return DelayDense(weights=weight, delays=np.array(projection.delays, dtype=int), **common)
    if projection.kind == "sparse":
        return Sparse(weights=csr_matrix(weight), **common)
    return Dense(weights=weight, **common)


def flat(port):
    """An output port as a vector: itself, or reshaped in C order."""
    return port if len(port.shape) == 1 else port.reshape((int(np.prod(port.shape)),))


def build(graph, kinds: dict, inputs: dict, sample: int, entrance=None):
    """Processes of a graph, connected.

    Args:
        graph: a SpikingGraph.
        kinds: the table `neuro.graph.kinds.KINDS`.
        inputs: integers (batch, steps, size) per input population.
        sample: which of the batch.
        entrance: (name, process of an input) -> the port from which its messages go on; default its own. On a board that
            is an adapter.

    Returns:
        ({population: process}, [(projection, process)]).
    """
    populations, entrances = {}, {}
    for population in graph.populations:
        data = None
        if population.kind == "input":  # RingBuffer: time last
            data = np.ascontiguousarray(inputs[population.name][sample].T, dtype=np.int32)
        populations[population.name] = make_population(population, kinds[population.kind].lava, data)
        if entrance is not None and population.kind == "input":
            entrances[population.name] = entrance(population.name, populations[population.name])
    synapses = []
    for projection in graph.projections:
        process = make_projection(projection)
        source = entrances.get(projection.source)
        if source is None:
            source = getattr(populations[projection.source], projection.source_port)
        if projection.kind == "conv":
            source = source.reshape(tuple(projection.conv.input_shape))
        source.connect(process.s_in)
        flat(process.a_out).connect(getattr(populations[projection.target], projection.port))
        synapses.append((projection, process))
    return populations, synapses
