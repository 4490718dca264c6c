"""One process: every reduction over ranks is the identity, to the bit."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from sparse_update.parallel.mesh import Mesh


class Single(Mesh):
    """The mesh of a process that trains alone."""

    rank, size = 0, 1
    kind = "single"

    def average_(self, gradients: Iterable[Tensor]) -> None:
        pass

    def gather(self, part: Tensor) -> Tensor:
        return part

    def sum(self, value: float) -> float:
        return value

    def largest(self, value: float) -> float:
        return value

    def wait(self) -> None:
        pass

    def said_by_first(self, text: str) -> str:
        return text

    def said_by_all(self, text: str) -> list[str]:
        return [text]


ALONE = Single()
