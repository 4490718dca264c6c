"""The one intermediate form between a trained module and a simulator, Lava or a chip: integers, exponents, names.

A `SpikingGraph` is populations (`kinds.py` lists the kinds) joined by projections (`synapses.py`). Every
value is an integer and every check happens when a record is built, so a graph that exists is one that the arithmetic is
defined for. Lava itself checks none of these ranges: it clips weights, drops bits and lets registers run over in silence.

Arithmetic (lava-nc 0.10.0, process models tagged `fixed_pt`; the simulators implement it):

* projection: `acc = W s[t-1]`, then `acc << weight_exp` or, for a negative exponent, `acc >> -weight_exp` (floor). The
  exponent acts on the sum (delay_dense: on the sum of each delay; conv: not at all). Every projection delays by one
  step, also one that closes a loop; delay_dense by 1 + delay. With `num_message_bits = 0` a message is 0 or 1 (anything
  not 0 counts as 1); above that it is a signed integer. A conv sum is kept modulo 2^24.
* `lif`: `u <- u (4096 - (du + 1)) / 4096 + (a << 6)`, wrapped once at 24 bits; `v <- v (4096 - dv) / 4096 + u + bias`,
  clipped to 24 bits; both divisions toward zero; a spike where `v > vth << 6`, and v becomes 0 there. `ternary_lif`
  sends -1 below `vth_lo << 6` too; `lif_reset` starts from u = v = 0 where `t mod reset_interval = reset_offset mod
  reset_interval`, t from 1; `lif_refractory` keeps v at 0 for `refractory` steps, its spike's own included (chip mode).
  `lif_soft` is lif with soft reset: v loses `vth << 6` where it fires; with a `reset_interval` it restarts as lif_reset.
  `lif_general`: decays and thresholds may differ from neuron to neuron; where it fires v becomes 0 (`reset` 0), loses the
  threshold (1) or stays (2). With `reset_delay` 1 the next step does so: after the update v becomes 0, whatever arrived,
  or loses the threshold. With a `reset_interval` it restarts as lif_reset, a delayed reset forgotten.
* `rf`: `real <- cos real - sin imag + (a_real << state_exp)`, `imag <- sin real + cos imag + (a_imag << state_exp)`, where
  sin and cos are `sin_decay / 4096` and `cos_decay / 4096`, each product toward zero and both parts clipped to 24 bits; a
  spike where `real >= vth << state_exp` and imag came from below 0 to 0 or above; nothing is reset. `rf_iz`: a spike where
  `imag >= vth << state_exp`; there real becomes 0 and imag one less than the threshold.
* `sigma`: `sigma <- sigma + a`, sent whole. `delta`: sends changes of `a << (spike_exp + state_exp)` of at least vth, `>>
  state_exp`. `sigma_delta`: sigma, then relu(sigma + bias) or sigma + bias, then the delta stage.
* `graded`, `graded_relu`: the input is sent on where `|a| > vth`, or `a > vth`; nothing is kept.
* `product`: `(a1 a2) >> exp` is sent where its magnitude exceeds vth.
* `norm`: `a1[t-1] a2[t]` is sent where its magnitude exceeds vth, and `a1[t]^2` at the second port `s2_out`.
* `xylo`, `xylo_out`: the neurons of another maker's chip, with an arithmetic of their own: see `xylo.py`.

This folder (`demand.py` apart) needs numpy only and runs under Python 3.10 with numpy 1.26 as well as under newer ones:
the Lava worker loads these very files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from neuro.graph.kinds import (
    KINDS,
    GraphError,
    Parameter,
    unknown_kind,
)
from neuro.graph.synapses import Projection
from neuro.graph.text import listed, quoted
from neuro.graph.values import checked_name, frozen, integer, integer_array, is_array

MOST_NEURONS = 2**31 - 1  # neurons are numbered in 32 bits

# Input ports of each kind of population.
PORTS: dict[str, tuple[str, ...]] = {name: kind.ports for name, kind in KINDS.items()}


@dataclass(frozen=True, eq=False)
class Population:
    """`size` neurons of one kind, with shared or per-neuron integer parameters.

    Attributes:
        name: unique within the graph.
        kind: one of `neuro.graph.kinds.KINDS`.
        size: number of neurons.
        params: as `KINDS[kind].parameters` lists them. Those that may differ from neuron to neuron may be int or an
            integers (size,), as an array, a CPU tensor, a list, a tuple or a range; they are kept as int or read-only
            int32.

    Raises:
        GraphError: unknown kind, missing or unknown parameter, value out of range.
    """

    name: str
    kind: str
    size: int
    params: Mapping[str, int | np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked_name(self.name, "population")
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise GraphError(f"population {quoted(self.name)}: {unknown_kind(self.kind, tuple(KINDS))}")
        size = integer(self.size, f"population {quoted(self.name)}: size")
        if not 1 <= size <= MOST_NEURONS:
            raise GraphError(
                f"population {quoted(self.name)}: size is {quoted(size)}; 1 to {MOST_NEURONS:,} neurons are possible"
            )
        known = KINDS[self.kind].parameters
        if not isinstance(self.params, Mapping):
            raise GraphError(
                f"population {quoted(self.name)}: params is {quoted(self.params)}; names and integers are needed"
            )
        unknown = [key for key in self.params if key not in known]
        if unknown:
            raise GraphError(
                f"population {quoted(self.name)} ({self.kind}): unknown parameter {quoted(unknown[0])};"
                f" known: {', '.join(known) or 'none'}"
            )
        params: dict[str, int | np.ndarray] = {}
        for key, parameter in known.items():
            if key not in self.params and parameter.default is None:
                raise GraphError(f"population {quoted(self.name)} ({self.kind}): parameter {quoted(key)} is missing")
            params[key] = self._parameter(key, self.params.get(key, parameter.default), parameter, size)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "params", params)
        self._check_together()

    def _parameter(self, key: str, value: Any, parameter: Parameter, size: int) -> int | np.ndarray:
        what, low, high = f"population {quoted(self.name)}: {key}", parameter.low, parameter.high
        if is_array(value) and not parameter.per_neuron:
            raise GraphError(f"{what} is an array; one integer for the whole population is needed")
        if is_array(value):
            value = integer_array(value, what)
        if not isinstance(value, np.ndarray) or not value.ndim:
            number = integer(value[()] if isinstance(value, np.ndarray) else value, what)
            if not low <= number <= high:
                raise GraphError(f"{what} is {quoted(number)}; its register holds {low}..{high}")
            return number
        if value.shape != (size,):
            raise GraphError(f"{what} has shape {value.shape}; the population has {size} neurons, so ({size},) is needed")
        bad = np.flatnonzero((value < low) | (value > high))
        if bad.size:
            raise GraphError(f"{what} is {int(value[bad[0]])} at neuron {bad[0]}; its register holds {low}..{high}")
        return frozen(value)

    def _check_together(self) -> None:
        """Rules that hold between parameters."""
        where, params = f"population {quoted(self.name)} ({self.kind})", self.params
        if self.kind == "ternary_lif" and params["vth_lo"] > params["vth_hi"]:
            raise GraphError(f"{where}: vth_lo is {params['vth_lo']}, above vth_hi, which is {params['vth_hi']}")
        if "alias" in params and int(np.max(params["alias"])) >= self.size:
            raise GraphError(
                f"{where}: alias is {int(np.max(params['alias']))}; neurons are numbered from 0 to {self.size - 1},"
                " and -1 is none"
            )
        if "spike_exp" not in params:
            return
        exponent = int(params["spike_exp"]) + int(params["state_exp"])
        for key in ("vth", "bias"):
            largest = int(np.abs(np.asarray(params.get(key, 0), dtype=np.int64)).max()) << exponent
            if largest >= 2**23:
                raise GraphError(
                    f"{where}: {key} << (spike_exp + state_exp) is {largest}; its register holds up to {2**23 - 1}."
                    " Lower it or an exponent"
                )
        if params["corrected"] and params["cum_error"]:
            raise GraphError(f"{where}: the corrected model has no cum_error; choose one of the two")


@dataclass(frozen=True, eq=False)
class SpikingGraph:
    """Populations, projections, and the names of the populations whose messages are the result.

    Attributes:
        populations: in any order.
        projections: in any order; loops are allowed, as each projection delays by a step.
        outputs: names of populations, at least one.
        meta: anything JSON can hold (scales, where it came from); carried, never interpreted here.

    Raises:
        GraphError: two things of one name, a projection to or from a population that is not there, a port the target
            does not have, a weight whose shape does not match, a population without bias that nothing arrives at,
            an output that does not exist, meta that is not JSON.
    """

    populations: tuple[Population, ...]
    projections: tuple[Projection, ...]
    outputs: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("populations", "projections", "outputs"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        sizes = {population.name: population for population in self.populations}
        for what, names in (("populations", self.populations), ("projections", self.projections)):
            seen: set[str] = set()
            for item in names:
                if item.name in seen:
                    raise GraphError(f"two {what} are named {quoted(item.name)}; names must be unique")
                seen.add(item.name)
        if not self.populations:
            raise GraphError("the graph has no population")
        for projection in self.projections:
            self._check(projection, sizes)
        fed = {(projection.target, projection.port) for projection in self.projections}
        for population in self.populations:
            if KINDS[population.kind].silent_ports:  # may live on its bias alone
                continue
            for port in PORTS[population.kind]:
                if (population.name, port) not in fed:
                    raise GraphError(
                        f"population {quoted(population.name)} ({population.kind}): nothing arrives at port {quoted(port)}"
                    )
        if not self.outputs:
            raise GraphError("the graph names no output population")
        for name in self.outputs:
            if name not in sizes:
                raise GraphError(f"output {quoted(name)} is not a population; there are: {listed(sizes)}")
        try:
            json.dumps(self.meta, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise GraphError(f"meta must be what JSON can hold: {error}") from error

    @staticmethod
    def _check(projection: Projection, populations: Mapping[str, Population]) -> None:
        where = f"projection {quoted(projection.name)}"
        for end in (projection.source, projection.target):
            if end not in populations:
                raise GraphError(f"{where}: population {quoted(end)} does not exist; there are: {listed(populations)}")
        source, target = populations[projection.source], populations[projection.target]
        ports = PORTS[target.kind]
        if projection.port not in ports:
            raise GraphError(
                f"{where}: population {quoted(target.name)} ({target.kind}) has no port {quoted(projection.port)};"
                f" it has: {', '.join(ports) or 'none'}"
            )
        outs = KINDS[source.kind].outs
        if projection.source_port not in outs:
            raise GraphError(
                f"{where}: population {quoted(source.name)} ({source.kind}) has no output port "
                f"{quoted(projection.source_port)};"
                f" it has: {', '.join(outs)}"
            )
        if projection.ends != (target.size, source.size):
            form = f"{projection.weight.shape}" if projection.conv is None else f"{projection.weight.shape} (conv)"
            raise GraphError(
                f"{where}: weight has shape {form}; {quoted(source.name)} -> {quoted(target.name)} needs"
                f" ({target.size}, {source.size}), that is (n_target, n_source), and this is {projection.ends}"
            )

    def population(self, name: str) -> Population:
        """The population of that name; GraphError if there is none."""
        for population in self.populations:
            if population.name == name:
                return population
        raise GraphError(f"no population {quoted(name)}; there are: {listed(p.name for p in self.populations)}")

    def incoming(self, name: str, port: str | None = None) -> tuple[Projection, ...]:
        """Projections that end at a population (and port), in the graph's order."""
        return tuple(p for p in self.projections if p.target == name and port in (None, p.port))

    def outgoing(self, name: str) -> tuple[Projection, ...]:
        """Projections that start at a population, in the graph's order."""
        return tuple(p for p in self.projections if p.source == name)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the input populations, in the graph's order."""
        return tuple(p.name for p in self.populations if p.kind == "input")


def identical(first: SpikingGraph, second: SpikingGraph) -> bool:
    """Whether two graphs hold the same names, integers, outputs and meta, in the same order."""

    def form(graph: SpikingGraph) -> list[Any]:
        populations = [
            (p.name, p.kind, p.size, {k: np.asarray(v).tolist() for k, v in p.params.items()}) for p in graph.populations
        ]
        projections = [
            {
                **vars(p),
                "weight": p.weight.tolist(),
                "delays": None if p.delays is None else p.delays.tolist(),
                "conv": None if p.conv is None else vars(p.conv),
            }
            for p in graph.projections
        ]
        return [populations, projections, graph.outputs, json.dumps(graph.meta, sort_keys=True)]

    return form(first) == form(second)
