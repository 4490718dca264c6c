"""Which of Xylo's decays stand for those of a layer, and what the layer then does in real numbers.

A state of Xylo keeps 1 - 2^-k of itself at each step, k = 1..15; a potential may also keep nothing (k = 0), a current may
not, as it decays before it is used. Decays in between are met by what a spike does to v, its kernel: asked for is
`sum over j of alpha^j beta^(n - j)`, n steps after the spike, and there is, with one or two currents that each keep a_j,

    sum over j of c_j times the kernel of a current a_j and a potential b

whose c_j are the least squares. What a neuron's own spike does to v afterwards, its reset, differs by `b^n - beta^n`; a
synapse of the neuron to itself takes that up in the same currents, from the step after. So a layer whose current keeps
nothing, a plain LIF neuron, is there exactly where beta is one of the chip's: b = 0, so that v is the current, a_1 = beta,
and the synapse to itself takes the threshold off.

Shape letters: B samples, T steps, N neurons, J currents, K kinds of decays in a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from neuro.conversion.spiking.description import INPUT, Description, Neurons, weighted
from neuro.graph.xylo import MOST_SPIKES

LARGEST_DASH = 15
MOST_KINDS = 64
"""Kinds of decays in one layer that are fitted each; beyond, the nearest fitted one is taken."""
LONGEST = 512  # steps of a kernel
SELF_GAIN = 0.01  # by which a synapse to itself must better the reset to be worth having
WORTH_SECOND = 0.9  # share of the error with one current below which a kernel with two is offered


def kept(dash: np.ndarray | int) -> np.ndarray:
    """Share of a state that is left after a step, of a decay by `dash` bits."""
    return 1 - 2.0 ** -np.asarray(dash, dtype=np.float64)


def nearest_dashes(share: float, lowest: int) -> tuple[int, ...]:
    """The bit shifts around a share that is kept: one where it is exact, else the two beside it."""
    exact = -math.log2(max(1 - share, 2.0**-LARGEST_DASH))
    around = {math.floor(exact + 1e-9), math.ceil(exact - 1e-9)}
    return tuple(sorted({min(max(dash, lowest), LARGEST_DASH) for dash in around}))


@dataclass(frozen=True, eq=False)
class Form:
    """A layer on Xylo in real numbers.

    Attributes:
        dash_mem: int64 (N,).
        dash_syn: int64 (J, N), J 1 or 2.
        gain: c_j, float64 (J, N).
        own: what a spike of the neuron adds to its own currents, in thresholds, float64 (J, N).
        kernel_error, reset_error: root of the squared difference over that of what was asked, the largest neuron's.
    """

    dash_mem: np.ndarray
    dash_syn: np.ndarray
    gain: np.ndarray
    own: np.ndarray
    kernel_error: float
    reset_error: float

    @property
    def error(self) -> float:
        """Both errors together."""
        return math.hypot(self.kernel_error, self.reset_error)


def _kernel(current: float, potential: float, steps: int) -> np.ndarray:
    """v after a spike that adds 1 to the current, (steps,)."""
    found, i, v = np.empty(steps), 1.0, 0.0
    for n in range(steps):
        v = potential * v + i
        i *= current
        found[n] = v
    return found


@dataclass(frozen=True, eq=False)
class _One:
    """A form of one kind of decays."""

    dash_mem: int
    dash_syn: tuple[int, ...]
    gain: np.ndarray
    own: np.ndarray
    kernel_error: float
    reset_error: float

    @property
    def error(self) -> float:
        return math.hypot(self.kernel_error, self.reset_error)


def _fitted(asked: np.ndarray, reset: np.ndarray | None, dash_mem: int, dashes: tuple[int, ...], may_loop: bool) -> _One:
    steps, b = len(asked), float(kept(dash_mem))
    columns = np.stack([_kernel(float(kept(dash)), b, steps) for dash in dashes], axis=1)
    gain = np.linalg.lstsq(columns, asked, rcond=None)[0]
    error = float(np.linalg.norm(columns @ gain - asked) / np.linalg.norm(asked))
    own, lost = np.zeros(len(dashes)), 0.0
    if reset is not None:
        left = reset + b ** np.arange(1, steps)
        scale = math.hypot(1.0, float(np.linalg.norm(reset)))
        lost = float(np.linalg.norm(left)) / scale
        if may_loop and steps > 1:
            tried = np.linalg.lstsq(columns[:-1], left, rcond=None)[0]
            better = float(np.linalg.norm(columns[:-1] @ tried - left)) / scale
            if better < lost - SELF_GAIN:
                own, lost = tried, better
    return _One(dash_mem, dashes, gain, own, error, lost)


def _of_kind(neurons: Neurons, alpha: float, beta: float, steps: int, currents: int, may_loop: bool) -> list[_One]:
    """Forms of one kind of decays, the best first."""
    asked = _kernel(alpha, beta, steps)
    reset = None
    if not neurons.is_readout:
        n = np.arange(1, steps)
        reset = -(beta ** (n - 1)) if neurons.reset_delayed else -(beta**n)
    potentials = {0, *nearest_dashes(beta, 0), *nearest_dashes(alpha, 0)}
    shifts = sorted({1, *nearest_dashes(alpha, 1), *nearest_dashes(beta, 1)})
    found = []
    for mem in sorted(potentials):
        one = [_fitted(asked, reset, mem, (dash,), may_loop) for dash in shifts]
        found += one
        if currents == 2:
            best = min(item.error for item in one)
            two = [_fitted(asked, reset, mem, pair, may_loop) for pair in combinations(shifts, 2)]
            found += [item for item in two if item.error < WORTH_SECOND * best]
    return sorted(found, key=lambda item: (round(item.error, 6), len(item.dash_syn), bool(item.own.any())))


def candidates(neurons: Neurons, steps: int, currents: int, may_loop: bool, count: int) -> list[Form]:
    """The forms of a layer whose kernels are nearest to what was asked, the best first.

    Args:
        steps: over which kernels are compared.
        currents: that the layer may have, 1 or 2. may_loop: whether its neurons may feed themselves.
        count: most forms.
    """
    pairs, place = np.unique(np.stack([neurons.alpha, neurons.beta], axis=1).round(6), axis=0, return_inverse=True)
    fitted, nearest = pairs, np.arange(len(pairs))
    if len(pairs) > MOST_KINDS:
        fitted = pairs[np.linspace(0, len(pairs) - 1, MOST_KINDS).astype(int)]
        nearest = np.abs(pairs[:, None] - fitted[None]).sum(axis=2).argmin(axis=1)
    length = max(2, min(steps, LONGEST))
    ranked = [_of_kind(neurons, float(a), float(b), length, currents, may_loop) for a, b in fitted]
    chosen = nearest[place.reshape(-1)]
    return [
        _joined([ranked[kind][min(rank, len(ranked[kind]) - 1)] for kind in range(len(fitted))], chosen)
        for rank in range(min(count, max(map(len, ranked))))
    ]


def _joined(kinds: Sequence[_One], chosen: np.ndarray) -> Form:
    """Forms of the kinds as one of the layer; a second current that a kind does without gets nothing."""
    currents = max(len(kind.dash_syn) for kind in kinds)

    def rows(name: str, fill: float) -> np.ndarray:
        table = [[*getattr(kind, name), fill][:currents] for kind in kinds]
        return np.array([row + [fill] * (currents - len(row)) for row in table])[chosen].T

    return Form(
        np.array([kind.dash_mem for kind in kinds], dtype=np.int64)[chosen],
        rows("dash_syn", 1).astype(np.int64),
        rows("gain", 0.0),
        rows("own", 0.0),
        max(kind.kernel_error for kind in kinds),
        max(kind.reset_error for kind in kinds),
    )


def overlaps(form: Form) -> np.ndarray:
    """Products of the two kernels of a form's currents, of a spike before decay: float64 (N, 2, 2)."""
    keys = np.stack([form.dash_mem, *form.dash_syn], axis=1)
    kinds, place = np.unique(keys, axis=0, return_inverse=True)
    found = []
    for mem, *dashes in kinds.tolist():
        shares = [float(kept(dash)) for dash in dashes]
        columns = np.stack([share * _kernel(share, float(kept(mem)), LONGEST) for share in shares], axis=1)
        found.append(columns.T @ columns)
    return np.stack(found)[place.reshape(-1)]


def relay_form(size: int) -> Form:
    """Of read-outs that each repeat the spikes of one neuron: what is left of the spikes before stays below one spike."""
    whole = np.ones((1, size))
    return Form(np.zeros(size, dtype=np.int64), whole.astype(np.int64), whole, 0 * whole, 0.0, 0.0)


def bias_of(neurons: Neurons, form: Form) -> np.ndarray:
    """What is added to v at each step for the layer's biases of either kind, float64 (N,): v ends at the same value."""
    by_current = neurons.current_bias / np.maximum(1 - neurons.alpha, 1e-9)
    asked, b = neurons.bias + by_current, kept(form.dash_mem)
    leak = 1 - neurons.beta
    return np.where(leak > 1e-6, asked * (1 - b) / np.maximum(leak, 1e-6), asked)


@dataclass(frozen=True)
class FormRun:
    """What the forms do on an input.

    Attributes:
        spikes: layer -> spikes, float64 (B, T, N). potentials: v after each step.
        currents: layer -> largest current before it decays, float64 (J, N). peaks: largest |v| before it fires, (N,).
        wanted: layer -> most spikes that v alone would send in a step, (N,).
    """

    spikes: dict[str, Tensor]
    potentials: dict[str, Tensor]
    currents: dict[str, np.ndarray]
    peaks: dict[str, np.ndarray]
    wanted: dict[str, np.ndarray]


def run_forms(
    description: Description, forms: Mapping[str, Form], x_BTF: Tensor, most: Mapping[str, np.ndarray]
) -> FormRun:
    """Run from rest in float64: Xylo's decays and numbers of spikes, without rounding and without ends of registers.

    Args:
        x_BTF: float64, flat.
        most: layer -> most spikes of each neuron in a step, (N,).
    """
    sent = {INPUT: x_BTF.double()}
    found = FormRun({}, {}, {}, {}, {})
    for name in list(description.depths())[1:]:
        layer = description.layer(name)
        drive_BTN = x_BTF.new_zeros((*x_BTF.shape[:2], layer.size), dtype=torch.float64)
        own = []
        for item in description.incoming(name):
            if item.recurrent:
                own.append(item)
            else:
                drive_BTN = drive_BTN + weighted(item, sent[item.source])
        _advance(found, layer, forms[name], drive_BTN, own, torch.from_numpy(np.array(most[name], dtype=np.float64)))
        sent[name] = found.spikes[name]
    return found


def all_spikes(description: Description, single: bool, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """Layer -> most spikes of each neuron in a step: one, or as many as the chip sends."""
    found = {}
    for layer in description.neurons:
        limit = 1 if single or layer.name in outputs else MOST_SPIKES["xylo"]
        found[layer.name] = np.full(layer.size, limit)
    return found


def _advance(found: FormRun, layer: Neurons, form: Form, drive_BTN: Tensor, own: list, most: Tensor) -> None:
    def row(value: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(value, dtype=np.float64))

    share, gain, keep = row(kept(form.dash_syn)), row(form.gain), row(kept(form.dash_mem))
    threshold, bias = row(layer.threshold), row(bias_of(layer, form))
    back = row(form.own * np.where(np.isfinite(layer.threshold), layer.threshold, 0))
    taken = torch.where(torch.isinf(threshold), 0, threshold)
    count = len(form.gain)
    current = [torch.zeros_like(drive_BTN[:, 0]) for _ in range(count)]
    v = spike = torch.zeros_like(drive_BTN[:, 0])
    spikes, potentials = torch.empty_like(drive_BTN), torch.empty_like(drive_BTN)
    highest = [torch.zeros(layer.size, dtype=torch.float64) for _ in range(count)]
    peak, wanted = torch.zeros(layer.size, dtype=torch.float64), torch.zeros(layer.size, dtype=torch.float64)
    for t in range(drive_BTN.shape[1]):
        drive = drive_BTN[:, t]
        for item in own:
            drive = drive + weighted(item, spike[:, None])[:, 0]
        for j in range(count):
            current[j] = share[j] * current[j] + gain[j] * drive + back[j] * spike
            highest[j] = torch.maximum(highest[j], current[j].abs().amax(dim=0) / share[j])
        v = keep * v + bias
        for each in current:
            v = v + each
        peak = torch.maximum(peak, v.abs().amax(dim=0))
        whole = torch.floor(v / threshold).clamp_min(0)
        wanted = torch.maximum(wanted, whole.amax(dim=0))
        spike = torch.minimum(whole, most)
        v = v - spike * taken
        spikes[:, t], potentials[:, t] = spike, v
    found.spikes[layer.name], found.potentials[layer.name] = spikes, potentials
    found.currents[layer.name] = torch.stack(highest).numpy()
    found.peaks[layer.name], found.wanted[layer.name] = peak.numpy(), wanted.numpy()
