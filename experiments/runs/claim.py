"""Whether a run in a folder begins, goes on, or is finished already."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from experiments.runs.folder import RunError, read_json
from experiments.runs.hydra_app import ConfigError
from experiments.runs.lock import LOCK
from experiments.runs.plain_json import plain
from hardware.documents import read_yaml
from hardware.text import short
from sparse_update.loop.checkpoint import CheckpointError, has_checkpoint
from sparse_update.loop.saving.files import open_checkpoint
from sparse_update.loop.saving.places import candidates, settle

RECORDS = ("run.json", "config.yaml", "component_times.json", "metrics.jsonl", "result.json", "deploy.json")
METRICS = "metrics.jsonl"
EVENTS = "events.out.tfevents.*"
RESUME = (False, True, "auto")


class Start(Enum):
    """How a claimed run begins."""

    NEW = "from the beginning"
    GO_ON = "from its checkpoint"
    FINISHED = "it is finished"


def begin(folder: Path, settings: Any, resume: bool | str, may_differ: Collection[str]) -> Start:
    """How a training run in `folder`, held by `exclusive`, begins; what a new start would stumble over is taken away, and
    what a killed process left half written too.

    Args:
        settings: the run's own, the dataclass that `config.yaml` was written from.
        resume: True goes on from what was saved and begins where nothing was. "auto" does so too, and where an unfinished
            run had other settings it begins anew, with what that run had saved set aside in a folder beside it. False
            refuses a folder that holds a run. A run that was refused before it trained is begun anew with any settings.
        may_differ: dotted keys that do not make another run.

    Raises:
        ConfigError: the folder holds a run and `resume` is False, a run of other settings (named with both values), or
            something that is no training run.
    """
    checkpoint = folder / "checkpoint"
    saved = has_checkpoint(checkpoint)
    if not (folder / "run.json").exists() and not saved:
        if left := [name for name in (METRICS, *(path.name for path in folder.glob(EVENTS))) if (folder / name).exists()]:
            raise ConfigError(f"{folder} holds {left[0]} of no run that can be told: move it away, or take another folder")
        return Start.NEW
    record = _record(folder)
    finished = record.get("status") == "finished" and _readable(folder / "result.json")
    if not resume:
        if record.get("kind") != "train":
            raise ConfigError(f"{folder} already holds a run, a {record.get('kind')}: run=FOLDER takes another folder")
        again = "it is finished, and without resume=false the same command shows what came out"
        again = again if finished else "without resume=false the same command goes on with it"
        raise ConfigError(f"{folder} already holds a run: {again}, run=FOLDER takes another folder")
    if record.get("kind") != "train":
        raise ConfigError(f"{folder} holds a {record.get('kind')}, not a training run: name another folder with run=FOLDER")
    differ = [] if _refused(folder, record, saved) else differences(folder, settings, may_differ, required=saved)
    if differ and (finished or resume != "auto"):
        aside = "" if finished else ", or set the old one aside with resume=auto"
        raise ConfigError(
            f"the {'finished ' if finished else ''}run in {folder} had other settings: {'; '.join(differ)}. Give the same "
            f"ones to go on with it, or start a new run with run=FOLDER{aside}"
        )
    tidy(folder)
    if finished:
        return Start.FINISHED
    if saved and not differ:
        return Start.GO_ON
    if saved:
        kept = _set_aside(folder)
        print(f"{folder} had other settings ({'; '.join(differ)}): what it had is now in {kept}", file=sys.stderr)
    else:
        clear(folder)
    return Start.NEW


def _refused(folder: Path, record: Mapping[str, Any], saved: bool) -> bool:
    """Whether the run ended by an error before anything was trained, such as settings that do not go together: there is
    nothing to go on with, and other settings are what it wants."""
    metrics = folder / METRICS
    return not saved and record.get("status") == "failed" and not (metrics.exists() and metrics.stat().st_size)


def tidy(folder: Path) -> None:
    """Take away what a killed process left half written; a checkpoint that it had finished moves into its place."""
    settle(folder / "checkpoint")
    for path in (part for name in RECORDS for part in (*folder.glob(f"{name}.*.part"), folder / "metrics.part")):
        path.unlink(missing_ok=True)


def _record(folder: Path) -> dict[str, Any]:
    """What run.json says; that it is a training run where it cannot be read (a power cut) and a checkpoint is there."""
    try:
        return read_json(folder / "run.json")
    except RunError as error:
        print(f"{error}: taken for a training run that was cut off", file=sys.stderr)
        return {"kind": "train"}


def _readable(path: Path) -> bool:
    try:
        read_json(path)
    except RunError:
        return False
    return True


def clear(folder: Path) -> None:
    """Take away the records that a run left in its folder, and nothing else."""
    for path in [*(folder / name for name in RECORDS), *folder.glob(EVENTS)]:
        path.unlink(missing_ok=True)


def differences(folder: Path, settings: Any, may_differ: Collection[str], required: bool) -> list[str]:
    """ "key was VALUE, is VALUE" of every setting that changed; keys that came later than the run are none."""
    path = folder / "config.yaml"
    try:
        before = read_yaml(path, RunError)
    except (FileNotFoundError, RunError):
        before = None
    if not isinstance(before, dict) and required:
        before = _saved_settings(folder)
    if not isinstance(before, dict):
        if required:
            raise ConfigError(
                f"{path} is missing or not readable, so nothing says with which settings the checkpoint beside it was "
                "made: start a new run with run=FOLDER"
            )
        return []
    return [
        f"{key} was {short(was)}, is {short(now)}" for key, was, now in _changed(before, settings) if key not in may_differ
    ]


def _saved_settings(folder: Path) -> Any:
    """The settings that the checkpoint holds, for a config.yaml that was lost; None where it holds none either."""
    for place in candidates(folder / "checkpoint"):
        try:
            return open_checkpoint(place).meta.get("config")
        except CheckpointError:
            continue
    return None


def _changed(before: Mapping[str, Any], settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value); plain dictionaries are compared whole, since their keys are the user's."""
    for name, was in before.items():
        key, now = f"{prefix}{name}", getattr(settings, name, "no setting of this version")
        if is_dataclass(now) and isinstance(was, Mapping):
            yield from _changed(was, now, f"{key}.")
        elif plain(now) != was:
            yield key, was, plain(now)


def _set_aside(folder: Path) -> Path:
    """Move all that `folder` holds, its lock apart, into FOLDER.aside-N and return that."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.aside-{number}")).exists():
        number += 1
    aside.mkdir()
    for path in folder.iterdir():
        if path.name != LOCK:
            path.rename(aside / path.name)
    return aside
