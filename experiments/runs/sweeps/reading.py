"""Sweep files: found by the name they are shipped under or by path, read and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from experiments.runs.sweeps.plan import Sweep, SweepArm
from experiments.runs.sweeps.shipped import SUFFIXES, shipped, shipped_file
from hardware.documents import MOST_YAML_BYTES, read_bytes, yaml_of
from hardware.names import check_file_name
from hardware.text import listed, short

KEYS = ("folder", "settings", "budget_reference_s", "budget_tokens", "seeds", "base", "arms", "tuning_seed")
OF_THE_SWEEP = frozenset({"hydra", "run", "resume", "progress", "seed"})
ARM_KEYS = ("set", "budgets", "grid", "tuned_as", "seeds")


class SweepError(ValueError):
    """A sweep file that cannot be run as written; the message names the key and what it takes."""


def find_sweep(word: str) -> Traversable:
    """The sweep file at a path, or the shipped one of that name.

    Raises:
        SweepError: there is neither; the message lists the shipped names.
    """
    path = Path(word)
    is_path = path.suffix in SUFFIXES or os.sep in word or "/" in word
    if not is_path and word in shipped():
        return shipped_file(word)
    if path.is_file():
        return path
    if path.stem in shipped():
        raise SweepError(f"{short(word)}: no such file here; the shipped one: spikegate sweep {path.stem}")
    what = "file" if is_path else "sweep"
    raise SweepError(f"{short(word)}: there is no such {what}; shipped sweeps go by name: {', '.join(shipped())}")


def read_sweep(path: Traversable) -> Sweep:
    """Read and check a sweep file. Raises SweepError naming file, key and remedy."""
    try:
        text = read_bytes(path, SweepError, MOST_YAML_BYTES) if isinstance(path, Path) else path.read_bytes()
    except FileNotFoundError as error:
        raise SweepError(f"{path}: not readable ({error})") from None
    raw = yaml_of(text, str(path), SweepError)
    if not isinstance(raw, dict) or not isinstance(raw.get("arms"), dict) or not raw["arms"]:
        raise SweepError(f"{path}: a sweep file is a mapping with at least `arms: {{NAME: {{set: [...]}}}}`")
    _only(path, "", raw, KEYS)
    try:
        return _sweep(path, raw)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        if isinstance(error, SweepError):
            raise
        raise SweepError(f"{path}: a value is not of the kind that its key takes: {short(str(error))}") from error


def _sweep(path: Traversable, raw: Mapping[str, Any]) -> Sweep:
    for key in ("folder", "seeds"):
        if key not in raw:
            raise SweepError(f"{path}: `{key}` is missing")
    budgets = [raw[key] for key in ("budget_tokens", "budget_reference_s") if key in raw]
    if len(budgets) != 1 or not float(budgets[0]) > 0 or not raw["seeds"]:
        raise SweepError(f"{path}: give budget_tokens or budget_reference_s, one of them and positive, and seeds")
    for key in ("settings", "base"):
        _check_words(path, key, raw.get(key, ()))
    arms = tuple(_read_arm(path, name, body or {}) for name, body in raw["arms"].items())
    for arm in arms:
        if arm.tuned_as and arm.tuned_as not in raw["arms"]:
            raise SweepError(
                f"{path}: arms.{arm.name}.tuned_as = {short(arm.tuned_as)!r} is no arm here: {listed(raw['arms'])}"
            )
        if arm.tuned_as and raw["arms"][arm.tuned_as].get("tuned_as"):
            raise SweepError(f"{path}: arms.{arm.name}.tuned_as = {arm.tuned_as}, which is tuned as another: name that one")
    return Sweep(
        folder=Path(raw["folder"]),
        settings=tuple(map(str, raw.get("settings", ()))),
        budget_reference_s=float(raw.get("budget_reference_s", 0.0)),
        budget_tokens=int(raw.get("budget_tokens", 0)),
        seeds=tuple(map(int, raw["seeds"])),
        arms=arms,
        base=tuple(map(str, raw.get("base", ()))),
        tuning_seed=int(raw.get("tuning_seed", 1000)),
    )


def _read_arm(path: Traversable, name: str, body: Any) -> SweepArm:
    check_file_name(f"{path}: the arm's name", str(name), SweepError)
    if not isinstance(body, dict):
        raise SweepError(f"{path}: arms.{name} must be a mapping of {', '.join(ARM_KEYS)}")
    _only(path, f"arms.{name}.", body, ARM_KEYS)
    budgets = tuple(map(float, body.get("budgets", (1.0,))))
    if not budgets or min(budgets) <= 0:
        raise SweepError(f"{path}: arms.{name}.budgets = {short(list(budgets))}: shares of the dense budget, above 0")
    grid = body.get("grid", {})
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise SweepError(f"{path}: arms.{name}.grid must map a setting to a list of values")
    if grid and body.get("tuned_as"):
        raise SweepError(f"{path}: arms.{name} has a grid and tuned_as: give one of them")
    _check_words(path, f"arms.{name}.set", body.get("set", ()))
    _check_words(path, f"arms.{name}.grid", [f"{key}=" for key in grid])
    return SweepArm(
        name, tuple(map(str, body.get("set", ()))), budgets, grid, str(body.get("tuned_as", "")),
        tuple(map(int, body.get("seeds", ()))),
    )  # fmt: skip


def _check_words(path: Traversable, where: str, words: Any) -> None:
    """Raise SweepError unless all are settings, KEY=VALUE, of the run itself: none of Hydra's own, which start programs."""
    if not isinstance(words, list | tuple):
        raise SweepError(f"{path}: {where} is {short(words)}; a list of KEY=VALUE is needed")
    for word in map(str, words):
        key = word.partition("=")[0].lstrip("+~")
        if "=" not in word or word.startswith("-") or key.split("/")[0].split(".")[0] in OF_THE_SWEEP or "_target_" in key:
            raise SweepError(
                f"{path}: {where} holds {short(word)!r}; a sweep file has settings of its runs, KEY=VALUE, and none of "
                f"Hydra's own, nor {', '.join(sorted(OF_THE_SWEEP - {'hydra'}))}, which the sweep sets itself"
            )


def _only(path: Traversable, where: str, found: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [str(key) for key in found if key not in known]
    if unknown:
        raise SweepError(f"{path}: unknown key {where}{short(unknown[0])}; known: {', '.join(known)}")


def seeds_of(text: str) -> tuple[int, ...]:
    """Seeds as a command line gives them, such as "0,1,2".

    Raises:
        SweepError: something else than whole numbers.
    """
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise SweepError(f"--seeds {text}: whole numbers with commas between them, e.g. 0,1,2") from None


def cluster_settings(words: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE words as a mapping.

    Raises:
        SweepError: a word without a key or an equals sign, or a key that is given twice.
    """
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise SweepError(f"--cluster-set {short(word)}: KEY=VALUE is needed, e.g. slurm_partition=gpu")
        if key in found:
            raise SweepError(f"--cluster-set {short(key)} is given twice")
        found[key] = value
    return found
