"""JSON, YAML and the data files of the ground floor from any bytes: a value, or one typed error within bounded memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hardware import load_profile
from hardware.chips.chip import load_chip
from hardware.chips.pooled import load_pooled
from hardware.datafile import ROOT, DataFileError
from hardware.declared import is_of, made
from hardware.documents import MOST_DEEP, read_bytes, read_json, read_yaml, yaml_of
from hardware.documents import json_of as json_value
from hardware.energy.measured_networks import read_networks
from hardware.latency.rates import load_rates
from tests import mutations

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=30,
)
READERS: dict[str, tuple[Path, Callable[[Path], Any]]] = {
    "profile": (ROOT / "profiles" / "loihi1_davies2018.yaml", load_profile),
    "rates": (ROOT / "rates" / "loihi2_estimated.yaml", load_rates),
    "chip": (ROOT / "chips" / "loihi1.yaml", load_chip),
    "pools": (ROOT / "pools" / "xylo_imu.yaml", load_pooled),
    "networks": (ROOT / "networks" / "xylo.yaml", read_networks),
}


MULTIPLIED = "\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 7))])


class Refused(ValueError):
    pass


@given(PLAIN)
def test_json_reads_what_json_writes(value: Any) -> None:
    assert json_value(json.dumps(value), "x", Refused) == value


@given(PLAIN)
def test_yaml_reads_what_yaml_writes(value: Any) -> None:
    assert yaml_of(yaml.safe_dump(value), "x", Refused) == value


@mutations.few(300)
@given(st.data())
def test_any_bytes_are_a_value_or_one_error(tmp_path: Path, data: st.DataObject) -> None:
    whole = {"schema": 1, "names": ["a", "b"], "deep": {"x": [1, 2.5, None, {"y": "z"}]}}
    refused = (Refused,)
    mutations.hold(lambda p: read_json(p, Refused), tmp_path / "x", data.draw(mutations.json_of(whole)), refused)
    mutations.hold(lambda p: read_yaml(p, Refused), tmp_path / "x", data.draw(mutations.yaml_of(whole)), refused)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"a": 1, "a": 2}', "key 'a' appears twice"),
        (b"[NaN]", "NaN is no number of JSON"),
        (b"[-Infinity]", "-Infinity is no number of JSON"),
        (b"[1e999]", "beyond what a float holds"),
        (b"[" + b"9" * 5000 + b"]", "not readable as JSON"),
        (b"[" * (MOST_DEEP + 2) + b"]" * (MOST_DEEP + 2), "more than 100 deep"),
        (b"[" * 50_000, "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"", "not readable as JSON"),
        (b"[" + b"1," * 2_000_001 + b"1]", "2,000,002 values; 2,000,000 are the limit"),
    ],
)
def test_what_json_is_refused(text: bytes, why: str) -> None:
    with pytest.raises(Refused, match=f"^here: .*{why}"):
        json_value(text, "here", Refused)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\na: 2", r"key 'a' appears twice \(line 2\)"),
        ("1: x\n1.0: y", "appears twice"),
        ("? [1]\n: x", "is a list or a mapping"),
        ("&a [*a]", "holds itself"),
        ("day: 2026-13-45", "not readable as YAML"),
        ("x: !!python/name:os.system", "could not determine a constructor"),
        ("x: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("[" * 102 + "]" * 102, "more than 100 deep"),
        ("[" * 200_000, "more than 100 deep"),  # found while it is read, before n brackets take n^2
        ("--- 1\n--- 2", "not readable as YAML"),
        (MULTIPLIED, "written out"),
    ],
)
def test_what_yaml_is_refused(text: str, why: str) -> None:
    with pytest.raises(Refused, match=f"^here: .*{why}"):
        yaml_of(text, "here", Refused)


def test_an_alias_within_the_limit_is_read() -> None:
    assert yaml_of("a: &x [1, 2]\nb: *x\nc: {<<: {d: 1}, e: 2}", "here", Refused) == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"d": 1, "e": 2},
    }


def test_only_plain_files_of_a_bearable_size_are_read(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("x\0y")):
        with pytest.raises(Refused):
            read_bytes(name, Refused, 100)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none", Refused)
    (tmp_path / "long").write_bytes(b" " * 101)
    with pytest.raises(Refused, match="more than 100 bytes"):
        read_bytes(tmp_path / "long", Refused, 100)


def test_fields_are_of_their_declared_types() -> None:
    from hardware.chips.budget import Budget

    assert is_of({"a": [1, 2.0]}, dict[str, list[float]])
    assert not is_of({"a": [True]}, dict[str, list[float]])
    assert not is_of(float("nan"), float)
    assert not is_of(2**63, int)
    assert is_of(None, int | None)
    for fields in ([], {"none": 1}, {1: 2}, {}):
        with pytest.raises(Refused, match=r"^here: "):
            made(Budget, fields, "here", Refused)


def _read(name: str, folder: Path, data: bytes) -> bool:
    golden, read = READERS[name]
    return mutations.hold(lambda path: read(path), folder / golden.name, data, (DataFileError,))


def _changed(name: str) -> st.SearchStrategy[bytes]:
    whole = READERS[name][0].read_bytes()
    value = json.loads(json.dumps(yaml.safe_load(whole), default=str))
    return mutations.yaml_of(value) | mutations.bytes_of(whole)


@pytest.mark.parametrize("name", READERS)
def test_a_changed_data_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    count = []

    @mutations.few(12)
    @given(_changed(name))
    def each(data: bytes) -> None:
        count.append(_read(name, tmp_path, data))

    each()
    assert sum(count) > 2


@pytest.mark.soak
@pytest.mark.parametrize("name", READERS)
def test_many_changed_data_files(name: str, tmp_path: Path) -> None:
    @mutations.few(600)
    @given(_changed(name))
    def each(data: bytes) -> None:
        _read(name, tmp_path, data)

    each()
