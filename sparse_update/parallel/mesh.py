"""What the loop asks of the processes that train together.

A mesh is a part that the loop is given. Every rank has the same text, the same gate with the same state, and the same
clock, so that every decision is made for the whole batch and is the same everywhere. What is divided is the work of a
step: a rank takes the windows of its `shard`, and what follows from forwards (losses, signals, gradients) is put together
again before anybody acts on it. What ranks may see differently (time, an interruption) is agreed on first.

Ranks of one shard hold different parts of the same matrices (tensor parallel) and see the same windows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class MeshError(ValueError):
    """Settings that several processes cannot train by; the message names what to use in their place."""


class Mesh(ABC):
    """`size` processes; this one is `rank`, from 0. Rank 0 writes files and reports.

    A mesh implements five things: `average_`, `gather`, `sum`, `largest` and `wait`. Every rank calls them in the same
    order.
    """

    rank: int
    size: int
    kind = "own"
    """What the record of a run calls it."""
    split: Any = None
    """`parallel.split.Split` of the model's parameters where a rank holds a part of them, after `prepare`"""

    @property
    def shard(self) -> int:
        """Which share of a batch's windows this rank takes, from 0."""
        return self.rank

    @property
    def shards(self) -> int:
        """Shares that the windows of a batch are cut into."""
        return self.size

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    @property
    def splits_weights(self) -> bool:
        """Whether a rank holds a part of the matrices only."""
        return False

    @abstractmethod
    def average_(self, gradients: Iterable[Tensor]) -> None:
        """Make each gradient its mean over the shards, in place; every rank gives as many, in the same order."""

    @abstractmethod
    def gather(self, part: Tensor) -> Tensor:
        """The parts of all shards one after the other along dimension 0; every shard gives the same shape."""

    @abstractmethod
    def sum(self, value: float) -> float:
        """The sum over the ranks; whole numbers stay whole."""

    @abstractmethod
    def largest(self, value: float) -> float:
        """The largest over the ranks, for what all of them wait for."""

    @abstractmethod
    def wait(self) -> None:
        """Return when every rank has come here."""

    def said_by_first(self, text: str) -> str:
        """What rank 0 gives, on every rank; the others' is not looked at."""
        raise NotImplementedError(f"{type(self).__name__} cannot tell what its first rank says")

    def said_by_all(self, text: str) -> list[str]:
        """What each rank gives, in the order of the ranks, on every rank."""
        raise NotImplementedError(f"{type(self).__name__} cannot tell what its ranks say")

    def beside(self) -> Callable[[str], list[str]]:
        """`said_by_all` for a thread that writes while training goes on: messages of its own, which meet no others. Every
        rank asks for it at the same place."""
        raise NotImplementedError(f"{type(self).__name__} cannot tell what its ranks say beside training")

    def prepare(  # noqa: B027 - most meshes leave them as they are
        self, model: nn.Module, strip_dim: Callable[[str], int | None] = lambda name: None
    ) -> None:
        """Take the model's weights in hand, before an optimizer sees them.

        `strip_dim`: name of a parameter -> the dimension that its strips are cut along, None where it has none.
        """

    def hold(self) -> Any:
        """What gathers weights for the sparse step and scatters its gradients; None where every rank has all weights."""
        return None

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's whole state dict, for a checkpoint; every rank asks."""
        return dict(model.state_dict())

    def pieces(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], Tensor]]:
        """What this rank saves of tensors that every rank names: name -> (where it begins in the whole, the piece).

        Over all ranks the pieces tile every tensor; what is whole on every rank is the first one's.
        """
        return {name: ((0,) * t.dim(), t) for name, t in tensors.items()} if self.first else {}

    def load(self, model: nn.Module, weights: Mapping[str, Any]) -> None:
        """Take a whole state dict up. Where ranks hold parts, tensors may be `Stored` ones, of which each reads its own."""
        model.load_state_dict(weights)

    def release(self, model: nn.Module) -> None:  # noqa: B027
        """Let go of weights that a forward has gathered and no backward follows for."""

    def module(self, model: nn.Module) -> nn.Module:
        """What a step by autograd calls in the model's place, and averages its gradients by itself if it is another."""
        return model

    @contextmanager
    def silent(self, quiet: bool = True) -> Iterator[None]:
        """While it is entered, a backward by autograd leaves the gradients as they are on each shard."""
        yield

    def mean(self, value: float) -> float:
        """The mean over the ranks; NaN where one of them has NaN."""
        return self.sum(value) / self.size

    def any(self, flag: bool) -> bool:
        """Whether it holds on one rank or more."""
        return self.largest(float(flag)) > 0

    def all(self, flag: bool) -> bool:
        """Whether it holds on every rank."""
        return not self.any(not flag)

    def mine(self, count: int) -> slice:
        """Which of `count` rows are this shard's; all shards have as many.

        Raises MeshError for a count that the shards do not divide.
        """
        each, rest = divmod(count, self.shards)
        if rest:
            raise MeshError(
                f"{count} windows cannot be shared alike by {self.shards} processes, and nobody may wait for another: "
                f"choose a multiple of {self.shards}"
            )
        return slice(self.shard * each, (self.shard + 1) * each)
