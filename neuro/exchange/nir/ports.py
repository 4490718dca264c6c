"""Where the values of a file's Inputs and Outputs lie in the layers of its description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hardware.text import quoted
from neuro.conversion.spiking.description import Description
from neuro.exchange.nir.library import NotInNir
from neuro.exchange.nir.linear_maps import Shape
from neuro.exchange.nir.synapse_nodes import Grid, ours_at


@dataclass(frozen=True)
class Port:
    """An Input or Output of the file, and where its values lie in a layer.

    Attributes:
        name: of the node.
        layer: name of the description's layer; `INPUT` for an input.
        shape: NIR's, (C, X, Y) for instance.
        grid: (W, H, C) where the layer is kept in our order of (x, y, channel), else None.
    """

    name: str
    layer: str
    shape: Shape
    grid: Grid | None

    def arranged(self, x: Tensor) -> Tensor:
        """Values (..., *shape) in the layer's order, (..., N)."""
        if tuple(x.shape[-len(self.shape) :]) != self.shape:
            raise NotInNir(
                f"node {quoted(self.name)}: values have shape {tuple(x.shape)}; (..., {_commas(self.shape)}) is needed"
            )
        flat = x.reshape(*x.shape[: x.dim() - len(self.shape)], -1)
        if self.grid is None:
            return flat
        found = torch.empty_like(flat)
        found[..., torch.from_numpy(ours_at(self.grid))] = flat
        return found

    def restored(self, x: Tensor) -> Tensor:
        """Values (..., N) of the layer in NIR's order, (..., *shape)."""
        flat = x if self.grid is None else x[..., torch.from_numpy(ours_at(self.grid))]
        return flat.reshape(*x.shape[:-1], *self.shape)


@dataclass(frozen=True)
class Described:
    """A description, and how values of the file lie in it.

    Attributes:
        description: of the network.
        input: of the file.
        outputs: of the file, in the order of their names.
        starts: name of a layer -> v_reset, float64 (N,), where it is not 0: v of the layer counts from it.
    """

    description: Description
    input: Port
    outputs: tuple[Port, ...]
    starts: Mapping[str, np.ndarray] = field(default_factory=dict)


def _commas(shape: Shape) -> str:
    return ", ".join(map(str, shape))
