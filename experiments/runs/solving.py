"""A run on tasks, deployed: which questions its float model, its quantised twin and the simulated chip solve, and joules of
a solved one.

Answers are the likeliest tokens, judged by the task's verifier. What the chip is charged for is what answering takes: the
tokens of question and answer, each read once, but the last one, which nobody reads.

Shape letters: N rows, T tokens, Q questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.comparison.proportions import paired_shares, wilson
from hardware.energy.account import EnergyReport
from neuro.analysis.tracing import evaluating
from sparse_update.data.tokens import Tokenizer, tokenizer_from_record
from sparse_update.loop.checkpoint import open_checkpoint
from sparse_update.loop.saving.places import whole_place
from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.examples.rows import prompt_tokens
from sparse_update.objectives.examples.settings import TaskConfig
from sparse_update.tasks.base import Instance

AT_ONCE = 64
"""Questions that are answered together."""


@dataclass(frozen=True, eq=False)
class Questions:
    """What a run on tasks was trained on and is judged by."""

    examples: Examples

    @property
    def asked(self) -> list[Instance]:
        """Every question that it is judged by, family after family."""
        return [instance for found in self.examples.judged.values() for instance in found]

    def training(self, tokens: int) -> Tensor:
        """Training rows, int64 (N, T): a question with its answer each, all of the most frequent length, nothing empty."""
        rows = self.examples.examples().rows(torch.arange(max(64, tokens // 4)))
        whole = _of_one_length(rows.tokens_NT1, rows.lengths_N)
        return whole[: max(1, tokens // whole.shape[1])]

    def held_out(self, tokens: int) -> Tensor:
        """Held-out rows, int64 (N, T + 1), of the most frequent length too."""
        rows = self.examples.held_out["val"]
        whole = _of_one_length(rows.tokens_NT1, rows.lengths_N)
        return whole[: max(1, tokens // (whole.shape[1] - 1))]


def _of_one_length(tokens_NT1: Tensor, lengths_N: Tensor) -> Tensor:
    length = Counter(lengths_N.tolist()).most_common(1)[0][0]
    return tokens_NT1[lengths_N == length][:, :length]


def questions_of(run: Path, context: int, judged: int) -> Questions | None:
    """The questions of a run on tasks, `judged` of each family; None for a run on text."""
    meta = open_checkpoint(whole_place(run / "checkpoint")).meta
    settings = (meta.get("config") or {}).get("task") or {}
    if not settings.get("tasks"):
        return None
    tokenizer: Tokenizer = tokenizer_from_record(meta["tokenizer"])
    cfg = TaskConfig(**{**settings, "judged": judged, "packed": False})
    return Questions(Examples(cfg, tokenizer, context, int(meta["config"].get("seed", 0))))


@dataclass(frozen=True, eq=False)
class Answers:
    """Of every question."""

    tokens: list[np.ndarray]
    """of question and answer, what closes it included"""
    score_Q: np.ndarray

    @property
    def solved_Q(self) -> np.ndarray:
        """bool: scored 1"""
        return self.score_Q >= 1


def answers(model: nn.Module, questions: Questions, advance: Callable[[int], object] = lambda count: None) -> Answers:
    """The likeliest answers of any module, tokens int64 (B, T) -> logits (B, T, V), which reads the whole text for each new
    token; `advance` is told how many questions were answered."""
    examples, asked = questions.examples, questions.asked
    prompts = [prompt_tokens(examples.tokenizer, instance, examples.cfg.form) for instance in asked]
    room = min(examples.cfg.new_tokens, examples.context - max(map(len, prompts)))
    texts: list[np.ndarray] = []
    with evaluating(model):
        for start in range(0, len(prompts), AT_ONCE):
            texts += _likeliest(model, prompts[start : start + AT_ONCE], room, examples.stop)
            advance(len(prompts[start : start + AT_ONCE]))
    scores = []
    for instance, prompt, text in zip(asked, prompts, texts, strict=True):
        ended = text[-1] in examples.stop
        scores.append(examples.score(instance, examples.text(text[len(prompt) :])) if ended else 0.0)
    return Answers(texts, np.array(scores))


def _likeliest(model: nn.Module, prompts: Sequence[np.ndarray], room: int, stop: Sequence[int]) -> list[np.ndarray]:
    texts, going = [list(prompt) for prompt in prompts], list(range(len(prompts)))
    for _ in range(room):
        longest = max(len(texts[row]) for row in going)
        tokens_BT = torch.zeros(len(going), longest, dtype=torch.int64)
        for place, row in enumerate(going):
            tokens_BT[place, : len(texts[row])] = torch.tensor(texts[row])
        last_B = torch.tensor([len(texts[row]) - 1 for row in going])
        new_B = model(tokens_BT)[torch.arange(len(going)), last_B].argmax(-1).tolist()
        for row, token in zip(going, new_B, strict=True):
            texts[row].append(token)
        going = [row for row, token in zip(going, new_B, strict=True) if token not in stop]
        if not going:
            break
    return [np.array(text, dtype=np.int64) for text in texts]


def read_once(model: nn.Module, found: Answers) -> int:
    """Let the model read what answering takes, texts of one length together and nothing empty; returns the tokens."""
    by_length: dict[int, list[np.ndarray]] = {}
    for text in found.tokens:
        by_length.setdefault(len(text) - 1, []).append(text[:-1])
    with evaluating(model):
        for texts in by_length.values():
            for start in range(0, len(texts), AT_ONCE):
                model(torch.from_numpy(np.stack(texts[start : start + AT_ONCE])))
    return sum(length * len(texts) for length, texts in by_length.items())


def record(
    questions: Questions, found: Mapping[str, Answers], energy: Sequence[EnergyReport], tokens: int
) -> dict[str, Any]:
    """JSON form.

    Args:
        found: "float", "quantised" and "simulated".
        energy: of reading `tokens` tokens on the chip, for each profile.
    """
    families = np.array([instance.task for instance in questions.asked])
    solved = int(found["simulated"].solved_Q.sum())

    def of(where: np.ndarray) -> dict[str, Any]:
        cells: dict[str, Any] = {"questions": int(where.sum())}
        for name, each in found.items():
            share = wilson(int(each.solved_Q[where].sum()), int(where.sum()))
            cells[name] = {"accuracy": share.value, "low": share.low, "high": share.high}
        for name in ("quantised", "simulated"):
            less = paired_shares(found[name].solved_Q[where], found["float"].solved_Q[where])
            cells[f"{name}_less_float"] = {"mean": less.value, "low": less.low, "high": less.high}
        return cells

    return {
        **of(np.ones(len(families), dtype=bool)),
        "families": {str(name): of(families == name) for name in dict.fromkeys(families)},
        "tokens_per_question": tokens / len(families),
        "solved": solved,
        "energy": [joules(report, len(families), solved) for report in energy],
    }


def joules(report: EnergyReport, questions: int, solved: int) -> dict[str, Any]:
    """Of a question, and of a solved one: all joules over those that were solved; None where none was."""
    whole = report.to_dict()
    ends = ("low_j", "mid_j", "high_j")
    each = {f"{end}_per_question": whole[end] / questions for end in ends}
    right = {f"{end}_per_solved": whole[end] / solved if solved else None for end in ends}
    return {"profile": whole["profile"], "kind": whole["kind"], "source": whole["source"], **each, **right}


def markdown(found: Mapping[str, Any]) -> str:
    """Accuracies of each family, then joules."""
    lines = ["| questions | float | quantised | simulated | less float, paired |", "|---|---|---|---|---|"]
    for name, cells in {**found["families"], "all": found}.items():
        shares = " | ".join(
            f"{cells[model]['accuracy']:.3f} [{cells[model]['low']:.3f}, {cells[model]['high']:.3f}]"
            for model in ("float", "quantised", "simulated")
        )
        less = cells["simulated_less_float"]
        lines.append(f"| {name} ({cells['questions']}) | {shares} | {_signed(less)} |")
    lines += ["", "| profile | low uJ per solved question | mid | high | source |", "|---|---|---|---|---|"]
    for one in found["energy"]:
        values = [one[f"{end}_j_per_solved"] for end in ("low", "mid", "high")]
        cells_j = " | ".join("none solved" if value is None else f"{1e6 * value:,.3f}" for value in values)
        lines.append(f"| {one['profile']} | {cells_j} | {one['source']} |")
    return "\n".join(lines)


def _signed(cells: Mapping[str, Any]) -> str:
    if cells["low"] is None:
        return f"{cells['mean']:+.3f}"
    return f"{cells['mean']:+.3f} [{cells['low']:+.3f}, {cells['high']:+.3f}]"
