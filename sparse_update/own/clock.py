"""The clock of one run: each step's work counted where its like was not seen before, and priced.

Two steps are alike where the batch has the same shapes, the same weights are active and as many of them have moments. The
first two of each kind are counted; where they differ (a mixture of experts, say), every step of that kind is.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparse_update.library.attach import Gate
from sparse_update.own.arms import DENSE, OwnArm
from sparse_update.own.counting import PARTS, Count, Counting, Work, flops_of
from sparse_update.own.prices import Prices

FILTER_OPERATIONS = 3
"""Operations for a sequence that a filter before the forward looks at: taken apart, put into a pool, put into a batch;
beside a signal that has a price of its own."""
Part = Callable[[str], AbstractContextManager[None]]
"""Counts, or not, what runs in a block towards a part of the step."""


def _nothing(name: str) -> AbstractContextManager[None]:
    return nullcontext()


class OwnClock:
    """Counts steps by what they do.

    Args:
        prices: the table of the comparison.
        arm: whose steps they are.
        model, gate, optimizer: the arm's; the gate is None for plain training.
    """

    def __init__(
        self, prices: Prices, arm: OwnArm, model: nn.Module, gate: Gate | None, optimizer: torch.optim.Optimizer
    ) -> None:
        self.prices, self.arm, self.model, self.gate, self.optimizer = prices, arm, model, gate, optimizer
        self.work: dict[str, Work] = {}
        """What a step of each kind does, by the kind's key."""
        self.uses: Counter[str] = Counter()
        self.confirmed: dict[str, bool] = {}
        """Whether a second step of the kind did the same."""
        self.unknown: set[str] = set()
        self.last_counted = False
        self.filter_work = Count()
        """What choosing `filter_counted` sequences did."""
        self.filter_counted = 0
        self._seconds: dict[str, float] = {}

    def key(self, batch: Any) -> str:
        """Key of the kind of step that this batch makes now."""
        shapes = [[list(t.shape), str(t.dtype)] for t in tree_leaves(batch) if isinstance(t, Tensor)]
        named = self.model.named_parameters() if self.gate is None else self.gate.named_parameters()
        active = [[name, list(p.shape)] for name, p in named if p.requires_grad]
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        fresh = sum(p not in self.optimizer.state for p in held)  # whose moments are made in this step
        text = json.dumps([shapes, active, fresh, self.model.training])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @contextmanager
    def counted(self, key: str) -> Iterator[Part]:
        """For one step of that kind: counts it where it has to be, and charges it."""
        must = key not in self.work or self.confirmed.get(key) is not True
        self.last_counted = must
        if not must:
            yield _nothing
            self.uses[key] += 1
            return
        strips = [] if self.gate is None else self.gate.parameters()
        counting = Counting([*self.model.parameters(), *strips])
        yield counting.part
        self.unknown |= counting.unknown
        self._note(key, counting.work)

    def _note(self, key: str, work: Work) -> None:
        """Take a counted step down; where its kind's first one did something else, under a key of its own."""
        if not work["backward_dx"].operations:  # a step that moved nothing, its loss not finite
            key = f"{key}:skipped"
            self.work.setdefault(key, work)
            self.uses[key] += 1
            return
        if key not in self.work:
            self.work[key] = work
            self.uses[key] += 1
            return
        same = self.work[key] == work
        self.confirmed[key] = same and self.confirmed.get(key, True)
        if same:
            self.uses[key] += 1
            return
        text = json.dumps({part: count.to_json() for part, count in work.items()}, sort_keys=True)
        own = f"{key}:{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
        self.work.setdefault(own, work)
        self.uses[own] += 1

    @contextmanager
    def filtering(self) -> Iterator[None]:
        """For taking the next batch: counts what choosing it does, until two pools were seen."""
        pool = None if self.gate is None else self.gate.pool
        if pool is None or pool.cfg.signal == "none" or self.filter_counted >= 2 * pool.cfg.pool:
            yield
            return
        before = pool.offered
        counting = Counting([])
        with counting.part("gate"):
            yield
        if pool.offered > before:
            self.filter_counted += pool.offered - before
            self.filter_work.add(counting.work["gate"])

    def step_s(self, key: str) -> float:
        """Reference seconds of a step of that kind; of the dearest kind so far where it was not seen, 0 where none was."""
        if key in self.work:
            if key not in self._seconds:
                self._seconds[key] = self.prices.total_s(self.work[key], self.arm.kind)
            return self._seconds[key]
        return max((self.step_s(other) for other in self.work), default=0.0)

    @property
    def steps_s(self) -> float:
        """Reference seconds of all steps so far."""
        return sum(times * self.step_s(key) for key, times in self.uses.items())

    @property
    def filter_s(self) -> float:
        """Reference seconds of choosing sequences before the forward."""
        if self.gate is None or not self.gate.pool.offered:
            return 0.0
        offered, signal = self.gate.pool.offered, self.gate.pool.signal
        by_signal = None
        if signal is not None and signal.cost_key:
            by_signal = self.prices.signal_s(signal.cost_key, signal.flops(1), offered)
        if by_signal is not None or not self.filter_counted:
            operations = FILTER_OPERATIONS * offered * self.prices.prices_ps["operations"]
            return 1e-12 * self.prices.scale * operations + (by_signal or 0.0)
        counted = (
            sum(self.prices.step_s({"gate": self.filter_work}, DENSE).values()) - self.prices.step_s({}, DENSE)["step"]
        )
        return counted * offered / self.filter_counted

    @property
    def reference_s(self) -> float:
        """Spent so far."""
        return self.steps_s + self.filter_s

    @property
    def flops(self) -> int:
        """Operations of all matrix products of the steps so far."""
        return sum(times * flops_of(self.work[key]) for key, times in self.uses.items()) + self.filter_flops

    @property
    def filter_flops(self) -> int:
        """Of it, those of scoring forwards."""
        if not self.filter_counted or self.gate is None:
            return 0
        return self.filter_work.flops * self.gate.pool.offered // self.filter_counted

    def by_part(self) -> dict[str, dict[str, float]]:
        """Part of a step -> {"reference_s", "flops"} so far, with "filter" for what comes before the forward."""
        seconds, flops = dict.fromkeys((*PARTS, "step"), 0.0), dict.fromkeys(PARTS, 0)
        for key, times in self.uses.items():
            for part, value in self.prices.step_s(self.work[key], self.arm.kind).items():
                seconds[part] += times * value
            for part in PARTS:
                flops[part] += times * self.work[key][part].flops
        found = {part: {"reference_s": seconds[part], "flops": flops.get(part, 0)} for part in seconds}
        return {**found, "filter": {"reference_s": self.filter_s, "flops": self.filter_flops}}

    @property
    def gate_s(self) -> float:
        """Of it, what the gate does beside the step: choosing sequences before it, and what follows the optimizer."""
        own = sum(times * self.prices.step_s(self.work[key], self.arm.kind)["gate"] for key, times in self.uses.items())
        return self.filter_s + own

    @property
    def notes(self) -> list[str]:
        """What a reader must know about the count, in sentences."""
        found = []
        if self.unknown:
            found.append(f"operations of unknown cost, whose products are not counted: {', '.join(sorted(self.unknown))}")
        if any(same is False for same in self.confirmed.values()):
            found.append("steps of one shape do not do the same here, so each was counted (its wall seconds are longer)")
        return found

    def state_dict(self) -> dict[str, Any]:
        work = {key: {part: count.to_json() for part, count in work.items()} for key, work in self.work.items()}
        return {
            "work": json.dumps(work),
            "uses": dict(self.uses),
            "confirmed": dict(self.confirmed),
            "unknown": sorted(self.unknown),
            "filter": {"work": json.dumps(self.filter_work.to_json()), "counted": self.filter_counted},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raw = json.loads(state["work"])
        self.work = {key: {part: Count.from_json(one) for part, one in work.items()} for key, work in raw.items()}
        self.uses = Counter({str(key): int(times) for key, times in state["uses"].items()})
        self.confirmed = {str(key): bool(same) for key, same in state["confirmed"].items()}
        self.unknown = set(state["unknown"])
        self.filter_work = Count.from_json(json.loads(state["filter"]["work"]))
        self.filter_counted = int(state["filter"]["counted"])
        self._seconds = {}
