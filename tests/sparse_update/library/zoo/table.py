"""Writes the table of docs/reference/models.md anew: `python -m tests.sparse_update.library.zoo.table`."""

from __future__ import annotations

import re
from pathlib import Path

from tests.sparse_update.library.zoo.check import check
from tests.sparse_update.library.zoo.entry import Entry
from tests.sparse_update.library.zoo.hf import HF
from tests.sparse_update.library.zoo.plain import PLAIN

PAGE = Path(__file__).parents[4] / "docs" / "reference" / "models.md"
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"
HEAD = "| Model | Reached, tokens | Reached, sequences | Left as they are | In full, and why |\n|---|---|---|---|---|"
BATCH, LENGTH = 4, 12


def row(entry: Entry) -> str:
    """One line of the table; raises AssertionError where the gradient is not that of the plain model, cut by hand."""
    reach, left, full = {}, "", {}
    for unit in ("token", "sequence"):
        if unit not in entry.units:
            continue
        report = check(entry, entry.attentions[0], unit, BATCH, LENGTH).report
        reach[unit] = f"{report['reach']:.0%}"
        left = _names(report["left"])
        for name, why in report["why"].items():
            full.setdefault((unit, why), []).append(name)
    reasons = "; ".join(f"{_names(names)} ({unit}s): {why}" for (unit, why), names in full.items())
    return f"| {entry.title} | {reach.get('token', '–')} | {reach.get('sequence', '–')} | {left} | {reasons or 'none'} |"


def _names(names: list[str]) -> str:
    """Names with numbers of layers left out, each once, those of one module together."""
    groups: dict[str, dict[str, None]] = {}
    for name in names:
        at, _, last = re.sub(r"\.\d+(?=\.|$)", ".*", name).rpartition(".")
        groups.setdefault(at, {})[last] = None
    return ", ".join(f"`{at}{'.' if at else ''}{'|'.join(last)}`" for at, last in groups.items()).replace("|", "/")


def table() -> str:
    entries = {**HF, **PLAIN}
    return "\n".join([HEAD, *(row(entry) for entry in entries.values())])


def main() -> None:
    lines = table()
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{lines}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
