"""The last line of a command: one JSON document of at most 4,096 bytes, not shown on a terminal, all of it in a file."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.runs.output import LIMIT_BYTES, entry, finish, line
from experiments.runs.plain_json import plain

DOCUMENTS = st.dictionaries(
    st.text(max_size=30),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=600),
        lambda inner: st.lists(inner, max_size=60) | st.dictionaries(st.text(max_size=40), inner, max_size=60),
        max_leaves=80,
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS)
def test_no_document_is_longer_than_a_line_may_be(document: dict[str, object]) -> None:
    text = line(document, "any", file=Path("all.json"))
    assert len(text.encode()) <= LIMIT_BYTES
    assert "\n" not in text
    found = json.loads(text)
    if "file" not in document:
        assert found["file"] == "all.json"


@pytest.fixture(autouse=True)
def documents_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here they go where they go in use, below the current folder."""
    monkeypatch.setattr("experiments.runs.output.FOLDER", Path("runs/documents"))


def huge() -> dict[str, object]:
    """As a comparison of many runs: 371,000 characters and more."""
    rows = [{"arm": f"arm {i}", "loss_nats": i / 7, "text": "ä" * 300} for i in range(900)]
    return {"table": rows, "equal": True, "loss_nats": 1.5, "streams": {f"s{i}": {"dense": {"n": i}} for i in range(500)}}


def test_a_huge_document_is_cut_and_its_whole_is_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = line(huge(), "any")
    found = json.loads(text)
    assert 2000 < len(text.encode()) <= LIMIT_BYTES  # cut, and no more than is needed
    assert (found["equal"], found["loss_nats"]) == (True, 1.5)  # what is small stays whole
    assert list(found)[:3] == ["table", "equal", "loss_nats"]
    assert found["table"][0] == {"arm": "arm 0", "loss_nats": 0, "text": "ä" * 300}
    assert found["table"][-1].endswith(" more")
    assert json.loads(Path(found["file"]).read_text()) == plain(huge())
    assert json.loads(line(huge(), "any", file=Path("f"), headline=["equal"])) == {"equal": True, "file": "f"}


def test_a_small_document_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert json.loads(line({"a": float("nan"), "b": [1]}, "any")) == {"a": "nan", "b": [1]}
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file is in the way")
    assert json.loads(line(huge(), "any"))["file"] is None
    assert "the whole document cannot be written" in capsys.readouterr().err


@entry
def command(argv: Sequence[str] | None = None) -> int:
    print("a table", *(argv or ()))
    finish({"answer": 42}, "command")
    return 0


def test_the_flag_leaves_the_document_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["x"]) == 0
    assert capsys.readouterr().out == 'a table x\n{"answer": 42}\n'
    assert command(["x", "--json", "y"]) == 0
    assert capsys.readouterr().out == '{"answer": 42}\n'
    assert command(["x"]) == 0
    assert capsys.readouterr().out.startswith("a table x\n")


def on_a_terminal(*words: str, cwd: Path) -> tuple[int, list[str]]:
    """(exit code, lines that a person sees) of `spikegate WORDS` with a pseudo-terminal for all three streams."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "experiments.cli", *words]
    env = {**os.environ, "TERM": "dumb"}
    process = subprocess.Popen(command, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    return process.wait(), shown.decode().splitlines()


def documents(lines: Sequence[str]) -> list[str]:
    return [text for text in lines if text.lstrip().startswith(("{", "["))]


@pytest.mark.parametrize(
    ("words", "last"),
    [
        (["bench", "account"], "spikes per neuron"),
        (["sweep", "smoke", "--dry-run"], "tuning/dense-1 "),
        (["doctor"], ""),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_terminal_shows_the_table_last_and_no_json(words: list[str], last: str, tmp_path: Path) -> None:
    code, lines = on_a_terminal(*words, cwd=tmp_path)
    assert code == 0, lines
    assert len(lines) > 1
    assert documents(lines) == []
    assert last in lines[-1]
    code, lines = on_a_terminal(*words, "--json", cwd=tmp_path)
    assert code == 0
    assert len(documents(lines)) == len(lines) == 1
    json.loads(lines[0])
