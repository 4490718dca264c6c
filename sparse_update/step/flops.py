"""Counted FLOPs of a sparse step: two per multiply-accumulate of its matrix products, as `torch.utils.flop_counter` counts.

Attention is counted as the explicit products do it, masked half included. Norms, softmax, gathers and the optimizer are not
counted: what they cost is in the measured times.

Shape letters: S sequence, R token row in the backward, T token, D width, F hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sparse_update.step.gradients import strips
from sparse_update.step.plan import PLAIN, StepPlan
from sparse_update.transformer import ModelConfig
from sparse_update.weights.lowrank import rank_of
from sparse_update.weights.subset import Active


@dataclass(frozen=True)
class Flops:
    """FLOPs of the matrix products of one step."""

    forward: int
    backward_dx: int
    backward_dw: int
    recomputed: int = 0
    """of a forward of the blocks that is run once more, where activations are not kept; not in `total`. torch stops it
    before each block's last product, of which the backward needs the inputs alone"""

    @property
    def total(self) -> int:
        return self.forward + self.backward_dx + self.backward_dw


def matrix_shapes(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a block's matrices by name."""
    width, hidden = cfg.width, cfg.hidden_ratio * cfg.width
    square = {f"attn.{m}": (width, width) for m in "qkvo"}
    return {**square, "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}


def plan_flops(
    cfg: ModelConfig,
    batch: int,
    plan: StepPlan = PLAIN,
    active: Active | None = None,
    length: int = 0,
    skip: frozenset[tuple[int, str]] | None = None,
) -> Flops:
    """FLOPs of one step on (batch, length) tokens.

    Args:
        active: updated weights (None: all).
        length: tokens in a sequence; 0 takes cfg.context.
        skip: sub-blocks whose backward is skipped; None takes the expectation under `plan.skip_rate`.
    """
    if rank := rank_of(active):
        return _lora(cfg, batch, length or cfg.context, rank)
    count = Count(cfg, batch, plan, active, length or cfg.context, skip)
    rows = batch * (length or cfg.context)
    recomputed = count.forward() - 2 * rows * cfg.width * (count.vocabulary + cfg.layers * cfg.hidden_ratio * cfg.width)
    return Flops(count.forward(), *count.backward(), recomputed)


def _lora(cfg: ModelConfig, batch: int, length: int, rank: int) -> Flops:
    """By autograd, with factors beside every matrix of the blocks; nothing below the lowest block asks for a gradient."""
    rows, d = batch * length, cfg.width
    shapes = matrix_shapes(cfg)
    full = {name: 2 * rows * outputs * inputs for name, (outputs, inputs) in shapes.items()}
    down = {name: 2 * rows * rank * inputs for name, (_, inputs) in shapes.items()}
    up = {name: 2 * rows * rank * outputs for name, (outputs, _) in shapes.items()}
    attention, head = 2 * 2 * rows * length * d, 2 * rows * d * cfg.vocab_size
    factors = sum(down.values()) + sum(up.values())
    forward = cfg.layers * (sum(full.values()) + factors + attention) + head
    lowest = ("attn.q", "attn.k", "attn.v")  # of block 0: their input is the frozen embedding
    dx = cfg.layers * (sum(full.values()) + factors + 2 * attention) + head - sum(full[m] + down[m] for m in lowest)
    return Flops(forward, dx, cfg.layers * factors)


@dataclass(frozen=True)
class BackwardLayer:
    """What one block's backward works on: sequences, query rows and keys of each, rows whose keys and values get a
    gradient, and the shares of steps in which its attention and its MLP run."""

    layer: int
    sequences: int
    queries: int
    keys: int
    updated: int
    attention: float
    mlp: float


class Count:
    """Counts the products of one step; arguments as of `plan_flops`."""

    def __init__(
        self,
        cfg: ModelConfig,
        batch: int,
        plan: StepPlan,
        active: Active | None,
        length: int,
        skip: frozenset[tuple[int, str]] | None,
    ) -> None:
        self.cfg, self.batch, self.plan, self.active, self.length, self.skip = cfg, batch, plan, active, length, skip
        self.width, self.hidden = cfg.width, cfg.hidden_ratio * cfg.width
        self.middle = plan.middle(cfg.layers)
        self.vocabulary = plan.vocabulary or cfg.vocab_size

    def forward(self) -> int:
        b, t, d, total = self.batch, self.length, self.width, 0
        for layer in range(self.cfg.layers):
            queries = self.plan.bypass if layer in self.middle else t
            keys = t if layer in self.middle and self.plan.bypass_keys else queries
            total += 2 * b * (queries * d * d + keys * 2 * d * d + queries * (d * d + 2 * d * self.hidden))
            total += 2 * 2 * b * queries * keys * d
        return total + 2 * b * t * d * self.vocabulary

    def backward_layers(self) -> Iterator[BackwardLayer]:
        """The blocks that a gradient reaches, from above."""
        plan, cfg = self.plan, self.cfg
        counts = plan.kept_sequences(self.batch)
        s, r = counts[-1], plan.rows or self.length
        lowest = 0 if self.active is None else self.active.lowest_block
        for layer in range(cfg.layers - 1, lowest - 1, -1):
            if plan.sample:
                s = counts[layer]
            exact = bool(plan.rows) and plan.rows_exact and layer == cfg.layers - 1
            through = plan.bypass if layer in self.middle else self.length
            queries = min(r, through)
            keys = self.length if exact or (layer in self.middle and plan.bypass_keys) else through
            wide = keys > queries and (exact or (layer in self.middle and plan.bypass_keys))
            updated = keys if wide else queries
            yield BackwardLayer(layer, s, queries, keys, updated, self._lives(layer, "attn"), self._lives(layer, "mlp"))
            if exact:
                r = self.length

    def head_rows(self) -> int:
        """Token rows whose loss has a gradient."""
        return self.plan.kept_sequences(self.batch)[-1] * (self.plan.rows or self.length)

    def backward(self) -> tuple[int, int]:
        plan, cfg, d = self.plan, self.cfg, self.width
        dx: float = 2 * self.head_rows() * d * self.vocabulary
        owner = "embed.weight" if cfg.tie_embeddings else "head.weight"
        dw: float = 2 * self.head_rows() * self._size(owner, (self.vocabulary, d))
        for at in self.backward_layers():
            s, queries, keys, updated = at.sequences, at.queries, at.keys, at.updated
            dx += at.mlp * 2 * s * queries * 2 * d * self.hidden
            dx += at.attention * 2 * s * (queries * 2 * d * d + updated * 2 * d * d + queries * 2 * (keys + updated) * d)
            for name, shape in matrix_shapes(cfg).items():
                rows = s * (updated if name in ("attn.k", "attn.v") else queries)
                if plan.dw_rows < 1:
                    rows = max(1, round(plan.dw_rows * rows))
                alive = at.mlp if name.startswith("mlp") else at.attention
                dw += alive * 2 * rows * self._size(f"blocks.{at.layer}.{name}.weight", shape)
        return round(dx), round(dw)

    def _lives(self, layer: int, part: str) -> float:
        """Share of steps in which a sub-block's backward runs."""
        if self.skip is None:
            return 1 - self.plan.skip_rate
        return float((layer, part) not in self.skip)

    def _size(self, name: str, shape: tuple[int, int]) -> int:
        """Active entries of a matrix."""
        if self.active is None:
            return shape[0] * shape[1]
        return sum((stop - start) * shape[1 - dim] for dim, start, stop in strips(self.active, name))


def shares(flops: Flops, dense: Flops) -> Mapping[str, float]:
    """Each part of a step's FLOPs over the dense step's whole."""
    parts = {"forward": flops.forward, "backward_dx": flops.backward_dx, "backward_dw": flops.backward_dw}
    return {name: value / dense.total for name, value in parts.items()}
