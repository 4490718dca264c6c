"""A layer's `neuron` group as a kind of population with its parameters.

| in the file | here |
|---|---|
| type LOIHI or CUBA: iDecay, vDecay, vThMant | lif: du = iDecay - 1 (4096: no current memory), dv = vDecay, vth = vThMant |
| one of them per channel or neuron (shared_param=False) | lif_general, with one per neuron |
| bias of such a layer | bias_mant, with bias_exp 6 |
| refDelay 1 | nothing: the step of the spike itself; above 1 kind lif_refractory |
| type SDNN: vThMant, bias | sigma_delta with spike_exp = state_exp = 6; sigma where there is a `sigma_output` |
| type RF_PHASE, or RF_IZHIKEVICH: sinDecay, cosDecay, vThMant | rf, or rf_iz, with state_exp 6 |
| no neurons (lava-dl's Affine) | sigma: it sends the running sum; with a reset lif_reset, its v / 64 |

Source: lava-dl 0.6.0, lava/lib/dl/netx/hdf5.py, `get_neuron_params`. It hands period and decay of an RF neuron to Lava,
whose constructor loses a unit of sinDecay or cosDecay in 39 % of their pairs (2,896 and 2,896 become 2,895 and 2,896); here
they are the file's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hardware.text import quoted
from neuro.exchange.netx.errors import NotInNetx
from neuro.exchange.netx.records import Layer

EXPONENT = 6  # of spikes, states and biases: lava-dl's scale is 64
GRADED_BITS = 24  # of sigma-delta messages; lava-dl writes 16 beside them, which nothing enforces and deep layers exceed
CUBA = ("LOIHI", "CUBA")
_ADAPTIVE = "its threshold adapts, which no kind does. Train with slayer.block.cuba or slayer.block.rf_iz"
REFUSED = dict.fromkeys(("ALIF", "ADRF_PHASE", "ADRF_IZHIKEVICH"), _ADAPTIVE)


@dataclass(frozen=True)
class Neurons:
    """What a population is made of.

    Attributes:
        kind, params: of `neuro.graph.Population`.
        bits: width of its messages, 0 for spikes.
    """

    kind: str
    params: dict[str, Any] = field(default_factory=dict)
    bits: int = 0


@dataclass(frozen=True)
class Reset:
    """Neurons restart every `interval` steps, first at step `offset` (from 1): where a sample's first step reaches them."""

    interval: int
    offset: int


def message_bits(layer: Layer) -> int:
    """Width of what a layer sends, 0 for spikes."""
    if layer.neuron == "SDNN":
        return layer.number("neuron/messageBits", GRADED_BITS)
    return 0 if layer.neuron else GRADED_BITS


def neurons(layer: Layer, bias: np.ndarray | int, reset: Reset | None) -> Neurons:
    """The kind and parameters of a layer's neurons.

    Args:
        layer: its record.
        bias: one integer, or one for each neuron in the graph's order.
        reset: when they restart, or None.

    Raises:
        NotInNetx: neurons, or a setting of theirs, that no kind has.
        NetxFileError: a parameter that is missing or no integer.
    """
    kind = layer.neuron
    if kind in CUBA:
        return _cuba(layer, bias, reset)
    if kind in REFUSED:
        raise NotInNetx(f"{layer.where}: neurons of type {quoted(kind)}: {REFUSED[kind]}")
    if not kind:
        return _read_out(layer, bias, reset)
    if reset is not None:
        raise NotInNetx(
            f"{layer.where}: neurons of type {quoted(kind)} have no reset; leave reset_interval out and run each sample by"
            " itself"
        )
    if kind == "SDNN":
        return _sigma_delta(layer, bias)
    if kind.startswith("RF"):
        return _resonator(layer, bias)
    raise NotInNetx(
        f"{layer.where}: neurons of type {quoted(kind)} are unknown; known: LOIHI, CUBA, SDNN, RF_PHASE, RF_IZHIKEVICH"
    )


def _cuba(layer: Layer, bias: np.ndarray | int, reset: Reset | None) -> Neurons:
    found = {key: layer.each(f"neuron/{key}") for key in ("iDecay", "vDecay", "vThMant")}
    current, voltage = found["iDecay"], found["vDecay"]
    if np.min(current) < 1 or np.max(current) > 4096:
        raise NotInNetx(
            f"{layer.where}: iDecay reaches from {np.min(current)} to {np.max(current)}; the chip's register holds 1..4096."
            " For a current that never decays, put the memory into v: iDecay 4096 and a smaller vDecay"
        )
    if np.min(voltage) < 0 or np.max(voltage) > 4095:
        raise NotInNetx(
            f"{layer.where}: vDecay reaches from {np.min(voltage)} to {np.max(voltage)}; the chip's register holds 0..4095."
            " For a voltage without memory, put the memory into u: train with voltage_decay of at most 0.9997"
        )
    if layer.number("neuron/gradedSpike", 0):
        raise NotInNetx(
            f"{layer.where}: gradedSpike is on, and spikes of a lif kind are 0 or 1. Train with graded_spike=False, or as"
            " SDNN"
        )
    params: dict[str, Any] = {"du": current - 1, "dv": voltage, "vth": found["vThMant"]}
    if np.any(bias):
        params |= {"bias_mant": bias, "bias_exp": EXPONENT}
    timing = {} if reset is None else {"reset_interval": reset.interval, "reset_offset": reset.offset}
    differ = [key for key, value in found.items() if isinstance(value, np.ndarray)]
    refractory = layer.number("neuron/refDelay", 1)
    if refractory > 1:
        if reset is not None or differ:
            raise NotInNetx(
                f"{layer.where}: refDelay is {refractory}, and no kind has refractory steps beside"
                f" {'a reset' if reset is not None else f'{differ[0]} per neuron'}; leave one of them out"
            )
        return Neurons("lif_refractory", {**params, "refractory": refractory})
    return Neurons("lif_general" if differ else "lif" if reset is None else "lif_reset", {**params, **timing})


def _read_out(layer: Layer, bias: np.ndarray | int, reset: Reset | None) -> Neurons:
    """A running sum: sent by a sigma, or, where it restarts, v / 64 of a lif that fires at its register's end only."""
    if np.any(bias):
        raise NotInNetx(f"{layer.where} has a bias and no neurons; a running sum has none. Give the layer neurons")
    if reset is None:
        return Neurons("sigma", bits=GRADED_BITS)
    timing = {"reset_interval": reset.interval, "reset_offset": reset.offset}
    return Neurons("lif_reset", {"du": 4095, "dv": 0, "vth": 2**17 - 1, **timing})


def _sigma_delta(layer: Layer, bias: np.ndarray | int) -> Neurons:
    bits = message_bits(layer)
    if "neuron/sigma_output" in layer.texts or layer.has("neuron/sigma_output"):
        if np.any(bias):
            raise NotInNetx(f"{layer.where}: sigma_output has no bias; put it into the layer before")
        return Neurons("sigma", bits=bits)
    activation = layer.texts.get("neuron/activation", "relu")
    if activation != "relu":
        raise NotInNetx(
            f"{layer.where}: activation {quoted(activation)}; lava-dl's own reader takes every activation for relu."
            " Train with relu, or rewrite neuron/activation"
        )
    params: dict[str, Any] = {"vth": layer.number("neuron/vThMant"), "spike_exp": EXPONENT, "state_exp": EXPONENT}
    return Neurons("sigma_delta", params | ({"bias": bias} if np.any(bias) else {}), bits)


def _resonator(layer: Layer, bias: np.ndarray | int) -> Neurons:
    if np.any(bias):
        raise NotInNetx(f"{layer.where}: a bias on resonate-and-fire neurons, which no kind has. Train without a norm")
    if layer.number("neuron/gradedSpike", 0):
        raise NotInNetx(
            f"{layer.where}: gradedSpike is on, and spikes of an rf kind are 0 or 1. Train with graded_spike=False"
        )
    params: dict[str, Any] = {"vth": layer.number("neuron/vThMant"), "state_exp": EXPONENT}
    for key, name in (("sin_decay", "sinDecay"), ("cos_decay", "cosDecay")):
        value = layer.whole(f"neuron/{name}").reshape(-1)
        params[key] = int(value[0]) if value.size == 1 else value
    return Neurons("rf" if "PHASE" in layer.neuron else "rf_iz", params)
