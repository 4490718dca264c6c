"""Which weights are updated: whole layers, or row blocks of each matrix; the rest costs no gradient and no state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sparse_update.transformer import Transformer

KINDS = ("all", "layers", "blocks")
POLICIES = ("rotate", "random")


@dataclass
class SubsetConfig:
    """Choice of active weights. Raises ValueError for a fraction outside (0, 1] or an unknown kind."""

    name: str = "all"
    kind: str = "all"
    """"all" | "layers": whole blocks of the Transformer | "blocks": contiguous output rows of every matrix."""
    active_fraction: float = 1.0
    policy: str = "rotate"
    change_every_steps: int = 100
    """How long a choice stays: optimizer moments start from zero with each new choice."""
    block_rows: int = 16
    """Granularity of output rows for kind "blocks"; 128 suits a GPU."""
    train_embeddings: bool = True
    """Embedding, head and final norm stay active with kind "layers"; then the backward runs to the bottom."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"subset.kind = {self.kind!r}: one of {', '.join(KINDS)}")
        if self.policy not in POLICIES:
            raise ValueError(f"subset.policy = {self.policy!r}: one of {', '.join(POLICIES)}")
        if not 0 < self.active_fraction <= 1:
            raise ValueError(f"subset.active_fraction = {self.active_fraction}: must lie in (0, 1]")
        if self.change_every_steps < 1 or self.block_rows < 1:
            raise ValueError("subset.change_every_steps and subset.block_rows must be at least 1")
        if self.kind == "all" and self.active_fraction != 1.0:
            raise ValueError("subset.active_fraction below 1 needs subset.kind = layers or blocks")


@dataclass(frozen=True)
class Active:
    """Active rows: parameter name -> (start, stop) along dimension 0. Names that are missing are frozen.

    `lowest_block`: index of the lowest block that a gradient must reach; `number of blocks` if none.
    """

    rows: Mapping[str, tuple[int, int]]
    lowest_block: int

    @staticmethod
    def everything(model: Transformer) -> Active:
        return Active({name: (0, p.shape[0]) for name, p in model.named_parameters()}, 0)

    def fraction(self, model: Transformer) -> float:
        """Share of all parameters that are active."""
        sizes = {name: p.numel() / p.shape[0] for name, p in model.named_parameters()}
        total = sum(p.numel() for p in model.parameters())
        return sum(sizes[name] * (stop - start) for name, (start, stop) in self.rows.items()) / total


def choose(model: Transformer, cfg: SubsetConfig, turn: int, seed: int) -> Active:
    """The active weights of the `turn`-th choice; a pure function of its arguments, so that a resumed run repeats it."""
    if cfg.kind == "all":
        return Active.everything(model)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
    return (_layers if cfg.kind == "layers" else _blocks)(model, cfg, turn, generator)


def _layers(model: Transformer, cfg: SubsetConfig, turn: int, generator: torch.Generator) -> Active:
    count = len(model.blocks)
    wanted = max(1, round(cfg.active_fraction * count))
    if cfg.policy == "rotate":
        chosen = {(turn * wanted + i) % count for i in range(wanted)}
    else:
        chosen = set(torch.randperm(count, generator=generator)[:wanted].tolist())
    rows = {}
    for name, p in model.named_parameters():
        part = name.split(".")
        if (part[0] == "blocks" and int(part[1]) in chosen) or (part[0] != "blocks" and cfg.train_embeddings):
            rows[name] = (0, p.shape[0])
    return Active(rows, 0 if "embed.weight" in rows else min(chosen))


def _blocks(model: Transformer, cfg: SubsetConfig, turn: int, generator: torch.Generator) -> Active:
    rows = {}
    for name, p in model.named_parameters():
        if p.dim() == 2 and name.startswith("blocks."):
            rows[name] = _span(p.shape[0], cfg, turn, generator)
        else:
            rows[name] = (0, p.shape[0])
    return Active(rows, 0)


def _span(size: int, cfg: SubsetConfig, turn: int, generator: torch.Generator) -> tuple[int, int]:
    """One contiguous run of whole row blocks out of `size` rows."""
    pieces = -(-size // cfg.block_rows)
    wanted = max(1, round(cfg.active_fraction * pieces))
    places = -(-pieces // wanted)
    place = turn % places if cfg.policy == "rotate" else int(torch.randint(places, (1,), generator=generator))
    first = min(place * wanted, pieces - wanted)
    return first * cfg.block_rows, min((first + wanted) * cfg.block_rows, size)
