"""What a plan keeps of a network of convolutions: one record per population that sends, one per way into it."""

from __future__ import annotations

from dataclasses import dataclass

INPUT = "x"
"""Population of a graph that the host sends to."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one source adds to a stage's sum. `source`: a stage's name or INPUT; `module`: the layer on the way, or "",
    which with weights is the whole module;
    `projection`: the one whose synapses are the layer's, those of a pooling's windows (`gain` 0), or the first of a
    residual add, which multiplies by `gain`; `norm`: the batch norm that the layer's weights have taken over; `macs`,
    `weights`: the layer's dense multiply-accumulates a sample and how many weights it has; `weight_scale`: weight =
    stored / step x scale, 0 without layer.
    """

    source: str
    module: str = ""
    norm: str = ""
    projection: str
    gain: int = 1
    macs: int = 0
    weights: int = 0
    weight_scale: float = 0.0

    @property
    def has_layer(self) -> bool:
        """Whether a layer is on the way."""
        return self.weights > 0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One population that sends messages, named like the stage, and what stands before it.

    `shape`: of a sample of its messages, `sum_shape` before a pooling, both in torch's order ((C, H, W), (C, W) or (F,));
    `sums`: population that holds the sum, which is the stage itself where nothing is rectified; `sum_unit`: what 1 in it
    is worth; `shift`: how far sums are shifted right on the way to a message; `unit`: what 1 in a message is worth (code
    "rate": a spike). `bias`: whole numbers per channel in the sum; `half`: what is added so that the shift rounds;
    `pool`: (rows, columns) of the kernel, of the stride and of the padding of a pooling between sum and message, or ();
    `held`: population whose messages are the stage's values, which is the stage itself unless that sends changes or
    spikes; `threshold`: messages of magnitude up to it are not sent (code "delta": smallest change sent; code "rate": the
    neurons' threshold).
    """

    name: str
    links: tuple[Link, ...]
    shape: tuple[int, ...]
    sum_shape: tuple[int, ...]
    relu: bool
    sums: str
    held: str
    sum_unit: float
    shift: int = 0
    unit: float
    bias: tuple[int, ...] = ()
    half: int = 0
    pool: tuple[int, ...] = ()
    threshold: int = 0
