"""A generation phase: prompts, the outputs that were sampled for them, their rewards; all of it tensors, so that a
checkpoint can hold it.

Shape letters: P prompts, R outputs, T predicted tokens of a prompt with its output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from sparse_update.gates.gate import GatedBatch, part
from sparse_update.generation.settings import Outputs

LENGTH_STEP = 16
"""Rows are as long as a multiple of this, so that steps have few shapes."""


@dataclass(frozen=True, eq=False)
class Phase:
    """What was sampled at once, the same on every process. Outputs of a prompt stand one after the other, prompts in
    order."""

    batch: GatedBatch
    """the prompts, as the gate gave them"""
    prompt_R: Tensor
    """int64: which prompt each output is of"""
    tokens_RT1: Tensor
    """int64: prompt and output, then zeros"""
    start_R: Tensor
    """int64: tokens of the prompt"""
    end_R: Tensor
    """int64: tokens of prompt and output"""
    logp_RT: Tensor
    """float32 nats: log-probability of each sampled token under the model that sampled it, at temperature 1; 0 elsewhere"""
    drawn_RT: Tensor
    """float32 nats: the same under what it was drawn from, with the temperature and top_p"""
    entropy_RT: Tensor
    """float32 nats: entropy of the distribution that each token was drawn for, at temperature 1"""
    stopped_R: Tensor
    """bool: ended by a stop token"""
    reward_R: Tensor
    """float64: by what the outputs are judged while training"""
    true_R: Tensor
    """float64: the verifier's score, which is the reward where nothing else judges"""
    taken: int = 0
    """updates made of it"""
    more: Mapping[str, Tensor] = field(default_factory=dict)
    """what an objective keeps with it, such as advantages (R,) or log-probabilities of a reference (R, T)"""

    def __len__(self) -> int:
        """Prompts."""
        return len(self.batch.tokens)

    @property
    def mask_RT(self) -> Tensor:
        """bool: which predicted tokens were sampled."""
        place_T = torch.arange(1, self.tokens_RT1.shape[1])
        return (place_T >= self.start_R[:, None]) & (place_T < self.end_R[:, None])

    @property
    def lengths_R(self) -> Tensor:
        """int64: sampled tokens of each output."""
        return self.end_R - self.start_R

    def by_prompt(self, value_R: Tensor, fill: float = float("nan")) -> Tensor:
        """(P, n) of a value per output, filled up where a prompt has fewer outputs than the one with most."""
        count_P = torch.bincount(self.prompt_R, minlength=len(self))
        before_P = count_P.cumsum(0) - count_P
        found = value_R.new_full((len(self), int(count_P.max())), fill)
        found[self.prompt_R, torch.arange(len(value_R)) - before_P[self.prompt_R]] = value_R
        return found

    def of_prompts(self, which: slice) -> Tensor:
        """int64: the outputs of some prompts."""
        first, last = which.start, which.stop
        return ((self.prompt_R >= first) & (self.prompt_R < last)).nonzero()[:, 0]

    def prompts(self, which: slice) -> GatedBatch:
        """Some of the prompts."""
        return part(self.batch, which)  # type: ignore[return-value]

    def with_more(self, **more: Tensor) -> Phase:
        return replace(self, more={**self.more, **more})

    def state(self) -> dict[str, Any]:
        """Nested dicts of tensors and plain values."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("batch", "more")}
        given = {name: value for name, value in vars(self.batch).items() if value is not None}
        return {**found, "batch": given, "more": dict(self.more)}

    @staticmethod
    def of_state(state: Mapping[str, Any]) -> Phase:
        rest = {name: value for name, value in state.items() if name not in ("batch", "taken")}
        return Phase(batch=GatedBatch(**state["batch"]), taken=int(state["taken"]), **rest)


def outputs_as_rows(outputs: Sequence[Outputs], prompts: Sequence[Any], first: int, context: int) -> dict[str, Tensor]:
    """Tensors of a phase out of what was sampled: `prompts[p]` int64 (tokens,) were sampled from in this order, `first`
    is the number of the first one. Rows are as long as the model's context; `cut` shortens them when all are together."""
    count_P = [outputs_of.n for outputs_of in outputs for _ in range(len(outputs_of) // outputs_of.n)]
    rows = sum(count_P)
    tokens_RT1 = torch.zeros(rows, context + 1, dtype=torch.int64)
    values_3RT = torch.zeros(3, rows, context, dtype=torch.float32)
    start_R, end_R = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    number = 0
    for outputs_of in outputs:
        for row in range(len(outputs_of)):
            prompt = torch.from_numpy(prompts[_prompt_of(count_P, number)])
            start, length = len(prompt), int(outputs_of.lengths_R[row])
            tokens_RT1[number, :start] = prompt
            tokens_RT1[number, start : start + length] = torch.from_numpy(outputs_of.tokens_RN[row, :length])
            found = (outputs_of.logp_RN, outputs_of.drawn_logp_RN, outputs_of.entropy_RN)
            for value_RT, value_RN in zip(values_3RT, found, strict=True):
                value_RT[number, start - 1 : start + length - 1] = torch.from_numpy(value_RN[row, :length])
            start_R[number], end_R[number] = start, start + length
            number += 1
    logp_RT, drawn_RT, entropy_RT = values_3RT
    prompt_R = torch.repeat_interleave(torch.arange(len(count_P)), torch.tensor(count_P)) + first
    stopped_R = torch.cat([torch.from_numpy(outputs_of.stopped_R) for outputs_of in outputs])
    return {
        "prompt_R": prompt_R,
        "tokens_RT1": tokens_RT1,
        "start_R": start_R,
        "end_R": end_R,
        "logp_RT": logp_RT,
        "drawn_RT": drawn_RT,
        "entropy_RT": entropy_RT,
        "stopped_R": stopped_R,
    }


def _prompt_of(count_P: Sequence[int], row: int) -> int:
    for prompt, count in enumerate(count_P):
        if row < count:
            return prompt
        row -= count
    raise IndexError(row)


def cut(found: Mapping[str, Tensor], context: int) -> dict[str, Tensor]:
    """The same with rows as long as the longest one, up to a multiple of `LENGTH_STEP` and the context at most."""
    length = min(context, -(-int(found["end_R"].max() - 1) // LENGTH_STEP) * LENGTH_STEP)
    shorter = {"tokens_RT1": length + 1, "logp_RT": length, "drawn_RT": length, "entropy_RT": length}
    return {name: value[:, : shorter[name]].contiguous() if name in shorter else value for name, value in found.items()}
