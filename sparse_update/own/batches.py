"""Training batches of one run, and where in them it stands: what is drawn while they are made has generators of its own.

A loader that shuffles or augments draws from the process's generators. Here it finds them as its own stream left them, not
as dropout did, so every arm meets the same batches in the same order, and a resumed run can read its way to where it was.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from sparse_update.nested import get_rng_state, set_rng_state
from sparse_update.own.task import TaskError, UserTask

PASS = 1_000_003
"""Added to the seed for every further pass over a loader, so that no pass of one seed is one of another."""


class Batches:
    """Batches without end; iterate over it once.

    Args:
        task: whose loader it is.
        seed: of the run; what the loader draws follows from it.
    """

    def __init__(self, task: UserTask, seed: int) -> None:
        self.task, self.seed = task, seed
        self.epoch = self.taken = 0
        """Times that the loader ended, and batches read since."""
        self._own: dict[str, Any] | None = None
        self._epoch_start: dict[str, Any] | None = None
        self._current: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The next batch. Raises TaskError for a loader without any."""
        before = get_rng_state()
        try:
            self._enter()
            with _disable_current_modes():  # the loader is on no arm's clock
                return self._take()
        finally:
            self._own = get_rng_state()
            set_rng_state(before)

    def _enter(self) -> None:
        if self._own is None:
            seed_all(self.seed)
        else:
            set_rng_state(self._own)

    def _take(self) -> Any:
        if self._current is None:
            self._begin()
        assert self._current is not None
        batch = next(self._current, _END)
        if batch is _END:
            if not self.taken:
                raise TaskError("train gave no batch: is its data set empty, or smaller than one batch (drop_last)?")
            self.epoch, self.taken = self.epoch + 1, 0
            self._begin()
            batch = next(self._current, _END)
            if batch is _END:
                raise TaskError(
                    f"train ended after its first pass and gave no batch when it was read again (pass {self.epoch + 1}): "
                    "give a loader that can be read again, or a function that makes a new iterator"
                )
        self.taken += 1
        return batch

    def _begin(self) -> None:
        self._epoch_start = get_rng_state()
        self._current = self.task.batches("train", self.seed + PASS * self.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands in its batches."""
        return {"epoch": self.epoch, "taken": self.taken, "own": self._own, "epoch_start": self._epoch_start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read up to where the state was taken, in a pass that starts as that one did.

        Raises TaskError where the loader now ends before that place.
        """
        self.epoch, self.taken, self._own = int(state["epoch"]), 0, state["own"]
        if state["epoch_start"] is None:
            return
        before = get_rng_state()
        try:
            set_rng_state(state["epoch_start"])
            self._begin()
            assert self._current is not None
            for number in range(int(state["taken"])):
                if next(self._current, _END) is _END:
                    raise TaskError(
                        f"the run had read {int(state['taken'])} batches of this pass and train now ends after {number}: "
                        "resume with the data that the run began with"
                    )
            self.taken = int(state["taken"])
        finally:
            set_rng_state(before)


_END = object()


def seed_all(seed: int) -> None:
    """Set the process's generators: torch's, Python's and numpy's old global one."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def held_out(task: UserTask, seed: int) -> Iterator[Any]:
    """All held-out batches, in a stream of draws of their own. Raises TaskError where there are none."""
    before = get_rng_state()
    seed_all(seed)
    own = get_rng_state()
    set_rng_state(before)
    current: Iterator[Any] | None = None
    number = 0
    while True:
        before = get_rng_state()
        set_rng_state(own)
        try:
            if current is None:
                current = task.batches("held_out", seed)
            batch = next(current, _END)
        finally:
            own = get_rng_state()
            set_rng_state(before)
        if batch is _END:
            break
        number += 1
        yield batch
    if not number:
        raise TaskError("held_out gave no batch: is its data set empty, or smaller than one batch (drop_last)?")
