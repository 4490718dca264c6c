"""Files as a careless copy, a broken disk or a stranger would leave them: the mutators that all fuzzing tests share.

`bytes_of(whole)` is a hypothesis strategy of changed bytes: bits flipped, ends cut, stretches doubled or put in, lengths
in binary or in digits made huge. `json_of(value)` and `yaml_of(value)` change a document and write it again: odd values at
any place, keys twice, keys gone, deep nesting. `hold(read, ...)` says what every reader owes: a value or one of its errors,
within twice the file's bytes and `CONSTANT_BYTES` of memory.
"""

from __future__ import annotations

import copy
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CONSTANT_BYTES = 24 * 2**20
"""What a reader may take beside twice the file: its own records, and a document's parser."""
LONGEST_MESSAGE = 1500
ODD: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**63, 10**12, 10**400, 1.5, -0.0, 1e308),
    *("", "x", "0", "nan", "../x", "\u2028", "\0", "${oc.env:HOME}"),
    *([], {}, [[1]], {"": ""}, {"$tensor": "x"}, {"$dict": [[[], 1]]}, ["x"] * 50),
]  # fmt: skip
HUGE = (
    b"\xff" * 8,
    struct.pack("<q", 2**62),
    struct.pack("<I", 2**31),
    struct.pack(">I", 2**31 - 1),
    b"\x7f" + b"\xff" * 7,
)
DIGITS = (b"99999999999999999999", b"-1", b"1e999", b"9" * 5000, b"4294967296", b"NaN")
NAMES = ("", "x", "name", "schema", "__class__", "_target_")
DEEP = ((b"[", b"]"), (b'{"a":', b"}"), (b"(", b")"))


def few(examples: int) -> Callable[[Any], Any]:
    """Settings of a share that runs with every test: seconds, the same draws each time, nothing kept on disk."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


@st.composite
def bytes_of(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` after one to three changes."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        way = draw(st.sampled_from(BYTE_WAYS))
        way(draw, data)
    return bytes(data)


def _place(draw: st.DrawFn, data: bytearray) -> int:
    return draw(st.integers(0, max(0, len(data) - 1)))


def _flip(draw: st.DrawFn, data: bytearray) -> None:
    for _ in range(draw(st.integers(1, 8))):
        if data:
            data[_place(draw, data)] ^= 1 << draw(st.integers(0, 7))


def _cut(draw: st.DrawFn, data: bytearray) -> None:
    del data[_place(draw, data) :]


def _drop(draw: st.DrawFn, data: bytearray) -> None:
    first = _place(draw, data)
    del data[first : first + draw(st.integers(1, 64))]


def _double(draw: st.DrawFn, data: bytearray) -> None:
    first = _place(draw, data)
    data[first:first] = data[first : first + draw(st.integers(1, 400))]


def _insert(draw: st.DrawFn, data: bytearray) -> None:
    first = _place(draw, data)
    run = draw(
        st.sampled_from([b"\0" * 64, b"\xff" * 64, b'"' * 3, b"\n- ", b"&a *a", b"\xef\xbb\xbf", b"PK\x03\x04", b"{}[],:"])
    )
    data[first:first] = run


def _huge(draw: st.DrawFn, data: bytearray) -> None:
    first = _place(draw, data)
    word = draw(st.sampled_from(HUGE))
    data[first : first + len(word)] = word


def _digits(draw: st.DrawFn, data: bytearray) -> None:
    """A run of digits from some place on becomes another number."""
    first = _place(draw, data)
    while first < len(data) and not 48 <= data[first] <= 57:
        first += 1
    last = first
    while last < len(data) and 48 <= data[last] <= 57:
        last += 1
    data[first:last] = draw(st.sampled_from(DIGITS))


def _nest(draw: st.DrawFn, data: bytearray) -> None:
    first, deep = _place(draw, data), draw(st.sampled_from([3, 150, 3000]))
    opening, closing = draw(st.sampled_from(DEEP))
    data[first:first] = opening * deep + closing * deep


BYTE_WAYS = (_flip, _cut, _drop, _double, _insert, _huge, _digits, _nest)


@st.composite
def value_of(draw: st.DrawFn, whole: Any) -> Any:
    """A JSON value after one to three changes of what stands at its places."""
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        places = [at for at in _places(value) if at]
        if not places:
            return value
        *way, last = draw(st.sampled_from(places))
        inner = value
        for key in way:
            inner = inner[key]
        change = draw(st.sampled_from(["odd", "odd", "odd", "gone", "more", "deep", "swap"]))
        if change == "odd":
            inner[last] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif change == "gone":
            del inner[last]
        elif change == "more":
            inner = inner if isinstance(inner, dict) else value
            if isinstance(inner, dict):
                inner[draw(st.sampled_from(NAMES))] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif change == "deep":
            for _ in range(draw(st.sampled_from([2, 120]))):
                inner[last] = [inner[last]]
        else:
            found = value
            for key in draw(st.sampled_from(places)):
                found = found[key]
            inner[last] = json.loads(json.dumps(found))
    return value


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value, as keys from the top; at most 4,000, so that a large table costs no more."""
    found, stack = [], [(value, at)]
    while stack and len(found) < 4000:
        inner, here = stack.pop()
        found.append(here)
        parts = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        stack += [(part, (*here, key)) for key, part in parts]
    return found


@st.composite
def json_of(draw: st.DrawFn, whole: Any) -> bytes:
    """The bytes of a changed JSON document; sometimes with a key twice, sometimes changed as bytes too."""
    text = json.dumps(draw(value_of(whole))).encode()
    if draw(st.integers(0, 5)) == 0 and text.startswith(b'{"'):
        text = b'{"' + text[2:].split(b'"', 1)[0] + b'": 0, ' + text[1:]
    return draw(bytes_of(text)) if draw(st.integers(0, 3)) == 0 else text


@st.composite
def yaml_of(draw: st.DrawFn, whole: Any) -> bytes:
    """As `json_of`, in YAML; sometimes with anchors that multiply."""
    value = draw(value_of(whole))
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=False).encode()
    if draw(st.integers(0, 9)) == 0:
        rows = [b"x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1]"]
        rows += [b"x%d: &x%d [%s]" % (n, n, b", ".join([b"*x%d" % (n - 1)] * 8)) for n in range(1, 8)]
        text = b"\n".join(rows) + b"\n" + text
    return draw(bytes_of(text)) if draw(st.integers(0, 3)) == 0 else text


def hold(read: Callable[[Path], Any], path: Path, data: bytes, errors: tuple[type[Exception], ...]) -> bool:
    """Write `data` to `path` and read it. Whether it was refused, by one of `errors` in words of a bearable length; memory
    within the bound in either case. Any other error passes through."""
    path.write_bytes(data)
    said = None
    tracemalloc.start()
    try:
        read(path)
    except errors as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert said is None or 0 < len(said) <= LONGEST_MESSAGE, said
    assert peak <= 2 * len(data) + CONSTANT_BYTES, f"{peak:,} bytes for a file of {len(data):,}"
    return said is not None


def refusals(
    changed: st.SearchStrategy[bytes],
    read: Callable[[Path], Any],
    path: Path,
    errors: tuple[type[Exception], ...],
    examples: int,
) -> int:
    """How many of so many changed files are refused; each is written to `path` and held to what `hold` asks."""
    refused = []

    @few(examples)
    @given(changed)
    def each(data: bytes) -> None:
        refused.append(hold(read, path, data, errors))

    each()
    return sum(refused)
