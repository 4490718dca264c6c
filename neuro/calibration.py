"""Ranges of what flows into and out of every linear layer, from one pass over training data.

    calibration = calibrate(model, training_batches)
    calibration.layers["blocks.0.mlp.fc1"].input_max

Percentiles come from a histogram over log2|x| with 64 bins an octave, so that one pass is enough and memory does not
grow; they are accurate to 2^(1/64), about 1.1 %. Use training data only: the ranges are part of the converted model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuro.tracing import Example, evaluating, split_example

BINS_PER_OCTAVE = 64
OCTAVES = 64
LOWEST_LOG2 = -40
DEFAULT_PERCENTILE = 99.99


@dataclass(frozen=True)
class LayerRange:
    """Magnitudes seen at one nn.Linear, in the model's own float units.

    `input_max`, `output_max`: largest |x|; `input_percentile`, `output_percentile`: the calibration's percentile of
    |x| over all values, zeros included; `output_positive_max`: largest positive output (what a ReLU passes on), 0 if
    none was positive. For the second layer of an MLP pair the input is the hidden activation. `rows`: tokens seen.
    """

    rows: int
    input_max: float
    input_percentile: float
    output_max: float
    output_percentile: float
    output_positive_max: float


@dataclass(frozen=True)
class Calibration:
    """Ranges per layer name, the percentile they hold, and what they were made from."""

    layers: Mapping[str, LayerRange]
    percentile: float
    batches: int
    never_called: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "percentile": self.percentile,
            "batches": self.batches,
            "never_called": list(self.never_called),
            "layers": {name: asdict(value) for name, value in self.layers.items()},
        }


class _Magnitudes:
    """Running maximum and log-spaced histogram of |x|."""

    def __init__(self) -> None:
        self.maximum = 0.0
        self.positive = 0.0
        self.zeros = 0
        self.bins = torch.zeros(OCTAVES * BINS_PER_OCTAVE, dtype=torch.int64)

    def add(self, values: Tensor) -> bool:
        """Count a tensor's values; False when one of them is NaN or infinite (nothing is then counted)."""
        flat = values.detach().float().reshape(-1)
        magnitude = flat.abs()
        largest = float(magnitude.max())
        if not largest < float("inf"):
            return False
        self.maximum = max(self.maximum, largest)
        self.positive = max(self.positive, float(flat.max()))
        present = magnitude[magnitude > 0]
        self.zeros += magnitude.numel() - present.numel()
        index = ((present.log2() - LOWEST_LOG2) * BINS_PER_OCTAVE).long().clamp(0, self.bins.numel() - 1)
        self.bins += torch.bincount(index, minlength=self.bins.numel()).cpu()
        return True

    def percentile(self, percent: float) -> float:
        """Upper edge of the bin that holds the percentile, never above the maximum."""
        total = self.zeros + int(self.bins.sum())
        wanted = percent / 100 * total
        reached = self.zeros + torch.cumsum(self.bins, 0)
        if self.zeros >= wanted:
            return 0.0
        index = int(torch.searchsorted(reached.double(), torch.tensor(wanted, dtype=torch.float64)))
        return float(min(self.maximum, 2.0 ** ((index + 1) / BINS_PER_OCTAVE + LOWEST_LOG2)))


def calibrate(module: nn.Module, batches: Iterable[Example], *, percentile: float = DEFAULT_PERCENTILE) -> Calibration:
    """Run `module` in eval mode on every batch and keep the ranges at all its nn.Linear layers.

    Args:
        module: any nn.Module; not changed (training flags are put back, hooks are removed).
        batches: what forward takes, each a tensor, a tuple of arguments or a dict of keyword arguments. Training data.
        percentile: which percentile of |x| to keep beside the maximum, above 0 and up to 100.

    Raises:
        ValueError: no batch, a batch that does not run through the module (its shape is named), NaN or infinite values
            at a layer (the layer is named), a percentile out of range, a module without nn.Linear.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; it lies above 0 and up to 100, 99.99 for instance")
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    if not linears:
        raise ValueError(f"{type(module).__name__} has no nn.Linear, so there is nothing to calibrate")
    inputs = {name: _Magnitudes() for name in linears}
    outputs = {name: _Magnitudes() for name in linears}
    rows = dict.fromkeys(linears, 0)
    current = 0

    def watch(name: str):
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if output.numel() == 0:
                raise _Refused(f"calibration batch {current} is empty at layer {name!r} (shape {tuple(output.shape)})")
            for store, values, side in ((inputs, args[0], "input"), (outputs, output, "output")):
                if not store[name].add(values):
                    raise _Refused(
                        f"calibration batch {current}: the {side} of layer {name!r} holds NaN or infinite values. "
                        "Check the batch and the weights before it."
                    )
            rows[name] += output.numel() // output.shape[-1]

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in linears.items()]
    seen = 0
    try:
        with evaluating(module):
            for current, batch in enumerate(batches):
                args, kwargs = split_example(batch)
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
    layers = {
        name: LayerRange(
            rows=rows[name],
            input_max=inputs[name].maximum,
            input_percentile=inputs[name].percentile(percentile),
            output_max=outputs[name].maximum,
            output_percentile=outputs[name].percentile(percentile),
            output_positive_max=outputs[name].positive,
        )
        for name in linears
        if rows[name]
    }
    return Calibration(
        layers=layers,
        percentile=percentile,
        batches=seen,
        never_called=tuple(name for name in linears if not rows[name]),
    )


class _Refused(ValueError):
    """A calibration batch whose values cannot be used; raised from inside a hook."""
