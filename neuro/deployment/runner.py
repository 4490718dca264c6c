"""What every runner of a segment is: float in, integers through the graph, float out, and what was counted on the way."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from hardware.energy.account import Counts
from hardware.text import quoted
from neuro.analysis.state import Account
from neuro.conversion.plan import Segment

BACKENDS = ("fixed_point", "quantised")


@dataclass(frozen=True)
class SegmentHealth:
    """What went beyond its range in one segment.

    `clipped_inputs` of `inputs` values were beyond int8; `wraps`: sums or products beyond 32 bits; `wide`: values that
    a 24-bit register could not hold; `payload_overflows`: messages beyond their projection's width;
    `max_payload_bits`: widest message per population, sign included.
    """

    segment: str
    inputs: int
    clipped_inputs: int
    wraps: int
    wide: int
    payload_overflows: int
    max_payload_bits: dict[str, int]


class SegmentRunner(Account):
    """One segment on one backend, with its counters. Not a module: the stand-ins of a pair share it.

    Attributes:
        segment, backend: what runs, and on which of `BACKENDS`.
        mode: of the simulator, "lava" or "chip".
        layers: layer of `counts()` -> populations of the graph that stand for it.
        notes: what the simulator had to say about the graph.
        keep_state: whether a call goes on where the one before ended; only runners of streams have such a state.
        pending: between the two stand-ins of a pair: what should reach the second, and what it then gives.
        rows: rows (tokens) run since the last reset.
    """

    layers: dict[str, tuple[str, ...]]

    def __init__(self, segment: Segment, backend: str, mode: str = "lava") -> None:
        self.segment, self.backend, self.mode = segment, backend, mode
        self.notes: tuple[str, ...] = ()
        self.keep_state = False
        self.pending: tuple[Tensor, Tensor] | None = None
        self._warned = False

    def reset(self) -> None:
        """Forget all counts; the state of a stream stays."""
        self.rows = 0
        self._inputs = self._clipped = self._wraps = self._wide = self._overflows = 0

    def reset_state(self) -> None:
        """The next call starts from rest."""

    def run(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output (..., n_out) and, for a pair, the rectified hidden values (..., n_hidden), both in x's dtype.

        Raises:
            RuntimeError: an input that asks for gradients.
            ValueError: an input of another type or width, or with NaN or infinite values.
        """
        s = self.segment
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(f"segment {quoted(s.name)} is integer arithmetic without gradients; use torch.no_grad()")
        if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] != s.n_in:
            raise ValueError(f"segment {quoted(s.name)} takes floats (..., {s.n_in}), not {x.dtype} {tuple(x.shape)}")
        found = self._run_quickly(x) if x.numel() else None
        if found is None and not bool(torch.isfinite(x).all()):
            raise ValueError(f"segment {quoted(s.name)} got NaN or infinite inputs, which no integer payload can carry")
        if not x.numel():
            hidden = x.new_zeros(*x.shape[:-1], s.n_hidden) if s.n_hidden else None
            return x.new_zeros(*x.shape[:-1], s.n_out), hidden
        self.rows += x.numel() // s.n_in
        self._inputs += x.numel()
        if found is not None:
            return found
        found = self._run(x)
        self._warn()
        return found

    def _run_quickly(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """As `_run`, where a runner has a shorter way for finite inputs in which no value leaves its word; else None."""
        return None

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def health(self) -> SegmentHealth:
        """Range violations since the last reset."""
        raise NotImplementedError

    def counts(self) -> list[Counts]:
        """One record per entry of `layers`."""
        raise NotImplementedError

    def _warn(self) -> None:
        if not self._warned and (self._wraps or self._wide or self._overflows):
            self._warned = True
            warnings.warn(
                f"segment {quoted(self.segment.name)}: {self._wraps} wrapped sums, {self._wide} values beyond 24 bits, "
                f"{self._overflows} messages beyond their width; calibrate on more data or convert with fewer bits",
                RuntimeWarning,
                stacklevel=4,
            )
