"""The same steps by our parts: the sampler, an estimator of `objectives.reinforcement`, autograd, AdamW.

Shape letters: R outputs, T predicted tokens of a prompt with its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sparse_update.data.tokens import ByteTokenizer
from sparse_update.generation import GenerateConfig, Sampler
from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.examples.settings import TaskConfig
from sparse_update.objectives.reinforcement.advantages import advantages
from sparse_update.objectives.reinforcement.settings import EstimatorConfig, preset
from sparse_update.objectives.reinforcement.surrogate import Sampled, token_weights
from sparse_update.transformer import ModelConfig, Transformer, token_loss

TUNING_ROWS = 16
TUNING_RATE = 3e-3


def tuned(cfg: ModelConfig, task: TaskConfig, steps: int, seed: int = 0) -> tuple[Transformer, Examples]:
    """A model that learnt answers of the task by likelihood for so many steps of `TUNING_ROWS` packed rows: AdamW, a cosine
    from `TUNING_RATE` to nothing."""
    examples = Examples(task, ByteTokenizer(), cfg.context, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), TUNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    stream = examples.examples()
    for step in range(steps):
        rows = stream.rows(torch.arange(step * TUNING_ROWS, (step + 1) * TUNING_ROWS))
        loss_NT = token_loss(model(rows.tokens_NT1[:, :-1], packing=rows.packing), rows.tokens_NT1[:, 1:])
        optimizer.zero_grad()
        ((loss_NT * rows.weight_NT).sum() / rows.weight_NT.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model, examples


@dataclass
class Ours:
    """A model in training; `step` samples, scores and updates once."""

    model: Transformer
    examples: Examples
    generate: GenerateConfig
    lr: float
    estimator: EstimatorConfig = field(default_factory=lambda: preset("grpo", kl=0.0))

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), self.lr, weight_decay=0.0)
        self.sampler = Sampler(self.model, self.generate, self.examples.stop)
        self.steps = 0

    def step(self, prompts: Sequence[np.ndarray], answers: Sequence[str]) -> tuple[float, int]:
        """One step on these prompts: mean reward, and tokens that were sampled."""
        n = self.generate.n
        found = self.sampler.sample(prompts, [self.steps * len(prompts) + number for number in range(len(prompts))])
        texts = [self.examples.text(row) for row in found]
        rewards = np.array([float(text.strip() == answers[row // n]) for row, text in enumerate(texts)])
        group_R = np.repeat(np.arange(len(prompts)), n)
        advantage_R = advantages(rewards, group_R, self.estimator.advantage)
        learnt = np.flatnonzero(advantage_R)
        if len(learnt):
            self._update(prompts, list(found), found.logp_RN, advantage_R, group_R, learnt)
        self.steps += 1
        return float(rewards.mean()), int(found.lengths_R.sum())

    def _update(
        self,
        prompts: Sequence[np.ndarray],
        outputs: list[np.ndarray],
        logp_RN: np.ndarray,
        advantage_R: np.ndarray,
        group_R: np.ndarray,
        learnt: np.ndarray,
    ) -> None:
        """By the outputs that have an advantage."""
        texts = [np.concatenate((prompts[group_R[row]], outputs[row])) for row in learnt]
        longest = max(map(len, texts))
        tokens_RT1 = torch.zeros(len(learnt), longest, dtype=torch.int64)
        mask_RT = torch.zeros(len(learnt), longest - 1, dtype=torch.bool)
        old_RT = torch.zeros(len(learnt), longest - 1)
        for place, row in enumerate(learnt):
            start, stop = len(prompts[group_R[row]]), len(texts[place])
            tokens_RT1[place, :stop] = torch.from_numpy(texts[place])
            mask_RT[place, start - 1 : stop - 1] = True
            old_RT[place, start - 1 : stop - 1] = torch.from_numpy(logp_RN[row, : stop - start])
        size_G = torch.full((len(prompts),), self.generate.n)
        advantage = torch.from_numpy(advantage_R[learnt]).float()
        sampled = Sampled(mask_RT, old_RT, advantage, len(prompts), torch.from_numpy(group_R[learnt]), size_G)
        loss_RT = token_loss(self.model(tokens_RT1[:, :-1]), tokens_RT1[:, 1:])
        weight_RT: Tensor = token_weights(-loss_RT.detach() * mask_RT, sampled, self.estimator)
        self.optimizer.zero_grad()
        (loss_RT * weight_RT).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
