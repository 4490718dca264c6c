"""Where checkpoints lie, and the moves between: a folder is the old checkpoint or the new one, never half of one.

    RUN/checkpoint                  the newest
    RUN/checkpoints/step-00000042   earlier ones, where more than one is kept
    RUN/checkpoints/best            the one with the lowest held-out loss, where it is kept
    RUN/checkpoints/damaged-1       what was found damaged, set aside
    RUN/.checkpoint.new             being written; .checkpoint.old: about to be removed

A save writes `.checkpoint.new`, syncs it, moves the folder that is there away and the new one into its place. Whatever
instant the process dies at, a whole checkpoint is left, and `whole_place` finds it. One writer per folder.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparse_update.loop.saving.files import (
    META,
    MODEL,
    PARTS,
    STATE,
    CheckpointDamaged,
    CheckpointError,
    open_checkpoint,
    refuse_pickle,
    sync,
    write_meta,
)

_STEP = re.compile(r"step-(\d+)")


def places(folder: str | Path) -> tuple[Path, Path, Path]:
    """(the folder, where a new one is written, where the old one waits)"""
    target = Path(folder).expanduser().resolve()
    return target, target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")


def history(folder: str | Path) -> Path:
    """Where the earlier ones of a checkpoint are kept."""
    target, _, _ = places(folder)
    return target.with_name(f"{target.name}s")


def stage(folder: str | Path) -> Path:
    """An empty folder beside `folder`, for the files of its next checkpoint; what an interrupted save left is dealt with.

    Raises CheckpointError for a folder that holds other things.
    """
    target, new, _ = places(folder)
    _refuse_foreign(target)
    settle(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    new.mkdir()
    return new


def commit(
    folder: str | Path,
    meta: Mapping[str, Any],
    *,
    outline: Any,
    tied: Mapping[str, Mapping[str, str]],
    files: Mapping[str, Mapping[str, Any]],
    keep: int = 1,
) -> Path:
    """Make what lies in the staged folder the newest checkpoint of `folder`, and return that.

    Args:
        meta: the caller's own record, JSON; `meta["step"]` names an earlier checkpoint that is kept.
        outline: of the state, from `nested.pack`.
        tied: by part, names of tensors that are one.
        files: every file that was written, with its seal.
        keep: checkpoints that stay, the newest among them.
    """
    target, new, old = places(folder)
    write_meta(new, {**meta, "tied": {part: dict(tied.get(part, {})) for part in PARTS}, "state": outline}, files)
    if target.exists():
        os.rename(target, _place_of_the_last(target, old, meta.get("step")) if keep > 1 else old)
    os.rename(new, target)
    sync(target.parent)
    if old.exists():
        shutil.rmtree(old)
    prune(folder, keep - 1)
    return target


def _place_of_the_last(target: Path, old: Path, step: Any) -> Path:
    """Where the checkpoint that gives way is kept; `old`, which is removed, for a damaged one and one of the same step."""
    try:
        before = open_checkpoint(target).meta.get("step")
    except CheckpointError:
        return old
    if not isinstance(before, int) or before == step:
        return old
    kept = history(target) / f"step-{before:08d}"
    kept.parent.mkdir(exist_ok=True)
    if kept.exists():
        shutil.rmtree(kept)
    return kept


def prune(folder: str | Path, keep: int) -> None:
    """Remove all but the last `keep` of the earlier checkpoints."""
    for place in earlier(folder)[max(0, keep) :]:
        shutil.rmtree(place)


def earlier(folder: str | Path) -> list[Path]:
    """The earlier checkpoints of a folder, the last one first."""
    kept = history(folder)
    found = [(int(match[1]), place) for place in _inside(kept) if (match := _STEP.fullmatch(place.name))]
    return [place for _, place in sorted(found, reverse=True)]


def settle(folder: str | Path) -> None:
    """Complete the moves that a save which died between them left open, and remove what is left of an unfinished one."""
    target, new, old = places(folder)
    if beside := _left_beside(target, new, old):
        if target.exists():
            shutil.rmtree(target)
        os.rename(beside, target)
    for rest in (new, old):
        if rest.exists():
            shutil.rmtree(rest)


def whole_place(folder: str | Path) -> Path:
    """The folder, or what an interrupted save left beside it. Raises CheckpointError where there is none."""
    target, new, old = places(folder)
    if target.is_file():
        refuse_pickle(target)
        raise CheckpointError(f"{target} is a file; a checkpoint is the folder that holds {META}")
    if beside := _left_beside(target, new, old):
        return beside
    if not target.exists():
        raise CheckpointError(f"there is no checkpoint {target}; give the folder that holds {META} and {MODEL}")
    missing = [META] * (not (target / META).is_file())
    missing += [f"{part}.safetensors" for part in PARTS if not _has_part(target, part)]
    if missing:
        for path in sorted(p for p in target.iterdir() if p.suffix in {".pt", ".pth", ".bin", ".ckpt", ".pkl"}):
            refuse_pickle(path)
        raise CheckpointDamaged(f"{target} is not a whole checkpoint: {', '.join(missing)} missing")
    return target


def candidates(folder: str | Path) -> list[Path]:
    """Where a checkpoint may be read from, the newest first: the folder's own, then earlier ones and the best."""
    target, new, old = places(folder)
    first = _left_beside(target, new, old) or (target if target.is_dir() else None)
    others = [(_step_of(place), place) for place in [*earlier(folder), history(folder) / "best"] if place.is_dir()]
    others.sort(key=lambda found: found[0], reverse=True)
    return [*([first] if first else []), *(place for _, place in others)]


def set_aside(place: Path, folder: str | Path) -> Path:
    """Move a damaged checkpoint out of the way of the next save, and return where it is."""
    number = 1
    while (aside := history(folder) / f"damaged-{number}").exists():
        number += 1
    aside.parent.mkdir(exist_ok=True)
    return place.rename(aside)


def _step_of(place: Path) -> int:
    match = _STEP.fullmatch(place.name)
    if match:
        return int(match[1])
    try:
        return int(open_checkpoint(place).meta.get("step", -1))
    except (CheckpointError, TypeError, ValueError):
        return -1


def _inside(folder: Path) -> Iterator[Path]:
    yield from (place for place in (folder.iterdir() if folder.is_dir() else ()) if place.is_dir())


def _has_part(target: Path, part: str) -> bool:
    return (target / f"{part}.safetensors").is_file() or any((target / part).glob("*.safetensors"))


def _left_beside(target: Path, new: Path, old: Path) -> Path | None:
    """The whole checkpoint that stands beside `target` where a save died between its two moves, or None."""
    if (target / META).is_file():
        return None
    return next((place for place in (new, old) if (place / META).is_file()), None)


def _refuse_foreign(target: Path) -> None:
    if target.is_file():
        raise CheckpointError(f"{target} is a file; a checkpoint is a folder: choose another name")
    if target.is_dir():
        foreign = sorted({p.name for p in target.iterdir()} - {MODEL, STATE, META, *PARTS})
        if foreign:
            raise CheckpointError(
                f"{target} holds other things ({', '.join(foreign[:3])}), which a save would remove: "
                "choose a folder of the checkpoint's own"
            )
