"""Neurons of NIR in the terms of a description: one step dt of Euler's rule.

    tau_syn di/dt = -i + w_in x            i <- alpha i + w_in (dt / tau_syn) x,  alpha = 1 - dt / tau_syn
    tau dv/dt = v_leak - v + r i           v <- beta v + r (dt / tau) i + v_leak dt / tau,  beta = 1 - dt / tau

A neuron without a time constant of its synapse has alpha = 0; an integrator (IF, I) has beta = 1 and takes its input per
step, so that r is 1, or 1 / dt where weights are rates. The gains go into the weights that lead to the neuron, which is the
same network. v counts from v_reset, where a neuron also starts. LI, CubaLI and I send no spikes: their value is a result,
or a Threshold behind them makes spikes of it, without a reset.

Shape letters: N neurons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hardware.text import quoted
from neuro.exchange.nir.library import NotInNir, values

SPIKING = ("LIF", "IF", "CubaLIF", "Threshold")
VALUED = ("LI", "CubaLI", "I")
NEURONS = (*SPIKING, *VALUED)
_SIZED_BY = {"LIF": "v_threshold", "IF": "v_threshold", "CubaLIF": "v_threshold", "Threshold": "threshold"}


@dataclass(frozen=True, eq=False)
class Step:
    """A layer's step, flat in NIR's order, float64 (N,) each.

    Attributes:
        alpha, beta: shares of the synaptic current and the potential that stay.
        gain: factor of everything that arrives.
        bias: added to v at each step.
        threshold: counted from v_reset; infinity for a layer whose value is the result.
        reset: "zero" (to v_reset), "subtract" or "none".
        start: v_reset, where v is 0 in these terms.
    """

    alpha: np.ndarray
    beta: np.ndarray
    gain: np.ndarray
    bias: np.ndarray
    threshold: np.ndarray
    reset: str
    start: np.ndarray


def declared_shape(node: Any) -> tuple[int, ...]:
    """Shape of a neuron node's parameters."""
    return np.shape(getattr(node, _SIZED_BY.get(type(node).__name__, "r")))


def step_of(name: str, node: Any, shape: tuple[int, ...], dt_s: float, reset: str, threshold: Any = None) -> Step:
    """What one step of a neuron node does.

    Args:
        name: of the node.
        node: one of `NEURONS`.
        shape: of what reaches it.
        dt_s: seconds of a step.
        reset: "zero" or "subtract", for nodes that spike: NIR's own is "zero", to v_reset.
        threshold: a (name, Threshold node) behind an LI, CubaLI or I.

    Raises NotInNir: parameters that do not fit the shape, a step longer than a time constant, a threshold that is not above
    v_reset.
    """
    kind = type(node).__name__
    where = f"node {quoted(name)} ({kind})"
    size = math.prod(shape)

    def each(key: str) -> np.ndarray:
        return _spread(values(node, name, key), shape, f"{where}: {key}")

    zeros, ones = np.zeros(size), np.ones(size)
    if kind == "Threshold":
        return Step(zeros, zeros, ones, zeros, _above(each("threshold"), zeros, f"{where}: threshold"), "none", zeros)
    alpha, beta, gain, bias = zeros, ones, ones, zeros
    start = each("v_reset") if kind in SPIKING else zeros
    if kind in ("IF", "I"):
        _per_step(each("r"), dt_s, where)
    else:
        tau = each("tau" if kind in ("LIF", "LI") else "tau_mem")
        beta, gain = _kept(tau, dt_s, f"{where}: tau"), each("r") * dt_s / tau
        bias = (each("v_leak") - start) * dt_s / tau
    if kind in ("CubaLIF", "CubaLI"):
        synapse = each("tau_syn")
        alpha, gain = _kept(synapse, dt_s, f"{where}: tau_syn"), gain * each("w_in") * dt_s / synapse
    limit = np.full(size, np.inf)
    if kind in SPIKING:
        limit = _above(each("v_threshold"), start, f"{where}: v_threshold")
    elif threshold is not None:
        other, made = threshold
        what = f"node {quoted(other)} (Threshold): threshold"
        limit = _above(_spread(values(made, other, "threshold"), shape, what), start, what)
    return Step(alpha, beta, gain, bias, limit, reset if kind in SPIKING else "none", start)


def _spread(value: np.ndarray, shape: tuple[int, ...], what: str) -> np.ndarray:
    """One value per neuron, flat, of a parameter that has one, one per neuron, or one per channel as (C, 1, 1)."""
    size = math.prod(shape)
    if value.size == 1:
        return np.full(size, value.reshape(()))
    if value.size == size:
        return value.reshape(-1)
    if value.ndim == len(shape) and all(n in (1, m) for n, m in zip(value.shape, shape, strict=True)):
        return np.broadcast_to(value, shape).reshape(-1)
    raise NotInNir(f"{what} has {value.size} values, {size} neurons reach it")


def _kept(tau: np.ndarray, dt_s: float, what: str) -> np.ndarray:
    """1 - dt / tau, 0 where they are the same."""
    if np.any(tau < dt_s * (1 - 1e-6)):
        raise NotInNir(
            f"{what} is {tau.min():g} s, shorter than the step of {dt_s:g} s; give the step it was made with (dt_s, --dt)"
        )
    share = 1 - dt_s / tau
    found: np.ndarray = np.where(share < 1e-6, 0.0, share)
    return found


def _per_step(r: np.ndarray, dt_s: float, where: str) -> None:
    if not (np.allclose(r, 1) or np.allclose(r, 1 / dt_s)):
        raise NotInNir(
            f"{where}: r is {r[0]:g}; tools write 1, or 1/dt = {1 / dt_s:g}, for weights that count per step."
            " Multiply the weights by it, or give the step it was written for (dt_s, --dt)"
        )


def _above(limit: np.ndarray, start: np.ndarray, what: str) -> np.ndarray:
    if not np.all(limit > start):
        at = int(np.argmin(limit - start))
        raise NotInNir(
            f"{what} is {limit[at]:g}, not above the {start[at]:g} that a neuron starts from, so it would spike at once and"
            " for ever. Raise it"
        )
    return limit - start
