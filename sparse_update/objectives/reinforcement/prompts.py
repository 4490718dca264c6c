"""Which prompts are sampled from, decided before anything is generated.

A gate is shown candidates and says which of them to take. It learns from the groups that were sampled. Controls are gates
too: every prompt, a random share, and GRESO.

Shape letters: C candidates, P prompts that are taken.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_update.objectives.reinforcement.rates import REMEMBERED, PassRates, Predicted
from sparse_update.objectives.reinforcement.settings import PromptGateConfig, ReinforcementError


@dataclass(frozen=True, eq=False)
class Candidates:
    """Prompts that could be sampled from."""

    ids: Sequence[int]
    cells: Sequence[str]
    """where each belongs, for predictions: task and level"""
    surprise_C: np.ndarray | None = None
    """nats, of a reference answer of each; where the gate looks at it"""

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, index: np.ndarray) -> Candidates:
        """Some of them."""
        surprise = None if self.surprise_C is None else self.surprise_C[index]
        return Candidates([self.ids[i] for i in index], [self.cells[i] for i in index], surprise)


class PromptGate(ABC):
    """Chooses prompts. A subclass gives `choose`; one that learns, `observe` and its state."""

    looks = False
    """Whether it needs `Candidates.surprise_C`, which costs a forward of each candidate."""

    def __init__(self, cfg: PromptGateConfig) -> None:
        self.cfg = cfg

    def candidates(self, prompts: int) -> int:
        """How many candidates to show it for so many prompts."""
        return math.ceil(prompts / self.cfg.keep_fraction)

    @abstractmethod
    def choose(self, shown: Candidates, prompts: int, n: int, generator: np.random.Generator) -> np.ndarray:
        """Ascending places of `prompts` candidates, int64 (P,); fewer where there are no more.

        `n` is the number of outputs that each of them will have in the mean.
        """

    def predict(self, shown: Candidates) -> Predicted | None:
        """A belief on the candidates' pass rates, where the gate has one."""
        return None

    def observe(self, taken: Candidates, right_P: np.ndarray, outputs_P: np.ndarray) -> None:
        """Learn from groups: sums of rewards in [0, 1], and numbers of outputs."""
        return

    def notes(self) -> Mapping[str, float]:
        """Its own numbers, for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Plain values; generators are their owner's."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        return


class EveryPrompt(PromptGate):
    """Every prompt as it comes."""

    def candidates(self, prompts: int) -> int:
        return prompts

    def choose(self, shown: Candidates, prompts: int, n: int, generator: np.random.Generator) -> np.ndarray:
        return np.arange(min(prompts, len(shown)))


class RandomPrompts(PromptGate):
    """A random share of what it is shown."""

    def choose(self, shown: Candidates, prompts: int, n: int, generator: np.random.Generator) -> np.ndarray:
        return np.sort(generator.permutation(len(shown))[:prompts])


class PredictedPrompts(PromptGate):
    """Those whose groups are likeliest to hold both right and wrong outputs, by `PassRates`.

    Of the prompts taken a share of `explore` is drawn evenly from all candidates, so that a cell that was written off is
    looked at again; the rest have the highest predicted probability of a signal, in which a wide belief counts as one that
    may give a signal. Equal predictions are ordered by chance.
    """

    def __init__(self, cfg: PromptGateConfig) -> None:
        super().__init__(cfg)
        self.rates = PassRates(cfg.half_life)

    def predict(self, shown: Candidates) -> Predicted:
        return self.rates.predict(shown.cells, shown.ids, shown.surprise_C if self.looks else None)

    def choose(self, shown: Candidates, prompts: int, n: int, generator: np.random.Generator) -> np.ndarray:
        prompts = min(prompts, len(shown))
        score_C = self.predict(shown).signal(n)
        ties_C = generator.random(len(shown))
        order = np.lexsort((ties_C, -np.round(score_C, 9)))
        explored = int(generator.binomial(prompts, self.cfg.explore))
        best = order[: prompts - explored]
        rest = order[prompts - explored :]
        return np.sort(np.concatenate((best, generator.permutation(rest)[:explored])))

    def observe(self, taken: Candidates, right_P: np.ndarray, outputs_P: np.ndarray) -> None:
        surprise = taken.surprise_C if self.looks else None
        self.rates.observe(taken.cells, taken.ids, right_P, outputs_P, surprise)

    def state_dict(self) -> dict[str, Any]:
        return {"rates": self.rates.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rates.load_state_dict(state["rates"])


class SurprisingPrompts(PredictedPrompts):
    """The same, where the prediction sees how surprising a reference answer is to the model."""

    looks = True


class Greso(PromptGate):
    """GRESO (Zheng et al. 2025, arXiv 2506.02177): skip a prompt by chance, the likelier the oftener in a row it gave no
    signal.

    A prompt whose last z groups were all without a signal is skipped with probability 1 - p^z. There is one p for prompts
    that were last all right and one for all wrong; each begins at `greso_start` and after a step moves by `greso_step`,
    down where the share of such groups among all sampled so far is at its target or above, else up, within [0.05, 0.95]
    (the bounds and the running share are those of the authors' code).
    """

    LOWEST, HIGHEST = 0.05, 0.95

    def __init__(self, cfg: PromptGateConfig) -> None:
        super().__init__(cfg)
        self.explore = {"easy": cfg.greso_start, "hard": cfg.greso_start}
        self.seen = {"easy": 0, "hard": 0, "all": 0}
        self.runs: dict[int, tuple[str, int]] = {}
        """prompt -> kind of its last group without a signal, how many of any kind came in a row"""

    def choose(self, shown: Candidates, prompts: int, n: int, generator: np.random.Generator) -> np.ndarray:
        uniform_C = generator.random(len(shown))
        keep_C = np.ones(len(shown))
        for place, number in enumerate(shown.ids):
            if number in self.runs:
                kind, count = self.runs[number]
                keep_C[place] = self.explore[kind] ** count
        return np.flatnonzero(uniform_C < keep_C)[:prompts]

    def observe(self, taken: Candidates, right_P: np.ndarray, outputs_P: np.ndarray) -> None:
        for number, right, outputs in zip(taken.ids, right_P, outputs_P, strict=True):
            self.seen["all"] += 1
            kind = "hard" if right <= 0 else "easy" if right >= outputs else ""
            if not kind:
                self.runs.pop(number, None)
                continue
            self.seen[kind] += 1
            self.runs[number] = kind, self.runs.pop(number, ("", 0))[1] + 1
            if len(self.runs) > REMEMBERED:
                del self.runs[next(iter(self.runs))]
        for kind, target in (("easy", self.cfg.greso_target_easy), ("hard", self.cfg.greso_target_hard)):
            down = self.seen[kind] >= target * self.seen["all"]
            moved = self.explore[kind] + (-self.cfg.greso_step if down else self.cfg.greso_step)
            self.explore[kind] = min(self.HIGHEST, max(self.LOWEST, moved))

    def notes(self) -> Mapping[str, float]:
        return {f"explore_{kind}": value for kind, value in self.explore.items()}

    def state_dict(self) -> dict[str, Any]:
        runs = {str(number): [kind, count] for number, (kind, count) in self.runs.items()}
        return {"explore": dict(self.explore), "seen": dict(self.seen), "runs": runs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.explore = {kind: float(value) for kind, value in state["explore"].items()}
        self.seen = {kind: int(value) for kind, value in state["seen"].items()}
        self.runs = {int(number): (str(kind), int(count)) for number, (kind, count) in state["runs"].items()}


GATES: Mapping[str, type[PromptGate]] = {
    "none": EveryPrompt,
    "random": RandomPrompts,
    "predicted": PredictedPrompts,
    "surprise": SurprisingPrompts,
    "greso": Greso,
}


def make_prompt_gate(cfg: PromptGateConfig) -> PromptGate:
    """The gate of these settings. Raises ReinforcementError for an unknown kind."""
    if cfg.kind not in GATES:
        raise ReinforcementError(f"rl.prompts.kind = {cfg.kind!r}: one of {', '.join(GATES)}")
    return GATES[cfg.kind](cfg)
