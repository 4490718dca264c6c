"""What a sweep file says, as runs with names, folders and overrides.

A sweep file (YAML):

    folder: runs/sweep/redundant        # where everything goes
    settings: [experiment=redundant]    # overrides of every run
    budget_tokens: 3000000              # the dense budget: what plain training takes for that, by the shared table
                                        # (or budget_reference_s: 40.0)
    seeds: [0, 1, 2]
    base: [experiment=clean]            # optional: one run before all others; {base} in settings is its folder
    arms:
      dense: {grid: {optim.muon_lr: [0.03, 0.04]}}
      surprise: {set: [gate=surprise, gate.keep_fraction=0.5], budgets: [0.5, 0.6, 0.8, 1.0]}

`budgets` are shares of the dense budget, a run for each, its schedule decayed for it: what "time to the dense end loss" is
read from. `grid` is tried at the full budget with `tuning_seed`, every combination; the arm's runs use the one with the
lowest held-out loss. `tuned_as: ARM` takes another arm's choice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.runs.folder import RunError, read_json
from experiments.runs.hydra_app import quoted
from experiments.runs.plain_json import write_json


@dataclass(frozen=True)
class Job:
    """One training run: its folder's name, and its overrides without those that the sweep adds."""

    name: str
    words: tuple[str, ...]

    def folder(self, sweep: Path) -> Path:
        return sweep / self.name


@dataclass(frozen=True)
class SweepArm:
    """One arm of a sweep file. `grid`: setting -> values to try; `seeds` empty: those of the sweep."""

    name: str
    settings: tuple[str, ...] = ()
    budgets: tuple[float, ...] = (1.0,)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tuned_as: str = ""
    seeds: tuple[int, ...] = ()

    def choices(self) -> list[tuple[str, ...]]:
        """Every combination of the grid as overrides; one empty combination without a grid."""
        columns = [[f"{key}={value}" for value in values] for key, values in self.grid.items()]
        return list(itertools.product(*columns))


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked."""

    folder: Path
    settings: tuple[str, ...]
    budget_reference_s: float
    seeds: tuple[int, ...]
    arms: tuple[SweepArm, ...]
    base: tuple[str, ...] = ()
    tuning_seed: int = 1000
    budget_tokens: int = 0
    """Instead of `budget_reference_s`: tokens of plain training; the table of component times turns them into seconds."""

    def job(self, name: str, arm: str, words: Sequence[str], share: float, seed: int) -> Job:
        base = [word.replace("{base}", quoted(self.folder / "base")) for word in (*self.settings, *words)]
        budget = f"trainer.budget_reference_s={self.budget_reference_s * share:g}"
        return Job(name, (*base, f"arm={arm}", f"seed={seed}", budget))

    @property
    def table(self) -> Path:
        """The table of component times of all runs: measured once and shared where there is one, else as priced for the run
        `clock` by the shipped one."""
        shared = self.folder / "component_times.json"
        return shared if shared.exists() else self.folder / "clock" / "component_times.json"

    def clock_jobs(self) -> list[Job]:
        """A run of one step, whose table of component times says what a token costs; where the budget is given in
        tokens."""
        if not self.budget_tokens:
            return []
        words = [word for word in self.settings if "{base}" not in word]
        return [Job("clock", (*words, "stream=clock", "trainer.budget_reference_s=1", "trainer.budget_offered_tokens=1"))]

    def with_budget(self) -> Sweep:
        """This sweep with its budget in reference seconds. Raises RunError while there is no table."""
        if not self.budget_tokens:
            return self
        from sparse_update.clock.cost import ComponentTimes  # brings torch, which nothing else here needs

        if not self.table.exists():
            raise RunError(f"{self.table}: no table of component times, so {self.budget_tokens} tokens have no price yet")
        times = ComponentTimes.load(self.table)
        seconds = self.budget_tokens / (times.batch * int(times.model["context"])) * times.dense_ms / 1000
        return replace(self, budget_reference_s=round(seconds, 3), budget_tokens=0)

    def base_jobs(self) -> list[Job]:
        if not self.base:
            return []
        budget = f"trainer.budget_reference_s={self.budget_reference_s:g}"
        return [Job("base", (budget, *self.base, "stream=base", f"seed={self.tuning_seed}"))]

    def tuning_jobs(self) -> list[Job]:
        """One run per point of each grid that has a choice."""
        return [
            self.job(
                f"tuning/{arm.name}-{i}", arm.name, (*arm.settings, *words, f"stream=tuning {arm.name} {i}"), 1.0, seed
            )
            for arm in self.arms
            for i, words in enumerate(arm.choices())
            if len(arm.choices()) > 1
            for seed in (self.tuning_seed,)
        ]

    def chosen(self, arm: SweepArm) -> tuple[str, ...]:
        """The overrides that tuning found for `arm`, among those tuning runs that are finished. Raises RunError where none
        is."""
        if arm.tuned_as:
            return self.chosen(next(other for other in self.arms if other.name == arm.tuned_as))
        choices = arm.choices()
        if len(choices) == 1:
            return choices[0]
        losses = {}
        for i, words in enumerate(choices):
            run = self.folder / "tuning" / f"{arm.name}-{i}"
            if (run / "result.json").exists():
                value = float(read_json(run / "result.json")["loss_nats"])
                losses[words] = value if math.isfinite(value) else math.inf
        if not losses:
            raise RunError(f"no tuning run of arm {arm.name} is finished ({self.folder}/tuning/{arm.name}-0, ...)")
        return min(losses, key=losses.__getitem__)

    def untuned(self) -> dict[str, str]:
        """Arm -> why it cannot run: none of the runs that its settings are chosen by is finished."""
        found = {}
        for arm in self.arms:
            try:
                self.chosen(arm)
            except RunError as error:
                found[arm.name] = str(error)
        return found

    def main_jobs(self, without: Collection[str] = ()) -> list[Job]:
        """Arms in turn within each seed, full budgets first: what an interrupted sweep leaves can be compared.

        `without`: arms left out. Raises RunError for an arm that is not tuned yet.
        """
        jobs = []
        arms = [arm for arm in self.arms if arm.name not in without]
        for seed_number, full in itertools.product(range(self._most_seeds()), (True, False)):
            for arm in arms:
                seeds = arm.seeds or self.seeds
                for share in arm.budgets if seed_number < len(seeds) else ():
                    if (share == max(arm.budgets)) == full:
                        seed = seeds[seed_number]
                        words = (*arm.settings, *self.chosen(arm))
                        jobs.append(self.job(f"{arm.name}-b{share:g}-s{seed}", arm.name, words, share, seed))
        return jobs

    def _most_seeds(self) -> int:
        return max(len(arm.seeds or self.seeds) for arm in self.arms)


def finished(run: Path) -> bool:
    """Whether the run's record says that it came to its end."""
    note = run / "run.json"
    return note.exists() and read_json(note).get("status") == "finished"


def settle(sweep: Path, jobs: Iterable[Job]) -> None:
    """Note the settings of every job. Raises RunError where a finished run of the same name was made with others.

    A run that failed or was interrupted is no obstacle: it is taken up again with the settings that it has now.
    """
    note = sweep / "sweep.json"
    before: dict[str, Any] = read_json(note) if note.exists() else {}
    for job in jobs:
        words = list(job.words)
        if job.name in before and before[job.name] != words and finished(job.folder(sweep)):
            differ = sorted(set(before[job.name]) ^ set(words))
            raise RunError(
                f"{job.folder(sweep)} is finished and was made with other settings ({', '.join(differ)}): remove that "
                "folder, name the arm differently, or take another `folder`"
            )
        before[job.name] = words
    write_json(note, before)
