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
from sparse_update.loop.checkpoint import has_checkpoint

RECORDS = ("run.json", "config.yaml", "component_times.json", "metrics.jsonl", "result.json", "deploy.json")
EVENTS = "events.out.tfevents.*"
RESUME = (False, True, "auto")


class Start(Enum):
    """How a claimed run begins."""

    NEW = "from the beginning"
    GO_ON = "from its checkpoint"
    FINISHED = "it is finished"


def begin(folder: Path, settings: Any, resume: bool | str, may_differ: Collection[str]) -> Start:
    """How a training run in `folder`, held by `exclusive`, begins; what a new start would stumble over is taken away.

    Args:
        settings: the run's own, the dataclass that `config.yaml` was written from.
        resume: False refuses a folder that holds a run. True goes on from what was saved and begins where nothing was.
            "auto" does so too, and where an unfinished run had other settings it begins anew, with what that run had
            saved set aside in a folder beside it.
        may_differ: dotted keys that do not make another run.

    Raises:
        ConfigError: the folder holds a run and `resume` is False, a run of other settings (named with both values), or
            something that is no training run.
    """
    saved = has_checkpoint(folder / "checkpoint")
    if not (folder / "run.json").exists() and not saved:
        return Start.NEW
    record = read_json(folder / "run.json") if (folder / "run.json").exists() else {"kind": "train"}
    finished = record.get("status") == "finished" and (folder / "result.json").exists()
    if not resume:
        if record.get("kind") != "train":
            raise ConfigError(f"{folder} already holds a run, a {record.get('kind')}: run=FOLDER takes another folder")
        again = "it is finished, and resume=true shows what came out" if finished else "resume=true continues it"
        raise ConfigError(f"{folder} already holds a run: {again}, run=FOLDER takes another folder")
    if record.get("kind") != "train":
        raise ConfigError(f"{folder} holds a {record.get('kind')}, not a training run: name another folder with run=FOLDER")
    differ = differences(folder, settings, may_differ, required=saved)
    if differ and (finished or resume != "auto"):
        what = "resume=true" if resume is True else f"resume={resume}"
        raise ConfigError(
            f"{what}, but the {'finished ' if finished else ''}run in {folder} had other settings: {'; '.join(differ)}. "
            "Give the same ones, or start a new run with run=FOLDER"
        )
    if finished:
        return Start.FINISHED
    if saved and not differ:
        return Start.GO_ON
    if saved:
        aside = _set_aside(folder)
        print(f"{folder} had other settings ({'; '.join(differ)}): what it had is now in {aside}", file=sys.stderr)
    else:
        clear(folder)
    return Start.NEW


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
