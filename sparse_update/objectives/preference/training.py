"""Reward models from pairs, by Bradley and Terry's likelihood: -log sigmoid(r(chosen) - r(rejected)), nats a pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_update.objectives.preference.errors import PreferenceError
from sparse_update.objectives.preference.pairs import Pair
from sparse_update.objectives.preference.reward import RewardModel, padded


@dataclass
class FitConfig:
    """How a model is fitted to pairs. Raises PreferenceError for values that cannot train."""

    epochs: int = 3
    batch_pairs: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    grad_clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_pairs < 1 or self.lr <= 0 or not 0 <= self.warmup_fraction < 1:
            raise PreferenceError(
                f"fit with epochs = {self.epochs}, batch_pairs = {self.batch_pairs}, lr = {self.lr}, warmup_fraction = "
                f"{self.warmup_fraction}: at least 1, at least 1, positive, in [0, 1)"
            )


def bradley_terry_loss(chosen_R: Tensor, rejected_R: Tensor) -> Tensor:
    """Negative log-likelihood of the preferences, nats, (R,) (Bradley and Terry 1952)."""
    return F.softplus(rejected_R - chosen_R)


def fit_reward(model: RewardModel, pairs: Sequence[Pair], cfg: FitConfig) -> list[float]:
    """Train in place; the mean loss of each epoch, nats a pair. Raises PreferenceError for no pairs or a NaN loss."""

    def loss_of(batch: Sequence[Pair]) -> Tensor:
        tokens, lengths = padded([row for pair in batch for row in pair.rows], model.trunk.embed.weight.device)
        rewards_R = model(tokens, lengths)
        return bradley_terry_loss(rewards_R[::2], rewards_R[1::2])

    model.train()
    found = fit(list(model.parameters()), pairs, loss_of, cfg)
    model.eval()
    return found


def fit(
    parameters: list[torch.nn.Parameter],
    pairs: Sequence[Pair],
    loss_of: Callable[[Sequence[Pair]], Tensor],
    cfg: FitConfig,
) -> list[float]:
    """AdamW with linear warm-up and half a cosine down over `cfg.epochs` shuffled passes; the mean loss of each.

    Each batch holds pairs of like length, so that little is padded; the order of batches is drawn.
    """
    if not len(pairs):
        raise PreferenceError("no pairs to fit to: at least one is needed")
    generator = np.random.default_rng(cfg.seed)
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.98), weight_decay=cfg.weight_decay)
    batches = math.ceil(len(pairs) / cfg.batch_pairs)
    steps, step, found = cfg.epochs * batches, 0, []
    size = np.array([len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs])
    for _ in range(cfg.epochs):
        total = 0.0
        order = np.lexsort((generator.random(len(pairs)), size))
        for number in generator.permutation(batches):
            batch = [pairs[i] for i in order[number * cfg.batch_pairs : (number + 1) * cfg.batch_pairs]]
            progress = (step + 1) / steps
            warm = min(1.0, progress / cfg.warmup_fraction) if cfg.warmup_fraction else 1.0
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * (warm if warm < 1 else 0.5 * (1 + math.cos(math.pi * progress)))
            loss_R = loss_of(batch)
            loss = loss_R.mean()
            if not bool(torch.isfinite(loss)):
                raise PreferenceError(f"the loss on pairs is {float(loss)} at step {step}: lower fit.lr = {cfg.lr}")
            optimizer.zero_grad()
            loss.backward()
            if cfg.grad_clip:
                torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
            optimizer.step()
            total += float(loss_R.detach().sum())
            step += 1
        found.append(total / len(pairs))
    return found
