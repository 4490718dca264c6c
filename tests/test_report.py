"""What a run left out is told by reason, counted, with its files; `-m soak` runs what a plain run leaves out."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report import grouped

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import warnings, pytest
@pytest.mark.parametrize("i", range(3))
def test_needs_a_chip(i): pytest.skip("no chip here")
@pytest.mark.skipif(True, reason="no browser here")
def test_needs_a_browser(): pass
@pytest.mark.xfail(reason="a known fault")
def test_known(): assert False
def test_warns(): warnings.warn("an old key")
@pytest.mark.soak
@pytest.mark.parametrize("i", range(4))
def test_long(i, record_property):
    record_property("soak", {"what": f"case {i}", "faults": 7, "survived": 7 - i, "lost": "6 steps"})
"""


def test_equal_reasons_are_one_line_and_long_ones_are_cut() -> None:
    found = [("skipped", "no  GPU", f"tests/room/test_{i}.py") for i in (1, 1, 2, 3, 4)]
    lines = grouped([("warned", "x" * 500, "tests/test_b.py"), *found])
    assert lines[0] == "skipped   5  no GPU  [room/test_1.py (2), room/test_2.py, room/test_3.py and 1 more files]"
    assert lines[1] == f"warned   1  {'x' * 157}...  [test_b.py]"
    assert grouped([]) == []


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_the_end_of_a_run_names_what_was_left_out(workers: list[str], tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "report.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -m 'not soak'\nmarkers = soak: long\n")
    command = [sys.executable, "-m", "pytest", *workers]

    def run(*more: str) -> list[str]:
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    lines = run()
    told = lines[lines.index(next(line for line in lines if "left out and warned of" in line)) + 1 : -1]
    assert told == [
        "skipped   3  no chip here  [test_it.py (3)]",
        "expected to fail   1  a known fault  [test_it.py]",
        "skipped   1  no browser here  [test_it.py]",
        "warned    1  UserWarning: an old key  [test_it.py]",
        "left out  4  marked soak; `make soak` runs them",
    ]
    if not workers:
        long = run("-m", "soak")
        assert "4 passed" in long[-1]
        rows = [line.split(maxsplit=3) for line in long if "case " in line]
        assert rows == [["7", str(7 - i), "-", f"6 steps                  case {i}"] for i in range(4)]
