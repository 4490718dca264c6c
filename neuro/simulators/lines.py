"""Messages on their way: those of a chunk of steps, and as many steps before as delays ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from neuro.graph import Projection
from neuro.simulators.exact import Exact, narrow
from neuro.simulators.memory import copied, write, zeros


class Line:
    """Messages of one output port: those of this chunk, and as many steps before as the longest delay asks for."""

    def __init__(self, past: int, batch: int, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self._past = past
        self.whole = zeros((past, batch, size), dtype, device)
        self._room = self.whole  # of the largest chunk so far, which later ones use again
        self.bound, self.share, self.bound_before = 0, 1.0, 0
        self._before: list[tuple[int, int]] = []  # (steps, bound) of chunks that the past still holds, newest first

    def _end_chunk(self) -> None:
        """Note the bound of the chunk that ends: the past may hold several, where chunks are shorter than delays."""
        found, steps = [(len(self.whole) - self._past, self.bound), *self._before], 0
        self._before = []
        for chunk in found:
            if steps >= self._past:
                break
            self._before.append(chunk)
            steps += chunk[0]
        self.bound_before = max(bound for _, bound in self._before)

    def begin(self, steps: int) -> Tensor:
        """Room for a chunk's messages, to be written in place; returns it."""
        self._end_chunk()
        past = copied(self.whole[len(self.whole) - self._past :])
        if self._room.dtype != past.dtype or len(self._room) < self._past + steps:
            self._room = past.new_empty(self._past + steps, *past.shape[1:])
        whole = self._room[: self._past + steps]
        write(whole[: self._past], past)
        self.whole = whole
        return whole[self._past :]

    def put(self, messages: Tensor, bound: int, share: float) -> None:
        """A chunk's messages, made elsewhere."""
        self._end_chunk()
        past = self.whole[len(self.whole) - self._past :]
        dtype = narrow(max(self.bound_before, bound))
        self.whole = torch.cat([past.to(dtype), messages.to(dtype)])
        self.bound, self.share = bound, share

    def read(self, delay: int, rows: slice) -> Exact:
        """Messages that arrive at `rows` of this chunk, 1 + delay steps after they were sent."""
        first = self._past - 1 - delay
        bound = max(self.bound, self.bound_before)
        return Exact(self.whole[first + rows.start : first + rows.stop], bound, self.share)

    def arriving(self, delay: int, row: int, delayed: bool = True) -> Tensor:
        """Messages that arrive from row `row` of this chunk on."""
        return self.whole[self._past + row - (1 + delay) * delayed :]

    def now(self) -> Exact:
        """This chunk's messages without delay."""
        return Exact(self.whole[self._past :], self.bound, self.share)


def synapses_of(projection: Projection, neuron: int) -> list[tuple[int, int, int]]:
    """(weight, delay, source) of every synapse of one target."""
    if projection.conv is None:
        row = projection.weight[neuron].tolist()
        delays = [0] * len(row) if projection.delays is None else projection.delays[neuron].tolist()
        return list(zip(row, delays, range(len(row)), strict=True))
    channels = len(projection.weight)
    position, channel = divmod(neuron, channels)
    group = channel // (channels // projection.conv.groups)
    sources = projection.conv.patches(projection.weight.shape)[position, group].tolist()
    weights = projection.weight[channel].reshape(-1).tolist()
    return [(weight, 0, source) for weight, source in zip(weights, sources, strict=True) if source >= 0]
