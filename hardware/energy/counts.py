"""What was counted of one layer: the record that energy, latency and break-even are computed from."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from hardware.text import quoted

_COUNT_FIELDS = (
    "tokens",
    "synops",
    "events",
    "neuron_updates_active",
    "neuron_updates_inactive",
    "dense_macs",
    "weight_bytes",
    "payload_bits",
    "time_steps",
)


@dataclass(frozen=True)
class Counts:
    """Events of one layer over ``tokens`` tokens, all ``time_steps`` steps of each token included.

    Attributes:
        layer: the layer's name, unique within one account.
        tokens: tokens that the counts cover.
        synops: synaptic operations: one weight applied because one event arrived.
        events: spikes or graded messages sent into this layer's synapses; each costs a message.
        neuron_updates_active: neuron updates that sent a message.
        neuron_updates_inactive: neuron updates that sent none.
        dense_macs: multiply-accumulates that a dense evaluation of the same layer needs.
        weight_bytes: bytes of weights held.
        graded: the layer's payloads are wider than one bit.
        payload_bits: widest payload seen, sign included.
        host: the layer runs on the host; only ``dense_macs`` is used then.
        time_steps: steps of the chip that one token takes: 1 for graded messages, T for rate coding over T steps. Synops,
            events and neuron updates are those of all T steps; ``dense_macs`` are those of one dense evaluation.

    Raises:
        ValueError: a count is negative, not finite or no whole number; no time step; a binary layer with a wide payload.
    """

    layer: str
    tokens: int
    synops: int
    events: int
    neuron_updates_active: int
    neuron_updates_inactive: int
    dense_macs: int
    weight_bytes: int
    graded: bool
    payload_bits: int
    host: bool = False
    time_steps: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.layer, str) or not self.layer:
            raise ValueError(f"Counts: layer must be a name, got {quoted(self.layer)}")
        for field in _COUNT_FIELDS:
            value = getattr(self, field)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"layer {quoted(self.layer)}: {field} is {value}; a count must be finite")
            try:
                whole = operator.index(value)
            except TypeError:
                raise ValueError(
                    f"layer {quoted(self.layer)}: {field} is {quoted(value)}; a count must be a whole number"
                ) from None
            if whole < 0:
                raise ValueError(f"layer {quoted(self.layer)}: {field} is {whole}; a count cannot be negative")
            object.__setattr__(self, field, whole)
        if self.time_steps < 1:
            raise ValueError(
                f"layer {quoted(self.layer)}: time_steps is {self.time_steps}; a token takes at least one step"
            )
        if not self.host and not self.graded and self.payload_bits > 1:
            raise ValueError(
                f"layer {quoted(self.layer)}: graded is False, but payload_bits is {self.payload_bits}; set graded=True"
            )

    @property
    def neuron_updates(self) -> int:
        """Neuron updates, with and without a message."""
        return self.neuron_updates_active + self.neuron_updates_inactive


def check_counts(counts: Sequence[Counts]) -> None:
    """Refuse counts that do not belong together.

    Raises:
        ValueError: no counts, no tokens, a layer named twice, layers over different tokens, or layers on the chip over
            different numbers of steps per token.
    """
    if not counts:
        raise ValueError("no counts to account for: run the layers before asking for their energy")
    seen: set[str] = set()
    on_chip = [item for item in counts if not item.host]
    for item in counts:
        if item.layer in seen:
            raise ValueError(f"layer {quoted(item.layer)} appears twice in the counts; it would be paid for twice")
        seen.add(item.layer)
        if item.tokens == 0:
            raise ValueError(f"layer {quoted(item.layer)}: tokens is 0; run the layers before asking for their energy")
        if item.tokens != counts[0].tokens:
            raise ValueError(
                f"layer {quoted(item.layer)} covers {item.tokens} tokens, layer {quoted(counts[0].layer)} "
                f"{counts[0].tokens}; "
                "reset and count all layers over the same input"
            )
        if not item.host and item.time_steps != on_chip[0].time_steps:
            raise ValueError(
                f"layer {quoted(item.layer)} takes {item.time_steps} steps a token, layer {quoted(on_chip[0].layer)} "
                f"{on_chip[0].time_steps}; layers on one chip run in the same steps"
            )
