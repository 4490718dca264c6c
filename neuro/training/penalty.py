"""The event budget: synaptic operations per dense multiply-accumulate, and the weight that holds it at a target.

An event costs one operation per synapse of its channel, so the share is

    sum over layers l, channels c of rate_lc x fan_lc  /  sum over layers of in x out

with rate_lc the share of rows that send an event, fan_lc the channel's non-zero weights. The loss is task + weight x
share. `Controller` moves the weight so that the share follows a falling target, since what one nat buys differs from
model to model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hardware.text import quoted
from neuro.training.insert import Gates


class EventBudget:
    """Share of synaptic operations of gated layers, with a gradient to their thresholds.

    Args:
        gates: the layers that count. rows_per_token: name -> how often a layer runs per token, where not once.
        extra_macs: dense multiply-accumulates per token of mapped layers without a gate; they are paid in full.
        sparse: a weight of 0 is no synapse (sparse projections); False: every channel costs its layer's full fan-out.
    """

    def __init__(
        self,
        gates: Gates,
        *,
        rows_per_token: dict[str, float] | None = None,
        extra_macs: float = 0.0,
        sparse: bool = True,
    ) -> None:
        if not gates.layers:
            raise ValueError("an event budget needs at least one gated layer; see insert_thresholds")
        self.gates = gates
        self.sparse = sparse
        self.extra_macs = extra_macs
        self._calls = {layer.name: (rows_per_token or {}).get(layer.name, 1.0) for layer in gates.layers}
        self.dense_macs = extra_macs + sum(layer.linear.weight.numel() * self._calls[layer.name] for layer in gates.layers)
        self._fan: dict[str, Tensor] = {}
        self.refresh()

    @torch.no_grad()
    def refresh(self, masks: Mapping[str, Tensor] | None = None) -> None:
        """Count the synapses again: those of `masks` (layer name -> bool like the weight), else weights other than 0. A
        layer whose weights are all 0, as some are before training, counts in full.
        """
        for layer in self.gates.layers:
            weight = layer.linear.weight
            alive = masks[layer.name] if masks is not None else weight != 0
            if not self.sparse or not bool(alive.any()):
                alive = torch.ones_like(alive)
            self._fan[layer.name] = alive.sum(0).to(weight.dtype) * self._calls[layer.name]

    def share(self) -> Tensor:
        """Synaptic operations per dense multiply-accumulate of the latest forward pass in training mode, a scalar.

        Raises RuntimeError when a gate has seen no such pass.
        """
        synops: Tensor | float = self.extra_macs
        for layer in self.gates.layers:
            if layer.gate.rate_C is None:
                raise RuntimeError(
                    f"the gate of {quoted(layer.name)} has counted nothing: run a forward pass in training mode"
                )
            synops = synops + (layer.gate.rate_C * self._fan[layer.name]).sum()
        return torch.as_tensor(synops / self.dense_macs)

    @torch.no_grad()
    def rates(self) -> dict[str, float]:
        """Mean event rate per layer of the latest pass, 0..1."""
        return {layer.name: float(layer.gate.rate_C.mean()) for layer in self.gates.layers if layer.gate.rate_C is not None}


def annealed(progress: float, start: float, end: float, hold_from: float) -> float:
    """Target at `progress` in 0..1: geometric from `start` to `end`, reached at `hold_from` and held."""
    done = min(1.0, progress / hold_from) if hold_from > 0 else 1.0
    return start * (end / start) ** done


@dataclass
class ControllerConfig:
    """Gains per step on log(share / target), and bounds of the weight (nats per unit of share)."""

    proportional: float = 4.0
    integral: float = 0.05
    smoothing: float = 0.9
    start: float = 0.05
    lowest: float = 1e-4
    highest: float = 20.0


class Controller:
    """PI controller in the logarithm: weight = exp(integral + proportional x error), error = log(share / target)."""

    def __init__(self, config: ControllerConfig | None = None) -> None:
        self.config = config or ControllerConfig()
        self._log_weight = math.log(self.config.start)
        self._share: float | None = None

    def update(self, share: float, target: float) -> float:
        """The weight for the next step. Raises ValueError for a target or share that is not above 0."""
        if not target > 0 or not share > 0:
            raise ValueError(f"share is {share}, target {target}; both must be above 0")
        c = self.config
        self._share = share if self._share is None else c.smoothing * self._share + (1 - c.smoothing) * share
        error = max(-0.5, min(0.5, math.log(self._share / target)))
        low, high = math.log(c.lowest), math.log(c.highest)
        self._log_weight = max(low, min(high, self._log_weight + c.integral * error))
        return math.exp(max(low, min(high, self._log_weight + c.proportional * error)))

    def state_dict(self) -> dict[str, Any]:
        """Where the controller stands."""
        return {"log_weight": self._log_weight, "share": self._share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._log_weight, self._share = state["log_weight"], state["share"]
