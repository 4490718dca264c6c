"""Which objective a kind means, and what stream it trains on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.examples.rows import PromptStream, RowStream
from sparse_update.objectives.instruction.instruct import Instruct
from sparse_update.objectives.likelihood import Likelihood
from sparse_update.objectives.objective import Given, Objective
from sparse_update.objectives.preference.learned import ByReward
from sparse_update.objectives.preference.online import OnlineDpo
from sparse_update.objectives.reinforcement.reinforce import Reinforce
from sparse_update.objectives.reinforcement.rejection import Rejection
from sparse_update.objectives.sampled import Sampled
from sparse_update.objectives.settings import ObjectiveConfig


@dataclass(frozen=True)
class Kind:
    """An objective on tasks."""

    make: Callable[[Given, Examples, ObjectiveConfig], Objective]
    stream: Callable[[Examples, ObjectiveConfig], RowStream]
    """what the gate is offered"""


def _prompts(examples: Examples, cfg: ObjectiveConfig) -> PromptStream:
    return examples.prompts(cfg.sample.new_tokens)


def _sampled(kind: Callable[..., Sampled], given: Given, examples: Examples, cfg: ObjectiveConfig, *own: object) -> Sampled:
    return kind(given, examples, cfg.sample, _prompts(examples, cfg), *own)


KINDS: Mapping[str, Kind] = {
    "instruct": Kind(
        lambda given, examples, cfg: Instruct(given, examples, cfg.instruct), lambda examples, cfg: examples.examples()
    ),
    "rl": Kind(lambda given, examples, cfg: _sampled(Reinforce, given, examples, cfg, cfg.rl), _prompts),
    "reward": Kind(lambda given, examples, cfg: _sampled(ByReward, given, examples, cfg, cfg.rl, cfg.reward), _prompts),
    "rejection": Kind(lambda given, examples, cfg: _sampled(Rejection, given, examples, cfg, cfg.rejection), _prompts),
    "dpo": Kind(lambda given, examples, cfg: _sampled(OnlineDpo, given, examples, cfg, cfg.dpo), _prompts),
}
"""Every kind of `settings.TASK_KINDS`."""


def task_stream(cfg: ObjectiveConfig, examples: Examples) -> RowStream:
    """The rows that a run of this objective is offered."""
    return KINDS[cfg.kind].stream(examples, cfg)


def make_objective(cfg: ObjectiveConfig, examples: Examples | None = None) -> Callable[[Given], Objective]:
    """What `make_trainer` is given. Raises ValueError for an objective on tasks without any."""
    if not cfg.on_tasks:
        return Likelihood
    if examples is None:
        raise ValueError(f"objective.kind = {cfg.kind} trains on tasks: task=sums, or task.tasks=[...]")
    found = examples

    def make(given: Given) -> Objective:
        return KINDS[cfg.kind].make(given, found, cfg)

    return make
