"""Depth expansion of any model whose blocks are an `nn.ModuleList`, in a loop of one's own.

model = ...                                     # with a few blocks at first
optimizer = torch.optim.AdamW(model.parameters())
for step in range(steps):
    if step == expand_at:
        grow_blocks(model, 12, optimizer=optimizer)
    ...
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hardware.text import listed, short
from sparse_update.library.layers import GATE


class GrowthError(ValueError):
    """A model or an optimizer that cannot grow as asked; the message names what is wrong and the remedy."""


def grow_blocks(
    model: nn.Module,
    layers: int,
    *,
    blocks: str = "",
    outputs: Sequence[str] = (),
    make: Callable[[int], nn.Module] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[str]:
    """Put blocks on top of a model's, in place, until there are `layers`.

    Args:
        model: any module. The number of layers in the configuration of a transformers model, and the places that its blocks
            keep (`layer_idx`), follow.
        blocks: dotted name of the `nn.ModuleList`; "": the one that holds the most parameters.
        outputs: ends of the names of parameters of a block that become zero in new ones, such as ("o_proj.weight",
            "down_proj.weight"): all that writes to the residual stream, so that the model computes what it did.
        make: number of a block -> the new block; without it the old ones are copied, again and again from below.
        optimizer: gets the new parameters, each in the group of the parameter that has its name in the block which a copy
            would be of. Those have no state yet, old ones keep theirs. A group that was in the model's order still is, so
            that its checkpoint loads into an optimizer made of the grown model.

    Returns: names of the new parameters that are trained.

    Raises:
        GrowthError: no such list, nothing to add, a gate on the model, an output that no parameter ends with, a made block
            whose parameters have other names or shapes than the old ones', or parameters that the optimizer lacks.
    """
    name, stack = _stack(model, blocks)
    old = len(stack)
    if layers <= old:
        raise GrowthError(f"layers = {layers}: {name or 'the model'} has {old} blocks already; ask for more")
    if gated := next((at for at, m in model.named_modules() if GATE in vars(m)), None):
        raise GrowthError(
            f"{gated}: a gate is attached, which does not know the new blocks: gate.detach(), grow, and attach again"
        )
    template = [dict(block.named_parameters()) for block in stack]
    for end in outputs:
        if not any(key.endswith(end) for key in template[0]):
            raise GrowthError(f"outputs: no parameter of a block ends with {short(end)}: there are {listed(template[0])}")
    made = []
    for number in range(old, layers):
        source = number % old
        block = copy.deepcopy(stack[source]) if make is None else make(number)
        found = dict(block.named_parameters())
        if {k: p.shape for k, p in found.items()} != {k: p.shape for k, p in template[source].items()}:
            differ = sorted(set(found) ^ set(template[source])) or [
                k for k in found if found[k].shape != template[source][k].shape
            ]
            raise GrowthError(f"make({number}): its parameters differ from those of block {source}: {listed(differ)}")
        with torch.no_grad():
            for key, p in found.items():
                p.grad = None
                p.requires_grad_(template[source][key].requires_grad)
                if any(key.endswith(end) for end in outputs):
                    p.zero_()
        like = next(iter(template[source].values()), None)
        made.append((source, block if like is None else block.to(like.device)))
    groups = _Groups(optimizer, model) if optimizer is not None else None
    if groups is not None:
        groups.check(p for found in template for p in found.values())
    new: list[str] = []
    for number, (source, block) in zip(range(old, layers), made, strict=True):
        stack.append(block.train(stack[source].training))
        _place(block, source, number)
        for key, p in block.named_parameters():
            if p.requires_grad:
                new.append(f"{name}.{number}.{key}" if name else f"{number}.{key}")
            if groups is not None:
                groups.add(p, template[source][key])
    _configure(model, old, layers)
    if groups is not None:
        groups.order()
    return new


def _stack(model: nn.Module, blocks: str) -> tuple[str, nn.ModuleList]:
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if blocks and blocks not in lists:
        known = listed(lists) if lists else "none with a block in it"
        raise GrowthError(f"blocks = {short(blocks)}: no nn.ModuleList of that name; the model has {known}")
    if not lists:
        raise GrowthError(f"{type(model).__name__} has no nn.ModuleList with a block in it: nothing that could grow")
    name = blocks or max(lists, key=lambda at: sum(p.numel() for p in lists[at].parameters()))
    return name, lists[name]


def _place(block: nn.Module, source: int, number: int) -> None:
    """The number that transformers' attention keeps, for its cache of keys and values."""
    for part in block.modules():
        if getattr(part, "layer_idx", None) == source:
            part.layer_idx = number  # type: ignore[assignment]


def _configure(model: nn.Module, old: int, layers: int) -> None:
    """The configuration of a transformers model; its forward runs as many blocks as that says."""
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        if getattr(config, "num_hidden_layers", None) == old:
            config.num_hidden_layers = layers
        types: Any = getattr(config, "layer_types", None)
        if isinstance(types, list) and len(types) == old:
            config.layer_types = [types[i % old] for i in range(layers)]


class _Groups:
    """The groups of an optimizer, by whose parameter is in which."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self.model = model
        self.groups = optimizer.param_groups
        self.of = {id(p): group for group in self.groups for p in group["params"]}
        self.sorted = [self._in_order(group["params"]) for group in self.groups]

    def check(self, parameters: Iterator[nn.Parameter]) -> None:
        if any(p.requires_grad and id(p) not in self.of for p in parameters):
            raise GrowthError(
                "the optimizer lacks parameters of the old blocks that ask for a gradient, so it is not known how the new "
                "ones are to be trained: give the optimizer of this model"
            )

    def add(self, p: nn.Parameter, like: nn.Parameter) -> None:
        if id(like) in self.of:
            self.of[id(like)]["params"].append(p)

    def order(self) -> None:
        rank = self._ranks()
        for group, was in zip(self.groups, self.sorted, strict=True):
            if was:
                group["params"].sort(key=lambda p: rank[id(p)])

    def _ranks(self) -> dict[int, int]:
        return {id(p): i for i, p in enumerate(self.model.parameters())}

    def _in_order(self, parameters: Sequence[nn.Parameter]) -> bool:
        rank = self._ranks()
        places = [rank.get(id(p), -1) for p in parameters]
        return min(places, default=0) >= 0 and places == sorted(places)
