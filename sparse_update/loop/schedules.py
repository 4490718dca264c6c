"""Schedules of batches and of the vocabulary: what else of a run they go together with, and the order of the tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from sparse_update.clock.cost import Step
from sparse_update.gates.config import GateConfig
from sparse_update.growth.vocabulary import Vocabulary, make_vocabulary
from sparse_update.loop.records import TrainerConfig
from sparse_update.parallel.mesh import Mesh
from sparse_update.parallel.single import ALONE
from sparse_update.weights.subset import SubsetConfig

MOST_SHAPES = 8
"""Shapes that torch.compile compiles one function for (torch._dynamo.config.recompile_limit, torch 2.13)."""


def check_batches(gate: GateConfig, batches: str) -> None:
    """Raise ValueError for a gate that does not go with batches of several sizes."""
    if not gate.only_tokens:
        raise ValueError(
            f"trainer.batch_schedule = {batches} with gate.unit = {gate.unit!r}, gate.signal = {gate.signal!r}: what it "
            "leaves out of a step, or learns from steps, is meant for batches of one size; use gate=dense, or unit "
            "sequence by a signal that is asked before the forward (random, ngram, ...)"
        )


def check_partial(gate: GateConfig, subset: SubsetConfig, cfg: TrainerConfig, size: int, mesh: Mesh = ALONE) -> None:
    """Raise ValueError for what does not go with steps that predict a part of a vocabulary of `size` tokens."""
    what = f"trainer.vocabulary = {cfg.vocabulary}"
    if too_many := [count for count, _ in cfg.predicted() if count >= size]:
        raise ValueError(f"{what}: {too_many[0]} tokens, but the model's vocabulary has {size}: take fewer")
    if not gate.only_tokens:
        raise ValueError(
            f"{what} with gate.unit = {gate.unit!r}, gate.signal = {gate.signal!r}: no gate knows the loss of a part of "
            "the vocabulary; use gate=dense, or unit sequence by a signal that is asked before the forward (random, ...)"
        )
    if subset.kind != "all":
        raise ValueError(
            f"{what} with subset.kind = {subset.kind}: the step that updates a part of the weights predicts all tokens; "
            "use subset=all"
        )
    if mesh.size > 1:
        raise ValueError(f"{what} with {mesh.size} processes: not tried yet. Use mesh=single")


def vocabulary_of(cfg: TrainerConfig, size: int, stream: Any, seed: int) -> Vocabulary | None:
    """The order of a vocabulary of `size` tokens, counted in the stream's training text, where the settings ask for one.

    Raises ValueError for a stream without a text that could be counted.
    """
    if not cfg.vocabulary:
        return None
    tokens = getattr(getattr(stream, "corpus", None), "train_tokens", None)
    if tokens is None:
        raise ValueError(f"trainer.vocabulary = {cfg.vocabulary}: this stream has no corpus whose tokens could be counted")
    return make_vocabulary(tokens, size, cfg.vocabulary_order, seed)


def check_shapes(planned: Sequence[Step]) -> None:
    """Raise ValueError for more shapes than torch.compile compiles the model for: it would go on without, in silence."""
    parts: dict[bool, set[Hashable]] = {False: set(), True: set()}  # two functions are compiled
    for step in planned:
        shape = (step.batch, step.length, step.plan.bag, step.plan.vocabulary, step.layers)
        parts[step.plan.vocabulary > 0].add(shape)
    shapes = max(parts.values(), key=len)
    if len(shapes) > MOST_SHAPES:
        raise ValueError(
            f"trainer.compile = on: the schedules of this run make steps of {len(shapes)} shapes, and torch.compile "
            f"compiles a model for {MOST_SHAPES}: give trainer.length_schedule, bags, vocabulary, batch_schedule fewer "
            "stages, let them change at the same shares of the budget, or take trainer.compile=off"
        )
