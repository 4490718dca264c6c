"""Checks of single values at the door of a graph: whole numbers, arrays of them, names.

Needs numpy only and runs under Python 3.10 too.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from neuro.graph.kinds import GraphError
from neuro.graph.text import quoted, short

LONGEST_RANGE = 2**24
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\Z")


def integer(value: Any, what: str) -> int:
    """`value` as int; GraphError naming `what` if it is no integer."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise GraphError(f"{what} is {quoted(value)} ({type(value).__name__}); an integer is needed")
    return int(value)


def checked_name(value: Any, what: str) -> str:
    """`value` if it is a usable name; GraphError otherwise."""
    if not isinstance(value, str) or not _NAME.match(value):
        raise GraphError(
            f"{what} name {quoted(value)} is not usable: letters, digits, '_', '.', '-' and no other characters"
        )
    return value


def is_array(value: Any) -> bool:
    """Whether `integer_array` should look at the value: an array, a tensor, a list, a tuple or a range."""
    return isinstance(value, (np.ndarray, list, tuple, range)) or (
        hasattr(value, "__array__") and not isinstance(value, np.generic)
    )


def integer_array(value: Any, what: str) -> np.ndarray:
    """Integers as a numpy array: an integer array or CPU tensor as it is, or (nested) lists, tuples and ranges of integers.

    Args:
        value: any object.
        what: its name in messages.

    Returns:
        an array of an integer dtype; the object itself where it is one.

    Raises:
        GraphError: truth values, fractions, rows of unequal length, numbers beyond 64 bits, or no array at all.
    """
    if isinstance(value, range):
        if abs(value.stop - value.start) > LONGEST_RANGE * abs(value.step):
            raise GraphError(f"{what} is {quoted(value)}; a range of at most {LONGEST_RANGE:,} values is taken")
        value = list(value)
    try:
        if isinstance(value, (list, tuple)):
            return _from_lists(value, what)
        array = np.asarray(value)
    except GraphError:
        raise
    except Exception as error:  # whatever a stranger's object raises when it is asked for numbers
        raise GraphError(f"{what} is {quoted(value)}, which numpy does not take: {short(str(error))}") from error
    if not np.issubdtype(array.dtype, np.integer):
        raise GraphError(f"{what} is an array of {array.dtype}; integers are needed")
    return array


def _from_lists(value: Any, what: str) -> np.ndarray:
    objects = np.array(value, dtype=object)
    for kind in set(map(type, objects.ravel())):
        if kind in (list, tuple, range, np.ndarray):
            raise GraphError(f"{what} has rows of unequal length; every row needs as many values")
        if kind in (bool, np.bool_) or not issubclass(kind, (int, np.integer)):
            first = next(item for item in objects.ravel() if type(item) is kind)
            raise GraphError(f"{what} holds {quoted(first)} ({kind.__name__}); integers are needed")
    try:
        return objects.astype(np.int64)
    except OverflowError:
        far = next(item for item in objects.ravel() if not -(2**63) <= item < 2**63)
        raise GraphError(f"{what} holds {quoted(far)}, beyond 64 bits") from None


def frozen(array: np.ndarray) -> np.ndarray:
    """A read-only int32 copy."""
    array = np.ascontiguousarray(array, dtype=np.int32).copy()
    array.flags.writeable = False
    return array
