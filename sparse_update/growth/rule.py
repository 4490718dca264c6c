"""Rules of growth: what the loop asks of one between two steps, and depth expansion.

A rule changes the model in place, so that all parts which hold it see the new one, and the subset of active weights with
it. The optimizer is then told the new weights by `Optimizer.activate`, which keeps the moments of those that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_update.growth.blocks import cut_to, grow_to
from sparse_update.growth.settings import GrowthConfig
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.subset import Subset


class Growth:
    """Nothing grows. Other rules override what differs.

    `full`: the model's configuration in the end.
    """

    grows = False

    def __init__(self, full: ModelConfig) -> None:
        self.full = full

    def depths(self) -> tuple[int, ...]:
        """Numbers of blocks that the model has from now on, the present one first."""
        return (self.full.layers,)

    def depth_at(self, progress: float) -> int:
        """Number of blocks at `progress` of the budget."""
        return self.full.layers

    def due(self, progress: float) -> bool:
        """Whether `grow` is to be called before the step at `progress` of the budget."""
        return False

    def grow(self, model: Transformer, subset: Subset) -> None:
        """Change model and subset, in place."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], model: Transformer, subset: Subset) -> None:
        """Bring model and subset to the shapes of the checkpoint, before its weights are loaded.

        Raises ValueError for a checkpoint of a run that grew by another rule.
        """
        if state:
            raise ValueError(
                "the checkpoint is of a run whose model grows, and this run has growth.kind = none: resume with the "
                "settings of that run"
            )


class Depth(Growth):
    """Depth expansion (arXiv 2511.04981, who start with no block or one): few blocks first, then all, once.

    Args:
        cfg: when, from how many blocks, and what the new ones start as.
        model: at its full size; it is cut at once.
        seed: of the run; new blocks are drawn by it.
    """

    grows = True

    def __init__(self, cfg: GrowthConfig, model: Transformer, seed: int) -> None:
        super().__init__(model.cfg)
        self.cfg, self.seed, self.grown = cfg, seed, False
        cut_to(model, cfg.start_layers)

    def depths(self) -> tuple[int, ...]:
        return (self.full.layers,) if self.grown else (self.cfg.start_layers, self.full.layers)

    def depth_at(self, progress: float) -> int:
        return self.full.layers if self.grown or progress >= self.cfg.until else self.cfg.start_layers

    def due(self, progress: float) -> bool:
        return not self.grown and progress >= self.cfg.until

    def grow(self, model: Transformer, subset: Subset) -> None:
        grow_to(model, self.full.layers, self.cfg.new_blocks, self.seed)
        self.grown = True
        _renew(subset, model)

    def state_dict(self) -> dict[str, Any]:
        return {"grown": self.grown, "start_layers": self.cfg.start_layers, "layers": self.full.layers}

    def load_state_dict(self, state: Mapping[str, Any], model: Transformer, subset: Subset) -> None:
        own = (self.cfg.start_layers, self.full.layers)
        if (found := (state.get("start_layers"), state.get("layers"))) != own:
            raise ValueError(
                f"the checkpoint is of a model that grows from {found[0]} to {found[1]} blocks, this run's grows from "
                f"{own[0]} to {own[1]}: resume with the settings of that run"
            )
        if state["grown"] and not self.grown:
            self.grow(model, subset)


def make_growth(cfg: GrowthConfig, model: Transformer, seed: int) -> Growth:
    """The rule of `cfg`; a model that grows is cut to what it starts with."""
    return Growth(model.cfg) if cfg.kind == "none" else Depth(cfg, model, seed)


def _renew(subset: Subset, model: Transformer) -> None:
    """The subset's choice among the weights of the model as it is now, at the same turn. For policies whose choice follows
    from turn and seed alone."""
    fresh = Subset(model, subset.cfg, subset.seed)
    if (subset.turn, subset.piece) != (fresh.turn, fresh.piece):
        fresh.at(subset.turn, subset.piece)
    vars(subset).update(vars(fresh))
