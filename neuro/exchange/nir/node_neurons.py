"""Neurons of NIR in the terms of a description: one step dt of Euler's rule.

    tau_syn di/dt = -i + w_in x            i <- alpha i + w_in (dt / tau_syn) x,  alpha = 1 - dt / tau_syn
    tau dv/dt = v_leak - v + r i           v <- beta v + r (dt / tau) i + v_leak dt / tau,  beta = 1 - dt / tau

A neuron without a time constant of its synapse has alpha = 0; an integrator (IF, I) has beta = 1 and takes its input per
step, so that r is 1, or 1 / dt where weights are rates. The gains go into the weights that lead to the neuron, which is the
same network. v counts from v_reset, where a neuron also starts. LI, CubaLI and I send no spikes: their value is a result,
or a Threshold behind them makes spikes of it, without a reset.

A pool right behind neurons may be a layer of its own, which sends sums of spikes. Folded into the kernel behind it, a pool
of 2 x 2 multiplies that kernel's synapses by about four; into a matrix, by four. The layer of sums has one synapse per
spike and pool, sends graded messages, and takes a step.

Shape letters: N neurons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hardware.text import quoted
from neuro.conversion.spiking.description import Neurons, Synapses
from neuro.exchange.nir.library import NotInNir, nir_library, values
from neuro.exchange.nir.linear_maps import POOLS, Node, Shape, linear_map, single, sizes
from neuro.exchange.nir.synapse_nodes import Grid

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


@dataclass(frozen=True)
class PooledLayer:
    """A layer of sums, and what is left of the way.

    Attributes:
        neurons, synapses: of the layer.
        shape: NIR's, behind the pool.
        rest: nodes behind it, a mean's division among them.
        at: place of the pool among the way's nodes.
        count: synapses.
    """

    neurons: Neurons
    synapses: Synapses
    shape: Shape
    rest: list[Node]
    at: int
    count: int

    def named(self, name: str) -> PooledLayer:
        """The same under a name of its own."""
        synapses = replace(self.synapses, name=f"{name}.{self.synapses.source}", target=name)
        return replace(self, neurons=replace(self.neurons, name=name), synapses=synapses)


def pooled(source: str, shape: Shape, grid: Grid | None, nodes: Sequence[Node]) -> PooledLayer | None:
    """The layer of sums that a way begins with; None where it does not begin with a pool of a grid."""
    at = next((n for n, (_, node) in enumerate(nodes) if type(node).__name__ != "Identity"), len(nodes))
    if grid is None or at == len(nodes) or type(nodes[at][1]).__name__ not in POOLS or len(shape) != 3:
        return None
    name, node = nodes[at]
    kernel = single(name, node, shape)
    behind = sizes(nodes[at], shape)
    summed = nir_library().SumPool2d(*(np.array(v) for v in (kernel.weight.shape[2:], kernel.stride, kernel.padding)))
    wide, high, channels = behind[1], behind[2], behind[0]
    made = linear_map([(name, summed)], shape, grid, (wide, high, channels))
    if made.conv is None:
        return None
    rest = list(nodes[at + 1 :])
    if type(node).__name__ == "AvgPool2d":
        size = kernel.weight.shape[2] * kernel.weight.shape[3]
        rest.insert(0, (name, nir_library().Scale(np.full(behind, 1 / size))))
    neurons = Neurons(name, (wide, high, channels), sums=True)
    return PooledLayer(
        neurons, Synapses(name, source, name, np.rint(made.weight), made.conv), behind, rest, at, made.synapses
    )
