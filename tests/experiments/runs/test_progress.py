"""Progress: plain lines where standard error is piped, a bar that moves on a terminal, nothing where it is not wanted."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from experiments.runs import progress
from experiments.runs.progress import Bar, clock, counted


def test_a_piped_bar_says_where_it_is_now_and_then_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", -1.0)
    with Bar("noisy surprise", 40, "ref s") as bar:
        bar.to(20, "loss 2.823, kept 70%")
        monkeypatch.setattr(progress, "PLAIN_EVERY_S", 1e9)
        bar.to(30)
        bar.to(60)
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"noisy surprise: 50%, 20/40 ref s, \d:\d\d, \d:\d\d left, loss 2\.823, kept 70%", first)
    assert re.fullmatch(r"noisy surprise: 100%, 40/40 ref s, \d:\d\d, loss 2\.823, kept 70%", last)


def test_a_bar_that_is_not_wanted_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted("abc", "letters", 3, "letters", shown=False)) == ["a", "b", "c"]
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_time_as_people_write_it() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 187, 3612)] == ["0:00", "1:00", "3:07", "1:00:12"]


TWO = """
import sys
from experiments.runs.progress import Bar
with Bar("letters [bold]", 4, "letters") as bar:
    for number in range(4):
        bar.to(number + 1, f"at {number}")
        print("a line between", file=sys.stderr)
"""


def test_a_terminal_gets_one_bar_below_the_other_lines() -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", TWO], env=env, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # Linux: the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert text.count("a line between") == 4
    assert re.search(r"letters \[bold\] +100% .*4/4 letters.*at 3", text)
