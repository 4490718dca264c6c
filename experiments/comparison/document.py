"""A comparison as `comparison.json`: everything that was read, counted and said."""

from __future__ import annotations

from typing import Any

from experiments.comparison.accounts import layer_energies
from experiments.comparison.overview import rows
from experiments.comparison.record import SCHEMA, Comparison, Stream
from experiments.comparison.targets import frontier, times_to_dense
from experiments.comparison.verdicts import verdicts


def to_json(comparison: Comparison) -> dict[str, Any]:
    """`comparison.json`: {"schema": 1, "streams": {NAME: {"dense": ARM, ..., "deployed": DEPLOYED}}}, and beside it all
    deployments, verdicts, notes per stream, excluded folders.

    `table` is the one table, a row per arm and deployed model. `deployed` is the first of a stream's deployed models
    (of the surprise arm where there is one), `deployments` lists all of them, `joules_by_layer` what each of their
    layers costs. `time_to_dense` and `frontier` hold what several budgets say (`targets.py`). `missing` names, per stream,
    the runs that were found and could not be compared.
    """
    streams = comparison.streams
    return {
        "schema": SCHEMA,
        "table": [row for stream in streams.values() for row in rows(stream)],
        "streams": {name: _stream(stream) for name, stream in streams.items()},
        "deployments": [
            {"stream": name, "folder": item.folder, "seed": item.seed, **item.record}
            for name, stream in streams.items()
            for item in stream.deployments
        ],
        "joules_by_layer": [
            {"folder": item.folder, "profiles": [e.to_json() for e in found], "missing": missing}
            for stream in streams.values()
            for item in stream.deployments
            for found, missing in [layer_energies(item.record)]
        ],
        "verdicts": verdicts(comparison),
        "time_to_dense": {name: {r.arm: r.to_json() for r in times_to_dense(s)} for name, s in streams.items()},
        "frontier": {name: [point.to_json() for point in frontier(s)] for name, s in streams.items()},
        "notes": {name: list(stream.notes) for name, stream in streams.items()},
        "missing": {name: list(stream.missing) for name, stream in streams.items()},
        "excluded": [{"folder": item.folder, "reason": item.reason} for item in comparison.excluded],
    }


def _stream(stream: Stream) -> dict[str, Any]:
    record: dict[str, Any] = {name: arm.record() for name, arm in stream.arms.items()}
    if stream.deployments:
        record["deployed"] = dict(stream.deployments[0].record)
    return record
