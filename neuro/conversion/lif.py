"""A trained network of leaky integrate-and-fire layers (snnTorch's Leaky) to an integer graph of lif neurons.

Float: `v <- beta v + W x + b`, a spike where v > threshold, v becomes 0. Chip: the same in integers, with S units of v for
a threshold. S is the largest that leaves no register for any input and any number of steps up to `steps`, with
`headroom_bits` to spare: sums within 16 bits, v within 24, biases within their mantissa; the weight exponent then follows,
such that weights use their 8 bits as far as they go. Exponents are -1 at the lowest: weights of mixed sign are even, so
that halving loses nothing in either mode. Thresholds are exact (S is a multiple of 64); weights are rounded to even
integers, decays to 1/4096, biases to 13 bits.

Each projection delays by one step, which the float network does not: layer k sees step t at t + k. With `steps` given the
populations are of kind lif_reset and start from rest when a sample's first step reaches them. Samples can then follow each
other in one stream, without a gap, and biases that act while the pipeline fills do no harm.

Shape letters: B samples, T steps, F features, N neurons. Reads attributes of snnTorch's neurons, and imports no snnTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hardware.text import quoted
from neuro.conversion.integers import BIAS_LIMIT, bias_registers, payload_bits
from neuro.conversion.spiking.description import NotConvertible
from neuro.graph import Population, Projection, SpikingGraph

SUM_LIMIT = 2**15 - 1  # 16 bits, sign included, reach a neuron
V_LIMIT = 2**23 - 1
VTH_LIMIT = 2**17 - 1
WEIGHT_LIMIT = 254  # even, mixed signs
LOWEST_EXP, HIGHEST_EXP = -1, 7


@dataclass(frozen=True)
class LifLayer:
    """What one layer became.

    Attributes:
        name: of the population.
        units: S, integer units of v per float threshold.
        weight_exp, largest_weight: of its projection, and the largest |weight| used of 254.
        dv: v keeps (4096 - dv) / 4096 at each step.
        spare_bits_sum, spare_bits_v: bits left above the worst sum and the worst v that any input can give.
    """

    name: str
    units: int
    weight_exp: int
    largest_weight: int
    dv: int
    spare_bits_sum: float
    spare_bits_v: float


@dataclass(frozen=True)
class LifNetwork:
    """An integer graph and how samples go in and come out.

    Attributes:
        graph: input population "x", then "layer1", "layer2", ...; the last one is the output.
        layers: one record per layer.
        steps: length of a sample where populations reset themselves, else None.
        input_scale: float value of one unit of an input message.
        input_range: lowest and highest message.
    """

    graph: SpikingGraph
    layers: tuple[LifLayer, ...]
    steps: int | None
    input_scale: float
    input_range: tuple[int, int]

    @property
    def depth(self) -> int:
        """Steps from an input to the output."""
        return len(self.layers)

    def messages(self, x_BTF: Tensor) -> Tensor:
        """Coded float input as integer messages, int32 (B, T, F).

        Raises NotConvertible where a value is no whole number of input units or out of range.
        """
        units = x_BTF.double() / self.input_scale
        whole = torch.round(units)
        low, high = self.input_range
        if bool(((units - whole).abs() > 1e-3).any()) or bool((whole < low).any()) or bool((whole > high).any()):
            reach = f"{float(x_BTF.min()):g}..{float(x_BTF.max()):g}"
            raise NotConvertible(
                f"inputs must be whole numbers {low}..{high} of {self.input_scale:g}; they reach over {reach}."
                f" Convert with another input_scale or input_range, or round them first"
            )
        return whole.to(torch.int32)

    def present(self, x_BTF: Tensor) -> dict[str, Tensor]:
        """Inputs for a run in which every sample starts from rest: (B, T + depth, F), silent at the end."""
        message = self._of_length(self.messages(x_BTF))
        return {"x": torch.cat([message, message.new_zeros(len(message), self.depth, message.shape[2])], dim=1)}

    def collect(self, out_BTN: Tensor) -> Tensor:
        """Output messages of such a run, aligned with the input steps: (B, T, N)."""
        return out_BTN[:, self.depth :]

    def stream(self, x_BTF: Tensor) -> dict[str, Tensor]:
        """Inputs for one run of all samples, one behind the other: (1, B x T + depth, F). Needs `steps`."""
        if self.steps is None:
            raise NotConvertible("samples can follow each other only where neurons reset themselves; convert with steps=T")
        message = self._of_length(self.messages(x_BTF)).flatten(0, 1)[None]
        return {"x": torch.cat([message, message.new_zeros(1, self.depth, message.shape[2])], dim=1)}

    def split(self, out_1MN: Tensor) -> Tensor:
        """Output messages of a stream (1, B x T + depth, N) as (B, T, N)."""
        assert self.steps is not None
        return out_1MN[0, self.depth :].unflatten(0, (-1, self.steps))

    def _of_length(self, message_BTF: Tensor) -> Tensor:
        if self.steps is not None and message_BTF.shape[1] != self.steps:
            raise NotConvertible(f"samples have {message_BTF.shape[1]} steps; the network was converted for {self.steps}")
        return message_BTF

    def table(self) -> str:
        """One line per layer."""
        return "\n".join(
            f"{layer.name}: {layer.units} units per threshold, weight_exp {layer.weight_exp}, weights to"
            f" {layer.largest_weight} of {WEIGHT_LIMIT}, dv {layer.dv}, spare bits: sum {layer.spare_bits_sum:.1f},"
            f" v {layer.spare_bits_v:.1f}"
            for layer in self.layers
        )


def convert_lif(
    layers: Iterable[tuple[nn.Linear, nn.Module]],
    *,
    steps: int | None,
    input_scale: float = 1.0,
    input_range: tuple[int, int] = (0, 1),
    headroom_bits: float = 0.5,
) -> LifNetwork:
    """Convert a chain of linear layers, each into `snntorch.Leaky` neurons.

    Args:
        layers: (linear, neuron) from the input on, as `[(layer.linear, layer.neuron) for layer in classifier.layers]`.
        steps: length of a sample: populations become lif_reset and samples may be streamed. None: plain lif; then biases
            are refused, as they would act before the first message arrives.
        input_scale: float value of one unit of an input message: 1 for spikes, 1/16 for currents of 0..16 sixteenths.
        input_range: lowest and highest input message; (0, 1) are binary spikes.
        headroom_bits: bits to leave free above the worst case.

    Returns:
        LifNetwork.

    Raises:
        NotConvertible: another neuron than Leaky with reset to zero, decays that differ within a layer, a threshold that
            is not positive, values that are not finite, or ranges that fit no exponent; names the layer and the remedy.
    """
    low, high = int(input_range[0]), int(input_range[1])
    if low > high or not input_scale > 0:
        raise NotConvertible(
            f"input_range {input_range} or input_scale {input_scale} is unusable: lowest <= highest, scale > 0"
        )
    if steps is not None and steps < 1:
        raise NotConvertible(f"steps is {steps}; at least 1, or None")
    populations: list[Population] = []
    projections: list[Projection] = []
    records: list[LifLayer] = []
    source, scale, edges = "x", input_scale, (low, high)
    for number, (linear, neuron) in enumerate(layers, start=1):
        name = f"layer{number}"
        if number == 1:
            populations.append(Population("x", "input", linear.in_features))
        weight, bias, beta = _normalised(name, linear, neuron)
        if steps is None and np.any(bias):
            raise NotConvertible(f"{name} has a bias, which acts before the first message arrives; convert with steps=T")
        binary = edges[0] >= 0 and edges[1] <= 1
        fit = _fitted(name, weight * scale, bias, beta, edges, steps, headroom_bits)
        params: dict[str, Any] = {"du": 4095, "dv": fit.dv, "vth": fit.units // 64}
        params |= {"bias_mant": fit.mantissa, "bias_exp": fit.exponent}
        if steps is not None:
            params |= {"reset_interval": steps, "reset_offset": (number + 1) % steps}
        populations.append(Population(name, "lif" if steps is None else "lif_reset", linear.out_features, params))
        bits = 0 if binary else payload_bits(max(abs(edges[0]), abs(edges[1])))
        projections.append(Projection(f"fc{number}", source, name, "a_in", fit.weight, fit.weight_exp, 8, "mixed", bits))
        records.append(
            LifLayer(
                name, fit.units, fit.weight_exp, int(np.abs(fit.weight).max()), fit.dv, fit.spare_bits_sum, fit.spare_bits_v
            )
        )
        source, scale, edges = name, 1.0, (0, 1)
    if not records:
        raise NotConvertible("no layer was given")
    meta = {
        "route": "lif",
        "steps": steps,
        "input_scale": input_scale,
        "input_range": [low, high],
        "layers": [asdict(record) for record in records],
    }
    graph = SpikingGraph(tuple(populations), tuple(projections), (source,), meta)
    return LifNetwork(graph, tuple(records), steps, input_scale, (low, high))


def _normalised(name: str, linear: nn.Linear, neuron: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """Weights (N, F) and bias (N,) in units of each neuron's threshold, float64, and the decay."""
    kind = type(neuron).__name__
    if kind != "Leaky":
        raise NotConvertible(f"{name}: neurons are {kind}; snntorch.Leaky is what converts")
    rules: Mapping[str, tuple[object, object]] = {
        "reset_mechanism": (neuron.reset_mechanism, "zero"),
        "inhibition": (bool(neuron.inhibition), False),
        "state_quant": (bool(neuron.state_quant), False),
        "graded_spikes_factor": (float(torch.as_tensor(neuron.graded_spikes_factor).max()), 1.0),
    }
    for key, (given, needed) in rules.items():
        if given != needed:
            raise NotConvertible(
                f"{name}: {key} is {quoted(given)}; the chip's neurons need {quoted(needed)}. Train with that"
            )

    def array(value: Tensor) -> np.ndarray:
        return value.detach().cpu().double().numpy()

    beta_N = np.clip(array(neuron.beta).reshape(-1), 0, 1)
    if np.ptp(beta_N) > 0:
        raise NotConvertible(f"{name}: beta runs from {beta_N.min():g} to {beta_N.max():g}; a population has one decay")
    threshold_N = np.broadcast_to(array(neuron.threshold).reshape(-1), (linear.out_features,))
    if not np.all(threshold_N > 0):
        raise NotConvertible(f"{name}: a threshold is {threshold_N.min():g}; it must be above 0")
    bias = np.zeros(linear.out_features) if linear.bias is None else array(linear.bias)
    weight_NF, bias_N = array(linear.weight) / threshold_N[:, None], bias / threshold_N
    if not (np.isfinite(weight_NF).all() and np.isfinite(bias_N).all()):
        raise NotConvertible(f"{name}: a weight or bias is not finite; the training ran away")
    return weight_NF, bias_N, float(beta_N[0])


@dataclass(frozen=True)
class _Fit:
    units: int
    dv: int
    weight_exp: int
    weight: np.ndarray
    mantissa: np.ndarray
    exponent: np.ndarray
    spare_bits_sum: float
    spare_bits_v: float


def _fitted(
    name: str,
    weight_NF: np.ndarray,
    bias_N: np.ndarray,
    beta: float,
    edges: tuple[int, int],
    steps: int | None,
    headroom_bits: float,
) -> _Fit:
    """Integers of one layer. `weight_NF`: thresholds per message unit; `edges`: lowest and highest message."""
    dv = min(4095, 4096 - round(4096 * beta))
    keep = (4096 - dv) / 4096
    length = math.inf if steps is None else steps
    # How often a constant drive adds up: sum of keep^k over the steps there are.
    piled = length if keep == 1 else (1 - keep**length) / (1 - keep)
    if math.isinf(piled):
        raise NotConvertible(
            f"{name}: v never decays and steps is None, so nothing bounds it; give steps, or train beta < 1"
        )
    room = 2.0**-headroom_bits
    largest = float(np.abs(weight_NF).max())
    units = _most_units(weight_NF, bias_N, keep, piled, edges, room)
    weight_exp = LOWEST_EXP
    if largest > 0:
        full = {e: WEIGHT_LIMIT * 64 * 2.0**e / largest for e in range(LOWEST_EXP, HIGHEST_EXP + 1)}
        weight_exp = max((e for e, most in full.items() if most <= units), default=LOWEST_EXP)
        units = min(units, full[weight_exp])
    while units >= 64:
        exact = int(units // 64) * 64
        per_unit = 64 * 2.0**weight_exp
        weight = 2 * np.rint(weight_NF * exact / per_unit / 2).astype(np.int64)
        mantissa, exponent = bias_registers(bias_N * exact)
        low_N, high_N = _sums(weight * 2.0**weight_exp, edges)
        worst_sum = float(max(np.abs(low_N).max(), np.abs(high_N).max()))
        worst_v = _worst_v(low_N * 64, high_N * 64, mantissa * 2.0**exponent, exact, keep, piled)
        if worst_sum <= SUM_LIMIT * room and worst_v <= V_LIMIT * room and np.abs(weight).max() <= WEIGHT_LIMIT:
            spare = [math.log2(limit / max(worst, 1.0)) for limit, worst in ((SUM_LIMIT, worst_sum), (V_LIMIT, worst_v))]
            return _Fit(exact, dv, weight_exp, weight.astype(np.int32), mantissa, exponent, *spare)
        units = min(units * 0.995, exact - 64)  # rounding went over the edge
    raise NotConvertible(
        f"{name}: with weights up to {largest:.3g} thresholds, no exponent keeps its sums within 16 bits and v within 24."
        " Shrink its weights (weight decay), its inputs' range, or headroom_bits"
    )


def _most_units(
    weight_NF: np.ndarray, bias_N: np.ndarray, keep: float, piled: float, edges: tuple[int, int], room: float
) -> float:
    """Largest S that every register allows, before rounding."""
    low_N, high_N = _sums(weight_NF, edges)
    worst_sum = max(float(np.abs(low_N).max()), float(np.abs(high_N).max()))
    bounds = [
        VTH_LIMIT * 64.0,
        V_LIMIT * room / _worst_v(low_N, high_N, bias_N, 1.0, keep, piled),
        SUM_LIMIT * 64 * room / max(worst_sum, 1e-300),
        BIAS_LIMIT * 2.0**7 / max(float(np.abs(bias_N).max()), 1e-300),
    ]
    return min(bounds)


def _sums(weight_NF: np.ndarray, edges: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest sum that messages within `edges` can give each neuron; silence is always possible."""
    low, high = min(edges[0], 0), max(edges[1], 0)
    up, down = np.maximum(weight_NF, 0).sum(axis=1), np.minimum(weight_NF, 0).sum(axis=1)
    return up * low + down * high, up * high + down * low


def _worst_v(
    low_N: np.ndarray, high_N: np.ndarray, bias_N: np.ndarray, threshold: float, keep: float, piled: float
) -> float:
    """Largest |v| before a reset: above, at most a threshold is carried over; below, drive adds up."""
    above = keep * threshold + np.maximum(high_N + bias_N, 0)
    below = np.maximum(-(low_N + bias_N), 0) * piled
    return float(max(above.max(), below.max()))
