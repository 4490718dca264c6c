"""Policy gradients against any reward, watched: proxy, true reward and distance from the reference as it goes.

The gradient is REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740), one update for each batch
of outputs, so that nothing is off policy. The KL term is part of the reward: `kl` times the log-ratio of an output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from experiments.studies.rewards.setting import Answers, Setting, answers, questions, trainable
from sparse_update.objectives.preference.dpo import answer_logp
from sparse_update.objectives.preference.overoptimisation import kl_per_row
from sparse_update.objectives.preference.rewards import Reward
from sparse_update.objectives.reinforcement.advantages import advantages
from sparse_update.tasks import Instance, distinct
from sparse_update.transformer import Transformer


@dataclass(frozen=True)
class TrainingConfig:
    """How a policy is trained and watched."""

    steps: int = 160
    farthest: float = 2.4
    """Distance at which a run ends: that of the best of about 900, so that both ways are compared over the same ones"""
    prompts: int = 48
    n: int = 8
    lr: float = 1.5e-5
    warmup_steps: int = 10
    grad_clip: float = 1.0
    kl: float = 0.0
    """Weight of the log-ratio to the reference, taken off the reward"""
    every: int = 3
    """Steps between two evaluations"""
    watched_prompts: int = 128
    watched_outputs: int = 32
    """Of each, for the true reward"""
    read_outputs: int = 8
    """Of these, for the proxy and the distance, which take forwards"""


@dataclass(frozen=True, eq=False)
class Point:
    """An evaluation on the same development questions every time, with the same random numbers."""

    step: int
    kl: float
    """nats, of whole answers"""
    proxy_P: np.ndarray
    """Mean of the learned reward over each question's outputs"""
    true_P: np.ndarray
    length: float

    @property
    def distance(self) -> float:
        """sqrt(KL)"""
        return max(0.0, self.kl) ** 0.5

    @property
    def proxy(self) -> float:
        return float(self.proxy_P.mean())

    @property
    def true(self) -> float:
        return float(self.true_P.mean())


def watched_questions(setting: Setting, cfg: TrainingConfig) -> list[Instance]:
    """Development questions that every policy is watched on; the same for all seeds."""
    return distinct(questions(setting, "development", 0), cfg.watched_prompts)


def evaluate(
    policy: Transformer,
    reference: Transformer,
    proxy: Reward,
    instances: list[Instance],
    setting: Setting,
    cfg: TrainingConfig,
    step: int = 0,
) -> Point:
    """Both rewards of a policy and its distance from the reference."""
    found = answers(policy, instances, cfg.watched_outputs, 11, setting)
    few = found.first(min(cfg.read_outputs, found.n))
    proxy_P = proxy.rewards(few.prompts, few.rows).reshape(-1, few.n).mean(1)
    kl = float(kl_per_row(policy, reference, few.prompts, few.rows).mean())
    return Point(step, kl, proxy_P, found.true_PN.mean(1), float(found.length_PN.mean()))


def reinforce(
    reference: Transformer, reward: Reward, proxy: Reward, setting: Setting, cfg: TrainingConfig, seed: int
) -> Iterator[tuple[Point, Transformer]]:
    """Train a copy of the reference by `reward`, and give a point every `cfg.every` steps, the first before any update.

    `proxy` is the reward that is reported. Stop by no longer asking.
    """
    policy = trainable(reference)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.98), weight_decay=0.0)
    stream, instances = questions(setting, "train", 1000 + seed), watched_questions(setting, cfg)
    for step in range(cfg.steps + 1):
        if step % cfg.every == 0 or step == cfg.steps:
            point = evaluate(policy, reference, proxy, instances, setting, cfg, step)
            yield point, policy
            if step == cfg.steps or point.distance > cfg.farthest:
                return
        found = answers(policy, stream.take(cfg.prompts), cfg.n, 1_000_000 * (seed + 1) + step, setting)
        logp_R = answer_logp(policy, found.prompts, found.rows)
        group_R = np.repeat(np.arange(cfg.prompts), cfg.n)
        advantage_R = torch.from_numpy(advantages(_rewards(found, reward, reference, cfg.kl), group_R, "rloo"))
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, (step + 1) / cfg.warmup_steps)
        optimizer.zero_grad()
        (-(advantage_R.float() * logp_R).mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        optimizer.step()


@torch.no_grad()
def _rewards(found: Answers, reward: Reward, reference: Transformer, kl: float) -> np.ndarray:
    value_R = reward.rewards(found.prompts, found.rows)
    if kl:
        value_R = value_R - kl * (found.logp_R - answer_logp(reference, found.prompts, found.rows).double().numpy())
    return value_R
