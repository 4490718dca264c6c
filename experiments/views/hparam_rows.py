"""Rows and columns of TensorBoard's hparams table: what a row is called, and which settings it has.

A row has every setting of its run under the key that sets it on the command line, so that any two runs can be told apart.
TensorBoard puts the columns in which the rows differ first, then sorts by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.comparison.record import Arm, Comparison, DeployedGroup, Deployment, Run, Stream
from experiments.comparison.settings import differing

Value = str | float | bool
Row = dict[str, Value]

# Settings that a comparison always announces as columns, beside all that differ between its runs.
ALWAYS = (
    "data.garbage_fraction", "data.regime", "gate.keep_fraction", "gate.noise_cut", "gate.policy", "gate.signal",
    "gate.unit", "model.name", "optim.lr", "optim.muon_lr", "optim.name", "subset.name", "trainer.batch_windows",
    "trainer.budget_reference_s",
)  # fmt: skip
LABELS = frozenset(("gate.name",))  # names of configuration files; the arm says more


@dataclass(frozen=True)
class TableRow:
    """One row: the name that TensorBoard shows for it, and its settings by column."""

    name: str
    settings: Row


@dataclass(frozen=True)
class TableColumn:
    """One column: its key, whether its values are numbers, and whether they differ between the rows."""

    key: str
    numeric: bool
    differs: bool


def run_row(stream: str, arm: str, seed: int, folder: str, settings: Mapping[str, Any]) -> TableRow:
    """The row of one training run; `settings` are flat (`comparison.settings.experiment_settings`).

    TensorBoard shows about 17 characters of a name, so stream, arm and seed come first and short. The comparison writes
    the same row for an arm of one seed. Rows of one name are one row to TensorBoard, so the name
    has the run's folder in it: runs that only share stream, arm and seed stay apart.
    """
    named: Row = {"kind": "run", "stream": stream, "arm": arm, "seed": str(seed)}
    return TableRow(f"{stream} {arm} s{seed} [{folder}]", _values(settings) | named)


def arm_row(stream: Stream, arm: Arm, folder: str) -> TableRow:
    """The row of an arm: its run's, where it has one seed; otherwise the mean's, with the settings that all seeds share."""
    if len(arm.runs) == 1:
        return _row_of(arm.runs[0])
    seeds = " ".join(map(str, arm.seeds))
    named: Row = {"kind": "mean over seeds", "stream": stream.name, "arm": arm.name, "seed": seeds}
    settings = _values(_shared(run.settings for run in arm.runs))
    return TableRow(f"{stream.name} {arm.name} mean of s{arm.seeds[0]} to s{arm.seeds[-1]} [{folder}]", settings | named)


def deployed_row(stream: Stream, group: DeployedGroup, item: Deployment, profile: str | None) -> TableRow:
    """The row of a deployed model, with the settings that its training run had; `profile`: whose joules the row has."""
    seed = "" if item.seed is None else str(item.seed)
    trained = [run for run in stream.ladders.get(item.arm, ()) if run.seed == item.seed]
    named: Row = {"kind": "deployed", "stream": stream.name, "arm": group.label, "seed": seed}
    extra: Row = {"deployed.route": str(item.record.get("route") or "graded")}
    extra |= {} if profile is None else {"deployed.energy_profile": profile}
    name = f"{stream.name} {item.arm} s{seed or '?'} deployed [{item.folder}]"
    return TableRow(name, _values(_shared(run.settings for run in trained)) | extra | named)


def columns(comparison: Comparison, rows: Sequence[TableRow]) -> list[TableColumn]:
    """Names, `ALWAYS`, what is deployed, and every setting that differs between any two of the comparison's runs."""
    runs = [run.settings for s in comparison.streams.values() for ladder in s.ladders.values() for run in ladder]
    known = [key for row in rows for key in row.settings]
    wanted = ["arm", "kind", "seed", "stream", "deployed.route", "deployed.energy_profile", *ALWAYS, *differing(runs)]
    found = []
    for key in dict.fromkeys(key for key in wanted if key in known and key not in LABELS):
        values = [row.settings[key] for row in rows if key in row.settings]
        numeric = all(isinstance(value, float) for value in values)
        found.append(TableColumn(key, numeric, len(set(values)) > 1 or key in differing(runs)))
    return found


def _row_of(run: Run) -> TableRow:
    return run_row(run.stream, run.arm, run.seed, str(run.result.get("folder", run.folder)), run.settings)


def _shared(every: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings that are the same in all of these runs."""
    known = [settings for settings in every if settings]
    differ = set(differing(known))
    return {key: value for key, value in known[0].items() if key not in differ} if known else {}


def _values(settings: Mapping[str, Any]) -> Row:
    return {key: _value(value) for key, value in settings.items() if key not in LABELS}


def _value(value: Any) -> Value:
    """As TensorBoard takes it: numbers as floats, truth values and texts as they are, lists as words, nothing as ""."""
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)
