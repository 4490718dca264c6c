"""Finished runs as points of a scaling law: parameters, tokens, FLOPs and the loss that came of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from experiments.comparison.collection import find_runs
from experiments.runs.folder import RunError, read_json
from hardware.documents import read_yaml
from hardware.text import short


class LawError(ValueError):
    """Runs that no law can be fitted to as asked; the message says what is missing."""


@dataclass(frozen=True)
class Point:
    """One finished run."""

    parameters: int
    """all weights, embeddings and output head included"""
    embedding_parameters: int | None
    """of them those of the embedding table and the head; None where the run's settings do not say"""
    tokens: int
    """tokens of the steps that were taken"""
    flops: float
    """counted"""
    loss_nats: float
    """held out, per token"""
    seed: int = 0
    arm: str = "dense"
    stream: str = ""
    budget: float | None = None
    """reference seconds that it was given, or tokens that were offered to it"""
    tokenizer: str = ""
    held_out: str = ""
    """which held-out text its loss is of"""
    folder: str = ""
    started: str = ""

    def size(self, embeddings: bool = True) -> int:
        """Parameters, with or without embeddings. Raises LawError where they cannot be told apart."""
        if embeddings:
            return self.parameters
        if self.embedding_parameters is None or self.embedding_parameters >= self.parameters:
            raise LawError(
                f"{self.folder or 'a run'}: its {self.parameters} parameters cannot be told apart into embeddings and the "
                "rest by its settings (model.width, model.layers); fit with embeddings"
            )
        return self.parameters - self.embedding_parameters


@dataclass(frozen=True)
class LeftOut:
    """A run that is no point, and why."""

    folder: str
    reason: str


@dataclass(frozen=True)
class Found:
    points: tuple[Point, ...]
    left_out: tuple[LeftOut, ...]


def read_points(folders: Iterable[str | Path]) -> Found:
    """Every finished training run in `folders` and below.

    A run that diverged, is unfinished or cannot be read is named in `left_out`. Runs with the same place in the grid
    (stream, arm, seed, parameters, budget) count once, the earliest started: to choose among repeats would be to choose the
    result.

    Raises:
        LawError: no run is left, or the runs differ in their tokenizer or their held-out text, so that their losses are of
            different things.
        FileNotFoundError: a folder that is not there.
    """
    points, left_out = [], []
    for folder in find_runs(folders):
        try:
            points.append(_point(folder))
        except (_Unusable, RunError) as reason:
            left_out.append(LeftOut(str(folder), str(reason)))
        except (TypeError, ValueError, OverflowError, AttributeError) as error:  # a seed of words, a list of settings
            left_out.append(LeftOut(str(folder), f"a value is not of the kind that it should be: {short(str(error))}"))
    kept: dict[tuple[Any, ...], Point] = {}
    for point in sorted(points, key=lambda p: (p.started, p.folder)):
        place = (point.stream, point.arm, point.seed, point.parameters, point.budget)
        if place in kept:
            left_out.append(LeftOut(point.folder, f"double of {kept[place].folder}; the earlier one counts"))
        else:
            kept[place] = point
    if not kept:
        why = f" Left out: {short('; '.join(f'{o.folder} ({o.reason})' for o in left_out), 300)}" if left_out else ""
        raise LawError(f"no finished training run in {short(', '.join(map(str, folders)))}.{why}")
    same_things(list(kept.values()))
    return Found(tuple(kept.values()), tuple(left_out))


def same_things(points: Sequence[Point]) -> None:
    """Raise LawError where losses are of different things: nats per token of another tokenizer, or of another text."""
    for name, of in (("tokenizers", "tokenizer"), ("held-out texts", "held_out")):
        by: dict[str, list[str]] = {}
        for point in points:
            by.setdefault(getattr(point, of), []).append(point.folder)
        if len(by) > 1:
            shown = "; ".join(f"{key or 'unknown'}: {len(folders)} runs, {folders[0]}" for key, folders in by.items())
            raise LawError(
                f"runs of different {name} in one fit ({short(shown, 300)}): nats per token mean different things there. "
                "Give the folders of one of them"
            )


def of_arm(points: Sequence[Point], arm: str, stream: str | None = None) -> list[Point]:
    """The points of one arm, on one stream. `arm` is a name or a pattern such as "dense*", since the arms of a sweep have
    a name for each size. Raises LawError where there is none, or several streams."""
    ours = [p for p in points if fnmatchcase(p.arm, arm) and stream in (None, p.stream)]
    if not ours:
        there = sorted({f"{p.arm} on {p.stream}" for p in points})
        raise LawError(
            f"no run of arm {arm!r}{f' on {stream!r}' if stream else ''}; there are {short(', '.join(there), 300)}"
        )
    streams = sorted({p.stream for p in ours})
    if len(streams) > 1:
        raise LawError(f"arm {arm!r} has runs on several streams ({', '.join(streams)}): choose one with --stream")
    return ours


class _Unusable(Exception):
    pass


def _point(folder: Path) -> Point:
    info = read_json(folder / "run.json")
    if info.get("kind") != "train":
        raise _Unusable(f"kind {short(info.get('kind'))}, not a training run")
    if info.get("status") != "finished":
        raise _Unusable(f"not finished: status is {short(info.get('status'))}")
    result = read_json(folder / "result.json")
    loss = _number(result, "loss_nats", finite=False)
    if not math.isfinite(loss):
        raise _Unusable(f"diverged: loss_nats is {loss}")
    settings = _settings(folder)
    budget = result.get("budget_reference_s") or result.get("budget_offered_tokens")
    data = settings.get("data") or {}
    tokenizer = str(data.get("tokenizer", ""))
    if tokenizer not in ("", "bytes"):
        tokenizer += f" of {data.get('vocab_size')}"
    parameters = int(_number(result, "params"))
    return Point(
        parameters=parameters,
        embedding_parameters=_embedding_parameters(parameters, settings.get("model") or {}),
        tokens=int(_number(result, "tokens")),
        flops=_number(result, "flops"),
        loss_nats=loss,
        seed=int(info.get("seed") or 0),
        arm=str(info.get("arm", "")),
        stream=str(info.get("stream", "")),
        budget=float(budget) if isinstance(budget, int | float) else None,
        tokenizer=tokenizer,
        held_out=f"{result.get('corpus', '')}, {result.get('val_tokens', '')} tokens",
        folder=str(folder),
        started=str(info.get("started", "")),
    )


def _number(record: Mapping[str, Any], key: str, finite: bool = True) -> float:
    value = record.get(key)
    if value in ("nan", "inf", "-inf"):
        value = float(str(value))
    if not isinstance(value, int | float) or isinstance(value, bool) or (finite and not 0 < value < math.inf):
        raise _Unusable(f"result.json has no number {key} above 0: {short(repr(value))}")
    return float(value)


def _settings(folder: Path) -> Mapping[str, Any]:
    try:
        found = read_yaml(folder / "config.yaml", RunError)
    except (FileNotFoundError, RunError):
        return {}
    return found if isinstance(found, dict) else {}


def _embedding_parameters(parameters: int, model: Mapping[str, Any]) -> int | None:
    """What is left beside the blocks and the last norm: the embedding table, and the head where it is untied."""
    shape = [model.get(key) for key in ("width", "layers", "hidden_ratio")]
    numbers = [value for value in shape if isinstance(value, int) and value > 0]
    if len(numbers) < 3:
        return None
    width, layers, ratio = numbers
    left = parameters - layers * ((4 + 2 * ratio) * width**2 + 2 * width) - width
    return left if left > 0 and left % width == 0 else None
