"""Ranges of what flows into and out of every linear layer, from one pass over training data.

    calibration = calibrate(model, training_batches)
    calibration.layers["blocks.0.mlp.fc1"].input_max

Percentiles come from a histogram over log2|x| with 64 bins an octave, so that one pass is enough and memory does not
grow; they are accurate to 2^(1/64), about 1.1 %. The same histogram gives the clip of least squared rounding and
clipping error (`method="mse"`). Use training data only: the ranges are part of the converted model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hardware.text import quoted
from neuro.analysis.preparation import convertible, prepared_copy
from neuro.analysis.tracing import Example, check_ready, evaluating, split_example
from neuro.conversion.integers import INT8_MAX
from neuro.conversion.settings import check_word

BINS_PER_OCTAVE = 64
OCTAVES = 64
LOWEST_LOG2 = -40
DEFAULT_PERCENTILE = 99.99
METHODS = ("percentile", "mse")
WATCHED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)
HIDDEN_LEVELS = 2**10 - 1  # magnitudes of a hidden message of 11 bits, for the error search
CLIPS_PER_OCTAVE, CLIP_OCTAVES, POINTS = 16, 6, 4  # clips tried below the maximum; points per bin


@dataclass(frozen=True)
class LayerRange:
    """Magnitudes seen at one nn.Linear, nn.Conv1d or nn.Conv2d, in the model's own float units.

    `input_max`, `output_max`: largest |x|; `input_percentile`, `output_percentile`: the calibration's percentile of
    |x| over all values, zeros included; `output_positive_max`: largest positive output (what a ReLU passes on), 0 if
    none was positive. For the second layer of an MLP pair the input is the hidden activation. `rows`: tokens seen, samples
    of a convolution.
    `input_clip`, `output_positive_clip`: what the calibration's method says the integers should reach, 0 where nothing
    was seen; `output_channel_max`: largest |output| per output channel.
    """

    rows: int
    input_max: float
    input_percentile: float
    output_max: float
    output_percentile: float
    output_positive_max: float
    input_clip: float = 0.0
    output_positive_clip: float = 0.0
    output_channel_max: tuple[float, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """Ranges per layer name, the percentile they hold, the method that chose the clips, and what they were made from."""

    layers: Mapping[str, LayerRange]
    percentile: float
    batches: int
    never_called: tuple[str, ...]
    method: str = "percentile"

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "percentile": self.percentile,
            "method": self.method,
            "batches": self.batches,
            "never_called": list(self.never_called),
            "layers": {name: asdict(value) for name, value in self.layers.items()},
        }


class _Histogram:
    """Log-spaced histogram of magnitudes, zeros apart."""

    def __init__(self) -> None:
        self.zeros = 0
        self.bins = torch.zeros(OCTAVES * BINS_PER_OCTAVE, dtype=torch.int64)

    def add(self, magnitude: Tensor) -> None:
        present = magnitude[magnitude > 0]
        self.zeros += magnitude.numel() - present.numel()
        index = ((present.log2() - LOWEST_LOG2) * BINS_PER_OCTAVE).long().clamp(0, self.bins.numel() - 1)
        self.bins += torch.bincount(index, minlength=self.bins.numel()).cpu()

    def percentile(self, percent: float, maximum: float) -> float:
        """Upper edge of the bin that holds the percentile, never above the maximum."""
        total = self.zeros + int(self.bins.sum())
        wanted = percent / 100 * total
        reached = self.zeros + torch.cumsum(self.bins, 0)
        if self.zeros >= wanted:
            return 0.0
        index = int(torch.searchsorted(reached.double(), torch.tensor(wanted, dtype=torch.float64)))
        return float(min(maximum, 2.0 ** ((index + 1) / BINS_PER_OCTAVE + LOWEST_LOG2)))

    def least_error(self, levels: int, maximum: float) -> float:
        """Clip c, at most `maximum`, of least sum of (x - s q)^2 with s = c / levels and q = min(round(x / s), levels).

        A bin stands for four points spread over it; clips are tried down to 1/64 of the maximum, 16 an octave.
        """
        (filled,) = torch.nonzero(self.bins, as_tuple=True)
        if not len(filled):
            return 0.0
        within = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
        x_BP = torch.exp2((filled[:, None] + within) / BINS_PER_OCTAVE + LOWEST_LOG2).clamp_(max=maximum)
        weight_B1 = self.bins[filled][:, None].double()
        best, best_error = maximum, float("inf")
        for step in range(CLIPS_PER_OCTAVE * CLIP_OCTAVES):
            clip = maximum * 2.0 ** (-step / CLIPS_PER_OCTAVE)
            scale = clip / levels
            error = float((weight_B1 * (x_BP - scale * torch.round(x_BP / scale).clamp_(max=levels)).square()).sum())
            if error < best_error:
                best, best_error = clip, error
        return best


class _Magnitudes:
    """What calibration keeps of one side of a layer: maxima, also per channel, and histograms of |x| and of x > 0."""

    def __init__(self, output: bool) -> None:
        self.output = output
        self.maximum = 0.0
        self.positive = 0.0
        self.channel_max: Tensor | None = None
        self.all = _Histogram()
        self.above = _Histogram()

    def add(self, values: Tensor) -> bool:
        """Count a tensor's values; False when one of them is NaN or infinite (nothing is then counted)."""
        rows = values.detach().float().reshape(-1, values.shape[-1])
        magnitude = rows.abs()
        channel_max = magnitude.amax(dim=0)
        largest = float(channel_max.max())
        if not largest < float("inf"):
            return False
        self.maximum = max(self.maximum, largest)
        self.positive = max(self.positive, float(rows.max()))
        self.all.add(magnitude.reshape(-1))
        if self.output:
            self.above.add(rows[rows > 0])
            self.channel_max = channel_max if self.channel_max is None else torch.maximum(self.channel_max, channel_max)
        return True

    def clip(self, method: str, percent: float, levels: int, positive: bool = False) -> float:
        """The largest magnitude that integers should reach, by the calibration's method."""
        histogram, maximum = (self.above, self.positive) if positive else (self.all, self.maximum)
        return histogram.least_error(levels, maximum) if method == "mse" else histogram.percentile(percent, maximum)


def calibrate(
    module: nn.Module,
    batches: Iterable[Example],
    *,
    percentile: float = DEFAULT_PERCENTILE,
    method: str = "percentile",
) -> Calibration:
    """Run `module` in eval mode on every batch and keep the ranges at all its linear layers,
    convolutions over one and two axes, and batch norms.

    Args:
        module: any nn.Module; not changed: training flags, buffers and what it keeps from call to call are put back, hooks
            are removed. Where layers can become nn.Linear (`neuro.analysis.preparation`), a copy with them converted runs.
        batches: what forward takes, each a tensor, a tuple of arguments or a dict of keyword arguments. Training data.
        percentile: which percentile of |x| to keep beside the maximum, above 0 and up to 100.
        method: what `input_clip` and `output_positive_clip` are: "percentile", or "mse": the clip of least squared error
            of rounding to 127 magnitudes (inputs) or 1,023 (hidden values) and of clipping, on the histogram.

    Raises:
        ValueError: no batch, a batch that does not run through the module (its shape is named), NaN or infinite values
            at a layer (the layer is named), a percentile out of range, an unknown method, a module without such a layer,
            or a lazy, pruned or compiled one (`neuro.analysis.tracing.check_ready`).
    """
    check_word("method", method, METHODS)
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; it lies above 0 and up to 100, 99.99 for instance")
    check_ready(module)
    if convertible(module):
        module = prepared_copy(module)
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, WATCHED)}
    if not any(isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) for layer in linears.values()):
        raise ValueError(
            f"{type(module).__name__} has no nn.Linear, nn.Conv1d or nn.Conv2d, so there is nothing to calibrate"
        )
    inputs = {name: _Magnitudes(output=False) for name in linears}
    outputs = {name: _Magnitudes(output=True) for name in linears}
    rows = dict.fromkeys(linears, 0)
    current = 0

    def watch(name: str):
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            given = args[0] if args else kwargs["input"]
            if output.numel() == 0:
                raise _Refused(
                    f"calibration batch {current} is empty at layer {quoted(name)} (shape {tuple(output.shape)})"
                )
            for store, values, side in ((inputs, given, "input"), (outputs, output, "output")):
                if not store[name].add(_channels_last(linears[name], values)):
                    raise _Refused(
                        f"calibration batch {current}: the {side} of layer {quoted(name)} holds NaN or infinite values. "
                        "Check the batch and the weights before it."
                    )
            last = _channels_last(linears[name], output)
            rows[name] += len(last) if not isinstance(linears[name], nn.Linear) else last.numel() // last.shape[-1]

        return hook

    handles = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in linears.items()]
    seen = 0
    try:
        with evaluating(module):
            for current, batch in enumerate(batches):
                try:
                    args, kwargs = split_example(batch)
                except TypeError as error:
                    raise ValueError(f"calibration batch {current}: {error}") from error
                try:
                    module(*args, **kwargs)
                except _Refused:
                    raise
                except Exception as error:
                    shapes = [tuple(a.shape) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
                    raise ValueError(
                        f"calibration batch {current} of shape {shapes} does not run through {type(module).__name__}: "
                        f"{type(error).__name__}: {error}"
                    ) from error
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("calibration got no batch; pass at least one batch of training data")
    layers = {name: _range(rows[name], inputs[name], outputs[name], method, percentile) for name in linears if rows[name]}
    return Calibration(
        layers=layers,
        percentile=percentile,
        batches=seen,
        never_called=tuple(name for name in linears if not rows[name]),
        method=method,
    )


def _channels_last(layer: nn.Module, values: Tensor) -> Tensor:
    """A convolution's or a batch norm's values with the channels in the last dimension and the samples, of which there may
    be one, first.
    """
    if isinstance(layer, nn.Linear):
        return values
    alone = isinstance(layer, nn.Conv1d | nn.Conv2d) and values.dim() < layer.weight.dim()
    return (values[None] if alone else values).movedim(1, -1)


def _range(rows: int, x: _Magnitudes, y: _Magnitudes, method: str, percentile: float) -> LayerRange:
    return LayerRange(
        rows=rows,
        input_max=x.maximum,
        input_percentile=x.all.percentile(percentile, x.maximum),
        output_max=y.maximum,
        output_percentile=y.all.percentile(percentile, y.maximum),
        output_positive_max=y.positive,
        input_clip=x.clip(method, percentile, INT8_MAX),
        output_positive_clip=y.clip(method, percentile, HIDDEN_LEVELS, positive=True),
        output_channel_max=() if y.channel_max is None else tuple(y.channel_max.tolist()),
    )


class _Refused(ValueError):
    """A calibration batch whose values cannot be used; raised from inside a hook."""
