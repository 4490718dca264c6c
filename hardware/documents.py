"""JSON and YAML of strangers: any bytes give a value of plain types, or the one error that the caller names.

Before a parser sees the text, its length and the number of its items are held against a limit, since a parser needs
memory for each item: about 150 bytes for one of JSON, about 2 kB for one of YAML. Keys that stand twice, numbers that are
none (NaN, Infinity) in JSON, nesting beyond `MOST_DEEP` and aliases of YAML that multiply are refused.

PyYAML is imported inside the functions, so that importing ``hardware`` stays light.
"""

from __future__ import annotations

import functools
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hardware.text import quoted, short

MOST_JSON_BYTES = 2**26
MOST_JSON_ITEMS = 2_000_000
MOST_YAML_BYTES = 2**18
MOST_YAML_NODES = 50_000
"""Values and keys of a YAML file, each alias counted as all that it stands for."""
MOST_DEEP = 100


def read_bytes(path: Path, refused: type[Exception], most_bytes: int) -> bytes:
    """A file's bytes.

    Raises:
        FileNotFoundError: no such file.
        refused: no plain file (a folder, a device, a pipe), one that cannot be opened, or one of more than `most_bytes`.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise refused(f"{path} is no file but a folder, a device or a pipe; name a file")
            found = file.read(min(about.st_size, most_bytes) + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, refused):
            raise
        raise refused(f"{short(str(path))} cannot be read: {short(str(error))}") from error
    if len(found) > most_bytes:
        raise refused(f"{path} has more than {most_bytes:,} bytes, the limit for such a file; is it the right one?")
    return found


def read_json(path: Path, refused: type[Exception], most_bytes: int = MOST_JSON_BYTES) -> Any:
    """The value in a JSON file. Raises FileNotFoundError, and `refused` as `read_bytes` and `json_of` do."""
    return json_of(read_bytes(path, refused, most_bytes), str(path), refused)


def json_of(text: bytes | str, where: str, refused: type[Exception]) -> Any:
    """The value of a JSON text.

    Args:
        text: UTF-8.
        where: what it is, for the message.

    Raises:
        refused: no JSON, more items or deeper than the limits, a key twice, NaN, Infinity or a number beyond float64.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        items = sum(map(text.count, ",[{"))
        if items > MOST_JSON_ITEMS:
            raise _Wrong(f"it may hold {items:,} values; {MOST_JSON_ITEMS:,} are the limit")
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
        if not _shallow(found):
            raise _Wrong(f"its lists and objects lie more than {MOST_DEEP} deep")
    except (ValueError, RecursionError) as error:  # a number of more than 4,300 digits and text in another encoding too
        raise refused(f"{where}: not readable as JSON: {short(str(error))}") from error
    return found


def read_yaml(path: Path, refused: type[Exception], most_bytes: int = MOST_YAML_BYTES) -> Any:
    """The value in a YAML file. Raises FileNotFoundError, and `refused` as `read_bytes` and `yaml_of` do."""
    return yaml_of(read_bytes(path, refused, most_bytes), str(path), refused)


def yaml_of(text: bytes | str, where: str, refused: type[Exception]) -> Any:
    """The value of a YAML text: plain types alone, no object of Python's is made.

    Args:
        text: UTF-8.
        where: what it is, for the message.

    Raises:
        refused: no YAML, a key twice or one that is no text or number, more nodes or deeper than the limits, an alias that
            holds itself, a tag that is not of YAML itself.
    """

    try:
        loader = _loader()(text.decode() if isinstance(text, bytes) else text)
        try:
            node = _composed(loader)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except _Wrong as error:
        raise refused(f"{where}: {error}") from error
    except Exception as error:  # PyYAML's constructors raise whatever int(), a date or a deep nesting does
        raise refused(f"{where}: not readable as YAML: {short(str(error), limit=300)}") from error


class _Wrong(ValueError):
    """What is wrong with a text, without its name."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _Wrong(f"key {quoted(twice)} appears twice")
    return found


def _no_constant(word: str) -> float:
    raise _Wrong(f"{word} is no number of JSON")


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise _Wrong(f"{short(word)} is beyond what a float holds")
    return value


def _shallow(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_DEEP + 1):
        level = list(_inner(level))
        if not level:
            return True
    return False


def _inner(level: list[Any]) -> Iterator[Any]:
    for item in level:
        for part in item.values() if isinstance(item, dict) else item if isinstance(item, list) else ():
            if isinstance(part, dict | list):
                yield part


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def fetch_flow_collection_start(self, TokenClass: Any) -> None:
            if self.flow_level > MOST_DEEP:  # PyYAML looks at every open bracket for each token: n brackets take n^2
                raise _Wrong(f"its lists and mappings lie more than {MOST_DEEP} deep")
            super().fetch_flow_collection_start(TokenClass)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            merged = any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value)
            found = super().construct_mapping(node, deep)
            if not merged and len(found) != len(node.value):  # 1 and 1.0, say; the same word twice is found before
                raise _Wrong(f"a key of the mapping at line {node.start_mark.line + 1} appears twice")
            return found

    return Loader


def _composed(loader: Any) -> Any:
    """The one document's node, found to be lawful before anything is made of it."""
    node = loader.get_single_node()
    if node is not None:
        _count(node, {}, 0)
    return node


def _count(node: Any, known: dict[int, int | None], deep: int) -> int:
    """Nodes under `node` and itself, what an alias stands for counted each time."""
    import yaml

    if deep > MOST_DEEP:
        raise _Wrong(f"its lists and mappings lie more than {MOST_DEEP} deep")
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise _Wrong(f"the alias at line {node.start_mark.line + 1} holds itself")
        return found
    known[id(node)] = None
    total = 1
    if isinstance(node, yaml.MappingNode):
        seen: set[tuple[str, str]] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Wrong(f"the key at line {key.start_mark.line + 1} is a list or a mapping; a text is needed")
            if (key.tag, key.value) in seen:
                raise _Wrong(f"key {quoted(key.value)} appears twice (line {key.start_mark.line + 1})")
            seen.add((key.tag, key.value))
            total += 1 + _count(value, known, deep + 1)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count(part, known, deep + 1) for part in node.value)
    if total > MOST_YAML_NODES:
        raise _Wrong(f"it holds more than {MOST_YAML_NODES:,} values, aliases written out")
    known[id(node)] = total
    return total
