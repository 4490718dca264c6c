"""What the collection knows of a model: how to make it tiny, what to call it with, and by hand which row is which token.

Shape letters: B sequences, T tokens of a sequence in the loss, V outputs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

V = 41
Rule = Callable[[tuple[int, ...], int, int], Tensor | None]
"""(rows of a layer, B, T) -> the token b T + t that each row is, -1 for none; None where the rule does not hold."""


def batch_first(lead: tuple[int, ...], batch: int, length: int) -> Tensor | None:
    """(B, T, ...) or (B T,): what most models have."""
    number = torch.arange(batch * length)
    if lead[:2] == (batch, length):
        return number.view(batch, length, *[1] * (len(lead) - 2)).expand(lead)
    if lead == (batch, 1, length):  # a head in between
        return number.view(lead)
    return number if lead == (batch * length,) else None


def none_of_them(lead: tuple[int, ...], batch: int, length: int) -> Tensor | None:
    """Rows that are no tokens of the loss."""
    return torch.full(lead, -1)


def time_first(lead: tuple[int, ...], batch: int, length: int) -> Tensor | None:
    """(T, B) or (T B,)."""
    number = torch.arange(batch * length).view(batch, length).t()
    if lead[:2] == (length, batch):
        return number
    return number.reshape(-1) if lead == (batch * length,) else None


def shifted_by(before: int) -> Rule:
    """(B, before + T, ...): places in front of the tokens, such as a class token or a prefix."""

    def rule(lead: tuple[int, ...], batch: int, length: int) -> Tensor | None:
        if lead[:2] != (batch, before + length):
            return None
        number = torch.arange(batch * length).view(batch, length)
        return torch.cat((torch.full((batch, before), -1), number), 1)

    return rule


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """int64 (B, T) below V - 2."""
    return torch.randint(1, V - 2, (batch, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> Tensor:
    """float64 of this shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@dataclass(frozen=True)
class Entry:
    """A model of the collection.

    Args:
        make: (attention) -> the model, freshly initialised, without dropout.
        call: (model, B, T) -> logits (B, T, V), or (B, V) for one answer to a sample.
        units: which kinds of rows its loss has.
        rows: rules by name of a layer (shell patterns, the first that fits); `batch_first` for the others.
        dense: layers (patterns) whose rows are no tokens, by unit: the gate must leave them alone and say so.
        why: what its reasons must hold for these layers.
        attentions: the kernels to run it with.
        padded: (model, B, T, mask (B, T)) -> logits, where the model takes a mask.
    """

    title: str
    make: Callable[[str], nn.Module]
    call: Callable[[nn.Module, int, int], Tensor]
    units: tuple[str, ...] = ("token", "sequence")
    rows: Mapping[str, Rule] = field(default_factory=dict)
    dense: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    why: str = "none of the loss's tokens|could not be followed|some of them|order"
    attentions: tuple[str, ...] = ("eager", "sdpa")
    single: bool = False
    """whether it computes in float32 inside, whatever its type"""
    padded: Callable[[nn.Module, int, int, Tensor], Tensor] | None = None

    def rule(self, name: str) -> Rule:
        return next((rule for pattern, rule in self.rows.items() if fnmatch.fnmatch(name, pattern)), batch_first)

    def expected_dense(self, unit: str, names: list[str]) -> set[str]:
        patterns = self.dense.get(unit, ())
        return {n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)}


def logits_of(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    assert isinstance(found, Tensor)
    return found
