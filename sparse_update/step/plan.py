"""What a sparse step does: a static, hashable plan; what the forward shows; what was chosen; what comes back.

A plan fixes every shape, so that compiled kernels and CUDA graphs keep working; places (which sequences, rows, tokens) are
data. All kinds combine, but for what `StepPlan.check` refuses.

Shape letters: B batch, T token, L layer, S kept sequence, R kept row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

from torch import Tensor

SIGNALS = ("entropy", "gradient_norm", "update", "block_norms")
"""Extra results: the first three of the forward, see `View`; the last of the backward, see `SparseStep`."""


@dataclass(frozen=True)
class StepPlan:
    """Static description of one step; equal plans have equal shapes.

    Raises ValueError at construction for values outside their range.
    """

    sequences: int = 0
    """Sequences kept after the forward, whose activations are reused; 0 keeps all."""
    rows: int = 0
    """Token rows kept per sequence in the backward; 0 keeps all."""
    rows_exact: bool = False
    """Drop rows only where their gradient is exactly zero: head, final norm, and the last block's MLP, o and q projection.
    The gradient then equals that of the masked loss. False: rows are dropped in every block (a biased gradient: keys and
    values of dropped rows receive nothing)."""
    bypass: int = 0
    """Tokens per sequence that go through the middle layers; the others pass them by, forward and backward. 0: all go
    through."""
    bypass_first: int = 1
    """First layer that is passed by."""
    bypass_stop: int = -1
    """Layers [bypass_first, layers + bypass_stop) are passed by."""
    bypass_keys: bool = False
    """Tokens that pass by still give keys and values (their own are not updated by those layers)."""
    dw_rows: float = 1.0
    """Share of the token rows that every weight gradient of the blocks is formed from, sampled without bias (1/p)."""
    sample: tuple[float, ...] = ()
    """Share of the sequences that the activation gradient keeps on entering each block, from below, (L,) and not falling;
    drawn in proportion to their gradient's norm and scaled by 1/p, so unbiased (VCAS, arXiv 2402.17227). Empty: all."""
    skip_rate: float = 0.0
    """Expected share of sub-blocks whose backward is skipped (DropBP); which ones is the step's `skip` argument."""
    bag: int = 1
    """Neighbouring tokens that make one position (growth/superposition.py); such a step leaves nothing out."""
    vocabulary: int = 0
    """Tokens that are predicted (growth/vocabulary.py), 0 for all; such a step leaves nothing else out."""
    want: frozenset[str] = field(default_factory=frozenset)
    """Extra signals to compute: any of `SIGNALS`."""

    def __post_init__(self) -> None:
        for name in ("sequences", "rows", "bypass", "bypass_first", "vocabulary"):
            if getattr(self, name) < 0:
                raise ValueError(f"plan.{name} = {getattr(self, name)}: must not be negative (0 keeps all)")
        if self.bypass_stop > 0:
            raise ValueError(f"plan.bypass_stop = {self.bypass_stop}: counts from the last layer, so 0 or negative")
        if not 0 < self.dw_rows <= 1:
            raise ValueError(f"plan.dw_rows = {self.dw_rows}: must lie in (0, 1]")
        if any(not 0 < share <= 1 for share in self.sample):
            raise ValueError(f"plan.sample = {self.sample}: every share must lie in (0, 1]")
        if list(self.sample) != sorted(self.sample):
            raise ValueError(
                f"plan.sample = {self.sample}: the backward runs from the top, so shares must not fall with the layer"
            )
        if self.bag < 1 or (self.bag > 1 and replace(self, bag=1) != PLAIN):
            raise ValueError(f"plan.bag = {self.bag}: at least 1, and with bags of tokens a step leaves nothing out")
        if self.vocabulary and replace(self, vocabulary=0) != PLAIN:
            raise ValueError(f"plan.vocabulary = {self.vocabulary}: a step that predicts a part leaves nothing else out")
        if not 0 <= self.skip_rate < 1:
            raise ValueError(f"plan.skip_rate = {self.skip_rate}: must lie in [0, 1)")
        if unknown := self.want - set(SIGNALS):
            raise ValueError(f"plan.want = {sorted(unknown)}: known signals are {', '.join(SIGNALS)}")
        if self.bypass_keys and self.rows and not self.rows_exact:
            raise ValueError(
                "plan.bypass_keys with plan.rows: dropped rows give no gradient to keys and values, but passed-by tokens "
                "would; set rows_exact, or bypass_keys = False"
            )

    @property
    def plain(self) -> bool:
        """Whether the step leaves nothing out (it may still compute signals)."""
        return self.key == "plain"

    @property
    def key(self) -> str:
        """What tells the cost of plans apart, as a part of a component-time key; "plain" for nothing left out or added."""
        parts = []
        for f in fields(self):
            value, default = getattr(self, f.name), f.default
            if f.name == "want":
                if value:
                    parts.append("want=" + "+".join(sorted(value)))
            elif f.name in ("bypass_first", "bypass_stop", "bypass_keys"):
                if self.bypass and value != default:
                    parts.append(f"{f.name}={value}")
            elif f.name == "rows_exact":
                if self.rows and value:
                    parts.append("exact")
            elif value != default:
                text = ":".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value:g}"
                parts.append(f"{f.name}={text}")
        return ",".join(parts) or "plain"

    def middle(self, layers: int) -> range:
        """The layers that are passed by; empty without a bypass."""
        return range(self.bypass_first, layers + self.bypass_stop) if self.bypass else range(0)

    def check(self, batch: int, length: int, layers: int) -> None:
        """Raise ValueError where the plan does not fit (B, T) tokens and L layers."""
        if self.bag > 1:
            raise ValueError(f"plan.bag = {self.bag}: steps on bags of tokens go by autograd, not by the sparse step")
        if self.vocabulary:
            raise ValueError(
                f"plan.vocabulary = {self.vocabulary}: steps that predict a part of the vocabulary go by autograd, not by "
                "the sparse step"
            )
        for name, limit, of in (
            ("sequences", batch, "sequences in the batch"),
            ("rows", length, "tokens in a sequence"),
            ("bypass", length, "tokens in a sequence"),
        ):
            if getattr(self, name) > limit:
                raise ValueError(f"plan.{name} = {getattr(self, name)}: only {limit} {of}")
        if self.sample and len(self.sample) != layers:
            raise ValueError(f"plan.sample has {len(self.sample)} shares, the model {layers} layers: give one for each")
        if self.bypass and not self.middle(layers):
            raise ValueError(
                f"plan.bypass: no layer lies in [{self.bypass_first}, {layers + self.bypass_stop}) of {layers}: "
                "lower plan.bypass_first, or raise plan.bypass_stop"
            )
        if self.bypass and self.rows and self.rows_exact and layers - 1 in self.middle(layers):
            raise ValueError("plan.rows_exact needs a last layer that all tokens go through: set plan.bypass_stop below 0")

    def kept_sequences(self, batch: int) -> list[int]:
        """Sequences in the backward: of each block from below, then of the head, (L + 1) or (1,) without `sample`."""
        top = self.sequences or batch
        return [max(1, round(share * top)) for share in self.sample] + [top]


PLAIN = StepPlan()


@dataclass(frozen=True)
class View:
    """What a choice after the forward may look at.

    `loss_BT`: token losses, nats. `signals`: those the plan wants: "entropy" (B, T) of the prediction, nats;
    "gradient_norm" (B, T), exact norm of the head's weight gradient of each token, |softmax - onehot| |h|; "update" (L, B,
    T), norm of what each block adds to the residual stream over that stream's norm (tokens that pass a block by: 0).
    """

    loss_BT: Tensor
    signals: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Chosen:
    """What the backward keeps; sizes must be the plan's.

    `sequences_S`: int64, ascending, or None for all. `rows_SR`: token positions, int64, ascending in each row, or None.
    `weight`: (S,) or (S, R), multiplies token losses, for instance 1/p; None weighs all alike. `share`: what falls on this
    process of a choice among the sequences of several, so that their number is not the plan's.
    """

    sequences_S: Tensor | None = None
    rows_SR: Tensor | None = None
    weight: Tensor | None = None
    share: bool = False


Choose = Callable[[View], Chosen]


@dataclass(frozen=True)
class SparseStep:
    """What one step gives back.

    `loss_BT`: token losses of every token, nats. `gradients`: parameter name to the gradients of its active strips, in the
    order of
    `Active.parts` and the parameter's dtype; inactive parameters, and those of a skipped sub-block, have no entry.
    """

    loss_BT: Tensor
    gradients: dict[str, tuple[Tensor, ...]]
    chosen: Chosen
    view: View
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of each watched weight the inputs x (S, R, I) and the gradient of its outputs g (S, R, O), whose product summed over
    S and R is its gradient: what single windows contribute."""
    norms_LS: Tensor | None = None
    """Norm of the activation gradient that enters each block from above, per kept sequence and before the block's own draw,
    scaled as drawn so far; 0 for sequences that an upper block left out and for blocks that no gradient reaches. Where the
    plan samples, or wants "block_norms"."""
    averaged: bool = False
    """Whether the gradients are means over all processes already, as a wrapper of the module leaves them."""
    empty: bool = False
    """Whether there was nothing to learn, such as answers that are all equally good: no weight moves. The same on every
    process."""
