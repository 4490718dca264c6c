"""What the loop asks of the processes that train together.

A mesh is a part that the loop is given. Its ranks take every step at the same time and call every method in the same order.
What they may see differently (time, an interruption, a gradient that is not finite) is agreed on before it is acted on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor


class Mesh(ABC):
    """`size` processes; this one is `rank`, from 0. Rank 0 writes files and reports.

    A mesh implements four things: `average_`, `sum`, `largest` and `wait`. Where the wrapper of a module reduces gradients
    by itself (DistributedDataParallel, FSDP), `average_` has nothing left to do.
    """

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    @abstractmethod
    def average_(self, gradients: Iterable[Tensor]) -> None:
        """Make each gradient its mean over the ranks, in place; every rank gives as many, in the same order."""

    @abstractmethod
    def sum(self, value: float) -> float:
        """The sum over the ranks; whole numbers stay whole."""

    @abstractmethod
    def largest(self, value: float) -> float:
        """The largest over the ranks, for what all of them wait for."""

    @abstractmethod
    def wait(self) -> None:
        """Return when every rank has come here."""

    def mean(self, value: float) -> float:
        """The mean over the ranks; NaN where one of them has NaN."""
        return self.sum(value) / self.size

    def any(self, flag: bool) -> bool:
        """Whether it holds on one rank or more."""
        return self.largest(float(flag)) > 0

    def all(self, flag: bool) -> bool:
        """Whether it holds on every rank."""
        return not self.any(not flag)
