"""Active strips of a user's own weights: which they are, as parameters of their own for any torch optimizer.

A strip is a view of its weight, so an update of the strip is an update of the model; the weight itself asks for no
gradient. Gradient and optimizer state exist for strips only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sparse_update.library.linear import Layer, Strip
from sparse_update.library.tracking.rows import GateError
from sparse_update.weights.subset import Part, Subset, SubsetConfig


def layer_stack(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks, by name, from below: those of the nn.ModuleList that holds most of the parameters. Without one,
    the parts of the largest nn.Sequential but embeddings and its last part, the head. Raises GateError where there are
    fewer than two."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    if lists:
        at, stack = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
        return [(f"{at}.{i}" if at else str(i), block) for i, block in enumerate(stack)]
    rows = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Sequential)]
    for at, row in sorted(rows, key=lambda item: -sum(p.numel() for p in item[1].parameters())):
        inner = [(f"{at}.{i}" if at else i, m) for i, m in row.named_children() if any(True for _ in m.parameters())]
        inner = [(name, m) for name, m in inner[:-1] if not isinstance(m, nn.Embedding)]
        if len(inner) > 1:
            return inner
    raise GateError(
        "weights.kind = 'layers' needs an nn.ModuleList, or an nn.Sequential, of two or more blocks beside embedding and "
        "head, and this model has none: use weights.kind = 'blocks', which takes strips of every matrix"
    )


def subset_names(model: nn.Module, gated: set[str]) -> dict[str, str]:
    """Names under which `Subset` knows the parameters: "blocks.NUMBER.NAME" for what is in the stack of layers or gated."""
    number: dict[str, int] = {}
    try:
        stack = layer_stack(model)
    except GateError:
        pass  # a model without a stack: its gated matrices count as one block
    else:
        number = {f"{at}.{n}": i for i, (at, block) in enumerate(stack) for n, _ in block.named_parameters()}
    names = [name for name, _ in model.named_parameters()]
    inner = {n: number.get(n, 0 if n in gated else None) for n in names}
    return {n: f"rest.{n}" if i is None else f"blocks.{i}.{n}" for n, i in inner.items()}


@dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]


class _Shapes:
    """A model as `Subset` looks at it: names, shapes, number of blocks. What must stay whole is shown as a vector."""

    def __init__(self, shapes: dict[str, _Shape]) -> None:
        self.shapes = shapes
        self.blocks = range(1 + max((int(n.split(".")[1]) for n in shapes if n.startswith("blocks.")), default=0))

    def named_parameters(self) -> Iterator[tuple[str, _Shape]]:
        yield from self.shapes.items()


def subset_of(
    names: Mapping[str, str], parameters: Mapping[str, nn.Parameter], gated: set[str], cfg: SubsetConfig, seed: int
) -> Subset:
    """The choice of active weights for any model. Raises ValueError for settings that need our own optimizer."""
    if cfg.inactive == "sign8" or cfg.look_every_turns:
        raise ValueError(
            f"weights.inactive = {cfg.inactive!r}, weights.look_every_turns = {cfg.look_every_turns}: gradients of one "
            "byte, and looks at inactive weights, are of this package's own optimizer only; with one of yours leave them "
            "'frozen' or 'sign', and 0"
        )
    if cfg.inactive == "sign" and (cfg.kind not in ("blocks", "block_columns") or cfg.scored):
        raise ValueError(
            f"weights.inactive = 'sign' moves what is left of each matrix: with weights.kind = {cfg.kind!r} and policy "
            f"{cfg.policy!r} it cannot; take kind 'blocks' or 'block_columns', and policy 'random' or 'rotate'"
        )
    if cfg.embedding_strips:
        raise ValueError(
            "weights.embedding_strips: embeddings of an attached model stay whole; train_embeddings = False freezes them"
        )
    shapes = {names[n]: _Shape(tuple(p.shape) if n in gated else (p.shape.numel() or 1,)) for n, p in parameters.items()}
    return Subset(_Shapes(shapes), cfg, seed)  # type: ignore[arg-type]


class Strips:
    """The leaves of the gated weights."""

    def __init__(self, layers: Mapping[str, list[Layer]]) -> None:
        self.layers = layers
        """gated weight -> the layers that use it"""
        self.leaves: dict[tuple[str, int], nn.Parameter] = {}
        """(gated weight, number of the strip) -> the strip"""
        self.signs: dict[tuple[str, int], nn.Parameter] = {}
        """the same of inactive strips that move by their gradient's sign; in no optimizer"""
        self.fresh: list[nn.Parameter] = []
        """strips that are new since the last `activate`"""
        self.places: WeakIdKeyDictionary = WeakIdKeyDictionary()
        """any strip that is or was active -> (gated weight, dim, start, stop)"""

    def activate(self, chosen: Mapping[str, tuple[Part, ...]]) -> None:
        """Make these the active strips; a weight without any is frozen. A strip that stays keeps its leaf, and so its
        moments."""
        before = {self.places[leaf]: leaf for leaf in self.leaves.values()}
        self.leaves, self.signs, self.fresh = {}, {}, []
        for name, layers in self.layers.items():
            weight = layers[0].weight
            weight.grad = None
            leaves = [self._leaf(name, weight.detach(), part, before) for part in chosen[name]]
            moved = {(name, i): leaf for i, leaf in enumerate(leaves) if chosen[name][i].rule == "sign"}
            self.signs |= moved
            self.leaves |= {(name, i): leaf for i, leaf in enumerate(leaves) if (name, i) not in moved}
            for layer in layers:
                layer.strips = tuple(
                    Strip((part.dim == 0) != layer.turned, part.start, leaf, part.dim)
                    for part, leaf in zip(chosen[name], leaves, strict=True)
                )

    def _leaf(self, name: str, weight: Tensor, part: Part, before: Mapping[Any, nn.Parameter]) -> nn.Parameter:
        place, view = (name, part.dim, part.start, part.stop), part.of(weight)
        if part.rule == "sign":
            self.fresh.append(signs := nn.Parameter(view))
            return signs
        leaf = before.get(place)
        if leaf is None or leaf.data_ptr() != view.data_ptr() or leaf.dtype != view.dtype:
            leaf = nn.Parameter(view)
            self.places[leaf] = place
            self.fresh.append(leaf)
        leaf.grad = None
        return leaf

    def of(self, name: str) -> list[nn.Parameter]:
        """The active strips of a gated weight."""
        return [leaf for leaf in self._in(name) if leaf in self.places]

    def signs_of(self, name: str) -> list[nn.Parameter]:
        """Its strips that move by the sign."""
        return [leaf for leaf in self._in(name) if leaf not in self.places]

    def _in(self, name: str) -> list[nn.Parameter]:
        return [strip.leaf for strip in self.layers[name][0].strips]

    def check(self) -> None:
        """Raise GateError where the model's weights were moved away from under the strips."""
        for (name, _), leaf in self.leaves.items():
            if leaf.untyped_storage().data_ptr() != self.layers[name][0].weight.untyped_storage().data_ptr():
                raise GateError(
                    f"{name} was moved or cast after attach, its active strip was not: call model.to(...) before attach"
                )
