"""Masked updates: in each step some blocks of the weights do not move, while the moments of all of them go on.

The update that an optimizer made is taken back in part: w <- w_before + c (w_after - w_before), with one factor c for each
block. Weight decay is a part of the update. Kinds of masks:

random      c = scale for blocks that a coin keeps, else 0; scale = 1 / keep is SkipUpdate, whose mean step is the dense one
agreement   Magma: c = scale s, where s is a running mean of sigmoid(cos(momentum, gradient) / temperature)
surprise    c = scale for the blocks whose squared gradient lies farthest above its own running mean

Source of the first two: Joo et al. 2026, "On Surprising Effectiveness of Masking Updates in Adaptive Optimizers", arXiv
2602.15322. Our own choices where its text leaves one: the momentum includes the step's gradient, the running mean starts at
its first value, embedding, head and gains are never masked. The third is ours, the challenger.

Shape letters: N block of all weights, n block of one weight, R row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("none", "random", "agreement", "surprise")
STATES = {"none": 0, "random": 0, "agreement": 1, "surprise": 2}
"""Numbers that a kind remembers of each block."""


@dataclass
class MaskConfig:
    """Which updates are left out. Raises ValueError for an unknown kind and for values outside their range."""

    name: str = "none"
    kind: str = "none"
    """"none" | "random": a coin for each block and step | "agreement": the same coin, survivors scaled by how well momentum
    and gradient agree (Magma) | "surprise": the blocks whose gradient is largest, measured by their own past."""
    keep: float = 0.5
    """Chance of a block to be updated; with "surprise" the share that is, at least one block."""
    scale: float = 1.0
    """Factor on the updates that survive; 1 / keep makes their mean that of dense training (SkipUpdate)."""
    temperature: float = 2.0
    """Divides the cosine, with "agreement"."""
    memory: float = 0.9
    """What a step keeps of the past in the running means of "agreement" and "surprise"."""
    block_rows: int = 0
    """Rows of a block; 0 makes every matrix one block, as in the paper."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"mask.kind = {self.kind!r}: one of {', '.join(KINDS)}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"mask.keep = {self.keep}: must lie in (0, 1]")
        if not 0 <= self.memory < 1:
            raise ValueError(f"mask.memory = {self.memory}: must lie in [0, 1)")
        if not self.scale > 0 or not self.temperature > 0:
            raise ValueError(f"mask.scale = {self.scale}, mask.temperature = {self.temperature}: must be positive")
        if self.block_rows < 0:
            raise ValueError(f"mask.block_rows = {self.block_rows}: rows of a block, or 0 for whole matrices")


class Mask:
    """Decides over the blocks of some weights, step by step: `before` the optimizer's own step, `after` it.

    The coins come from a generator of its own on the CPU, so that they are the same on every device and in every process.
    It keeps a copy of the weights that it may take back.

    Args:
        cfg: the mask; its kind is not "none".
        seed: of the coins.
        together: float32 (N,) of the parts of the weights that this process holds -> the sums over all processes.
    """

    def __init__(self, cfg: MaskConfig, seed: int, together: Callable[[Tensor], Tensor] = lambda found: found) -> None:
        self.cfg, self.together = cfg, together
        self.generator = torch.Generator().manual_seed(seed * 1_000_003 + 17)
        self.memory: dict[str, Tensor] = {}
        """By weight: what is remembered of its blocks, float32 (STATES, n), NaN where nothing is yet."""
        self.held: dict[str, Tensor] = {}
        """Weights as they were before the step."""
        self.weights: dict[str, Tensor] = {}
        self.counts: list[int] = []
        """Blocks of each of the weights."""
        self.kept: dict[str, Tensor] = {}
        """By weight: 1 for the blocks of the last step that were kept, 0 for the others, float32 (n,)."""

    @torch.no_grad()
    def before(self, weights: Mapping[str, Tensor]) -> None:
        """Choose among the blocks of the weights that have a gradient, by name; call it right before the optimizer's step.

        Raises ValueError for a weight without rows.
        """
        if flat := [name for name, w in weights.items() if w.dim() < 2]:
            raise ValueError(f"{flat[0]} is a vector: masks are for matrices, whose rows make blocks")
        self.weights = {name: w for name, w in weights.items() if w.grad is not None}
        self.held = {name: self._copied(name, w) for name, w in self.weights.items()}
        self.memory = {name: self._remembered(name, w) for name, w in self.weights.items()}
        self.counts = [self.blocks(w) for w in self.weights.values()]
        coin_N = torch.rand(sum(self.counts), generator=self.generator)
        if self.cfg.kind == "surprise" and self.weights:
            excess_N = self._excess()
            kept_N = _largest(excess_N, max(1, round(self.cfg.keep * len(excess_N))), coin_N.to(excess_N.device))
        else:
            kept_N = (coin_N < self.cfg.keep).float()
        self.kept = dict(zip(self.weights, kept_N.split(self.counts), strict=True))

    @torch.no_grad()
    def after(self, momentum: Callable[[str], Tensor]) -> None:
        """Take back what was not kept; call it right after the optimizer's step, its gradients still in place.

        Args:
            momentum: gives a weight's momentum, of its shape, the last gradient included; asked for with "agreement" only.
        """
        if not self.weights:
            return
        device = next(iter(self.weights.values())).device
        factor_N = torch.cat([kept.to(device) for kept in self.kept.values()]) * self.cfg.scale
        if self.cfg.kind == "agreement":
            factor_N = factor_N * self._agreement(momentum)
        for (name, w), factor_n in zip(self.weights.items(), factor_N.split(self.counts), strict=True):
            factor_R = factor_n if len(factor_n) == 1 else factor_n.repeat_interleave(self.cfg.block_rows)[: len(w)]
            torch.lerp(self.held[name], w, factor_R.to(w.device, w.dtype).view(-1, *(1,) * (w.dim() - 1)), out=w)

    def forget(self, names: Mapping[str, Any]) -> None:
        """Keep what is remembered of these weights only."""
        self.memory = {name: kept for name, kept in self.memory.items() if name in names}
        self.held, self.weights = {}, {}

    def blocks(self, w: Tensor) -> int:
        """Blocks of a weight."""
        return -(-len(w) // self.cfg.block_rows) if self.cfg.block_rows else 1

    @property
    def tensors(self) -> list[Tensor]:
        """What is allocated: the copy of the weights, and what is remembered."""
        return [*self.held.values(), *self.memory.values()]

    def state_dict(self) -> dict[str, Any]:
        """What the next choice depends on; tensors are not copied."""
        return {"generator": self.generator.get_state(), "memory": {n: m.cpu() for n, m in self.memory.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.memory = {str(name): kept.clone() for name, kept in state["memory"].items()}

    # blocks

    def _copied(self, name: str, w: Tensor) -> Tensor:
        held = self.held.get(name)
        if held is None or held.shape != w.shape or held.dtype != w.dtype or held.device != w.device:
            return w.detach().clone(memory_format=torch.contiguous_format)
        return held.copy_(w.detach())

    def _remembered(self, name: str, w: Tensor) -> Tensor:
        found = self.memory.get(name)
        if found is None or found.shape[1] != self.blocks(w):
            return torch.full((STATES[self.cfg.kind], self.blocks(w)), float("nan"), device=w.device)
        return found.to(w.device)

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Scalar products of the blocks of two tensors, float32 (n,)."""
        size = self.cfg.block_rows
        if not size:
            return torch.dot(a.reshape(-1).float(), b.reshape(-1).float())[None]
        rows_R = (a.float() * b.float()).flatten(1).sum(1)
        return F.pad(rows_R, (0, -len(rows_R) % size)).view(-1, size).sum(1)

    def _dots(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Scalar products of the blocks of all weights, float32 (N,)."""
        return self.together(torch.cat([self._dot(a, b) for a, b in pairs]))

    def _gradients(self) -> list[Tensor]:
        return [w.grad for w in self.weights.values() if w.grad is not None]

    def _remember(self, state_SN: Tensor) -> None:
        self.memory = dict(zip(self.weights, state_SN.split(self.counts, 1), strict=True))

    def _mixed(self, old_N: Tensor, new_N: Tensor) -> Tensor:
        """The running mean with one value more, if that is finite; its first value where there was none."""
        new_N = torch.where(new_N.isfinite(), new_N, old_N)
        mixed_N = self.cfg.memory * old_N + (1 - self.cfg.memory) * new_N
        return torch.where(old_N.isnan(), new_N, mixed_N)

    def _agreement(self, momentum: Callable[[str], Tensor]) -> Tensor:
        """s of each block, (N,): running mean of sigmoid(cos(momentum, gradient) / temperature)."""
        gradients, momenta = self._gradients(), [momentum(name) for name in self.weights]
        along_N = self._dots(zip(momenta, gradients, strict=True))
        norms_N = (self._dots((g, g) for g in gradients) * self._dots((m, m) for m in momenta)).sqrt()
        cosine_N = along_N / norms_N.clamp_min(torch.finfo(torch.float32).tiny)
        s_N = self._mixed(torch.cat(list(self.memory.values()), 1)[0], torch.sigmoid(cosine_N / self.cfg.temperature))
        self._remember(s_N[None])  # NaN as long as no gradient was finite
        return s_N.nan_to_num(nan=0.5)

    def _excess(self) -> Tensor:
        """How far the squared gradient of each block lies above its running mean, in running mean deviations, (N,)."""
        energy_N = self._dots((g, g) for g in self._gradients())
        mean_N, spread_N = torch.cat(list(self.memory.values()), 1)
        above_N = torch.where(mean_N.isnan(), torch.zeros_like(energy_N), energy_N - mean_N)
        excess_N = torch.where(spread_N > 0, above_N / spread_N, torch.zeros_like(energy_N))
        self._remember(torch.stack((self._mixed(mean_N, energy_N), self._mixed(spread_N, above_N.abs()))))
        return excess_N


def _largest(value_N: Tensor, count: int, draw_N: Tensor) -> Tensor:
    """1 for the `count` largest values, 0 for the others; ties are broken by a draw."""
    order_N = draw_N.argsort()
    best_N = order_N[value_N[order_N].argsort(descending=True, stable=True)[:count]]
    return torch.zeros_like(value_N).scatter_(0, best_N, 1.0)
