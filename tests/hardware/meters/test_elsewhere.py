"""Arms in processes of their own: their seconds arrive, what goes wrong there is said here."""

from __future__ import annotations

import sys

import pytest

from hardware.meters.elsewhere import Elsewhere, ElsewhereError
from hardware.meters.ratios import InTurn, Until

ARM = """
import sys
print("a library says hello", flush=True)
for number, _ in enumerate(sys.stdin):
    print("SECONDS", float(sys.argv[1]) * (1 + number % 2), flush=True)
"""


def arm(seconds: str, code: str = ARM, **options) -> Elsewhere:
    return Elsewhere("other", [sys.executable, "-c", code, seconds], **options)


def test_two_processes_are_measured_in_turn():
    with arm("0.5") as base, arm("0.25") as other:
        found = InTurn({"base": base, "other": other}, "base", Until(most_rounds=10)).run()
    assert found.ratios["other"].median == 0.5
    assert sorted(set(found.seconds["base"])) == [0.5, 1.0]
    with pytest.raises(ElsewhereError, match="has ended"):
        base()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no such peer')", "other: has ended.*no such peer"),
        ("input(); print('SECONDS soon')", "answered 'SECONDS soon', not seconds"),
        ("input(); import time; time.sleep(60)", "no answer within 0.5 s"),
    ],
)
def test_what_goes_wrong_is_said(code, message):
    probe = arm("1", code, timeout_s=0.5 if "sleep" in code else 60)
    try:
        with pytest.raises(ElsewhereError, match=message):
            probe()
    finally:
        probe._process.kill()
        probe.close()


def test_a_program_that_is_not_there():
    with pytest.raises(ElsewhereError, match="'/no/such/python' does not start"):
        Elsewhere("other", ["/no/such/python"])


def test_our_path_is_not_handed_on(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    code = "import os; input(); print('SECONDS', float('PYTHONPATH' in os.environ) + float(os.environ['MINE']))"
    with arm("1", code, env={"MINE": "3"}) as probe:
        assert probe() == 3.0
