"""The settings of growth, and what else of a run they go together with."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_update.gates.config import BEFORE, GateConfig
from sparse_update.signals import SIGNALS
from sparse_update.weights.subset import SubsetConfig

KINDS = ("none", "depth")
NEW_BLOCKS = ("zero", "random", "copied", "copied_zero")
UNITS = ("none", "sequence", "sequence_after", "token", "token_exact", "dw_rows", "repeats", "auto")
"""Units of a gate whose choice does not depend on the number of blocks, or that is told when it changes."""
MODEL_SIGNALS = ("early_exit", "excess", "lagging", "learning_progress", "sample_norm", "update")
"""Signals that read the blocks of the model, or are priced by their number."""


@dataclass
class GrowthConfig:
    """How the model grows. Raises ValueError for values that cannot be used."""

    name: str = "none"
    kind: str = "none"
    """"none" | "depth": the model starts with `start_layers` of its blocks and gets the others at once."""
    start_layers: int = 1
    """Blocks until then; 0 leaves the embedding, the final norm and the head."""
    until: float = 0.6
    """Share of the budget until which the model stays small."""
    new_blocks: str = "zero"
    """What the new blocks, above the old ones, start as. "zero": drawn as those of a new model, whose outputs are zero, so
    that the model computes what it did | "random": drawn, outputs too, these with the standard deviation of the others over
    sqrt(2 x blocks) | "copied": the old blocks, again and again from below | "copied_zero": those, outputs zero."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"growth.kind = {self.kind!r}: one of {', '.join(KINDS)}")
        if self.new_blocks not in NEW_BLOCKS:
            raise ValueError(f"growth.new_blocks = {self.new_blocks!r}: one of {', '.join(NEW_BLOCKS)}")
        if self.start_layers < 0:
            raise ValueError(f"growth.start_layers = {self.start_layers}: must not be negative")
        if not 0 < self.until < 1:
            raise ValueError(f"growth.until = {self.until}: must lie in (0, 1)")
        if self.start_layers == 0 and self.new_blocks.startswith("copied"):
            raise ValueError(
                f"growth.new_blocks = {self.new_blocks} with growth.start_layers = 0: there is no block to copy. Start "
                "with 1, or take zero or random"
            )


def check_growth(growth: GrowthConfig, layers: int, gate: GateConfig, subset: SubsetConfig) -> None:
    """Raise ValueError where a growing model of `layers` blocks does not go together with the other settings of a run."""
    if growth.kind == "none":
        return
    if growth.start_layers >= layers:
        raise ValueError(
            f"growth.start_layers = {growth.start_layers}: the model has {layers} blocks in the end (model.layers), so "
            "there is nothing to add: start with fewer"
        )
    if gate.unit not in UNITS:
        raise ValueError(
            f"growth.kind = depth with gate.unit = {gate.unit!r}: what that gate leaves out depends on the number of "
            f"blocks, which changes. Units that go together with growth: {', '.join(UNITS)}"
        )
    if gate.replay == "forgotten":
        raise ValueError(
            "growth.kind = depth with gate.replay = forgotten: what a small model has lost says nothing of the grown "
            "one; use gate.replay = rest or uniform"
        )
    scores_by_forward = gate.unit in BEFORE and gate.signal in SIGNALS and SIGNALS[gate.signal].needs == "forward"
    if gate.signal in MODEL_SIGNALS or scores_by_forward:
        raise ValueError(
            f"growth.kind = depth with gate.unit = {gate.unit!r}, gate.signal = {gate.signal!r}: it reads the model's "
            "blocks, or is priced by their number, which changes. Signals of the text (ngram, novelty, duplicates, fresh), "
            "stale_loss, and those out of the step's own forward (token_loss, excess_entropy, gradient_norm, with units "
            "sequence_after, token and token_exact) go together with growth"
        )
    if subset.kind == "lora":
        raise ValueError(
            "growth.kind = depth with subset.kind = lora: new blocks are trained whole, LoRA trains none whole"
        )
    if subset.scored:
        raise ValueError(
            f"growth.kind = depth with subset.policy = {subset.policy!r}: what it has observed is of other blocks after "
            "the expansion. The policies rotate and random go together with growth"
        )
    if subset.kind != "all" and growth.start_layers == 0:
        raise ValueError(
            f"growth.start_layers = 0 with subset.kind = {subset.kind}: there is no block to choose weights from; start "
            "with at least 1"
        )
