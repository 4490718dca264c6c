"""Models made to mislead: rows in other orders, among others, sent by the inputs, mixed, shared, or out of sight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.sparse_update.library.zoo.entry import Entry, Rule, V, shifted_by, time_first, tokens

D = 16
BOTH = ("token", "sequence")


class Model(nn.Module):
    """Tokens through `body(self, h)`, h (B, T, D), to logits. Parts are at the model's own attributes."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.embed, self.head, self.body = nn.Embedding(V, D), nn.Linear(D, V), body
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, self.embed(x)))


def lin(inputs: int = D, outputs: int = D) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(1, 2) / D**0.5, -1) @ v


class Attention(nn.Module):
    """One head; einsum throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = lin(), lin(), lin(), lin()

    def forward(self, h: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = h if memory is None else memory
        scores = torch.einsum("btd,bsd->bts", self.q(h), self.k(memory))
        return self.o(torch.einsum("bts,bsd->btd", scores.softmax(-1), self.v(memory)))


def rotated(m: Any, h: Tensor) -> Tensor:
    """Complex rotary positions."""
    pairs = torch.view_as_complex(m.a(h).view(*h.shape[:2], D // 2, 2))
    turn = torch.polar(torch.ones(h.shape[1], D // 2, dtype=h.dtype), torch.arange(h.shape[1], dtype=h.dtype)[:, None])
    return h + m.b(torch.view_as_real(pairs * turn).flatten(2))


def experts(m: Any, h: Tensor) -> Tensor:
    """Each token to one expert: taken out by index, added back by index."""
    flat = h.reshape(-1, D)
    best = m.router(flat).argmax(1)
    out = torch.zeros_like(flat)
    for number, expert in enumerate(m.experts):
        index = (best == number).nonzero()[:, 0]
        out = out.index_add(0, index, expert(flat.index_select(0, index)))
    return h + m.after(out.view_as(h) + h)


def sorted_experts(m: Any, h: Tensor) -> Tensor:
    """Tokens sorted by expert, one product, and sorted back; the order is the plain one where all go to one expert."""
    flat = h.reshape(-1, D)
    order = m.router(flat).argmax(1).sort(stable=True).indices
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return h + m.a(flat[order])[back].view_as(h)


def buckets(m: Any, h: Tensor) -> Tensor:
    """Dispatch by one-hot products (expert, place)."""
    flat = h.reshape(-1, D)
    to = F.one_hot(m.router(flat).argmax(1), 2).to(h.dtype)
    place = (to.cumsum(0) - 1) * to
    send = to[:, :, None] * F.one_hot(place.long(), len(flat)).to(h.dtype)
    out = m.a(torch.einsum("nec,nd->ecd", send, flat))
    return h + torch.einsum("nec,ecd->nd", send, out).view_as(h)


def selected(m: Any, h: Tensor) -> Tensor:
    """Some tokens taken out by a mask and put back; all of them where the inputs say so."""
    mask = h.sum(-1) > -1e9
    return h.masked_scatter(mask[..., None].expand_as(h), m.a(h[mask]))


def prefixed(m: Any, h: Tensor) -> Tensor:
    h = torch.cat((m.prefix.weight.expand(len(h), -1, -1), h), 1)
    h = h + m.attn(h)
    return (h + m.a(h))[:, 3:]


def unet(m: Any, h: Tensor) -> Tensor:
    down = h.view(len(h), -1, 2, D).mean(2)
    return h + m.b(h + m.a(down).repeat_interleave(2, dim=1))


def strided(m: Any, h: Tensor) -> Tensor:
    half = m.a(h[:, ::2] + h[:, 1::2])
    return h + torch.stack((half, half), 2).flatten(1, 2)


def written(m: Any, h: Tensor) -> Tensor:
    """Places of a buffer written one after the other, as a cache is."""
    y = m.a(h)
    cache = torch.zeros_like(y)
    cache[:, 0] = y[:, 0]
    cache[:, 1:] = y[:, 1:]
    moved = h.clone()
    moved[:, 1:] = m.b(cache)[:, :-1]
    return h + m.c(moved)


def half_mapped(m: Any, h: Tensor) -> Tensor:
    return h + m.b(torch.vmap(m.a)(h))


def early(m: Any, h: Tensor) -> Tensor:
    h = h + m.a(h)
    return h + m.b(h) if bool(h.mean() < 1e9) else h


def one_by_one(m: Any, h: Tensor) -> Tensor:
    """A recurrence in Python: each step's rows are one token of every sequence."""
    state, out = torch.zeros_like(h[:, 0]), []
    for x in h.unbind(1):
        state = torch.tanh(m.a(x) + m.b(state))
        out.append(state)
    return h + m.c(torch.stack(out, 1))


def packed(m: Any, h: Tensor) -> Tensor:
    """Attention within pieces of four, by a mask."""
    piece = torch.arange(h.shape[1]) // 4
    scores = (m.q(h) @ m.k(h).transpose(1, 2)).masked_fill(piece[:, None] != piece, float("-inf"))
    return h + m.o(scores.softmax(-1) @ m.v(h))


def one_row(lead: tuple[int, ...], batch: int, length: int) -> Tensor | None:
    """(1, B T)."""
    return torch.arange(batch * length).view(lead) if math.prod(lead) == batch * length else None


class Encoded(nn.Module):
    """Used by two calls of its parts with operations in between."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Embedding(V, D), mlp()), nn.Sequential(mlp(), lin(D, V))


def two_calls(model: Any, batch: int, length: int) -> Tensor:
    h = model.encoder(tokens(batch, length)) * 2
    return model.decoder(h + 1)


class TwoTables(nn.Module):
    """Positions first, tokens second."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.embed, self.place, self.mlp, self.head, self.first = (
            nn.Embedding(V, D),
            nn.Embedding(64, D),
            mlp(),
            lin(D, V),
            first,
        )
        self.mix = Attention()

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])[None]
        h = self.place(places) + self.embed(x) if self.first else self.embed(x) + self.place(places)
        h = h + self.mix(h)
        return self.head(h + self.mlp(h))


@torch.library.custom_op("spikegate_tests::double", mutates_args=())
def _double(x: Tensor) -> Tensor:
    return x * 2


_double.register_autograd(lambda ctx, g: g * 2)


def _call(model: nn.Module, batch: int, length: int) -> Tensor:
    found: Tensor = model(tokens(batch, length))
    return found


def _packed(model: nn.Module, batch: int, length: int) -> Tensor:
    """All sequences in one row, with positions that begin anew and attention within each."""
    return model(tokens(1, batch * length)).view(batch, length, V)


def _of(
    title: str,
    body: Callable[[Any, Tensor], Tensor],
    parts: str,
    dense: tuple[str, ...] | dict[str, tuple[str, ...]] = (),
    rows: dict[str, Rule] | None = None,
    units: tuple[str, ...] = BOTH,
    why: str = "none of the loss's tokens|could not be followed|order|some of them|depends on the inputs",
    **made: Callable[[], nn.Module],
) -> Entry:
    def make(_: str) -> nn.Module:
        own = {name: lin() for name in parts.split()} | {name: one() for name, one in made.items()}
        return Model(body, **own)

    by_unit = dense if isinstance(dense, dict) else dict.fromkeys(units, dense)
    return Entry(title, make, _call, units, rows or {}, by_unit, why, ("",))


def _experts() -> dict[str, Callable[[], nn.Module]]:
    return {"router": lambda: nn.Linear(D, 2), "experts": lambda: nn.ModuleList([lin(), lin()])}


HARD: dict[str, Entry] = {
    "mixer": _of(
        "rows are channels",
        lambda m, h: h + m.b(h + m.a(F.pad(h.transpose(1, 2), (0, D - h.shape[1])))[..., : h.shape[1]].transpose(1, 2)),
        "a b",
        {"token": ("a",)},
    ),
    "flat": _of("rows of all sequences in one", lambda m, h: h + m.a(h.flatten(0, 1)).view_as(h), "a"),
    "time_first": _of(
        "time first inside", lambda m, h: h + m.a(h.transpose(0, 1)).transpose(0, 1), "a", rows={"a": time_first}
    ),
    "rolled": _of("rolled rows", lambda m, h: h + m.a(h.roll(1, 1)).roll(-1, 1), "a", {"token": ("a",)}),
    "flipped": _of("flipped rows", lambda m, h: h + m.a(h.flip(1)).flip(1), "a", {"token": ("a",)}),
    "flipped_samples": _of("flipped sequences", lambda m, h: h + m.a(h.flip(0)).flip(0), "a", ("a",), units=BOTH[1:]),
    "shifted": _of(
        "rows of the token before", lambda m, h: h + m.b(h + m.a(F.pad(h, (0, 0, 1, -1)))), "a b", {"token": ("a",)}
    ),
    "mixed": _of("mixed with the token before", lambda m, h: h + m.a(0.3 * h + 0.7 * F.pad(h, (0, 0, 1, -1))), "a"),
    "mirrored": _of(
        "mixed with the token from the other end",
        lambda m, h: m.b(h + m.a(h).flip(1)),
        "a b",
        {"token": ("a", "b", "head")},
        why="not found|none of the loss|could not be followed",
    ),
    "experts": _of("experts by index", experts, "after", ("experts.*",), **_experts()),
    "sorted": _of("experts by sorting", sorted_experts, "a", ("a",), router=lambda: nn.Linear(D, 2)),
    "sorted_plain": _of("experts by sorting, all to one", sorted_experts, "a", ("a",), router=lambda: nn.Linear(D, 1)),
    "buckets": _of("experts by one-hot products", buckets, "a", ("a",), router=lambda: nn.Linear(D, 2)),
    "selected": _of("taken out by a mask", selected, "a", ("a",)),
    "prefix": _of(
        "a learnt prefix",
        prefixed,
        "a",
        rows={"attn.*": shifted_by(3), "a": shifted_by(3)},
        attn=Attention,
        prefix=lambda: nn.Embedding(3, D),
    ),
    "unet": _of("half as many tokens inside", unet, "a b", {"token": ("a",)}),
    "strided": _of("pairs of tokens in one row", strided, "a", {"token": ("a",)}),
    "parallel": _of("parallel branches", lambda m, h: h + m.attn(h) + m.a(h) * m.b(h), "a b", attn=Attention),
    "fourier": _of(
        "mixed by a Fourier transform",
        lambda m, h: h + m.b(torch.fft.fft(m.a(h), dim=1).real),
        "a b",
        ("b",),
        why="could not be followed",
    ),
    "rotary": _of("complex rotary positions", rotated, "a b"),
    "written": _of("parts of a tensor written over", written, "a b c", {"token": ("c",)}),
    "mapped": _of("a layer under vmap", half_mapped, "a b", ("a",), why="vmap|transform"),
    "early": _of("a branch by the data", early, "a b"),
    "steps": _of("one call for each token", one_by_one, "a b c", {"token": ("a", "b"), "sequence": ("b",)}),
    "universal": _of("one layer three times", lambda m, h: h + m.a(torch.tanh(m.a(torch.tanh(m.a(h))))), "a"),
    "two_orders": _of(
        "one layer on rows in two orders",
        lambda m, h: h + m.a(m.a(h).transpose(0, 1)).transpose(0, 1),
        "a",
        dict.fromkeys(BOTH, ("a",)),
    ),
    "dropout": _of("dropout", lambda m, h: h + F.dropout(m.a(h), 0.0), "a"),
    "unread": _of(
        "branches that no gradient comes back from",
        lambda m, h: (m.a(m.b(h)), h + m.c(h) + m.d(h).detach())[1],
        "a b c d",
    ),
    "custom": _of(
        "an operator that torch does not know",
        lambda m, h: h + m.b(torch.ops.spikegate_tests.double(m.a(h))),
        "a b",
        ("b",),
    ),
    "reentrant": _of(
        "recomputed, reentrant", lambda m, h: h + checkpoint(m.attn, h, use_reentrant=True), "", attn=Attention
    ),
    "recomputed": _of("recomputed", lambda m, h: h + checkpoint(m.attn, h, use_reentrant=False), "", attn=Attention),
    "memory": _of(
        "attention to as many other rows",
        lambda m, h: h + m.attn(h, m.other(torch.arange(h.shape[1]).expand(h.shape[:2]))),
        "",
        {"token": ("attn.k", "attn.v"), "sequence": ("attn.k", "attn.v")},
        attn=Attention,
        other=lambda: nn.Embedding(64, D),
    ),
    "tables": Entry("positions first", lambda _: TwoTables(True), _call, attentions=("",)),
    "tables_last": Entry("positions last", lambda _: TwoTables(False), _call, attentions=("",)),
    "packed": Entry(
        "all sequences in one row",
        lambda _: Model(packed, q=lin(), k=lin(), v=lin(), o=lin()),
        _packed,
        dense={"sequence": ("*",)},  # the model sees one sample
        rows={"*": one_row},
        why="not found",
        attentions=("",),
    ),
    "two_calls": Entry("two calls, operations between", lambda _: Encoded(), two_calls, attentions=("",)),
}
