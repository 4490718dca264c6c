"""snnTorch as a third opinion: runs a graph of leaky integrate-and-fire neurons in floating point.

Each population becomes two `snntorch.Leaky` layers, in the graph's own units: one without reset for the register u, and
one that is reset to zero at once for v, which takes u + bias. float64 holds all integers below 2^53, so what differs from
the integer arithmetic is what follows, and `differences` lists which of it a graph can meet:

* decays are exact fractions; the integer arithmetic drops the fraction of u and v toward zero at every step;
* a negative weight exponent divides; the integer arithmetic rounds sums (mode chip: each synapse) down;
* a conv sum is not kept modulo 2^24, and weight_exp acts on it, which mode lava ignores;
* no register ends: u is not wrapped and v not clipped at 24 bits. Values beyond them are counted in the result's notes.

A graph that meets none of them gives the very spikes of `fixed_point.simulate(mode="lava")`. Projections keep their delay
of one step, so that steps of both results compare index by index.

snnTorch has leaky neurons with binary spikes. Everything else is refused by name: `NOT_HERE` holds kind -> reason.
Shape letters: B samples, T steps, N neurons. snntorch is imported when something runs, not before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hardware.text import quoted
from neuro.graph import GraphError, Population, Projection, SpikingGraph
from neuro.simulators.activity import Activity, recorded
from neuro.simulators.inputs import Integers, checked_run

MODE = "float"
POPULATIONS = ("input", "lif", "lif_reset")
PROJECTIONS = ("dense", "sparse", "conv")
_GRADED = "snnTorch's spikes are binary: it has no neuron that sends graded values"
_SIGMA_DELTA = "snnTorch has no sigma-delta neuron"
NOT_HERE: dict[str, str] = {
    "ternary_lif": "snnTorch's leaky neurons send no negative spikes",
    "lif_refractory": "snnTorch's leaky neurons have no refractory period",
    "lif_soft": "snnTorch's own soft reset acts a step later; this backend resets to zero",
    "rf": "snnTorch has no resonate-and-fire neuron",
    "rf_iz": "snnTorch has no resonate-and-fire neuron",
    "lif_general": "snnTorch has such neurons, and this backend does not build them",
    "sigma": _SIGMA_DELTA,
    "delta": _SIGMA_DELTA,
    "sigma_delta": _SIGMA_DELTA,
    "graded": _GRADED,
    "graded_relu": _GRADED,
    "product": _GRADED,
    "norm": _GRADED,
    "xylo": "snnTorch has no neuron that decays by bit shifts and sends several spikes a step",
    "xylo_out": "snnTorch has no neuron that decays by bit shifts",
    "delay_dense": "snnTorch has no synaptic delays",
}
_LIMIT = 2**23


class NotInSnnTorch(GraphError):
    """A graph that holds something snnTorch has no equivalent of."""


class SnnTorchUnavailable(RuntimeError):
    """snntorch is not installed."""


def check(graph: SpikingGraph) -> None:
    """NotInSnnTorch, naming the first population or projection that snnTorch cannot run, if there is one."""
    for word, items, known in (
        ("population", graph.populations, POPULATIONS),
        ("projection", graph.projections, PROJECTIONS),
    ):
        for item in items:
            if item.kind not in known:
                reason = NOT_HERE.get(item.kind, "it is not known to this backend")
                raise NotInSnnTorch(
                    f"{word} {quoted(item.name)} ({item.kind}): {reason}; run this graph on backend fixed_point"
                )


def differences(graph: SpikingGraph) -> tuple[str, ...]:
    """What a graph can meet that floating point does otherwise than mode "lava"; empty: only register ends are left.

    Raises NotInSnnTorch as `run`.
    """
    check(graph)
    found = []
    for population in graph.populations:
        if population.kind == "input":
            continue
        du, dv = _number(population, "du"), _number(population, "dv")
        if du != 4095:
            found.append(f"{population.name}: u decays by {du + 1}/4096 without dropping fractions")
        if dv != 0:
            found.append(f"{population.name}: v decays by {dv}/4096 without dropping fractions")
    for projection in graph.projections:
        if projection.kind == "conv":
            found.append(f"{projection.name}: a conv sum is not kept modulo 2^24")
            if projection.weight_exp:
                found.append(f"{projection.name}: weight_exp {projection.weight_exp} acts, which Lava's Conv ignores")
        elif _drops_bits(projection):
            found.append(f"{projection.name}: weight_exp {projection.weight_exp} divides without rounding down")
    return tuple(found)


def _drops_bits(projection: Projection) -> bool:
    """Whether a negative exponent can drop a bit: not where every weight is a multiple of its power of two."""
    return projection.weight_exp < 0 and bool(np.any(projection.weight % (1 << -projection.weight_exp)))


def run(
    graph: SpikingGraph,
    inputs: Mapping[str, Integers],
    *,
    record: Iterable[str] = ("spikes",),
    device: torch.device | str | None = None,
    steps: int | None = None,
) -> Activity:
    """Run a graph from rest in snnTorch.

    Args:
        graph: populations of kind input, lif and lif_reset, projections of kind dense, sparse and conv; loops allowed.
        inputs, record, device, steps: as `fixed_point.simulate`.

    Returns:
        Activity with `mode = "float"` and `ran_on = "snnTorch VERSION (float64)"`, without counts. Messages are int32, as
        of every backend; u, v and a_in float64, in the units of the integer registers. `notes` holds `differences(graph)`
        and how many values lay beyond 24 bits.

    Raises:
        NotInSnnTorch: names the population or projection, and why.
        SnnTorchUnavailable: snntorch is not installed.
        InputError, GraphError: as `fixed_point.simulate`.
    """
    notes = list(differences(graph))
    values, batch, length = checked_run(graph, inputs, steps, device)
    keep = recorded(graph, record)
    where = next((value.device for value in values.values()), torch.device(device or "cpu"))
    version, neurons = _neurons(graph, where)
    synapses = {p.name: _Synapses(p, where) for p in graph.projections}
    kept: dict[tuple[str, str], list[Tensor]] = {}
    beyond = {name: [0, 0] for name in neurons}

    def zeros(population: Population) -> Tensor:
        return torch.zeros(batch, population.size, dtype=torch.float64, device=where)

    sent = {p.name: zeros(p) for p in graph.populations}
    u = {name: zeros(graph.population(name)) for name in neurons}
    v = {name: zeros(graph.population(name)) for name in neurons}
    with torch.no_grad():
        for step in range(length):
            now = {name: value[:, step].to(torch.float64) for name, value in values.items()}
            for name, neuron in neurons.items():
                population = graph.population(name)
                a_BN = zeros(population)
                for projection in graph.incoming(name):
                    a_BN = a_BN + synapses[projection.name](sent[projection.source])
                if neuron.interval and (step + 1) % neuron.interval == neuron.offset:  # steps count from 1, as in Lava
                    u[name], v[name] = zeros(population), zeros(population)
                _, u[name] = neuron.current(a_BN * 64, u[name])
                spikes, v[name] = neuron.membrane(u[name] + neuron.bias_N, v[name])
                now[name] = spikes.to(torch.float64)
                beyond[name][0] += int(torch.count_nonzero(u[name].abs() >= _LIMIT))
                beyond[name][1] += int(torch.count_nonzero(v[name].abs() >= _LIMIT))
                for variable, value in (("u", u[name]), ("v", v[name]), ("a_in", a_BN)):
                    if variable in keep[name]:
                        kept.setdefault((name, variable), []).append(value)
            sent = now
            for name, value in now.items():
                if "spikes" in keep[name]:
                    kept.setdefault((name, "spikes"), []).append(value.to(torch.int32))
    for name, counts in beyond.items():
        for register, count in zip(("u", "v"), counts, strict=True):
            if count:
                notes.append(f"{name}: {register} lay beyond 24 bits {count} times; the chip would not hold it")
    stacked = {key: torch.stack(rows, dim=1) for key, rows in kept.items()}
    states: dict[str, dict[str, Tensor]] = {}
    for (name, variable), value in stacked.items():
        if variable != "spikes":
            states.setdefault(name, {})[variable] = value
    return Activity(
        spikes={name: value for (name, variable), value in stacked.items() if variable == "spikes"},
        states=states,
        batch=batch,
        steps=length,
        ran_on=f"snnTorch {version} (float64)",
        notes=tuple(notes),
        mode=MODE,
    )


def _number(population: Population, key: str) -> int:
    value = population.params[key]
    assert isinstance(value, int)
    return value


@dataclass(frozen=True)
class _Neurons:
    """A population: its two layers, its bias in units of v, and when it is reset (interval 0: never)."""

    current: torch.nn.Module
    membrane: torch.nn.Module
    bias_N: Tensor
    interval: int
    offset: int


def _neurons(graph: SpikingGraph, device: torch.device) -> tuple[str, dict[str, _Neurons]]:
    """snnTorch's version, and the layers of every population but the inputs."""
    try:
        import snntorch
    except ImportError as error:
        raise SnnTorchUnavailable(f"snntorch is not installed ({error}); pip install 'spikegate[spiking]'") from error

    def leaky(beta: float, threshold: int, reset: str) -> torch.nn.Module:
        number = torch.tensor([beta, threshold], dtype=torch.float64, device=device)
        layer = snntorch.Leaky(number[0], threshold=number[1], reset_mechanism=reset, reset_delay=False)
        snntorch.SpikingNeuron.instances.remove(layer)  # a list of the class, which would keep it for ever
        return layer.to(device)

    found: dict[str, _Neurons] = {}
    for p in graph.populations:
        if p.kind == "input":
            continue
        bias = np.asarray(p.params["bias_mant"], dtype=np.int64) << np.asarray(p.params["bias_exp"], dtype=np.int64)
        interval = _number(p, "reset_interval") if p.kind == "lif_reset" else 0
        found[p.name] = _Neurons(
            leaky((4095 - _number(p, "du")) / 4096, 1, "none"),
            leaky((4096 - _number(p, "dv")) / 4096, _number(p, "vth") << 6, "zero"),
            torch.from_numpy(np.broadcast_to(bias, (p.size,)).astype(np.float64)).to(device),
            interval,
            _number(p, "reset_offset") % interval if interval else 0,
        )
    return snntorch.__version__, found


class _Synapses:
    """Sums of one projection: (B, n_source) messages to (B, n_target), weights times 2^weight_exp, in float64."""

    def __init__(self, projection: Projection, device: torch.device) -> None:
        weight = np.ldexp(projection.weight.astype(np.float64), projection.weight_exp)
        self._binary, self._patches = projection.num_message_bits == 0, None
        if projection.conv is None:
            self._weight = torch.from_numpy(weight).to(device)
            return
        groups = projection.conv.groups
        self._patches = torch.from_numpy(projection.conv.patches(projection.weight.shape)).to(device)  # (P, G, K)
        self._weight = torch.from_numpy(weight.reshape(groups, weight.shape[0] // groups, -1)).to(device)  # (G, O/G, K)

    def __call__(self, message_BN: Tensor) -> Tensor:
        if self._binary:
            message_BN = (message_BN != 0).to(torch.float64)
        if self._patches is None:
            return message_BN @ self._weight.T
        padded = torch.cat([message_BN, message_BN.new_zeros(len(message_BN), 1)], dim=1)  # index -1: the padding
        sums = torch.einsum("bpgk,gok->bpgo", padded[:, self._patches], self._weight)
        return sums.reshape(len(message_BN), -1)
