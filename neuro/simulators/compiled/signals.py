"""Kinds sigma, delta, sigma_delta, rf and rf_iz through the loops in C, as long as nothing leaves 24 bits, and Xylo's, as
long as nothing could leave 16.

Layout: (T, B, N) = steps, samples, neurons; M = samples x neurons.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuro.graph import Population
from neuro.graph.kinds import RESONATORS
from neuro.simulators.compiled.calls import THREAD_NEURONS, shared, whole_numbers
from neuro.simulators.compiled.library import library
from neuro.simulators.compiled.structures import Resonator, Signal, Xylo, pointer
from neuro.simulators.exact import Arrived

KINDS = ("sigma", "delta", "sigma_delta", *RESONATORS)


@dataclass(frozen=True)
class Sent:
    """What T steps gave, int32 (T, B, N): messages, the value that is compared with the threshold, states that are kept."""

    messages: Tensor
    v: Tensor
    states: dict[str, Tensor]


def advance(
    population: Population, arrived: Mapping[str, Arrived], state: dict[str, Tensor], keep: Collection[str]
) -> Sent | None:
    """Take a population of one of `KINDS` through the steps that arrived.

    Args:
        state: int32 (B, N) by name; written only where the result is not None.
        keep: states to return of every step.

    Returns:
        what it sent, or None where a value left 24 bits: then only torch says which.
    """
    parts = [part for part in arrived.values() if part.wrapped is None]
    if len(parts) < len(arrived) or not len(parts[0].value):
        return None
    after = {name: value.clone() for name, value in state.items()}
    found = (_resonator if population.kind in RESONATORS else _signal)(population, parts, after, keep)
    if found is not None:
        state.update(after)
    return found


def _shifts(part: Arrived) -> tuple[int, int]:
    return max(-part.exponent, 0), max(part.exponent, 0)


def _run(name: str, given: ctypes.Structure, like: Tensor) -> bool:
    """Whether all values stayed within 24 bits."""
    steps, neurons = len(like), like[0].numel()
    function = getattr(library(), name)

    def part(begin: int, end: int) -> list[int]:
        return [int(function(ctypes.byref(given), *whole_numbers(steps, neurons, begin, end)))]

    return not any(beyond for (beyond,) in shared(part, neurons, steps * neurons // THREAD_NEURONS))


def _signal(population: Population, parts: list[Arrived], after: dict[str, Tensor], keep: Collection[str]) -> Sent | None:
    params, kind = population.params, population.kind
    value = parts[0].value.contiguous()
    number = {key: int(params.get(key, 0)) for key in ("spike_exp", "state_exp", "cum_error", "corrected", "relu")}
    exponent = number["spike_exp"] + number["state_exp"]
    threshold = int(params.get("vth", 0)) << exponent
    sent, v = torch.empty_like(value), torch.empty_like(value)
    states = {name: torch.empty_like(value) for name in after if name in keep and kind != "sigma"}
    given = Signal(n=population.size, exponent=exponent, threshold=threshold, encode=kind != "sigma")
    given.right, given.left = _shifts(parts[0])
    for key in ("state_exp", "cum_error", "corrected", "relu"):
        setattr(given, key, number[key])
    given.a_TM, given.sent_TM, given.v_TM = map(pointer, (value, sent, v))
    for name in after:
        setattr(given, f"{name}_M", pointer(after[name]))
        setattr(given, f"{name}_TM", pointer(states.get(name)))
    bias = np.asarray(params.get("bias", 0), dtype=np.int64) << exponent
    bias_N = np.ascontiguousarray(np.broadcast_to(bias, (population.size,)), dtype=np.int32)
    given.bias_N = pointer(bias_N) if kind == "sigma_delta" else None
    if not _run("run_signal", given, value):
        return None
    return Sent(sent, v, {"sigma": sent} if kind == "sigma" else states)


def _resonator(
    population: Population, parts: list[Arrived], after: dict[str, Tensor], keep: Collection[str]
) -> Sent | None:
    real_in, imag_in = (part.value.contiguous() for part in parts)
    sent, real, imag = (torch.empty_like(real_in) for _ in range(3))
    exponent, batch = int(population.params["state_exp"]), real_in.shape[1]
    given = Resonator(exponent=exponent, threshold=int(population.params["vth"]) << exponent)
    given.izhikevich = population.kind == "rf_iz"
    given.real_in_TM, given.imag_in_TM, given.sent_TM = map(pointer, (real_in, imag_in, sent))
    given.real_TM, given.imag_TM, given.real_M, given.imag_M = map(pointer, (real, imag, after["real"], after["imag"]))
    (given.real_right, given.real_left), (given.imag_right, given.imag_left) = map(_shifts, parts)
    decays = [
        np.tile(np.broadcast_to(np.asarray(population.params[key], dtype=np.int32), (population.size,)), batch)
        for key in ("sin_decay", "cos_decay")
    ]
    given.sin_M, given.cos_M = map(pointer, decays)
    if not _run("run_resonator", given, real_in):
        return None
    return Sent(sent, imag, {"real": real, "imag": imag})


def advance_xylo(
    arrived: Mapping[str, Arrived],
    state: dict[str, Tensor],
    dash: Mapping[str, Tensor],
    numbers: Mapping[str, Tensor],
    most: int,
) -> Sent | None:
    """Take a population of Xylo's, none of whose neurons has an alias, through the steps that arrived.

    Args:
        arrived: for each current, in the order of `dash`.
        state: int32 (B, N) by name; written only where the result is not None.
        dash: current -> int32 (N,).
        numbers: int32 (N,) for "dash_mem", "vth" and "bias".
        most: spikes of one neuron in a step.

    Returns:
        what it sent, or None where a register could have saturated.
    """
    parts = list(arrived.values())
    if any(part.wrapped is not None or part.bound >= 2**15 for part in parts) or not len(parts[0].value):
        return None
    sums = [part.value.contiguous() for part in parts]
    after = {name: value.clone() for name, value in state.items()}
    sent, raw = torch.empty_like(sums[0]), torch.empty_like(sums[0])
    kept = {name: torch.empty_like(sums[0]) for name in state}
    given = Xylo(currents=len(sums), n=sums[0].shape[2], most=most)
    given.sent_TM, given.raw_TM = pointer(sent), pointer(raw)
    for k, (part, value, (name, own)) in enumerate(zip(parts, sums, dash.items(), strict=True)):
        given.a_TM[k], given.dash_N[k], given.bound[k] = pointer(value), pointer(own), part.bound
        given.right[k], given.left[k] = _shifts(part)
        given.kept_TM[k], given.state_M[k] = pointer(kept[name]), pointer(after[name])
    given.kept_TM[2], given.state_M[2] = pointer(kept["v_mem"]), pointer(after["v_mem"])
    given.dash_mem_N, given.vth_N, given.bias_N = (pointer(numbers[name]) for name in ("dash_mem", "vth", "bias"))
    if not _run("run_xylo", given, sums[0]):
        return None
    state.update(after)
    return Sent(sent, raw, kept)
