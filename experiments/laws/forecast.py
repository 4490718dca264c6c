"""Predictions that are written down before a run starts, and held against it afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from experiments.laws.points import LawError, Point
from experiments.laws.resampling import Interval
from experiments.runs.plain_json import plain
from hardware.documents import read_json
from hardware.text import short

SCHEMA = 1
TARGET_NATS = 0.015
"""How far a prediction may lie off the run that it is about."""


@dataclass(frozen=True)
class Forecast:
    """What a law says of a run that was not made when it was written."""

    arm: str
    """name or pattern"""
    stream: str
    parameters: int
    tokens: int
    loss: Interval
    written: str
    """ISO time with its zone"""
    largest_fitted_flops: float
    tokenizer: str
    held_out: str
    embeddings: bool = True


@dataclass(frozen=True)
class Judged:
    """A forecast beside the run."""

    measured_nats: float
    error_nats: float
    """predicted minus measured"""
    inside: bool
    over_largest: float
    """the run's FLOPs over those of the largest fitted run"""
    before: bool
    """The prediction was written before the run started."""
    notes: tuple[str, ...]

    @property
    def met(self) -> bool:
        return abs(self.error_nats) <= TARGET_NATS and self.inside and self.before


def write(forecast: Forecast, path: Path) -> None:
    """Write it where no file is yet, with a checksum. Raises LawError where there is one: a prediction is made once."""
    body = plain({"schema": SCHEMA, "forecast": forecast.__dict__ | {"loss": forecast.loss.__dict__}})
    document = {**body, "sha256": _digest(body)}
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=1) + "\n")
    except FileExistsError:
        raise LawError(f"{path} is there already: a prediction is written once; choose another name") from None


def read(path: Path) -> Forecast:
    """Raises LawError for a file of another form, or one that was changed since it was written."""
    document = read_json(path, LawError)
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise LawError(f"{path} is no prediction of `spikegate scale predict`")
    body = {key: value for key, value in document.items() if key != "sha256"}
    if document.get("sha256") != _digest(body):
        raise LawError(f"{path} was changed since it was written: its checksum does not fit")
    try:
        fields = dict(body["forecast"])
        return Forecast(**{**fields, "loss": Interval(**fields["loss"])})
    except (KeyError, TypeError, ValueError) as error:
        raise LawError(f"{path} is no prediction of this version: {short(str(error))}") from None


def judge(forecast: Forecast, run: Point) -> Judged:
    """Raises LawError for a run of another arm, stream, tokenizer or held-out text, size or number of tokens."""
    if not fnmatchcase(run.arm, forecast.arm):
        raise LawError(f"{run.folder}: arm {run.arm!r}, but the prediction is of {forecast.arm!r}")
    for name in ("stream", "tokenizer", "held_out"):
        said, is_ = getattr(forecast, name), getattr(run, name)
        if said != is_:
            raise LawError(f"{run.folder}: {name.replace('_', '-')} {is_!r}, but the prediction is of {said!r}")
    size = run.size(forecast.embeddings)
    notes = []
    if size != forecast.parameters:
        raise LawError(f"{run.folder}: {size} parameters, but the prediction is of {forecast.parameters}")
    if abs(run.tokens / forecast.tokens - 1) > 0.02:
        raise LawError(f"{run.folder}: {run.tokens} tokens, but the prediction is of {forecast.tokens}")
    before = bool(run.started) and _time(forecast.written) < _time(run.started)
    if not before:
        notes.append(f"the run started at {run.started or 'an unknown time'}, the prediction is of {forecast.written}")
    error = forecast.loss.value - run.loss_nats
    inside = forecast.loss.holds(run.loss_nats)
    return Judged(run.loss_nats, error, inside, run.flops / forecast.largest_fitted_flops, before, tuple(notes))


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise LawError(f"{short(text)!r} is no time with a zone, such as 2026-11-30T20:00:00+0000") from None


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
