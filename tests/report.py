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
