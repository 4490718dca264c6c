"""Strict reading of the data files in ``profiles/`` and ``chips/``: nothing unknown, nothing missing, nothing twice."""

from __future__ import annotations

import datetime
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardware.documents import read_yaml
from hardware.interval import Interval
from hardware.text import listed, quoted
from hardware.units import Quantity, UnitError

ROOT = Path(__file__).parent


class DataFileError(ValueError):
    """A data file that cannot be trusted; the message names file, entry and remedy."""


def names(folder: str) -> tuple[str, ...]:
    """Names of the data files shipped in ``hardware/<folder>``, sorted."""
    return tuple(sorted(path.stem for path in (ROOT / folder).glob("*.yaml")))


def locate(name_or_path: str | Path, folder: str) -> Path:
    """The shipped file of that name, or the file at that path (a path has a separator or ends in ``.yaml``).

    Raises:
        FileNotFoundError: no such file; the message lists the shipped names.
    """
    text = str(name_or_path)
    is_path = isinstance(name_or_path, Path) or text.endswith((".yaml", ".yml")) or "/" in text
    path = Path(text) if is_path else ROOT / folder / f"{text}.yaml"
    if not path.is_file():
        what = "file" if is_path else "name"
        raise FileNotFoundError(f"{folder}: no {what} {quoted(text)}; shipped names: {', '.join(names(folder))}")
    return path


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises DataFileError as `documents.read_yaml` says, and for another type at the top."""
    content = read_yaml(path, DataFileError)
    if not isinstance(content, dict):
        raise DataFileError(f"{path.name}: expected a mapping at the top, got {type(content).__name__}")
    return content


def check_keys(where: str, entry: object, required: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """``entry`` itself, if it is a mapping with all required keys and no unknown one; else :class:`DataFileError`."""
    if not isinstance(entry, Mapping):
        raise DataFileError(f"{where}: expected a mapping, got {type(entry).__name__}")
    known = [*required, *optional]
    unknown = [str(key) for key in entry if key not in known]
    if unknown:
        raise DataFileError(f"{where}: unknown key {listed(unknown)}; known keys: {', '.join(known)}")
    missing = [key for key in required if key not in entry]
    if missing:
        raise DataFileError(f"{where}: missing key {listed(missing)}")
    return dict(entry)


def opened(
    name_or_path: str | Path, folder: str, keys: Collection[str], optional: Collection[str] = ()
) -> tuple[str, dict[str, Any]]:
    """A file's name and what it holds, its header checked: schema 1, its own file's name, a title, and the given keys.

    Raises:
        FileNotFoundError: as `locate`.
        DataFileError: no YAML mapping, an unknown, missing or repeated key, another schema or name.
    """
    path = locate(name_or_path, folder)
    entry = check_keys(path.name, read(path), ("schema", "name", "title", *keys), optional)
    if entry["schema"] != 1:
        raise DataFileError(f"{path.name}: schema {quoted(entry['schema'])} is not known; this version reads schema 1")
    if entry["name"] != path.stem:
        raise DataFileError(f"{path.name}: name {quoted(entry['name'])} differs from the file's name {quoted(path.stem)}")
    return path.name, entry


ABOUT = ("source", "assumptions", "not_modelled")


def about(where: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say of a whole file what it is and what it leaves out: name, title, and those of :data:`ABOUT`."""
    return {
        "name": entry["name"],
        "title": text(f"{where}: title", entry["title"]),
        "source": text(f"{where}: source", entry["source"]),
        "assumptions": texts(f"{where}: assumptions", entry["assumptions"]),
        "not_modelled": texts(f"{where}: not_modelled", entry["not_modelled"]),
    }


@dataclass(frozen=True)
class Provenance:
    """Where one value comes from, how it was obtained, the day it was read, and a caution if any."""

    source: str
    method: str
    date: str
    note: str


def sourced(where: str, raw: object, methods: Collection[str]) -> tuple[object, Provenance]:
    """The value of an entry with value, source, method, date and maybe a note, and where it comes from."""
    entry = check_keys(where, raw, ("value", "source", "method", "date"), ("note",))
    return entry["value"], Provenance(
        source=text(f"{where}: source", entry["source"]),
        method=choice(f"{where}: method", entry["method"], methods),
        date=iso_date(f"{where}: date", entry["date"]),
        note=text(f"{where}: note", entry["note"]) if "note" in entry else "",
    )


def text(where: str, value: object) -> str:
    """``value`` as stripped text; an empty or non-text value is refused."""
    if not isinstance(value, str) or not value.strip():
        raise DataFileError(f"{where}: expected a text, got {quoted(value)}")
    return " ".join(value.split())


def texts(where: str, value: object) -> tuple[str, ...]:
    """A list of texts."""
    if not isinstance(value, list):
        raise DataFileError(f"{where}: expected a list of texts, got {quoted(value)}")
    return tuple(text(where, item) for item in value)


def iso_date(where: str, value: object) -> str:
    """An ISO date (YYYY-MM-DD), as text."""
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return value.isoformat()
    raise DataFileError(f"{where}: expected a date YYYY-MM-DD, got {quoted(value)}")


def choice(where: str, value: object, allowed: Collection[str]) -> str:
    """``value``, if it is one of ``allowed``."""
    if value not in allowed:
        raise DataFileError(f"{where}: {quoted(value)} is not one of {', '.join(allowed)}")
    return str(value)


def number(where: str, value: object) -> float:
    """A finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise DataFileError(f"{where}: expected a finite number >= 0, got {quoted(value)}")
    return float(value)


def interval(where: str, raw: tuple[object, object, object], unit: str, dimension: str) -> Interval:
    """(low, value, high) in ``unit``, in order and of the dimension asked for."""
    low, mid, high = (number(f"{where}: {key}", n) for key, n in zip(("low", "value", "high"), raw, strict=True))
    if not low <= mid <= high:
        raise DataFileError(f"{where}: interval out of order: low {low}, value {mid}, high {high}")
    try:
        found = Interval(Quantity(low, unit), Quantity(mid, unit), Quantity(high, unit))
    except UnitError as error:
        raise DataFileError(f"{where}: {error}") from None
    if found.dimension != dimension:
        raise DataFileError(f"{where}: unit {quoted(unit)} is {found.dimension}, {dimension} is needed")
    return found


@dataclass(frozen=True)
class Figure:
    """A figure of a data file and where it comes from; a ``value`` of None is not known, ``note`` then says why."""

    value: Interval | None
    source: str
    method: str
    date: str
    note: str


def figure(where: str, raw: object, dimension: str, per: str, methods: Collection[str]) -> Figure:
    """An entry with value, low, high, unit (of ``dimension``, per ``per``), source, method, date and maybe a note; or one
    with a value of null, reason, source and date.
    """
    if isinstance(raw, dict) and "value" in raw and raw["value"] is None:
        entry = check_keys(where, raw, ("value", "reason", "source", "date"))
        source, reason = (text(f"{where}: {key}", entry[key]) for key in ("source", "reason"))
        return Figure(None, source, "unknown", iso_date(f"{where}: date", entry["date"]), reason)
    entry = check_keys(where, raw, ("value", "low", "high", "unit", "source", "method", "date"), ("note",))
    unit, slash, found = text(f"{where}: unit", entry["unit"]).partition("/")
    if not slash or found != per:
        raise DataFileError(f"{where}: unit {quoted(entry['unit'])} must be {dimension} per {per}")
    return Figure(
        value=interval(where, (entry["low"], entry["value"], entry["high"]), unit, dimension),
        source=text(f"{where}: source", entry["source"]),
        method=choice(f"{where}: method", entry["method"], methods),
        date=iso_date(f"{where}: date", entry["date"]),
        note=text(f"{where}: note", entry["note"]) if "note" in entry else "",
    )
