"""What a tuned run answers: the likeliest output and many sampled ones for each question, with scores and lengths.

Shape letters: Q questions, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.runs.folder import RunError, read_json
from sparse_update.data.tokens import tokenizer_from_record
from sparse_update.generation import GenerateConfig, Sampler
from sparse_update.loop.checkpoint import load_checkpoint
from sparse_update.loop.stored_model import stored_model
from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.examples.rows import prompt_tokens
from sparse_update.objectives.examples.settings import TaskConfig
from sparse_update.tasks.base import Instance
from sparse_update.transformer import Transformer


@dataclass(frozen=True, eq=False)
class Tuned:
    """A finished run on tasks."""

    name: str
    """of its size"""
    seed: int
    model: Transformer
    task: TaskConfig
    tokenizer_record: dict[str, object]

    def examples(self, split: str, judged: int) -> Examples:
        """Its tasks, to be judged by so many questions of a split."""
        settings = {**vars(self.task), "split": split, "judged": judged}
        tokenizer = tokenizer_from_record(self.tokenizer_record)
        return Examples(TaskConfig(**settings), tokenizer, self.model.cfg.context, self.seed)


def tuned(folder: Path) -> Tuned:
    """The run in `folder`. Raises RunError for one that is no finished run on tasks."""
    record = read_json(folder / "run.json")
    if record.get("kind") != "train" or record.get("status") != "finished":
        raise RunError(f"{folder} is a {record.get('kind')} run, {record.get('status')}: a finished training run is needed")
    checkpoint = load_checkpoint(folder / "checkpoint")
    task = checkpoint.meta["config"].get("task") or {}
    if not task.get("tasks"):
        raise RunError(f"{folder} trained on no task: `spikegate train objective=instruct task=...` makes one that did")
    model = stored_model(checkpoint)
    return Tuned(model.cfg.name, record["seed"], model.eval(), TaskConfig(**task), checkpoint.meta["tokenizer"])


@dataclass(frozen=True, eq=False)
class Answered:
    """The outputs of one run for the questions of one family."""

    prompt_Q: np.ndarray
    """tokens of each question"""
    greedy_Q: np.ndarray
    """score of the likeliest output"""
    greedy_length_Q: np.ndarray
    greedy_text: list[str]
    surprise_Q: np.ndarray
    """nats: what the likeliest output surprises the model by, in all"""
    score_QN: np.ndarray
    length_QN: np.ndarray
    logp_QN: np.ndarray
    """nats: log-probability of each sampled output"""
    text_QN: list[list[str]]
    """answers; an output that the limit cut has one of its own, as nobody else gives it"""

    def __len__(self) -> int:
        return len(self.prompt_Q)


def answered(run: Tuned, examples: Examples, instances: Sequence[Instance], n: int, temperature: float) -> Answered:
    """Ask the run.

    Args:
        n: sampled outputs of each question.
        temperature: of the samples; the likeliest output is made beside them.
    """
    prompts = [prompt_tokens(examples.tokenizer, instance, run.task.form) for instance in instances]
    ids = [instance.id for instance in instances]
    room = min(run.task.new_tokens, run.model.cfg.context - max(map(len, prompts)))

    def ask(cfg: GenerateConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[list[str]]]:
        found = Sampler(run.model, cfg, examples.stop).sample(prompts, ids)
        texts, scores = [], []
        for row, (tokens, stopped) in enumerate(zip(found, found.stopped_R, strict=True)):
            text = examples.text(tokens).strip() if stopped else f"cut off, {row}"
            texts.append(text)
            scores.append(examples.score(instances[row // cfg.n], text) if stopped else 0.0)
        shape = (len(prompts), cfg.n)
        each = [texts[start : start + cfg.n] for start in range(0, len(texts), cfg.n)]
        return np.reshape(scores, shape), found.lengths_R.reshape(shape), found.logp_RN.sum(1).reshape(shape), each

    score, length, logp, text = ask(GenerateConfig(new_tokens=room, temperature=0.0))
    score_QN, length_QN, logp_QN, text_QN = ask(GenerateConfig(new_tokens=room, n=n, temperature=temperature))
    return Answered(
        np.array([len(prompt) for prompt in prompts]), score[:, 0], length[:, 0], [row[0] for row in text], -logp[:, 0],
        score_QN, length_QN, logp_QN, text_QN,
    )  # fmt: skip
