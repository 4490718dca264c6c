"""Reinforcement by a learned reward, watched by the verifier: the estimators are those of `reinforcement`, the reward is a
reward model's, and at every evaluation both rewards are compared on development questions (`watch.py`)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sparse_update.generation.sampler import Sampler
from sparse_update.loop.checkpoint import CheckpointError
from sparse_update.objectives.examples.examples import JUDGING_SEED, Examples
from sparse_update.objectives.examples.rows import PromptStream
from sparse_update.objectives.objective import Given
from sparse_update.objectives.phase import Phase
from sparse_update.objectives.preference.errors import PreferenceError
from sparse_update.objectives.preference.reward import RewardModel
from sparse_update.objectives.preference.rewards import Ensemble, Learned, Reward
from sparse_update.objectives.preference.settings import RewardConfig
from sparse_update.objectives.preference.watch import Watch, WatchConfig
from sparse_update.objectives.reinforcement.reinforce import Reinforce
from sparse_update.objectives.reinforcement.settings import RlConfig
from sparse_update.objectives.settings import SampleConfig
from sparse_update.tasks.base import END, Instance
from sparse_update.tasks.encoding import prompt_text
from sparse_update.tasks.splits import TaskStream, distinct


class ByReward(Reinforce):
    """Policy gradients by `RlConfig`, where reward models say what an output is worth.

    Their forwards are on the clock, at the price of the policy's own. Evaluations are not.

    Raises:
        PreferenceError: no reward model is named, or a folder holds none.
        VocabularyMismatch: one reads other tokens than the policy writes.
    """

    def __init__(
        self,
        given: Given,
        examples: Examples,
        sample: SampleConfig,
        stream: PromptStream,
        cfg: RlConfig,
        reward: RewardConfig,
    ) -> None:
        super().__init__(given, examples, sample, stream, cfg)
        if not reward.models:
            raise PreferenceError(
                "objective.reward.models is empty: name the folder of a reward model, or take objective=rl, which follows "
                "the verifier"
            )
        self.reward_cfg = reward
        try:
            models = [
                RewardModel.load(folder, examples.tokenizer).requires_grad_(False).to(given.device)
                for folder in reward.models
            ]
        except CheckpointError as error:
            raise PreferenceError(f"objective.reward.models: {error} (spikegate reward RUN FOLDER makes one)") from error
        self.reward: Reward = Learned(models[0]) if len(models) == 1 else Ensemble(models, reward.rule)
        self.limit = min(model.trunk.cfg.context for model in models)
        self.watch = Watch(WatchConfig(alpha=reward.alpha))
        self._watched: dict[str, float] = {}

    # the reward

    def rewards(self, instances: Sequence[Instance], texts: Sequence[str], stopped: Sequence[bool]) -> list[float]:
        """The learned reward of each output. One that was cut off is read as far as it goes, and what does not fit the
        reward model's context is left out."""
        ended = [text + END if whole else text for text, whole in zip(texts, stopped, strict=True)]
        return self._of(instances, ended).tolist()

    def _of(self, instances: Sequence[Instance], texts: Sequence[str]) -> np.ndarray:
        encode = self.examples.tokenizer.encode
        form = self.examples.cfg.form
        prompts = [row.astype(np.int64) for row in encode([prompt_text(instance, form).encode() for instance in instances])]
        answers = [row.astype(np.int64) for row in encode([text.encode() for text in texts])]
        room = [max(0, self.limit - len(prompt)) for prompt in prompts]
        cut = [answer[:most] for answer, most in zip(answers, room, strict=True)]
        return self.reward.rewards(prompts, cut)

    def advise(self, phase: Phase) -> Phase:
        found = super().advise(phase)
        for _ in self.reward_cfg.models:
            self.charge(len(phase.tokens_RT1), phase.tokens_RT1.shape[1] - 1)
        if self.holds:
            return found.with_more(advantage_R=torch.zeros_like(found.more["advantage_R"]))
        return found

    @property
    def holds(self) -> bool:
        """Whether the flag went up and nothing is learnt any more."""
        return self.watch.flag is not None and self.reward_cfg.at_flag == "hold"

    # the watch

    @cached_property
    def _questions(self) -> list[Instance]:
        """Development questions, or held-out ones of another seed where the run is judged by development."""
        split = "held_out" if self.examples.cfg.split == "development" else "development"
        stream = TaskStream(self.examples.tasks, split, JUDGING_SEED)
        return distinct(stream, self.reward_cfg.watch_prompts, fewer=True)

    def judge(self) -> Mapping[str, float]:
        found = super().judge()
        if not self.reward_cfg.watch_prompts:
            return found
        proxy_P, true_P = self._both()
        raised = self.watch.add(self.watch.seen, proxy_P, true_P)
        if raised is not None:
            held = "; nothing is learnt any more (at_flag = hold)" if self.holds else ""
            warnings.warn(f"{raised.text()} (step: number of the evaluation){held}", stacklevel=2)
        self._watched = {
            "reward/proxy": float(proxy_P.mean()),
            "reward/true": float(true_P.mean()),
            "reward/flagged": float(self.watch.flag is not None),
        }
        return {**found, **self._watched}

    def _both(self) -> tuple[np.ndarray, np.ndarray]:
        """Learned and true reward of each question, means over its outputs; the same random numbers every time."""
        questions, n = self._questions, self.reward_cfg.watch_outputs
        sampler = Sampler(self.read(), replace(self.sampler.cfg, n=n, seed=JUDGING_SEED), self.examples.stop)
        encode = self.examples.tokenizer.encode
        prompts = encode([prompt_text(question, self.examples.cfg.form).encode() for question in questions])
        outputs = sampler.sample([row.astype(np.int64) for row in prompts], [question.id for question in questions])
        asked = [question for question in questions for _ in range(n)]
        texts = [self.examples.text(row) for row in outputs]
        stopped = outputs.stopped_R.tolist()
        both = self.rewards(asked, texts, stopped), self.scores(asked, texts, stopped)
        proxy_P, true_P = (np.array(values).reshape(-1, n).mean(1) for values in both)
        return proxy_P, true_P

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "by_reward": {"watch": self.watch.state_dict()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.watch.load_state_dict(state["by_reward"]["watch"])
