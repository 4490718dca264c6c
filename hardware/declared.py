"""Fields of a dataclass held against the types that it declares, for records that are read from files."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hardware.text import quoted

Record = TypeVar("Record")


def made(record_type: type[Record], fields: Any, where: str, refused: type[Exception]) -> Record:
    """`record_type(**fields)`, each field of its declared type.

    Args:
        fields: names and values, as JSON gives them.
        where: what is read, for the message.

    Raises:
        refused: no mapping, a field that is missing, unknown or of another type, a number that is not finite, or whatever
            the record's own checks say (ValueError).
    """
    if not isinstance(fields, Mapping) or not all(isinstance(name, str) for name in fields):
        raise refused(f"{where}: a {record_type.__name__} has names and values; found {quoted(fields)}")
    try:
        record = record_type(**fields)
    except (TypeError, ValueError) as error:
        raise refused(f"{where}: {record_type.__name__}: {quoted(str(error))}") from error
    if wrong := first_wrong(record):
        raise refused(f"{where}: {record_type.__name__}: {wrong} is {quoted(getattr(record, wrong))}")
    return record


def first_wrong(record: Any) -> str:
    """The name of the first field that is not of its declared type; "" where all are."""
    hints = get_type_hints(type(record))
    return next((name for name, declared in hints.items() if not is_of(getattr(record, name, None), declared)), "")


def is_of(value: Any, declared: Any) -> bool:
    """Whether a value, its items included, is of a declared type. Numbers are finite and whole ones below 2^63; a whole
    number is a float too; no bool is a number."""
    if declared is Any:
        return True
    if get_origin(declared) in (Union, types.UnionType):
        return any(is_of(value, one) for one in get_args(declared))
    if get_origin(declared) is tuple:
        return isinstance(value, tuple) and all(is_of(item, get_args(declared)[0]) for item in value)
    if get_origin(declared) is list:
        return isinstance(value, list) and all(is_of(item, get_args(declared)[0]) for item in value)
    if get_origin(declared) is not None:
        key, item = get_args(declared)
        return isinstance(value, Mapping) and all(is_of(k, key) and is_of(v, item) for k, v in value.items())
    if declared in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        return whole or (declared is float and isinstance(value, float) and math.isfinite(value))
    return isinstance(value, declared)
