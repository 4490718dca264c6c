"""What a run of the tests left out and what it warned of: one line per reason, counted, with the files it came from."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

REASON, FILES = 160, 3


def grouped(found: Iterable[tuple[str, str, str]]) -> list[str]:
    """One line per kind and reason, the most frequent first.

    Args:
        found: (kind, reason, path of the test file) of each skip, expected failure or warning.
    """
    files: Mapping[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for kind, reason, path in found:
        files[kind, " ".join(reason.split())][path.removeprefix("tests/")] += 1
    lines = []
    for (kind, reason), paths in sorted(files.items(), key=lambda item: (-item[1].total(), item[0])):
        short = reason if len(reason) <= REASON else f"{reason[: REASON - 3]}..."
        shown = ", ".join(path if n == 1 else f"{path} ({n})" for path, n in paths.most_common(FILES))
        more = f" and {len(paths) - FILES} more files" if len(paths) > FILES else ""
        lines.append(f"{kind} {paths.total():3}  {short}  [{shown}{more}]")
    return lines


def left_out(stats: Mapping[str, list]) -> list[tuple[str, str, str]]:
    """(kind, reason, path) of what pytest's terminal reporter collected in its `stats`."""
    found = []
    for report in stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        found.append(("skipped", reason.removeprefix("Skipped: "), report.nodeid.partition("::")[0]))
    for report in stats.get("xfailed", []):
        found.append(("expected to fail", getattr(report, "wasxfail", ""), report.nodeid.partition("::")[0]))
    for warning in stats.get("warnings", []):
        # "PATH:LINE: Category: text", then the source line
        text = warning.message.strip().splitlines()[0].split(": ", 1)[-1]
        place = warning.fslocation[0] if warning.fslocation else "pytest"
        found.append(("warned ", text, (warning.nodeid or "").partition("::")[0] or Path(place).name))
    return found


SOAK = "soak"
"""Name of the property that a long test records: {"what": ..., "faults": how many were injected, "survived": of them,
"lost": progress lost, in words, "tried": how many inputs}; all but the first may be missing."""


def soak_table(stats: Mapping[str, list]) -> list[str]:
    """What the long tests tried: one line for each property of the name :data:`SOAK`, and a head; empty without any."""
    found = [
        (value, outcome)
        for outcome in ("passed", "failed")
        for report in stats.get(outcome, [])
        for name, value in getattr(report, "user_properties", ())
        if name == SOAK
    ]
    if not found:
        return []
    lines = [f"{'faults':>7} {'survived':>8} {'inputs':>8}  {'lost':<24} what"]
    for value, outcome in sorted(found, key=lambda pair: str(pair[0]["what"])):
        numbers = [str(value.get(key, "-")) for key in ("faults", "survived", "tried")]
        told = value["what"] + ("" if outcome == "passed" else "  FAILED")
        lines.append(f"{numbers[0]:>7} {numbers[1]:>8} {numbers[2]:>8}  {value.get('lost', '-'):<24} {told}")
    return lines
