"""Weight gradients of the active strips only, formed from their two factors; optionally from sampled token rows.

Shape letters: N token row (sequences x rows), M sampled row, O output, I input, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_update.step.draw import draw
from sparse_update.step.kernels import Strip, strip_products, tiled
from sparse_update.weights.subset import Active


def strips(active: Active, name: str) -> tuple[Strip, ...]:
    """The active strips of a parameter; empty where it is frozen."""
    return tuple((part.dim, part.start, part.stop) for part in active.parts.get(name, ()))


@dataclass(frozen=True)
class Sampled:
    """Token rows that stand for all: `index_M`, and `weight_M1` = 1/p."""

    index_M: Tensor
    weight_M1: Tensor


class Gradients:
    """Collects the gradients of one step.

    Args:
        tied: the head is the embedding.
        dtype: of the gradients, the parameters' own.
        dw_rows: share of the token rows that `sample` draws; 1 takes all.
        watched: weights whose two factors are kept in `factors`.
        scatter: what becomes of a parameter's gradients where this process has a part of it.
    """

    def __init__(
        self,
        active: Active,
        tied: bool,
        dtype: torch.dtype,
        dw_rows: float = 1.0,
        generator: torch.Generator | None = None,
        watched: frozenset[str] = frozenset(),
        scatter: Callable[[str, tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None,
    ) -> None:
        self.scatter = scatter
        self.active, self.tied, self.dtype = active, tied, dtype
        self.dw_rows, self.generator, self.watched = dw_rows, generator, watched
        self.found: dict[str, tuple[Tensor, ...]] = {}
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        """x (S, R, I) and g (S, R, O) of each watched weight."""

    def owner(self, name: str) -> str:
        """The parameter that holds a weight."""
        return "embed.weight" if self.tied and name == "head.weight" else name

    def wants(self, *names: str) -> bool:
        return any(strips(self.active, self.owner(name)) for name in names)

    def sample(self, g: Tensor) -> Sampled | None:
        """Rows of (S, R, D) in proportion to their norm; the estimate is unbiased for every other factor too."""
        if self.dw_rows >= 1:
            return None
        norm_N = torch.linalg.vector_norm(g.flatten(0, 1), dim=-1)
        index, inverse = draw(norm_N, max(1, round(self.dw_rows * len(norm_N))), self.generator)
        return Sampled(index, inverse.to(g.dtype)[:, None])

    def weight(self, name: str, g: Tensor, x: Tensor, sampled: Sampled | None = None) -> None:
        """dW = g^T x, (O, I), from g (S, R, O) and x (S, R, I)."""
        if name in self.watched:
            self.factors[name] = x, g
        wanted = strips(self.active, self.owner(name))
        if wanted:
            self._add(name, strip_products(*_rows(g, x, sampled), wanted))

    def joined(self, names: list[str], g: Tensor, x: Tensor, sampled: Sampled | None = None) -> None:
        """The gradients of equally high matrices whose outputs lie side by side in g; one product if all are whole."""
        height = g.shape[-1] // len(names)
        wanted = [strips(self.active, name) for name in names]
        if not all(parts and tiled(parts, height, x.shape[-1]) for parts in wanted):
            for name, part in zip(names, g.split(height, dim=-1), strict=True):
                self.weight(name, part, x, sampled)
            return
        self.factors |= {
            name: (x, part) for name, part in zip(names, g.split(height, dim=-1), strict=True) if name in self.watched
        }
        g_NO, x_NI = _rows(g, x, sampled)
        for name, whole, parts in zip(names, (g_NO.t() @ x_NI).split(height), wanted, strict=True):
            self._add(name, tuple(whole.narrow(dim, start, stop - start) for dim, start, stop in parts))

    def vector(self, name: str, gradient: Tensor) -> None:
        """A gain's gradient, whole."""
        wanted = strips(self.active, name)
        if wanted:
            self._add(name, tuple(gradient[start:stop] for _, start, stop in wanted))

    def embedding(self, g: Tensor, tokens: Tensor, size: tuple[int, int]) -> None:
        """Rows of the embedding's (V, D) gradient: the sum of g (S, R, D) over the places of each token."""
        wanted = strips(self.active, "embed.weight")
        if not wanted:
            return
        place, flat = tokens.flatten(), g.flatten(0, 1)
        if tiled(wanted, *size) or wanted[0][0] == 0:
            whole = flat.new_zeros(size).index_add_(0, place, flat)
            self._add(
                "embed.weight",
                tuple(
                    whole.narrow(d, a, b - a).clone() if len(wanted) > 1 or b - a < size[d] else whole for d, a, b in wanted
                ),
            )
        else:
            columns = (flat.new_zeros(size[0], b - a).index_add_(0, place, flat[:, a:b]) for _, a, b in wanted)
            self._add("embed.weight", tuple(columns))

    def _add(self, name: str, gradients: tuple[Tensor, ...]) -> None:
        name = self.owner(name)
        gradients = tuple(g.to(self.dtype) for g in gradients)
        rules = [part.rule for part in self.active.parts[name]]
        if "sign8" in rules and not (self.tied and name == "embed.weight"):  # which is a sum of two: signs do not add
            gradients = tuple(
                g.sign().to(torch.int8) if rule == "sign8" else g.clone() for g, rule in zip(gradients, rules, strict=True)
            )
        if self.scatter is not None:
            gradients = self.scatter(name, gradients)
        before = self.found.get(name)
        self.found[name] = gradients if before is None else tuple(a + b for a, b in zip(before, gradients, strict=True))


def _rows(g: Tensor, x: Tensor, sampled: Sampled | None) -> tuple[Tensor, Tensor]:
    """Both factors with their token rows in one dimension, sampled and weighed where asked."""
    g_NO, x_NI = g.flatten(0, 1).to(x.dtype), x.flatten(0, 1)
    if sampled is None:
        return g_NO, x_NI
    return (
        g_NO.index_select(0, sampled.index_M) * sampled.weight_M1.to(x.dtype),
        x_NI.index_select(0, sampled.index_M),
    )
