"""Reinforcement as an objective: prompts are chosen, outputs sampled and scored, and what was better than its group is
pushed up.

A phase goes: candidates come from the loop's gate -> the prompt gate takes some, before anything is generated -> outputs
are shared out and sampled -> rewards, advantages, kept tokens -> one or several updates.

Shape letters: C candidates, P prompts, R outputs, M outputs at once, T predicted tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_update.clock.cost import Step
from sparse_update.gates.gate import GatedBatch
from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.examples.rows import PromptStream
from sparse_update.objectives.objective import Given
from sparse_update.objectives.phase import LENGTH_STEP, Phase
from sparse_update.objectives.reinforcement.advantages import advantages, all_equal, overlong_penalty
from sparse_update.objectives.reinforcement.joining import joined, picked, with_prompts
from sparse_update.objectives.reinforcement.outputs import allocate
from sparse_update.objectives.reinforcement.prompts import Candidates, make_prompt_gate
from sparse_update.objectives.reinforcement.settings import ReinforcementError, RlConfig
from sparse_update.objectives.reinforcement.surrogate import Sampled as Known
from sparse_update.objectives.reinforcement.surrogate import clipped_share, token_weights
from sparse_update.objectives.reinforcement.tokens import kept_tokens
from sparse_update.objectives.scored import Scored
from sparse_update.objectives.settings import SampleConfig
from sparse_update.objectives.tokens import row_losses
from sparse_update.step.plan import View
from sparse_update.tasks.draw import number_of
from sparse_update.tasks.encoding import encoded

SPARE = 1.25
"""How many more prompts a filter asks for than it expects to need (GRESO, arXiv 2506.02177)."""


class Reinforce(Scored):
    """Policy gradients by `RlConfig`.

    The estimators are exact for outputs that are sampled at temperature 1 with top_p 1; at other settings the outputs are
    another policy's, which is not corrected for.

    Raises ReinforcementError for settings that do not go together.
    """

    def __init__(self, given: Given, examples: Examples, sample: SampleConfig, stream: PromptStream, cfg: RlConfig) -> None:
        super().__init__(given, examples, sample, stream)
        self.cfg, self.estimator = cfg, cfg.estimator
        if sample.n < 2 and self.estimator.advantage != "reinforce":
            raise ReinforcementError(
                f"objective.sample.n = {sample.n} with rl.estimator.advantage = {self.estimator.advantage}: outputs of a "
                "prompt are compared with each other, so at least 2 are needed"
            )
        self.prompts = make_prompt_gate(cfg.prompts)
        if cfg.allocate != "fixed":
            self._check_allocation()
        if self.estimator.kl:
            self.refer(f"rl.estimator.kl = {self.estimator.kl}")
        self._unit = math.lcm(self.shares, sample.batches)
        """what a number of prompts must be a multiple of"""
        self._taken: Candidates | None = None
        self._place: dict[int, int] = {}
        """row number -> its place in `_taken`"""
        self.seen: Counter[str] = Counter()
        """Groups so far: all, right (all outputs), wrong (all outputs), sampled and filtered out, candidates."""
        self._clipped = 0.0

    def _check_allocation(self) -> None:
        cfg, n = self.cfg, self.sample.n
        if n % cfg.n_least or cfg.n_most % cfg.n_least or not cfg.n_least <= n <= cfg.n_most:
            raise ReinforcementError(
                f"rl.n_least = {cfg.n_least}, objective.sample.n = {n}, rl.n_most = {cfg.n_most}: must ascend, and be "
                "multiples of the first: outputs are shared out in portions of it"
            )
        if self.cfg.prompts.kind not in ("predicted", "surprise"):
            raise ReinforcementError(
                f"rl.allocate = {cfg.allocate} with rl.prompts.kind = {cfg.prompts.kind}: shares follow from predicted "
                "pass rates; use predicted or surprise (with rl.prompts.keep_fraction=1 every prompt is sampled from)"
            )

    # which prompts

    def prepare(self, batch: GatedBatch, step: Step, progress: float) -> GatedBatch:
        if self._spent:
            batch = self._choose(batch)
        return super().prepare(batch, step, progress)

    def _choose(self, batch: GatedBatch) -> GatedBatch:
        """The candidates that are sampled from; with a filter, those that may be, in the order they are tried in."""
        self._taken = None
        self.seen["candidates"] += len(batch.tokens)
        if self.cfg.prompts.kind == "none":
            return batch
        shown = self._candidates(batch)
        wanted = self._wanted(len(shown), filtering=False)
        index = self.prompts.choose(shown, wanted, self.sample.n, self._generator("prompts"))
        if not len(index):  # GRESO may skip them all: one is looked at again
            index = self._generator("prompts").permutation(len(shown))[:1]
        index = index[: len(index) // self._unit * self._unit or len(index)]
        self._taken = shown.of(index)
        self._place = {int(batch.window[at]): place for place, at in enumerate(index)}
        return picked(batch, torch.from_numpy(index))

    def _wanted(self, offered: int, filtering: bool) -> int:
        """Prompts of a phase, of so many that are offered."""
        if self.cfg.prompts.filter_after and not filtering:
            return offered
        all_of_them = self.cfg.prompts.kind == "none" and not self.cfg.prompts.filter_after
        share = 1.0 if all_of_them else self.cfg.prompts.keep_fraction
        return max(self._unit, round(share * offered) // self._unit * self._unit)

    def _candidates(self, batch: GatedBatch) -> Candidates:
        instances = [self.stream.row(int(number)).instances[0] for number in batch.window]
        surprise_C = self._surprise(instances) if self.prompts.looks else None
        return Candidates([i.id for i in instances], [f"{i.task}:{i.level}" for i in instances], surprise_C)

    def _surprise(self, instances: Sequence[Any]) -> np.ndarray:
        """Negative log-likelihood of each reference answer, nats (C,); on the clock."""
        found = encoded(self.examples.tokenizer, instances, self.examples.cfg.form, self.model.cfg.context)
        longest = max(len(one.tokens) for one in found) - 1
        length = min(self.model.cfg.context, -(-longest // LENGTH_STEP) * LENGTH_STEP)
        tokens_CT1 = torch.zeros(len(found), length + 1, dtype=torch.int64)
        mask_CT = torch.zeros(len(found), length)
        for place, one in enumerate(found):
            tokens_CT1[place, : len(one.tokens)] = torch.from_numpy(one.tokens)
            mask_CT[place, : len(one.answer_mask)] = torch.from_numpy(one.answer_mask).float()
        self.charge(len(found), length)
        parts = [loss.cpu() for _, loss in row_losses(self.read(), tokens_CT1[:, :-1], tokens_CT1[:, 1:], len(found))]
        return (torch.cat(parts) * mask_CT).sum(1).double().numpy() / self.sample.temperature

    def _generator(self, what: str) -> np.random.Generator:
        """Of this phase; the same on every process."""
        return np.random.default_rng(number_of(what, self.given.seed, self.phases))

    # how many outputs

    def outputs_of(self, batch: GatedBatch, progress: float) -> Sequence[int]:
        prompts, n, cfg = len(batch.tokens), self.sample.n, self.cfg
        if cfg.allocate == "fixed" or self._taken is None:
            return [n] * prompts
        shown = self._taken.of(np.array([self._place[int(number)] for number in batch.window]))
        predicted = self.prompts.predict(shown)
        assert predicted is not None  # _check_allocation
        portion = cfg.n_least
        count_P = portion * allocate(predicted.variance(), prompts * n // portion, 1, cfg.n_most // portion)
        if cfg.allocate == "random":
            count_P = self._generator("outputs").permutation(count_P)
        return [int(count) for count in count_P]

    # what is sampled, and filtered

    def _sample(self, batch: GatedBatch, progress: float) -> Phase:
        cfg = self.cfg.prompts
        if not cfg.filter_after:
            phase = super()._sample(batch, progress)
            self._note(phase)
            return phase
        wanted = self._wanted(len(batch.tokens), filtering=True)
        phases: list[Phase] = []
        at, have, share = 0, 0, 1.0
        for _ in range(cfg.filter_rounds):
            count = min(wanted, round(SPARE * (wanted - have) / share) if phases else wanted, len(batch.tokens) - at)
            count = max(self._unit, -(-count // self._unit) * self._unit)
            if at + count > len(batch.tokens):
                break
            phase = super()._sample(picked(batch, torch.arange(at, at + count)), progress)
            self._note(phase)
            at += count
            mixed_P = self._mixed(phase)
            self.seen["filtered"] += int((~mixed_P).sum())
            phases.append(with_prompts(phase, mixed_P.nonzero()[:, 0]))
            have += int(mixed_P.sum())
            share = max(0.05, float(mixed_P.double().mean()))
            if have >= wanted:
                break
        keep = min(wanted, have) // self._unit * self._unit
        return with_prompts(joined(phases), torch.arange(keep)) if keep else phase

    def _mixed(self, phase: Phase) -> Tensor:
        """bool (P,): prompts whose outputs differ in reward."""
        return torch.from_numpy(~all_equal(phase.reward_R.numpy(), phase.prompt_R.numpy(), len(phase)))

    def _note(self, phase: Phase) -> None:
        """Count, and let the prompt gate learn from what was sampled."""
        group_R, reward_R = phase.prompt_R.numpy(), phase.reward_R.numpy()
        count_P = np.bincount(group_R, minlength=len(phase))
        right_P = np.bincount(group_R, weights=np.clip(reward_R, 0, 1), minlength=len(phase))
        alike_P = ~self._mixed(phase).numpy()
        self.seen["groups"] += len(phase)
        self.seen["right"] += int((alike_P & (right_P >= count_P)).sum())
        self.seen["wrong"] += int((alike_P & (right_P < count_P)).sum())
        if self._taken is not None:
            index = np.array([self._place[int(number)] for number in phase.batch.window])
            self.prompts.observe(self._taken.of(index), right_P, count_P)

    # the gradient

    def advise(self, phase: Phase) -> Phase:
        cfg = self.estimator
        reward_R, group_R = phase.reward_R.numpy().copy(), phase.prompt_R.numpy()
        if cfg.overlong == "punish":
            margin = cfg.overlong_margin or max(1, self.sample.new_tokens // 4)
            reward_R += overlong_penalty(phase.lengths_R.numpy(), self.sample.new_tokens, margin)
        advantage_R = advantages(reward_R, group_R, cfg.advantage, cfg.baseline)
        if cfg.overlong == "mask":
            advantage_R = np.where(phase.stopped_R.numpy(), advantage_R, 0.0)
        mask_RT = phase.mask_RT
        token = self.cfg.tokens
        kept_RT = kept_tokens(
            token.kind, token.keep_fraction, mask_RT.numpy(), advantage_R, phase.logp_RT.numpy(),
            phase.entropy_RT.numpy(), self._generator("tokens"),
        )  # fmt: skip
        advantage_R = np.where(kept_RT.any(1), advantage_R, 0.0)
        more = {
            "advantage_R": torch.from_numpy(advantage_R),
            "kept_RT": torch.from_numpy(kept_RT),
            "size_P": torch.bincount(phase.prompt_R, minlength=len(phase)),
        }
        if self.reference is not None:
            more["reference_RT"] = self.reference_logp(phase)
        return phase.with_more(**more)

    def normaliser(self, phase: Phase, which_R: Tensor) -> float:
        if self.estimator.normalise == "token":
            return float(phase.lengths_R[which_R].sum())
        prompts = len(phase.prompt_R[which_R].unique())
        return prompts * (self.estimator.constant if self.estimator.normalise == "constant" else 1.0)

    def token_weights(self, phase: Phase, which_M: Tensor, view: View) -> Tensor:
        loss_MT = view.loss_BT.cpu().float()
        more = phase.more
        reference = more["reference_RT"][which_M] if "reference_RT" in more else None
        known = Known(
            more["kept_RT"][which_M],
            phase.logp_RT[which_M],
            more["advantage_R"][which_M].float(),
            1,
            phase.prompt_R[which_M],
            more["size_P"],
            1,  # `normaliser` has the rest
            reference,
        )
        cfg = replace(self.estimator, constant=1.0)
        self._clipped = clipped_share(-loss_MT, known, cfg)
        return token_weights(-loss_MT, known, cfg)

    # beside it

    def notes(self) -> Mapping[str, float]:
        groups = max(1, self.seen["groups"])
        return {
            **super().notes(),
            "rl/all_right": self.seen["right"] / groups,
            "rl/all_wrong": self.seen["wrong"] / groups,
            "rl/groups": float(self.seen["groups"]),
            "rl/filtered": float(self.seen["filtered"]),
            "rl/candidates": float(self.seen["candidates"]),
            "rl/clipped": self._clipped,
            **{f"rl/gate_{name}": value for name, value in self.prompts.notes().items()},
        }

    def state_dict(self) -> dict[str, Any]:
        own = {"prompts": self.prompts.state_dict(), "seen": dict(self.seen), "clipped": self._clipped}
        return {**super().state_dict(), "reinforce": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        own = state["reinforce"]
        self.prompts.load_state_dict(own["prompts"])
        self.seen = Counter({str(name): int(count) for name, count in own["seen"].items()})
        self._clipped = float(own["clipped"])
