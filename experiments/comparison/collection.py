"""Run folders to a Comparison: what is usable is read, what is not is named.

Nothing here raises because one folder is bad: a run that is broken, unfinished, of another schema, diverged or a double
is left out with its reason.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.comparison.record import (
    SCHEMA,
    Arm,
    Comparison,
    Deployment,
    Excluded,
    Run,
    Stream,
    arm_rank,
    at_budget,
    full_budget,
    notes_on,
)
from experiments.comparison.settings import difference_text, experiment_settings
from experiments.runs.folder import RunError, read_json
from hardware.documents import json_of, read_yaml
from hardware.text import short

ARM_FIELDS = ("loss_nats", "tokens", "flops", "reference_s", "wall_s", "peak_bytes")
DEPLOYED_FIELDS = (
    "loss_float_nats",
    "loss_quantised_nats",
    "loss_simulated_nats",
    "mapped_mac_share",
    "events_per_token",
    "synops_per_token",
    "macs_per_token",
)
SWEEP_SETUP = ("clock", "base", "tuning")  # of `experiments.sweep`: component times, starting point, choice of settings
SETUP = "set-up of a sweep, not one of its arms; to look at it, give this folder itself"
LONGEST_LINE_BYTES = 2**20
"""Of metrics.jsonl; a longer one is no line of ours."""
MARKERS = ("run.json", "result.json", "deploy.json", "metrics.jsonl", "config.yaml")


def collect(folders: Iterable[str | Path], trial: Callable[[Comparison], object] | None = None) -> Comparison:
    """Read finished runs and deployments from `folders` and whatever lies below them.

    `trial` is called with each of them alone; one that it fails on, whatever the error, has records of another form than
    ours and is left out.

    Raises FileNotFoundError for a folder that does not exist. Everything else that is wrong is named in `excluded`.
    """
    runs: list[tuple[str, Run]] = []
    deployments: list[Deployment] = []
    excluded: list[Excluded] = []
    diverged: dict[tuple[str, str], int] = {}
    found, setups = _walk(folders)
    excluded += [Excluded(str(folder), SETUP) for folder in setups]
    for folder in found:
        info: dict[str, Any] = {}
        try:
            info = read_json(folder / "run.json")
            _check_info(info)
            if info["kind"] == "train":
                run = _read_run(folder, info)
                _try(trial, run, None)
                if math.isfinite(run.result["loss_nats"]):
                    runs.append((str(info.get("started", "")), run))
                else:
                    diverged[run.stream, run.arm] = diverged.get((run.stream, run.arm), 0) + 1
                    raise _Unusable(f"diverged: loss_nats is {run.result['loss_nats']}")
            else:
                deployment = _read_deployment(folder, info)
                _try(trial, None, deployment)
                deployments.append(deployment)
        except (_Unusable, RunError) as reason:
            excluded.append(Excluded(str(folder), str(reason), *_names(info)))
    kept: dict[tuple[str, str, int, float | None], Run] = {}
    for _, run in sorted(runs, key=lambda item: (item[0], item[1].folder)):
        key = (run.stream, run.arm, run.seed, run.budget)
        if key in kept:  # the first one counts: choosing among repeats would be choosing the result
            first = kept[key]
            same = f"stream {run.stream}, arm {run.arm}, seed {run.seed}"
            why = f"double of {first.folder} ({same}); the earlier one counts"
            if differ := difference_text(first.settings, run.settings):
                why += f". Their settings differ ({differ}): to compare them, give one of them another arm=NAME"
            excluded.append(Excluded(run.folder, why))
        else:
            kept[key] = run
    names = dict.fromkeys([*sorted(key[0] for key in kept), *sorted(item.stream for item in deployments)])
    streams = {name: _stream(name, kept.values(), deployments, diverged, excluded) for name in names}
    return Comparison(streams, tuple(excluded))


def find_runs(folders: Iterable[str | Path]) -> list[Path]:
    """Folders that are, or should be, runs or deployments: those holding one of MARKERS, at any depth, each once.

    The set-up of a sweep (SWEEP_SETUP beside its sweep.json) is passed over, unless one of `folders` lies in it.
    """
    return _walk(folders)[0]


def _walk(folders: Iterable[str | Path]) -> tuple[list[Path], list[Path]]:
    """Run folders, and folders with the set-up of a sweep."""
    found: dict[Path, None] = {}
    setups: dict[Path, None] = {}
    for top in map(Path, folders):
        if not top.is_dir():
            raise FileNotFoundError(f"{top} is not a folder: give run folders, or a folder that holds them")
        for here, below, files in os.walk(top):
            setup = [name for name in below if name in SWEEP_SETUP] if "sweep.json" in files else []
            setups |= dict.fromkeys(Path(here, name) for name in sorted(setup))
            below[:] = sorted(name for name in below if not name.startswith((".", "checkpoint")) and name not in setup)
            if any(marker in files for marker in MARKERS):
                found[Path(here)] = None
    return list(found), list(setups)


class _Unusable(Exception):
    """Why a folder is left out."""


def _try(trial: Callable[[Comparison], object] | None, run: Run | None, deployment: Deployment | None) -> None:
    """Raise _Unusable where a run or a deployment, alone, is not what `trial` can take."""
    if trial is None:
        return
    name = run.stream if run else deployment.stream if deployment else ""
    try:
        alone = _stream(name, [run] if run else [], [deployment] if deployment else [], {}, [])
        trial(Comparison({name: alone}))
    except Exception as error:  # whatever a record of any other form leads to
        what = f"{type(error).__name__}: {short(str(error))}"
        raise _Unusable(f"its records have another form than this version writes ({what})") from error


def _check_info(info: Mapping[str, Any]) -> None:
    if info.get("schema") != SCHEMA:
        raise _Unusable(f"run.json has schema {info.get('schema')!r}; this version reads {SCHEMA}")
    if info.get("kind") not in ("train", "deploy"):
        raise _Unusable(f"kind {info.get('kind')!r} is not compared")
    if info.get("status") != "finished":
        error = f", {short(info['error'])}" if info.get("error") else ""
        raise _Unusable(f"not finished: status is {info.get('status')!r}{error}")
    for key in ("stream", "arm"):
        if not isinstance(info.get(key), str):
            raise _Unusable(f"run.json has no {key}")


def _names(info: Mapping[str, Any]) -> tuple[str | None, str | None, int | None]:
    """Stream, arm (of a deployment: with what it is) and seed of a run that is left out, as far as it says them."""
    stream, arm, seed = (info.get(key) for key in ("stream", "arm", "seed"))
    if not isinstance(stream, str) or not isinstance(arm, str):
        return None, None, None
    return stream, f"{arm}, deployed" if info.get("kind") == "deploy" else arm, seed if isinstance(seed, int) else None


def _read_run(folder: Path, info: Mapping[str, Any]) -> Run:
    result = read_json(folder / "result.json")
    _require(result, ARM_FIELDS, "result.json")
    if not isinstance(info.get("seed"), int):
        raise _Unusable(f"run.json has no whole-numbered seed: {info.get('seed')!r}")
    if "energy_j" not in result:
        raise _Unusable("result.json has no energy_j (null with energy_reason where nothing was measured)")
    curve = _read_curve(folder / "metrics.jsonl")
    times = info.get("component_times_sha256")
    return Run(str(folder), info["stream"], info["arm"], info["seed"], times, result, curve, _read_settings(folder))


def _read_settings(folder: Path) -> dict[str, Any]:
    """Flat settings of config.yaml; empty where there is none that can be read: nothing but their display hangs on them."""
    try:
        config = read_yaml(folder / "config.yaml", RunError)
    except (FileNotFoundError, RunError):
        return {}
    return experiment_settings(config) if isinstance(config, dict) else {}


def _read_deployment(folder: Path, info: Mapping[str, Any]) -> Deployment:
    record = read_json(folder / "deploy.json")
    _require(record, DEPLOYED_FIELDS, "deploy.json")
    if not isinstance(record.get("energy"), list):
        raise _Unusable("deploy.json has no list of energies")
    return Deployment(str(folder), info["stream"], info["arm"], info.get("seed"), {"arm": info["arm"], **record})


def _require(record: dict[str, Any], keys: Sequence[str], where: str) -> None:
    """Numbers under all `keys`; "nan" and "inf" as written by plain_json become floats again."""
    for key in keys:
        value = record.get(key)
        if value in ("nan", "inf", "-inf"):
            record[key] = value = float(str(value))
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _Unusable(f"{where} has no number {key}: {value!r}")


def _read_curve(path: Path) -> tuple[tuple[float, float], ...]:
    """Held-out losses of metrics.jsonl by reference second; a torn last line is passed over."""
    if not path.exists():
        return ()
    points: dict[float, float] = {}
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE_BYTES):
            try:
                record = json_of(line, path.name, _Unusable)
                if isinstance(record, dict):
                    second, loss = (float(record[key]) for key in ("reference_s", "val_loss_nats"))
                    points[second] = loss
            except (_Unusable, KeyError, TypeError, ValueError):
                continue
    return tuple(sorted(points.items()))


def _stream(
    name: str,
    runs: Iterable[Run],
    deployments: Sequence[Deployment],
    diverged: Mapping[tuple[str, str], int],
    excluded: Sequence[Excluded],
) -> Stream:
    by_arm: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.budget or 0.0)):
        if run.stream == name:
            by_arm.setdefault(run.arm, []).append(run)
    full = full_budget(by_arm)
    arms = {
        arm: Arm(arm, at_budget(by_arm[arm], full), diverged.get((name, arm), 0)) for arm in sorted(by_arm, key=arm_rank)
    }
    ladders = {arm: tuple(by_arm[arm]) for arm in arms}
    ours = sorted(
        (item for item in deployments if item.stream == name),
        key=lambda d: (not d.arm.startswith("surprise"), d.arm, d.folder),
    )
    missing = [
        f"{item.arm}{'' if item.seed is None else f', seed {item.seed}'} ({item.reason})"
        for item in excluded
        if item.stream == name
    ]
    return Stream(name, arms, tuple(ours), tuple(notes_on(arms)), ladders, tuple(missing))
