"""Where the tokens of a loss lie among the rows of a layer, as a rule that holds for batches of any size.

Shape letters: B sequences, T tokens of a sequence in the loss, S = before + T + after places of a sequence in a layer.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Rows (*lead) of a layer: which dimension counts sequences, which one their tokens.

    Both are the same dimension where sequences and tokens are counted in one; `inner` says which of the two changes faster
    there, "token" or "batch". `before`, `after`: places of a sequence that are no token of the loss (a class token, the
    last input of a shifted loss); they always stay. `whole`: rows belong to sequences, and all other dimensions to them.
    `parts`: the loss counts all tokens in one sequence, and the layer has `batch_dim` of them with equal shares.
    `unsure`: several rules fit what was seen, for it was one sequence or one token.
    """

    batch_dim: int
    token_dim: int
    inner: str = "token"
    before: int = 0
    after: int = 0
    whole: bool = False
    parts: bool = False
    unsure: bool = False

    def shape(self, lead: tuple[int, ...], batch: int, length: int) -> tuple[int, int]:
        """B and T as the layer has them."""
        if not self.parts or len(lead) <= self.batch_dim or not lead[self.batch_dim] or length % lead[self.batch_dim]:
            return batch, length
        return lead[self.batch_dim], length // lead[self.batch_dim]

    def split(self, lead: tuple[int, ...], batch: int) -> tuple[list[int], int, int] | None:
        """The layer's dimensions with sequences and tokens apart, and which ones they are; None where `lead` does not
        divide."""
        if len(lead) <= max(self.batch_dim, self.token_dim):
            return None
        dims, b_at, t_at = list(lead), self.batch_dim, self.token_dim
        if b_at == t_at:
            if dims[b_at] % batch:
                return None
            each = dims[b_at] // batch
            dims[b_at : b_at + 1] = [batch, each] if self.inner == "token" else [each, batch]
            b_at, t_at = (b_at, b_at + 1) if self.inner == "token" else (b_at + 1, b_at)
        return (dims, b_at, t_at) if dims[b_at] == batch else None

    def rows(self, lead: tuple[int, ...], units: Tensor, batch: int, length: int) -> tuple[Tensor, int] | None:
        """Kept rows of a layer, or None where its size is not that of this batch.

        Args:
            lead: the layer's rows, counted in C order.
            units: int64, kept sequences (S,) where rows belong to `whole` ones, else kept tokens b T + t (K,).
            batch, length: B and T of the loss.

        Returns: indices of groups of rows, and how many rows a group has.
        """
        batch, length = self.shape(lead, batch, length)
        found = self.split(lead, batch)
        if found is None:
            return None
        dims, b_at, t_at = found
        places = self.before + length + self.after
        if not self.whole and dims[t_at] != places:
            return None
        last = b_at if self.whole else max(b_at, t_at)
        strides = [math.prod(dims[d + 1 : last + 1]) for d in range(last + 1)]
        if self.whole:
            index, used = units * strides[b_at], {b_at}
        else:
            index, used = units // length * strides[b_at] + (units % length + self.before) * strides[t_at], {b_at, t_at}
            if self.before or self.after:
                other = [p for p in range(places) if not self.before <= p < self.before + length]
                others = torch.tensor(other, device=units.device) * strides[t_at]
                always = torch.arange(batch, device=units.device)[:, None] * strides[b_at] + others
                index = torch.cat((index, always.flatten()))
        for d in range(last + 1):
            if d not in used and dims[d] > 1:
                index = (torch.arange(dims[d], device=units.device)[:, None] * strides[d] + index).flatten()
        return index, math.prod(dims[last + 1 :])

    def units(self, lead: tuple[int, ...], batch: int, length: int, device: torch.device) -> Tensor | None:
        """The sequence or the token that each row belongs to by this rule, -1 for none: int64 (*lead)."""
        batch, length = self.shape(lead, batch, length)
        found = self.split(lead, batch)
        if found is None:
            return None
        dims, b_at, t_at = found
        b = torch.arange(batch, device=device).view(*[-1 if d == b_at else 1 for d in range(len(dims))])
        if self.whole:
            return b.expand(dims).reshape(lead)
        t = torch.arange(dims[t_at], device=device) - self.before
        t = t.view(*[-1 if d == t_at else 1 for d in range(len(dims))])
        unit = b * length + t
        return unit.where((t >= 0) & (t < length), torch.full_like(unit, -1)).expand(dims).reshape(lead)


def find_layout(rows: Tensor, batch: int, length: int, known: Tensor, whole: bool) -> Layout | None:
    """The rule behind what was seen of one layer in one forward; None where there is none.

    Args:
        rows: int64 (*lead), which token b T + t of the loss (or, with `whole`, which sequence) each row is, -1 for none.
        batch, length: B and T.
        known: bool (B T) or (B,), the units of the loss that were seen at all.
        whole: rows belong to sequences.
    """
    lead = tuple(rows.shape)
    candidates = _of_sequences(lead, batch) if whole else _of_tokens(rows, batch, length)
    if batch == 1 and not whole:
        candidates += _of_parts(rows, length)
    found = [c for c in candidates if _fits(c, rows, batch, length, known)]
    if not found:
        return None
    return found[0] if len(found) == 1 else replace(found[0], unsure=True)


def _of_sequences(lead: tuple[int, ...], batch: int) -> list[Layout]:
    whole = [Layout(d, len(lead), whole=True) for d, n in enumerate(lead) if n == batch]
    flat = [d for d, n in enumerate(lead) if n % batch == 0 and n > batch]
    return [
        *(replace(c, token_dim=-1) for c in whole),
        *(Layout(d, d, i, whole=True) for d in flat for i in ("token", "batch")),
    ]


def _of_tokens(rows: Tensor, batch: int, length: int) -> list[Layout]:
    seen = (rows >= 0).nonzero()
    if not len(seen):
        return []
    lead, place = tuple(rows.shape), seen[0].tolist()
    token = int(rows[tuple(place)]) % length
    made = []
    for b, t in itertools.permutations(range(len(lead)), 2):
        made.append(Layout(b, t, "token", place[t] - token, lead[t] - length - place[t] + token))
    for d, n in enumerate(lead):
        each = n // batch
        for inner, at in (("token", place[d] % each if each else 0), ("batch", place[d] // batch)):
            made.append(Layout(d, d, inner, at - token, each - length - at + token))
    return [c for c in made if c.before >= 0 and c.after >= 0]


def _of_parts(rows: Tensor, length: int) -> list[Layout]:
    made = []
    for d, n in enumerate(rows.shape):
        if n > 1 and length % n == 0:
            found = _of_tokens(rows, n, length // n)
            made += [replace(c, parts=True) for c in found if c.batch_dim == d != c.token_dim]
    return made


def _fits(layout: Layout, rows: Tensor, batch: int, length: int, known: Tensor) -> bool:
    """Every unit's rows are where the rule says, and no others; a unit that the loss did not show may be anywhere."""
    expected = layout.units(tuple(rows.shape), batch, length, rows.device)
    if expected is None:
        return False
    unseen = (rows < 0) & (expected >= 0) & ~known[expected.clamp(min=0)]
    return bool(((rows == expected) | unseen).all())
