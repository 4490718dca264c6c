"""How a model is judged on samples: share of right classes or error of values, with intervals, paired with another model.

Shape letters: N samples, T steps, C classes; the dots stand for the shape of one answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experiments.comparison.proportions import Estimate, bootstrap, paired_shares, wilson
from experiments.samples.records import CLASSES, Samples
from hardware.text import quoted, short
from neuro.analysis.tracing import evaluating

MOST_CLASSES = 100  # of a confusion matrix that is written down
Advance = Callable[[int], object]


class JudgeError(ValueError):
    """A module whose answers cannot be held against those of the data; the message says what both are."""


@dataclass(frozen=True)
class Readout:
    """How answers at every step become one: `how` of mean, sum, last, max ("" for none), over `axis`, 0 or 1."""

    how: str = ""
    axis: int = 1

    def __call__(self, out: Tensor) -> Tensor:
        """(N, T, ...) or (T, N, ...) -> (N, ...)."""
        if self.how == "mean":
            return out.mean(dim=self.axis)
        if self.how == "sum":
            return out.sum(dim=self.axis)
        if self.how == "last":
            return out.select(self.axis, -1)
        return out.amax(dim=self.axis)


@dataclass(frozen=True, eq=False)
class Judged:
    """One model on the held-out samples.

    `answers`: float64 (N, C), (N, T, C), or as the data's values. `predicted`: int64 like y, None for values.
    `scores`: float64 (N,): the share of right classes of each sample, or its mean squared error.
    """

    answers: NDArray[np.float64]
    predicted: NDArray[np.int64] | None
    scores: NDArray[np.float64]
    spread: float
    seconds: float

    @property
    def result(self) -> Estimate:
        """Accuracy, or NRMSE (root of the mean squared error over the standard deviation of all held-out values)."""
        if self.predicted is None:
            return bootstrap(len(self.scores), lambda rows: np.sqrt(self.scores[rows].mean(axis=1)) / self.spread)
        if self.predicted.ndim == 1:
            return wilson(round(float(self.scores.sum())), len(self.scores))
        return bootstrap(len(self.scores), lambda rows: self.scores[rows].mean(axis=1))

    def less(self, other: Judged) -> Estimate:
        """The result less another model's on the same samples, with a paired interval."""
        if self.predicted is not None and self.predicted.ndim == 1:
            return paired_shares(self.scores > 0.5, other.scores > 0.5)

        def difference(rows: NDArray[np.int64]) -> NDArray[np.float64]:
            one, two = self.scores[rows].mean(axis=1), other.scores[rows].mean(axis=1)
            return (np.sqrt(one) - np.sqrt(two)) / self.spread if self.predicted is None else one - two

        return bootstrap(len(self.scores), difference)

    def agreement(self, other: Judged) -> float | None:
        """Share of answers of the same class as another model's; None for values."""
        if self.predicted is None or other.predicted is None:
            return None
        return float((self.predicted == other.predicted).mean())


def judge(model: nn.Module, samples: Samples, readout: Readout, batch: int, advance: Advance | None = None) -> Judged:
    """Run a model over the held-out samples.

    Raises JudgeError where the model does not run on them, or its answers have a shape that does not fit the data's.
    """
    start = time.perf_counter()
    parts = []
    with evaluating(model):
        for rows in np.array_split(np.arange(len(samples.x)), -(-len(samples.x) // batch)):
            parts.append(answers(model, torch.from_numpy(samples.x[rows]), samples, readout, rows))
            if advance is not None:
                advance(len(rows))
    found = np.concatenate(parts)
    seconds = time.perf_counter() - start
    if samples.task == CLASSES:
        predicted = found.argmax(axis=-1)
        right = (predicted == samples.y).astype(np.float64)
        return Judged(found, predicted, right.reshape(len(right), -1).mean(axis=1), 1.0, seconds)
    spread = float(samples.y.astype(np.float64).std())
    if spread == 0:
        raise JudgeError(
            "y holds one value only, so an error relative to its spread is not defined; give other held-out samples"
        )
    error = ((found - samples.y.astype(np.float64)) ** 2).reshape(len(found), -1).mean(axis=1)
    return Judged(found, None, error, spread, seconds)


def answers(
    model: nn.Module, x: Tensor, samples: Samples, readout: Readout, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """What the model answers to some of the samples, as the data's answers are shaped, classes last."""
    try:
        with torch.no_grad():
            out = first_tensor(model(x))
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        what = f"{type(error).__name__}: {short(str(error), 300)}"
        hint = (
            "; whole numbers in x are token numbers unless scale= makes floats of them" if not x.is_floating_point() else ""
        )
        raise JudgeError(f"the module does not run on samples {x.dtype} {tuple(x.shape)}: {what}{hint}") from error
    wanted = samples.y[rows].shape
    classes = samples.task == CLASSES
    dims = len(wanted) + classes
    if not classes and out.dim() == dims + 1 and out.shape[-1] == 1:
        out = out[..., 0]  # one value, for data that leaves its axis out
    if out.dim() == dims + 1 and readout.how:
        out = readout(out)
    elif out.dim() == dims + 1:
        raise JudgeError(
            f"the module returns {tuple(out.shape)} where y is {wanted}: an answer at every step and one for each sample; "
            "readout=mean, sum, last or max makes one of them, over step_axis"
        )
    fits = tuple(out.shape[: len(wanted)]) == wanted and out.dim() == dims
    if not fits:
        need = f"({', '.join(map(str, wanted))}, classes)" if classes else f"{wanted}"
        raise JudgeError(f"the module returns {tuple(out.shape)} where y is {wanted}; {need} is needed")
    if classes and int(samples.y.max()) >= out.shape[-1]:
        raise JudgeError(f"y holds the class {int(samples.y.max())}, and the module answers for {out.shape[-1]} classes")
    if not bool(torch.isfinite(out).all()):
        raise JudgeError("the module returns NaN or infinite values; look for a diverged training")
    return out.detach().cpu().double().numpy()


def first_tensor(out: Any) -> Tensor:
    """The answer in what a module returns: a tensor, `.logits`, or the first tensor of a tuple."""
    if isinstance(out, Tensor):
        return out
    logits = getattr(out, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(out, tuple | list) and out and isinstance(out[0], Tensor):
        return out[0]
    raise JudgeError(
        f"the module returns {type(out).__name__} ({quoted(out)}); a tensor, something with .logits, or a tuple that "
        "begins with a tensor is needed"
    )


def confusion(samples: Samples, judged: Judged) -> list[list[int]] | None:
    """Held-out classes against those answered: row of the true class, column of the answer; None for values and for more
    than 100 classes.
    """
    if judged.predicted is None or judged.answers.shape[-1] > MOST_CLASSES:
        return None
    n = judged.answers.shape[-1]
    flat = samples.y.reshape(-1) * n + judged.predicted.reshape(-1)
    return np.bincount(flat.astype(np.int64), minlength=n * n).reshape(n, n).tolist()
