"""What a deployment is given: samples to calibrate on, held-out samples to judge by, and their answers, all checked.

Shape letters: N samples, T steps; the dots stand for the shape of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hardware.text import quoted

CLASSES, VALUES = "classes", "values"


class DataError(ValueError):
    """Samples that cannot be used; the message names the array, its value, the limit and what helps."""


class SettingError(DataError):
    """A setting that is missing, or that this data set does not take; no data were looked at."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs and answers of one task.

    Attributes:
        name: of the data, for tables.
        source: where they are from, in words.
        x_train: what ranges are set on, (N, ...), float32, or int64 for token numbers.
        y_train: answers to `x_train`; None where there are none.
        x: held-out samples (N, ...), of the same type.
        y: answers to `x`: int64 (N,) or (N, T) for classes, float32 (N, ...) for values.
        notes: what a reader of the numbers has to know.
    """

    name: str
    source: str
    x_train: NDArray[np.generic]
    y_train: NDArray[np.generic] | None
    x: NDArray[np.generic]
    y: NDArray[np.generic]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_inputs("x", self.x)
        check_inputs("x_train", self.x_train)
        if self.x.shape[1:] != self.x_train.shape[1:] or self.x.dtype != self.x_train.dtype:
            raise DataError(
                f"{self.name}: x_train holds samples {self.x_train.shape[1:]} of {self.x_train.dtype}, x samples "
                f"{self.x.shape[1:]} of {self.x.dtype}; ranges set on the one must fit the other, so give both alike"
            )
        check_answers("y", self.y, len(self.x))
        if self.y_train is not None:
            check_answers("y_train", self.y_train, len(self.x_train))

    @property
    def task(self) -> str:
        """`classes` where the answers are whole numbers, `values` where they are floats."""
        return CLASSES if self.y.dtype == np.int64 else VALUES

    def held_out(self, most: int) -> Samples:
        """The same with at most so many held-out samples, spread evenly over all of them; 0 keeps all."""
        if not most or most >= len(self.x):
            return self
        chosen = _evenly(most, len(self.x))
        return replace(self, x=self.x[chosen], y=self.y[chosen])

    def trained_on(self, most: int) -> Samples:
        """The same with at most so many training samples, spread evenly; 0 keeps all."""
        if not most or most >= len(self.x_train):
            return self
        chosen = _evenly(most, len(self.x_train))
        return replace(self, x_train=self.x_train[chosen], y_train=None if self.y_train is None else self.y_train[chosen])


def _evenly(most: int, of: int) -> NDArray[np.int64]:
    return (2 * np.arange(most) + 1) * of // (2 * most)


def check_inputs(name: str, value: NDArray[np.generic]) -> None:
    """Raise DataError for an array that is no batch of finite float32 or int64 samples."""
    if value.dtype not in (np.float32, np.int64):
        raise DataError(f"{name} is {value.dtype}; samples are float32, or int64 for token numbers")
    if value.ndim < 2 or 0 in value.shape:
        raise DataError(
            f"{name} has shape {value.shape}; at least one sample is needed, and a sample has at least one value"
        )
    _finite(name, value)


def check_answers(name: str, value: NDArray[np.generic], samples: int) -> None:
    """Raise DataError for answers that are not one for each sample, or neither classes 0, 1, ... nor finite floats."""
    if value.dtype not in (np.float32, np.int64):
        raise DataError(f"{name} is {value.dtype}; answers are whole numbers for classes, floats for values")
    if value.ndim < 1 or len(value) != samples:
        raise DataError(f"{name} has shape {value.shape} for {samples:,} samples; one answer for each is needed")
    if 0 in value.shape:
        raise DataError(f"{name} has shape {value.shape}; an answer has at least one value")
    if value.dtype == np.int64:
        if value.ndim > 2:
            raise DataError(
                f"{name} has shape {value.shape}; classes are one for each sample, (N,), or one for each step, (N, T)"
            )
        if int(value.min()) < 0:
            raise DataError(f"{name} holds the class {int(value.min())}; classes are counted from 0")
    _finite(name, value)


def _finite(name: str, value: NDArray[np.generic]) -> None:
    wrong = ~np.isfinite(value)
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise DataError(
            f"{name} holds {int(wrong.sum()):,} values that are NaN or infinite of {value.size:,}, the first at index "
            f"{first} ({quoted(float(value[first]))}); remove those samples or replace the values"
        )
