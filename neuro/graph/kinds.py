"""The kinds of node that a spiking graph may hold: their ports, states, parameters and ranges.

One table for populations, one for projections; the graph checks against them, the simulators and the Lava worker build
from them, and whoever generates random networks draws from them. Register widths are those that lava-nc 0.10.0 writes
beside its process models (lava/proc/lif, rf, rf_iz, sdn, graded, prodneuron, dense, sparse, conv); Lava itself enforces
none.

No imports beyond the standard library: the Lava worker reads this file under Python 3.10.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from neuro.graph.text import quoted


class GraphError(ValueError):
    """A population, projection or graph that the fixed-point arithmetic is not defined for."""


@dataclass(frozen=True)
class Parameter:
    """One integer parameter: `low`..`high`, inclusive; one value per neuron where `per_neuron`; optional if it has a
    `default`."""

    low: int
    high: int
    per_neuron: bool = False
    default: int | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of population.

    Attributes:
        lava: Lava's process class, or "" where Lava 0.10 has no fixed-point model of it.
        extends: where Lava has none, its class whose arithmetic mode "lava" of the simulator goes on from.
        instead: what to do to run the same on Lava, where there is something.
        ports: names of the input ports; several projections to one port add up.
        parameters: name -> range.
        states: variables kept from step to step, as Lava names them; all int32, one value per neuron.
        outs: names of the output ports.
        silent_ports: whether the population may live with nothing arriving at a port.
        family: whose arithmetic it is: "loihi", "xylo", or "" for inputs, which every chip has.
    """

    lava: str
    ports: tuple[str, ...]
    parameters: dict[str, Parameter] = field(default_factory=dict)
    states: tuple[str, ...] = ()
    outs: tuple[str, ...] = ("s_out",)
    silent_ports: bool = False
    extends: str = ""
    instead: str = ""
    family: str = "loihi"


VTH_17 = Parameter(0, 2**17 - 1)  # in units of 64
VTH_24 = Parameter(0, 2**23 - 1)
VTH_EACH = Parameter(0, 2**23 - 1, per_neuron=True)
_LIF = {
    "du": Parameter(0, 4095),
    "dv": Parameter(0, 4095),
    "bias_mant": Parameter(-(2**12), 2**12 - 1, per_neuron=True, default=0),
    "bias_exp": Parameter(0, 7, per_neuron=True, default=0),
}
SHIFT_4 = Parameter(0, 15, per_neuron=True)
_XYLO = {
    "dash_mem": SHIFT_4,  # a state loses itself >> dash at every step
    "dash_syn": SHIFT_4,
    "vth": Parameter(1, 2**15 - 1, per_neuron=True),
    "bias": Parameter(-(2**15), 2**15 - 1, per_neuron=True, default=0),
}
_XYLO_INSTEAD = "the simulator has it in mode 'xylo', and xylosim is the peer to verify it against"
_DELTA = {
    "vth": VTH_24,  # in the unit of what arrives; kept as vth << (spike_exp + state_exp)
    "spike_exp": Parameter(0, 7, default=0),
    "state_exp": Parameter(0, 7, default=0),
    "cum_error": Parameter(0, 1, default=0),
    "corrected": Parameter(0, 1, default=0),  # 0: the residue model of lava-nc 0.10.0; 1: the model of Lava's repository
}

# A complex state that turns by an angle at every step and shrinks: sin and cos of the angle times what is kept, in 1/4096.
_RESONATOR = {
    "sin_decay": Parameter(0, 4095, per_neuron=True),
    "cos_decay": Parameter(0, 4095, per_neuron=True),
    "vth": VTH_17,  # in the unit of what arrives; kept as vth << state_exp
    "state_exp": Parameter(0, 7, default=6),
}

KINDS: dict[str, Kind] = {
    "input": Kind("RingBuffer", (), family=""),
    "lif": Kind("LIF", ("a_in",), {**_LIF, "vth": VTH_17}, ("u", "v"), silent_ports=True),
    "ternary_lif": Kind(
        "TernaryLIF",
        ("a_in",),
        {**_LIF, "vth_hi": Parameter(1 - 2**17, 2**17 - 1), "vth_lo": Parameter(1 - 2**17, 2**17 - 1)},
        ("u", "v"),
        silent_ports=True,
    ),
    "lif_reset": Kind(
        "LIFReset",
        ("a_in",),
        {
            **_LIF,
            "vth": VTH_17,
            "reset_interval": Parameter(1, 2**16 - 1),
            "reset_offset": Parameter(0, 2**16 - 1, default=0),
        },
        ("u", "v"),
        silent_ports=True,
    ),
    "lif_refractory": Kind(
        "", ("a_in",), {**_LIF, "vth": VTH_17, "refractory": Parameter(1, 64)}, ("u", "v"), silent_ports=True
    ),
    # soft reset, or reset by subtraction: v loses the threshold where it fires; reset_interval 0: no other reset
    "lif_soft": Kind(
        "",
        ("a_in",),
        {
            **_LIF,
            "vth": VTH_17,
            "reset_interval": Parameter(0, 2**16 - 1, default=0),
            "reset_offset": Parameter(0, 2**16 - 1, default=0),
        },
        ("u", "v"),
        silent_ports=True,
        extends="LIF",
        instead="use kind lif or lif_reset (reset='hard' in the rate route)",
    ),
    # lif with one decay and threshold per neuron and a choice of reset, as a chip with programmable neurons has it:
    # reset 0: v to zero, 1: v loses the threshold, 2: none; reset_delay 1: in the step after the spike
    "lif_general": Kind(
        "",
        ("a_in",),
        {
            "du": Parameter(0, 4095, per_neuron=True),
            "dv": Parameter(0, 4095, per_neuron=True),
            "bias_mant": _LIF["bias_mant"],
            "bias_exp": _LIF["bias_exp"],
            "vth": Parameter(0, 2**17 - 1, per_neuron=True),
            "reset": Parameter(0, 2, default=0),
            "reset_delay": Parameter(0, 1, default=0),
            "reset_interval": Parameter(0, 2**16 - 1, default=0),
            "reset_offset": Parameter(0, 2**16 - 1, default=0),
        },
        ("u", "v"),
        silent_ports=True,
        extends="LIF",
        instead="Lava's LIF resets to zero at once, with one decay and threshold for all: train with those, or stay here",
    ),
    # resonate-and-fire: rf fires where its angle passes 0, rf_iz where its imaginary part reaches vth, and restarts there
    "rf": Kind("RF", ("a_real_in", "a_imag_in"), _RESONATOR, ("real", "imag"), silent_ports=True),
    "rf_iz": Kind("RF_IZ", ("a_real_in", "a_imag_in"), _RESONATOR, ("real", "imag"), silent_ports=True),
    "sigma": Kind("Sigma", ("a_in",), {}, ("sigma",)),
    "delta": Kind("Delta", ("a_in",), _DELTA, ("act", "residue", "error")),
    "sigma_delta": Kind(
        "SigmaDelta",
        ("a_in",),
        {**_DELTA, "bias": Parameter(-(2**15), 2**15 - 1, per_neuron=True, default=0), "relu": Parameter(0, 1, default=1)},
        ("sigma", "act", "residue", "error"),
    ),
    "graded": Kind("GradedVec", ("a_in",), {"vth": VTH_EACH}),
    "graded_relu": Kind("GradedReluVec", ("a_in",), {"vth": VTH_EACH}),
    "product": Kind("ProdNeuron", ("a_in1", "a_in2"), {"vth": VTH_24, "exp": Parameter(0, 31)}),
    # s_out: a_in1[t-1] a_in2[t] where its magnitude exceeds vth; s2_out: a_in1[t]^2
    "norm": Kind("NormVecDelay", ("a_in1", "a_in2"), {"vth": VTH_24}, ("v",), outs=("s_out", "s2_out")),
    # SynSense's Xylo (neuro/graph/xylo.py): hidden neurons with two synapses, of up to 31 spikes a step; alias: the neuron
    # of the same population that sends this one's spikes too, or -1
    "xylo": Kind(
        "",
        ("a_in", "a_in2"),
        {
            **_XYLO,
            "dash_syn2": Parameter(0, 15, per_neuron=True, default=0),
            "alias": Parameter(-1, 2**15 - 1, per_neuron=True, default=-1),
        },
        ("i_syn", "i_syn2", "v_mem"),
        silent_ports=True,
        instead=_XYLO_INSTEAD,
        family="xylo",
    ),
    # its read-outs: one synapse, at most one spike a step
    "xylo_out": Kind("", ("a_in",), _XYLO, ("i_syn", "v_mem"), silent_ports=True, instead=_XYLO_INSTEAD, family="xylo"),
}
LIF_KINDS = ("lif", "ternary_lif", "lif_reset", "lif_refractory", "lif_soft", "lif_general")
RESONATORS = ("rf", "rf_iz")
BINARY_KINDS = ("lif", "lif_reset", "lif_refractory", "lif_soft", "lif_general", *RESONATORS)  # send 0 or 1
XYLO_KINDS = ("xylo", "xylo_out")
STATELESS = ("input", "graded", "graded_relu", "product")

# Kind of projection -> Lava's process class.
PROJECTIONS: dict[str, str] = {"dense": "Dense", "sparse": "Sparse", "delay_dense": "DelayDense", "conv": "Conv"}
MAX_DELAY = 63  # lava/proc/dense/models.py; a synapse's delay field has 6 bits

# Sign mode -> (lowest, highest) weight, as lava/utils/weightutils.py clips them.
WEIGHT_RANGE: dict[str, tuple[int, int]] = {"mixed": (-256, 255), "excitatory": (0, 255), "inhibitory": (-255, 0)}

# Exponents the arithmetic accepts. The chip's own register holds -8..7; whether a graph keeps to it is a question for
# whoever places it on a chip.
WEIGHT_EXP_RANGE = (-24, 24)
MESSAGE_BITS_RANGE = (0, 32)

# What Lava has and a graph cannot hold, with the reason.
REFUSED: dict[str, str] = dict.fromkeys(
    ("learning_lif", "learning_dense", "learning_sparse", "stdp", "r_stdp"),
    "on-chip learning is not bit-exact even in Lava: its models are tagged bit_approximate_loihi and round at random",
)


def unknown_kind(kind: object, known: tuple[str, ...]) -> str:
    """Text for a kind that is not in `known`: what it is, why it is refused if that is known, what there is."""
    reason = f" ({REFUSED[kind]})" if isinstance(kind, str) and kind in REFUSED else ""
    return f"unknown kind {quoted(kind)}{reason}; known: {', '.join(known)}"
