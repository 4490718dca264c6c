"""One seed of the study on over-optimisation: a reference, its reward models, and every way to follow them.

Arms of reinforcement: "learned" follows one reward model with nothing against it; "kl" takes a KL term off it;
"no_length" takes its liking of length out; "ensemble" follows the least of several models; "gate" is "learned", stopped
when the flag goes up. Best-of-n is taken from one large sample of the reference, by each reward. DPO is the control that
learns no reward.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from experiments.runs.folder import read_json
from experiments.runs.plain_json import write_json
from experiments.studies.rewards.setting import (
    TOKENIZER,
    Answers,
    Setting,
    annotated,
    answers,
    reference,
    shape,
    trainable,
)
from experiments.studies.rewards.training import Point, TrainingConfig, evaluate, reinforce, watched_questions
from experiments.views.tracking import Tracker
from sparse_update.loop.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from sparse_update.objectives.preference.calibration import calibration, log_odds
from sparse_update.objectives.preference.dpo import fit_dpo
from sparse_update.objectives.preference.overoptimisation import best_of_n, best_of_n_kl
from sparse_update.objectives.preference.pairs import Pair
from sparse_update.objectives.preference.reward import RewardModel
from sparse_update.objectives.preference.rewards import Ensemble, Learned, Reward, WithoutLength
from sparse_update.objectives.preference.training import FitConfig, fit_reward
from sparse_update.objectives.preference.watch import Watch, WatchConfig
from sparse_update.transformer import Transformer

T = TypeVar("T")
ARMS = ("learned", "kl", "no_length", "ensemble")
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True)
class StudyConfig:
    """What a seed runs."""

    setting: Setting = field(default_factory=Setting)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=4, batch_pairs=32, lr=3e-3))
    watch: WatchConfig = field(default_factory=lambda: WatchConfig(evaluations=60))
    members: int = 3
    """Reward models of the ensemble; the first is the one that the other arms follow"""
    best_outputs: int = 1024
    """Outputs of each prompt that best-of-n is estimated from"""
    best_prompts: int = 64
    """Of the watched questions, those that best-of-n is estimated on"""
    kl: float = 0.5
    """Weight of the KL term of the arm "kl", in deviations of the reward over the reference's answers"""
    dpo_betas: tuple[float, ...] = (1.0, 0.3, 0.1)
    arms: tuple[str, ...] = ARMS


class SeedRun:
    """What one seed needs and gives, in a folder of its own; what is there is read back and not made again."""

    def __init__(self, cfg: StudyConfig, seed: int, folder: Path) -> None:
        self.cfg, self.seed, self.folder = cfg, seed, folder / f"seed-{seed}"
        self.found: dict[str, Any] = {"seed": seed, "best_of_n": {}, "reinforcement": {}, "dpo": []}

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """The value that `make` gives, kept as JSON."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_json(path, make())
        found: T = json.loads(path.read_text(encoding="utf-8"))
        return found

    @cached_property
    def start(self) -> Transformer:
        """The reference policy."""
        place = self.folder / "reference"
        if has_checkpoint(place):
            model = Transformer(shape(self.cfg.setting))
            model.load_state_dict(load_checkpoint(place).model)
            return model.requires_grad_(False).eval()
        say(f"seed {self.seed}: reference policy")
        model = reference(self.cfg.setting, self.seed)
        save_checkpoint(place, model.state_dict(), {}, {"seed": self.seed})
        return model

    @cached_property
    def annotated(self) -> tuple[list[Pair], list[Pair], Answers]:
        return annotated(self.start, self.cfg.setting, self.seed)

    @cached_property
    def models(self) -> list[RewardModel]:
        """The reward models."""
        return [self.model(member) for member in range(self.cfg.members)]

    def model(self, member: int) -> RewardModel:
        place = self.folder / f"reward-{member}"
        if not has_checkpoint(place):
            pairs, _, source = self.annotated
            model = reward_model(self.start, pairs, source, self.cfg, 10 * self.seed + member)
            model.save(place, {"seed": self.seed, "member": member})
        return RewardModel.load(place, TOKENIZER).requires_grad_(False)

    @cached_property
    def proxy(self) -> Reward:
        return Learned(self.model(0))

    def followed(self, arm: str) -> Reward:
        """The reward that an arm follows."""
        source = self.annotated[2]
        if arm == "no_length":
            return WithoutLength.of(self.proxy, source.prompts, source.rows, source.n)
        return Ensemble(self.models) if arm == "ensemble" else self.proxy

    def prepare(self) -> None:
        """The reference, its pairs and the first reward model, and how good both are."""

        def about() -> dict[str, Any]:
            pairs, judged_by, source = self.annotated
            return {
                "reference": {"true": float(source.true_PN.mean()), "complete": float(source.seen_PN.mean())},
                "pairs": len(pairs),
                "reward_models": [asdict(calibration(log_odds(self.model(0), judged_by)))],
                "liking_of_length": WithoutLength.of(self.proxy, source.prompts, source.rows, source.n).slope,
            }

        self.found |= self.kept("about", about)
        score = self.found["reward_models"][0]
        say(f"seed {self.seed}: {self.found['pairs']} pairs, reward model's accuracy {score['accuracy']:.3f}")

    @cached_property
    def sample(self) -> Answers:
        """What best-of-n chooses from."""
        cfg = self.cfg
        instances = watched_questions(cfg.setting, cfg.training)[: cfg.best_prompts]
        return answers(self.start, instances, cfg.best_outputs, 7 + self.seed, cfg.setting)

    def best_of_n(self) -> None:
        """Best-of-n by the reward of each arm; a KL term is none of it."""
        for name in self.cfg.arms:
            if name != "kl":

                def make(arm: str = name) -> list[dict[str, float]]:
                    return best_of(self.sample, self.followed(arm), self.proxy)

                self.found["best_of_n"][name] = self.kept(f"best-of-n-{name}", make)

    def arm(self, name: str) -> None:
        """Reinforcement by an arm's reward."""
        cfg = self.cfg
        training = replace(cfg.training, kl=cfg.kl if name == "kl" else 0.0)
        place = self.folder / f"reinforcement-{name}.json"
        if not place.exists():
            shutil.rmtree(self.folder / name, ignore_errors=True)  # of a run that was interrupted
            found = follow(name, self.start, self.followed(name), self.proxy, cfg, training, self.seed, self.folder / name)
            write_json(place, found)
        self.found["reinforcement"][name] = read_json(place)

    def controls(self) -> None:
        """DPO on the same pairs."""
        for beta in self.cfg.dpo_betas:
            make = partial(control, self.start, self.annotated[0], beta, self.proxy, self.cfg, self.seed)
            self.found["dpo"].append(self.kept(f"dpo-{beta:g}", make))


def reward_model(start: Transformer, pairs: Sequence[Pair], source: Answers, cfg: StudyConfig, seed: int) -> RewardModel:
    """A reward model from a copy of the reference; members of an ensemble differ in the order of pairs and the head."""
    model = RewardModel.of(start, TOKENIZER).requires_grad_(True)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.reward.weight, std=0.02)
    fit_reward(model, pairs, replace(cfg.fit, seed=seed))
    model.calibrate(source.whole)
    return model.requires_grad_(False)


def best_of(sample: Answers, followed: Reward, proxy: Reward) -> list[dict[str, float]]:
    """Best-of-n by one reward, a row for each n; all sizes from the same outputs."""
    by = followed.rewards(sample.prompts, sample.rows).reshape(-1, sample.n)
    reported = by if followed is proxy else proxy.rewards(sample.prompts, sample.rows).reshape(-1, sample.n)
    sizes = [n for n in SIZES if n <= sample.n // 2]
    columns = {"true": sample.true_PN, "proxy": reported, "length": sample.length_PN}
    means = {name: best_of_n(by, values, sizes) for name, values in columns.items()}
    error = means["true"].std(axis=0, ddof=1) / len(means["true"]) ** 0.5
    return [
        {"n": n, "d": best_of_n_kl(n) ** 0.5, **{key: float(value[:, i].mean()) for key, value in means.items()}}
        | {"true_error": float(error[i])}
        for i, n in enumerate(sizes)
    ]


def follow(
    name: str,
    start: Transformer,
    followed: Reward,
    proxy: Reward,
    cfg: StudyConfig,
    training: TrainingConfig,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Reinforcement by one reward, watched; scalars go to TensorBoard as they come."""
    watch, points = Watch(cfg.watch), []
    with Tracker(folder, layout=LAYOUT) as tracker:
        for point, _ in reinforce(start, followed, proxy, cfg.setting, training, seed):
            raised = watch.add(point.step, point.proxy_P, point.true_P)
            points.append(row(point))
            tracker.log(point.step, scalars(point, watch))
            if raised is not None:
                tracker.text("reward/flag", raised.text())
                say(f"seed {seed}, {name}: {raised.text()}")
    say(f"seed {seed}, {name}: true {points[0]['true']:.3f} -> {points[-1]['true']:.3f} at d = {points[-1]['d']:.2f}")
    return {"points": points, "flag": None if watch.flag is None else vars(watch.flag)}


LAYOUT = {
    "over-optimisation": {
        "true reward": ["Multiline", ["reward/true"]],
        "proxy": ["Multiline", ["reward/proxy"]],
        "distance, sqrt(KL)": ["Multiline", ["reward/distance"]],
        "flag: 1 from the evaluation on at which it went up": ["Multiline", ["reward/flagged"]],
    }
}


def scalars(point: Point, watch: Watch) -> dict[str, float]:
    """What TensorBoard is shown of an evaluation."""
    return {
        "reward/true": point.true,
        "reward/proxy": point.proxy,
        "reward/distance": point.distance,
        "reward/length": point.length,
        "reward/flagged": float(watch.flag is not None),
    }


def row(point: Point) -> dict[str, float]:
    error = float(point.true_P.std(ddof=1) / np.sqrt(len(point.true_P)))
    found = {"step": point.step, "d": point.distance, "proxy": point.proxy, "true": point.true, "true_error": error}
    return found | {"length": point.length}


def control(
    start: Transformer, pairs: Sequence[Pair], beta: float, proxy: Reward, cfg: StudyConfig, seed: int
) -> dict[str, float]:
    """DPO on the same pairs: one pass."""
    policy = trainable(start)
    fit_dpo(policy, start, pairs, FitConfig(epochs=1, batch_pairs=32, lr=1e-4, weight_decay=0.0, seed=seed), beta)
    instances = watched_questions(cfg.setting, cfg.training)
    found = row(evaluate(policy.eval(), start, proxy, instances, cfg.setting, cfg.training))
    say(f"seed {seed}, DPO at beta {beta}: true {found['true']:.3f} at d = {found['d']:.2f}")
    return found | {"beta": beta}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
