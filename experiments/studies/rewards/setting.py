"""The setting of the study on over-optimisation: a task, sloppy demonstrators, annotators who like long answers.

The task is `brackets`: close what is open, with at most twice as many brackets as are needed. A demonstrator often stops
early, and sometimes puts in pairs that nobody asked for. An annotator sees whether an answer closes everything, does not
count whether it is too long, and likes long answers. So a longer answer is first likelier to be complete, and then too
long: the flaw pays at first.

Shape letters: P prompts, N outputs of each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from sparse_update.data.tokens import ByteTokenizer
from sparse_update.generation import GenerateConfig, Sampler, stop_tokens
from sparse_update.objectives.preference.dpo import answer_logp
from sparse_update.objectives.preference.pairs import Annotator, Pair, sampled_pairs
from sparse_update.tasks import END, Draw, Instance, TaskStream, encoded, make_task
from sparse_update.tasks.texts import PAIRS, balanced
from sparse_update.transformer import ModelConfig, Transformer

TOKENIZER = ByteTokenizer()
STOP = stop_tokens(TOKENIZER)
TASK = make_task("brackets")


@dataclass(frozen=True)
class Setting:
    """Everything that a seed's reference, pairs and questions follow from."""

    levels: tuple[int, ...] = (3, 4, 5, 6)
    width: int = 64
    layers: int = 2
    context: int = 64
    new_tokens: int = 26
    early: float = 0.5
    """Share of demonstrations that stop early"""
    padded: float = 0.06
    """Chance, at each place of a demonstration, of one more pair that nobody asked for"""
    tuning_steps: int = 350
    tuning_rows: int = 64
    tuning_lr: float = 3e-3
    annotator: Annotator = field(default_factory=lambda: Annotator(quality_weight=4.0, length_weight=0.1))
    pair_prompts: int = 1500
    pair_outputs: int = 8


def demonstration(instance: Instance, draw: Draw, cfg: Setting) -> str:
    """An answer as a sloppy demonstrator writes it."""
    brackets, text = instance.answer, ""
    if draw.between(0, 999) < 1000 * cfg.early:
        brackets = brackets[: draw.between(1, len(brackets) - 1)]
    for bracket in brackets:
        while draw.between(0, 999) < 1000 * cfg.padded:
            opened = draw.choice("([{")
            text += opened + PAIRS[opened]
        text += bracket
    return text


def complete(instance: Instance, text: str) -> float:
    """What annotators see: 1 where everything is closed, however long the answer is."""
    text = "".join(text.split())
    return float(bool(text) and balanced(instance.facts["beginning"] + text))


def shape(cfg: Setting) -> ModelConfig:
    """The policy's."""
    return ModelConfig(
        width=cfg.width, layers=cfg.layers, context=cfg.context, vocab_size=TOKENIZER.vocab_size, attention="explicit"
    )


def reference(cfg: Setting, seed: int) -> Transformer:
    """A model tuned on demonstrations, by likelihood; its weights take no gradient."""
    torch.manual_seed(seed)
    model = Transformer(shape(cfg))
    stream, draw = questions(cfg, "train", seed), Draw("demonstrations", seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.tuning_lr, betas=(0.9, 0.98))
    for step in range(cfg.tuning_steps):
        instances = stream.take(cfg.tuning_rows)
        answers = [answer_row(demonstration(instance, draw, cfg)) for instance in instances]
        logp = answer_logp(model, prompt_rows(instances), answers)
        loss = -logp.sum() / sum(map(len, answers))
        for group in optimizer.param_groups:
            group["lr"] = cfg.tuning_lr * min(1, (step + 1) / 30) * half_cosine(step / cfg.tuning_steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.requires_grad_(False).eval()


def half_cosine(progress: float) -> float:
    """From 1 down to 0.05."""
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def trainable(model: Transformer) -> Transformer:
    """A copy that learns."""
    return copy.deepcopy(model).requires_grad_(True)


def questions(cfg: Setting, split: str, seed: int) -> TaskStream:
    """The stream of questions of a split."""
    return TaskStream([(TASK, cfg.levels)], split, seed)


def prompt_rows(instances: Sequence[Instance]) -> list[np.ndarray]:
    """What the model reads, as tokens, int64."""
    return [row.prompt for row in encoded(TOKENIZER, instances, "short")]


def answer_row(text: str) -> np.ndarray:
    """An answer with its closing token, int64."""
    return TOKENIZER.encode([(text + END).encode()])[0].astype(np.int64)


def text_of(row: np.ndarray) -> str:
    """An answer's text, without what closes it."""
    return TOKENIZER.decode(row).decode(errors="replace").partition(END)[0]


@dataclass(frozen=True, eq=False)
class Answers:
    """Outputs of a model to questions; row r answers question r // n."""

    instances: list[Instance]
    prompts: list[np.ndarray]
    rows: list[np.ndarray]
    logp_R: np.ndarray
    """float64 nats, of whole answers"""
    n: int

    def first(self, n: int) -> Answers:
        """The first n of each question."""
        rows = [row for row in range(len(self.rows)) if row % self.n < n]
        return Answers(self.instances, [self.prompts[i] for i in rows], [self.rows[i] for i in rows], self.logp_R[rows], n)

    def of(self, instance_of_row: int) -> Instance:
        return self.instances[instance_of_row // self.n]

    @property
    def true_PN(self) -> np.ndarray:
        """The verifier's score of each."""
        scores = [TASK.score(self.of(i), text_of(row)) for i, row in enumerate(self.rows)]
        return np.array(scores).reshape(-1, self.n)

    @property
    def seen_PN(self) -> np.ndarray:
        """What annotators see of each."""
        return np.array([complete(self.of(i), text_of(row)) for i, row in enumerate(self.rows)]).reshape(-1, self.n)

    @property
    def length_PN(self) -> np.ndarray:
        """Tokens of each."""
        return np.array([len(row) for row in self.rows]).reshape(-1, self.n)

    @property
    def whole(self) -> list[np.ndarray]:
        """Prompts with answers."""
        return [np.concatenate(parts) for parts in zip(self.prompts, self.rows, strict=True)]


def answers(model: Transformer, instances: Sequence[Instance], n: int, seed: int, cfg: Setting) -> Answers:
    """Sample `n` outputs of each question."""
    prompts = prompt_rows(instances)
    sampler = Sampler(model, GenerateConfig(new_tokens=cfg.new_tokens, n=n, seed=seed), STOP)
    outputs = sampler.sample(prompts, [instance.id for instance in instances])
    rows = list(outputs)
    logp = (outputs.logp_RN.astype(np.float64) * outputs.mask_RN).sum(1)
    return Answers(list(instances), [prompts[i // n] for i in range(len(rows))], rows, logp, n)


def annotated(model: Transformer, cfg: Setting, seed: int) -> tuple[list[Pair], list[Pair], Answers]:
    """Pairs to learn from, pairs of other questions to judge by, and the answers that the first were made of."""
    stream = questions(cfg, "train", 100 + seed)
    found = answers(model, stream.take(cfg.pair_prompts), cfg.pair_outputs, 5 + seed, cfg)
    others = questions(cfg, "development", 100 + seed).take(cfg.pair_prompts // 5)
    held_out = answers(model, others, cfg.pair_outputs, 6, cfg)
    return _pairs(found, cfg, seed), _pairs(held_out, cfg, seed), found


def _pairs(found: Answers, cfg: Setting, seed: int) -> list[Pair]:
    each = range(0, len(found.rows), found.n)
    by_prompt = [found.rows[i : i + found.n] for i in each]
    prompts = [found.prompts[i] for i in each]
    return sampled_pairs(prompts, by_prompt, found.seen_PN.tolist(), cfg.annotator, seed)
