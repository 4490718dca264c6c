"""Gradual pruning: a weight of 0 is no synapse, so it costs no operation, whatever arrives.

Density falls along the cubic schedule of Zhu and Gupta (2017, arXiv:1710.01878). What goes is ranked over all layers
together, by one of two scores:

    magnitude   |w| / rms of the layer's weights
    value       w^2 x E[g^2] / rate of the channel's events

The second is the loss that a diagonal Fisher estimate expects from removing the weight (Optimal Brain Damage, LeCun et
al. 1990, with E[g^2] for the second derivative), per synaptic operation saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hardware.text import quoted
from neuro.training.insert import Gates

SCORES = ("magnitude", "value")
LOWEST_RATE = 1e-3  # a channel that hardly ever sends saves nothing when it loses a synapse
MEMORY = 0.98  # of the running means of squared gradients and event rates


def density_at(progress: float, start: float, end: float, final: float) -> float:
    """Share of weights kept at `progress` in 0..1: 1 before `start`, `final` after `end`, cubic between."""
    if progress <= start:
        return 1.0
    done = min(1.0, (progress - start) / max(end - start, 1e-9))
    return final + (1.0 - final) * (1.0 - done) ** 3


class Pruner:
    """Masks over the weights of linear layers; what is pruned stays 0 until the end.

    Args:
        linears: layers by name. score: "magnitude" or "value". gates: where the event rates come from, for "value".
        lowest: least share of weights that every layer keeps.

    Raises ValueError for an unknown score, "value" without gates, or a share out of 0..1.
    """

    def __init__(
        self, linears: Mapping[str, nn.Linear], score: str = "value", gates: Gates | None = None, lowest: float = 0.05
    ) -> None:
        if score not in SCORES:
            raise ValueError(f"score is {quoted(score)}; one of {', '.join(SCORES)}")
        if score == "value" and gates is None:
            raise ValueError("score 'value' weighs synapses by their events and needs gates; use 'magnitude' without them")
        if not 0 <= lowest < 1:
            raise ValueError(f"lowest is {lowest}; it lies in 0..1")
        self.linears = dict(linears)
        self.score = score
        self.lowest = lowest
        self._gates = {layer.name: layer.gate for layer in gates.layers} if gates is not None else {}
        self.masks = {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in self.linears.items()}
        self._squares = {name: torch.zeros_like(layer.weight) for name, layer in self.linears.items()}
        self._rates = {name: torch.zeros_like(layer.weight[0]) for name, layer in self.linears.items()}
        self.density = 1.0

    @torch.no_grad()
    def observe(self) -> None:
        """After the backward pass: note gradients and event rates, and clear the gradients of what is pruned."""
        for name, layer in self.linears.items():
            gradient = layer.weight.grad
            if gradient is None:
                continue
            if self.score == "value":
                self._squares[name].mul_(MEMORY).add_(gradient.square(), alpha=1 - MEMORY)
                rate_C = self._gates[name].rate_C
                if rate_C is not None:
                    self._rates[name].mul_(MEMORY).add_(rate_C.detach(), alpha=1 - MEMORY)
            gradient.mul_(self.masks[name])

    @torch.no_grad()
    def prune_to(self, density: float) -> None:
        """Keep the best `density` of all weights; what is gone does not come back. Raises ValueError out of 0..1."""
        if not 0 < density <= 1:
            raise ValueError(f"density is {density}; it lies above 0 and up to 1")
        scores = {name: self._scores(name, layer) for name, layer in self.linears.items()}
        everything = torch.cat([s.flatten() for s in scores.values()])
        drop = everything.numel() - round(density * everything.numel())
        if drop:
            limit = torch.kthvalue(everything, drop).values
            for name, score in scores.items():
                floor = torch.kthvalue(score.flatten(), max(1, int((1 - self.lowest) * score.numel()))).values
                self.masks[name] &= score > torch.minimum(limit, floor)
        self.apply()

    def _scores(self, name: str, layer: nn.Linear) -> Tensor:
        weight = layer.weight.float()
        if self.score == "magnitude":
            kept = self.masks[name]
            score = weight.abs() / (weight[kept].square().mean().sqrt() + 1e-12)
        else:
            score = weight.square() * self._squares[name].float() / self._rates[name].float().clamp(min=LOWEST_RATE)
        return torch.where(self.masks[name], score, torch.full_like(score, -1.0))

    @torch.no_grad()
    def apply(self) -> None:
        """Set what is pruned to 0; call it after every step of an optimizer."""
        kept = total = 0
        for name, layer in self.linears.items():
            layer.weight.mul_(self.masks[name])
            kept += int(self.masks[name].sum())
            total += self.masks[name].numel()
        self.density = kept / total

    def densities(self) -> dict[str, float]:
        """Share of weights kept per layer."""
        return {name: float(mask.float().mean()) for name, mask in self.masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Masks and running means."""
        return {
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "squares": {name: value.clone() for name, value in self._squares.items()},
            "rates": {name: value.clone() for name, value in self._rates.items()},
            "density": self.density,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises ValueError for the state of other layers."""
        if set(state["masks"]) != set(self.linears):
            raise ValueError("this pruning state belongs to other layers")
        for mine, key in ((self.masks, "masks"), (self._squares, "squares"), (self._rates, "rates")):
            for name in mine:
                mine[name] = state[key][name].clone()
        self.density = state["density"]
