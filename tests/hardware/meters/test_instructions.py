"""Counted instructions: they repeat, they grow with the work, and nobody has to have a counter."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from hardware.meters import instructions
from hardware.meters.instructions import CALLGRIND, PERF, Instructions, count_instructions

LOOP = 'i=0; while [ "$i" -lt {} ]; do i=$((i+1)); done'


def loop(times: int) -> list[str]:
    return ["/bin/sh", "-c", LOOP.format(times)]


@pytest.mark.skipif(not (shutil.which("valgrind") or shutil.which("perf")), reason="neither perf nor valgrind is here")
def test_instructions_grow_with_the_work_and_repeat():
    found = [count_instructions(loop(times)) for times in (100, 1100, 2100)]
    if None in found:
        pytest.skip("perf has no counter on this machine, and valgrind is not here")
    one, two, three = (each.count for each in found)
    assert two - one > 1000 * 10  # a turn of the loop is more than ten instructions
    assert three - two == pytest.approx(two - one, rel=0.02)


def test_perf_is_asked_first_and_its_figure_read(monkeypatch):
    asked = []

    def run(words, command, timeout_s, env):
        asked.append(words[0])
        if words[0] == "perf":
            place = words[words.index("-o") + 1]
            with open(place, "w") as file:
                file.write("# started\n\n123456,,instructions:u,1000,100.00,,\n")

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(instructions, "_run", run)
    assert count_instructions(["true"]) == Instructions(123456, PERF)
    assert asked == ["perf"]


def test_without_a_counter_valgrind_is_asked(monkeypatch):
    def run(words, command, timeout_s, env):
        if words[0] == "perf":
            text, place = "<not supported>,,instructions:u,0,100.00,,\n", words[words.index("-o") + 1]
        else:
            text, place = "events: Ir\nsummary: 77\n", words[2].partition("=")[2]
        with open(place, "w") as file:
            file.write(text)

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(instructions, "_run", run)
    assert count_instructions(["true"]) == Instructions(77, CALLGRIND)


def test_nothing_there_or_too_slow_is_none(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert count_instructions(["true"]) is None

    def late(words, command, timeout_s, env):
        raise subprocess.TimeoutExpired(words, timeout_s)

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(instructions, "_run", late)
    assert count_instructions(["true"]) is None


def test_a_command_that_fails_is_said(monkeypatch):
    with pytest.raises(ValueError, match="empty command"):
        count_instructions([])
    if shutil.which("perf") or shutil.which("valgrind"):
        with pytest.raises(ValueError, match="exit code 3"):
            count_instructions(["/bin/sh", "-c", "exit 3"])
