"""Route lif: a network of snnTorch's neurons as integers of the chip's, judged and accounted for on streams.

Shape letters: N samples, T steps, F features, C outputs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from experiments.runs.hydra_app import ConfigError
from experiments.runs.samples.judging import Judged, JudgeError, Readout, first_tensor, judge
from experiments.samples.records import Samples
from neuro.accounting.account import GraphAccount, graph_account
from neuro.conversion.spiking.arguments import PIECES
from neuro.conversion.spiking.convert import convert_spiking
from neuro.conversion.spiking.describing import describe
from neuro.conversion.spiking.description import Description, run_float
from neuro.conversion.spiking.network import SpikingNetwork
from neuro.conversion.spiking.snntorch_modules import is_neuron

LIF = "lif"


@dataclass
class LifConfig:
    """Settings of the lif route, for networks of snnTorch's neurons."""

    time_steps: int = 0
    """Present every sample as a current at so many steps; 0: samples are streams (N, T, ...) already."""
    input_bits: int = 0
    """Bits of an input message, sign included; 0: inputs are whole numbers already, as spikes and counts are."""
    pieces: str = "1"
    """Synapses per weight: 1, 2, or auto."""
    potential: bool = False
    """The last neurons' potential is the result, not their spikes."""

    def __post_init__(self) -> None:
        if self.time_steps < 0:
            raise ConfigError(f"lif.time_steps is {self.time_steps}; it must be at least 0")
        if self.input_bits != 0 and not 2 <= self.input_bits <= 16:
            raise ConfigError(f"lif.input_bits is {self.input_bits}; it is 0, or 2 to 16")
        if self.pieces not in tuple(map(str, PIECES)):
            raise ConfigError(f"lif.pieces is {self.pieces!r}; it is one of {', '.join(map(str, PIECES))}")


@dataclass(frozen=True)
class Spiking:
    """What the route found. `judged`: float (snnTorch's own run), quantised (real numbers on rounded inputs), simulated."""

    network: SpikingNetwork
    judged: dict[str, Judged]
    account: GraphAccount
    samples: int
    clipped_inputs: int
    clips: int
    wraps: int


class Stepped(nn.Module):
    """Layers of one step, with neurons that keep their state, over a stream from rest: (N, T, ...) -> (N, T, C)."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x_NT: Tensor) -> Tensor:
        for part in self.layers.modules():
            reset = getattr(part, "reset_mem", None)
            if callable(reset):
                reset()
        return torch.stack([first_tensor(self.layers(x_N)) for x_N in x_NT.unbind(1)], dim=1)


class _Real(nn.Module):
    """The description in real numbers, on inputs as the messages have them."""

    def __init__(self, description: Description, scale: float, limits: tuple[int, int], potential: bool) -> None:
        super().__init__()
        self.description, self.scale, self.limits, self.potential = description, scale, limits, potential

    def forward(self, x_NT: Tensor) -> Tensor:
        run = run_float(self.description, rounded(x_NT, self.scale, self.limits))
        (name,) = self.description.outputs
        return (run.potentials if self.potential else run.spikes)[name]


class _Integers(nn.Module):
    """The converted network on the simulator."""

    def __init__(self, network: SpikingNetwork) -> None:
        super().__init__()
        self.network = network
        self.clips = self.wraps = 0

    def forward(self, x_NT: Tensor) -> Tensor:
        found, activity = self.network.run(rounded(x_NT, self.network.input_scale, self.network.input_range))
        counts = activity.populations.values()
        self.clips += sum(c.saturations_v for c in counts)
        self.wraps += sum(c.wraps_sum + c.wraps_u for c in counts)
        (values,) = found.values()
        return values


def rounded(x: Tensor, scale: float, limits: tuple[int, int]) -> Tensor:
    """Whole numbers of `scale` within the limits, in float units."""
    return torch.round(x.double() / scale).clamp(*limits) * scale


def as_streams(samples: Samples, steps: int) -> Samples:
    """Every sample as the same current at so many steps; 0 leaves streams as they are.

    Raises JudgeError for samples that are no streams.
    """
    if not steps:
        if samples.x.ndim < 3:
            raise JudgeError(
                f"route lif takes streams (N, T, ...), and x is {samples.x.shape}; lif.time_steps=T presents each sample "
                "at T steps"
            )
        return samples

    def repeated(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.broadcast_to(x[:, None], (len(x), steps, *x.shape[1:])))

    return replace(samples, x=repeated(samples.x), x_train=repeated(samples.x_train))


def message_range(samples: Samples, bits: int) -> tuple[float, tuple[int, int]]:
    """(float value of one unit, lowest and highest message) from the training samples.

    Raises JudgeError for values that are no whole numbers where no width is given.
    """
    x = samples.x_train.astype(np.float64)
    if bits:
        most = 2 ** (bits - 1) - 1
        return max(float(np.abs(x).max()), 1e-12) / most, (-most, most)
    both = (x, samples.x.astype(np.float64))
    if any(not np.array_equal(values, np.round(values)) for values in both):
        raise JudgeError(
            "x holds values that are no whole numbers, and messages are: lif.input_bits=8 rounds them to 8 bits of the "
            "largest training value, scale= multiplies arrays by a number"
        )
    return 1.0, (min(0, int(x.min())), max(1, int(x.max())))


def deploy_spiking(
    model: nn.Module,
    samples: Samples,
    cfg: LifConfig,
    *,
    chip: str,
    chips: int | None,
    profiles: list[str],
    readout: Readout,
    batch: int,
    calibration_samples: int,
    counted_samples: int,
) -> Spiking:
    """Describe, convert, judge and account for a network of snnTorch's neurons.

    Args:
        model: nn.Sequential of one step's layers, or any module that takes streams (N, T, ...).
        samples: streams; see `as_streams`.
        cfg: of the route.
        readout: what steps of an answer become; for the simulation steps are the second axis.
        counted_samples: held-out samples that counts, cores, joules and times are of.

    Raises:
        NotConvertible, JudgeError, DoesNotFit: as the parts.
    """
    training = torch.from_numpy(samples.x_train[:calibration_samples])
    steps = training.shape[1]
    scale, limits = message_range(samples, cfg.input_bits)
    if isinstance(model, nn.Sequential) and any(is_neuron(part) for part in model):
        description = describe(model, tuple(training.shape[2:]), readout=cfg.potential)
        whole: nn.Module = Stepped(model)
    else:
        description = describe(model, example=training[:1], readout=cfg.potential)
        whole = model
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        network = convert_spiking(
            description,
            steps=steps,
            calibration=rounded(training, scale, limits),
            input_scale=scale,
            input_range=limits,
            pieces=cfg.pieces if cfg.pieces == "auto" else int(cfg.pieces),
        )
    notes = (*network.notes, *dict.fromkeys(str(one.message) for one in said))
    inner = Readout(readout.how or "mean", 1)
    judged = {
        "float": judge(whole, samples, readout if not isinstance(whole, Stepped) else inner, batch),
        "quantised": judge(_Real(description, scale, limits, cfg.potential), samples, inner, batch),
    }
    integers = _Integers(network)
    judged["simulated"] = judge(integers, samples, inner, batch)
    few = rounded(torch.from_numpy(samples.x[:counted_samples]), scale, limits)
    found = graph_account(network.graph, network.present(few), chip=chip, chips=chips, profiles=profiles or None)
    whole_x = samples.x.astype(np.float64) / scale
    clipped = int(((np.round(whole_x) < limits[0]) | (np.round(whole_x) > limits[1])).sum())
    network = replace(network, notes=notes)
    return Spiking(network, judged, found, len(few), clipped, integers.clips, integers.wraps)
