"""Objectives that also ask models for log-probabilities of what was sampled, or of reference answers, on the clock; among
them the reference policy that a run stays near, which is the model that it started from.

Shape letters: R outputs, T predicted tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_update.clock.component import Component
from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.examples.rows import PromptStream
from sparse_update.objectives.objective import Given, ObjectiveError
from sparse_update.objectives.phase import Phase
from sparse_update.objectives.reinforcement.scoring import scoring_component, scoring_key, scoring_shape_of
from sparse_update.objectives.sampled import Sampled
from sparse_update.objectives.settings import SampleConfig
from sparse_update.objectives.tokens import row_losses
from sparse_update.transformer import Transformer


class Scored(Sampled):
    """A subclass calls `charge` for each forward that only scores, and `refer` where it needs a reference policy."""

    def __init__(self, given: Given, examples: Examples, sample: SampleConfig, stream: PromptStream) -> None:
        super().__init__(given, examples, sample, stream)
        self.reference: Transformer | None = None
        self._scoring: dict[str, Component] = {}

    def refer(self, what: str) -> None:
        """Keep the model as it is now as the reference. `what`: the setting that asks for it, for the error.

        Raises ObjectiveError for a model that grows.
        """
        if self.given.grows:
            raise ObjectiveError(f"{what} with a model that grows: it has no reference policy of its size; use growth=none")
        self.reference = self.copy_of_shape()
        self.reference.load_state_dict(self.given.mesh.weights(self.model))

    def reference_logp(self, phase: Phase) -> Tensor:
        """Log-probability of each sampled token under the reference, nats (R, T), 0 elsewhere; on the clock."""
        assert self.reference is not None
        x_RT, y_RT = phase.tokens_RT1[:, :-1], phase.tokens_RT1[:, 1:]
        losses = [loss.cpu() for _, loss in row_losses(self.reference, x_RT, y_RT, len(x_RT))]
        self.charge(*x_RT.shape)
        return -torch.cat(losses) * phase.mask_RT

    def charge(self, rows: int, length: int) -> None:
        """A forward that only scores, on the clock."""
        key = scoring_key(rows, length)
        self._scoring[key] = scoring_component(self._reader, rows, length)
        self.uses[key] += 1

    def components(self) -> Mapping[str, Component]:
        self.sampler.uses = Counter({key: n for key, n in self.uses.items() if scoring_shape_of(key) is None})
        return {**super().components(), **self._scoring}

    def state_dict(self) -> dict[str, Any]:
        kept = {} if self.reference is None else {"reference": dict(self.reference.state_dict())}
        return {**super().state_dict(), **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for key in self.uses:
            if shape := scoring_shape_of(key):
                self._scoring[key] = scoring_component(self._reader, *shape)
        if self.reference is None:
            return
        if "reference" not in state:
            raise ObjectiveError(
                "the checkpoint holds no reference policy, which this objective stays near: it was written without one, or "
                "by an earlier version; begin the run anew (resume=false, in another folder)"
            )
        self.reference.load_state_dict(state["reference"])
