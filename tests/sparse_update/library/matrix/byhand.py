"""The same gate by hand, in float64: no gated layer, no torch optimizer, no loop of anybody's.

Dropped rows are detached at the output of every linear layer and embedding of a plain model, whole sequences are left out
of the batch, resting halves of matrices are not moved. Momentum, clipping and averages are written out.

The Trainer divides by the labels of a batch, the first of each sequence among them, which nothing predicts: its steps, with
a gate or without, are (T - 1) / T of those of the mean.

Shape letters: B sequences, T tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.sparse_update.library.matrix.cells import Cell
from tests.sparse_update.library.matrix.parts import (
    CLIP,
    DECAY,
    EMA,
    MOMENTUM,
    RATE,
    STEPS,
    TURN,
    T,
    batch,
    built,
    count_of,
    is_frozen,
    is_slow,
    logits_of,
    place_score,
)


@dataclass
class End:
    """What a training came to, by name of the parameter: float64 tensors."""

    changed: dict[str, Tensor]
    """by how much each parameter moved"""
    average: dict[str, Tensor] = field(default_factory=dict)
    """by how much each averaged parameter moved"""
    copied: dict[str, Tensor] = field(default_factory=dict)
    """gradient of the plain mean loss of a copy, after COPIED steps"""


def by_hand(cell: Cell) -> End:
    """What the cell's training comes to. Loops that mean the same share one. The gate "" is none."""
    shifts = cell.loop == "trainer"
    pairs, count = 2 if cell.loop in ("ddp", "fully_shard") else 1, count_of(cell)
    feature = cell.feature if cell.feature in ("clipping", "ema", "schedule", "groups", "frozen", "deepcopy") else ""
    return _train(shifts, 1 if cell.gate in ("strips", "") else pairs, count, feature, cell.gate, cell.precision == "fp32")


@functools.cache
def _train(shifts: bool, pairs: int, count: int, feature: str, gate: str, by_loss: bool) -> End:
    model = built(shifts).double()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    hooks = _Cut(model)
    moved = {n: p for n, p in model.named_parameters() if not (feature == "frozen" and is_frozen(n))}
    speed = {n: torch.zeros_like(p) for n, p in moved.items()}
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    copied: dict[str, Tensor] = {}
    for step in range(STEPS):
        x, y = batch(step, shifts, count)
        if feature == "deepcopy" and step == STEPS // 2:
            loss = F.cross_entropy(logits_of(model, x).flatten(0, 1), y.flatten(), ignore_index=-100)
            copied = dict(zip(start, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        gradient = {n: torch.zeros_like(p) for n, p in moved.items()}
        parts = pairs * count
        for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = _loss(model, hooks, part_x, part_y, gate, by_loss) * (1 - 1 / T if shifts else 1)
            for n, g in zip(moved, torch.autograd.grad(loss, list(moved.values()), allow_unused=True), strict=True):
                gradient[n] += g / parts
        active = {n: _active(model, n, step, gate, p) for n, p in moved.items()}
        if step and step % TURN == 0:
            for n in moved:
                speed[n] *= active[n] * _active(model, n, step - 1, gate, moved[n])
        gradient = {n: g * active[n] for n, g in gradient.items()}
        if feature == "clipping":
            norm = torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()
            assert norm > 2 * CLIP  # it is clipped
            gradient = {n: g * CLIP / norm for n, g in gradient.items()}
        rate = RATE * (DECAY**step if feature == "schedule" else 1.0)
        with torch.no_grad():
            for n, p in moved.items():
                speed[n] = MOMENTUM * speed[n] + gradient[n]
                p -= active[n] * speed[n] * rate * (0.25 if feature == "groups" and is_slow(n) else 1.0)
            for n, p in model.named_parameters():
                average[n] = p.detach().clone() if step == 0 else EMA * average[n] + (1 - EMA) * p
    changed = {n: p.detach() - start[n] for n, p in model.named_parameters()}
    return End(changed, {n: a - start[n] for n, a in average.items()} if feature == "ema" else {}, copied)


class _Cut:
    """Makes the outputs of linear layers and embeddings constants at rows that `keep` (B, T) leaves out."""

    def __init__(self, model: nn.Module) -> None:
        self.keep: Tensor | None = None
        for module in model.modules():
            if type(module).__name__ in ("Linear", "Embedding", "Conv1D"):
                module.register_forward_hook(self.cut)

    def cut(self, module: nn.Module, args: object, out: Tensor) -> Tensor:
        if self.keep is None or out.shape[:-1] != self.keep.shape:  # the table of positions has one row for all sequences
            return out
        return torch.where(self.keep[..., None], out, out.detach())


def _loss(model: nn.Module, hooks: _Cut, x: Tensor, y: Tensor, gate: str, by_loss: bool) -> Tensor:
    def losses(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(model, x).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)

    valid = y != -100
    if gate in ("strips", ""):
        return losses(x, y).sum() / valid.sum()
    with torch.no_grad():
        score = (losses(x, y) if by_loss else place_score(x).double()).masked_fill(~valid, 0.0)
    if gate == "sequences":
        chosen = _top((score.sum(1) / valid.sum(1))[None], len(x) // 2)[0]
        return losses(x[chosen], y[chosen]).sum() / valid[chosen].sum()
    hooks.keep = _top(score.masked_fill(~valid, float("-inf")), x.shape[1] // 2)
    total = (losses(x, y) * hooks.keep).sum() / (hooks.keep & valid).sum()
    hooks.keep = None
    return total


def _top(score: Tensor, kept: int) -> Tensor:
    """bool, the `kept` largest of every row; the choice must not hang on rounding."""
    best = score.topk(kept + 1, dim=1)
    assert (best.values[:, kept - 1] - best.values[:, kept] > 1e-5).all()
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, best.indices[:, :kept], True)


def _active(model: nn.Module, name: str, step: int, gate: str, p: Tensor) -> Tensor:
    """1 where the weight moves: of matrices in the blocks the upper half of the rows as they are stored, then the lower."""
    mask = torch.ones_like(p)
    if gate != "strips" or p.dim() < 2 or ".emb" in f".{name}" or not _in_a_block(name):
        return mask
    half = len(p) // 2
    mask[half:] = 0
    return 1 - mask if step // TURN % 2 else mask


def _in_a_block(name: str) -> bool:
    return "blocks." in name or ".h." in name
