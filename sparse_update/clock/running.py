"""The clock of one run: what it has used of each component, and the reference seconds that this makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparse_update.clock.component import SCORING_FORWARD, Component, at_depth
from sparse_update.clock.cost import ComponentTimes, Step, optimizer_tag
from sparse_update.step.plan import PLAIN, StepPlan
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import Active

Measure = Callable[[ComponentTimes, Sequence[Step], Mapping[str, Component]], ComponentTimes]
"""A table, and the steps and components that it lacks -> the table with them."""
Components = Callable[[], Mapping[str, Component]]


class RunClock:
    """Counts uses and prices them by a table of component times.

    Args:
        times: the table.
        optim: of the run; steps of another optimizer than the table's have entries of their own.
        active: the weights that are updated now, None for all of them.
        batch_windows: windows of a step.
        layers: blocks that the model has now, None for the table's.
        measure: extends the table by what it lacks; without it a missing entry is an error.
    """

    def __init__(
        self,
        times: ComponentTimes,
        optim: OptimConfig,
        active: Callable[[], Active | None],
        batch_windows: int,
        measure: Measure | None = None,
        layers: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.times, self.optim, self.active, self.measure, self.layers = times, optim, active, measure, layers
        self.batch_windows = batch_windows
        self.uses: Counter[str] = Counter()
        """Steps taken, by key of the table."""
        self.others: list[Any] = []
        """What counts uses of its own in `uses`: the gate, and streams that look at windows."""
        self.recomputes = False
        """Whether a step's backward runs the forward of the blocks once more."""
        self._components: list[Components] = []

    def add(self, components: Components, user: Any = None) -> None:
        """Price these components too; a `user` counts its uses of them in its attribute `uses`."""
        self._components.append(components)
        if hasattr(user, "uses"):
            self.others.append(user)

    def step(self, plan: StepPlan, batch: int, length: int, layers: int | None = None) -> Step:
        """What the time of a step by `plan` depends on, now; or on a model of so many `layers`."""
        tag = optimizer_tag(self.optim)
        tag = "" if tag == self.times.model.get("optimizer", tag) else tag
        found = self.layers() if layers is None else layers
        return Step(plan, self.active(), batch, length, tag, None if found == self.times.model.get("layers") else found)

    def key(self, step: Step) -> str:
        """The step's key in the table."""
        return self.times.key(step)

    def components(self) -> dict[str, Component]:
        """Everything that may be used beside the steps."""
        return {key: component for found in self._components for key, component in found().items()}

    def require(self, steps: Sequence[Step], components: Mapping[str, Component]) -> None:
        """Entries for all of these in the table: measured now where they are missing and can be.

        Raises ComponentTimesError where they cannot.
        """
        missing = [step for step in steps if not self.times.has(self.times.key(step))]
        lacking = {key: use for key, use in components.items() if not self.times.has(key)}
        if (missing or lacking) and self.measure is not None:
            self.times = self.measure(self.times, missing, lacking)
        for key in [self.times.key(step) for step in steps] + list(components):
            self.times.ms_of(key)

    def beside(self, step: Step) -> dict[str, int]:
        """Uses of components that come with a step. A forward that is run once more is priced as one that scores, by
        windows of the whole context; that has the head in it, so it is not too low."""
        if not self.recomputes:
            return {}
        windows = -(-step.batch * step.length // int(self.times.model["context"]))
        return {at_depth(SCORING_FORWARD, step.layers): windows}

    def seconds(self, step: Step) -> float:
        """Reference seconds of one such step."""
        key = self.times.key(step)
        if not self.times.has(key):
            self.require([step], {})
        return self.times.ms_of(key) / 1000 + self.times.seconds(self.beside(step))

    def over_plain(self, step: Step, windows: int | None = None) -> float:
        """What one such step costs, over a plain one of the table's own batch and length on the model as it is now; or of
        so many `windows`, where a run's own batches differ."""
        scheduled = windows is not None and windows != self.batch_windows
        if step.layers is None and not scheduled:
            return self.seconds(step) / (self.times.dense_ms / 1000)
        batch = windows if scheduled and windows is not None else self.times.batch
        plain = Step(PLAIN, None, batch, int(self.times.model["context"]), step.optimizer, step.layers)
        return self.seconds(step) / self.seconds(plain)

    def charge(self, key: str) -> None:
        """One use of a component, a whole step as a rule."""
        self.uses[key] += 1

    @property
    def other_reference_s(self) -> float:
        """Spent beside the steps: scoring, proxies, probes, filters."""
        extra: Counter[str] = Counter()
        for user in self.others:
            extra += Counter(user.uses)
        lacking = [key for key in extra if not self.times.has(key)]
        if lacking:
            self.require([], {key: use for key, use in self.components().items() if key in lacking})
        return self.times.seconds(extra)

    @property
    def reference_s(self) -> float:
        """Spent so far, in reference seconds."""
        return self.times.seconds(self.uses) + self.other_reference_s
