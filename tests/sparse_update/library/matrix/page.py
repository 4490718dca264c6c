"""`python -m tests.sparse_update.library.matrix.page [loop=plain,ddp] [feature=resume] ...`: runs cells, writes the page.

All cells take an hour or two on two cores; values of axes run some of them again and keep what is known of the others,
`--missing` runs those without a result, `--page` none. The results lie beside the page, as JSON; several
processes may run cells.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.sparse_update.library.matrix.cells import AXES, PAIRED, PRECISE, Cell, all_cells, only
from tests.sparse_update.library.matrix.pair import Pair
from tests.sparse_update.library.matrix.run import Differs, run

DOCS = Path(__file__).resolve().parents[4] / "docs" / "reference"
RESULTS, PAGE, TEXT = DOCS / "loops.json", DOCS / "loops.md", Path(__file__).with_name("page.txt")
Outcome = float | str
NINE = "An entry stands for nine cells: three ways of compiling in three precisions."
NAMES = {
    "plain": "A loop of one's own",
    "accelerate": "accelerate",
    "trainer": "Hugging Face Trainer",
    "lightning": "Lightning, automatic optimization",
    "lightning_manual": "Lightning, manual optimization",
    "ddp": "DistributedDataParallel, two processes",
    "fully_shard": "`fully_shard` (FSDP2), two processes",
}


def main(argv: list[str]) -> int:
    wanted = only(all_cells(), [word for word in argv if not word.startswith("--")])
    if "--missing" in argv:
        known = load()
        wanted = [cell for cell in wanted if of(known, cell) is None]
    bad = 0
    for cell, outcome in () if "--page" in argv else outcomes(wanted):
        if isinstance(outcome, Exception):
            bad += 1
            print(f"{cell}: {outcome}", flush=True)
        note(cell, outcome)
    results = load()
    if missing := [str(cell) for cell in all_cells() if of(results, cell) is None]:
        print(f"{len(missing)} cells have no result, so there is no page: {', '.join(missing[:5])}, ...")
        return 1
    PAGE.write_text(page(results), encoding="utf-8")
    return min(bad, 1)


def outcomes(cells: Iterable[Cell]) -> Iterator[tuple[Cell, Outcome | Exception]]:
    """Each cell with its distance, the words of its refusal, or what is wrong with it."""
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = 256, 4096
    cells = list(cells)
    for cell in cells:
        if cell.loop not in PAIRED:
            try:
                yield cell, run(cell)
            except Differs as error:
                yield cell, error
    with tempfile.TemporaryDirectory() as folder:
        pair = None
        for number, cell in enumerate(c for c in cells if c.loop in PAIRED):
            if pair is None:
                (at := Path(folder, str(number))).mkdir()
                pair = Pair(str(at))
            try:
                yield cell, pair.run(cell)
            except (Differs, RuntimeError) as error:
                yield cell, error
                pair.close()  # the two may have come apart
                pair = None
        if pair is not None:
            pair.close()


def load() -> dict[str, dict[str, Outcome]]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def note(cell: Cell, outcome: Outcome | Exception) -> None:
    """Into the file; a cell that is wrong has no result."""
    with open(Path(tempfile.gettempdir(), "spikegate_loops.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = load()
        row = results.setdefault(f"{cell.loop} {cell.compile} {cell.precision} {cell.gate}", {})
        row.pop(cell.feature, None)
        if not isinstance(outcome, Exception):
            row[cell.feature] = outcome if isinstance(outcome, str) else float(f"{outcome:.1e}")
        save(results)


def save(results: Mapping[str, Mapping[str, Outcome]]) -> None:
    """One line for each loop, compilation, precision and gate."""
    order = list(dict.fromkeys(f"{c.loop} {c.compile} {c.precision} {c.gate}" for c in all_cells()))
    lines = []
    for key in order:
        if key in results:
            row = {feature: results[key][feature] for feature in AXES["feature"] if feature in results[key]}
            lines.append(f"{json.dumps(key)}: {json.dumps(row)}")
    fresh = RESULTS.with_suffix(f".{os.getpid()}")
    fresh.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    fresh.replace(RESULTS)


def of(results: Mapping[str, Mapping[str, Any]], cell: Cell) -> Outcome | None:
    return results.get(f"{cell.loop} {cell.compile} {cell.precision} {cell.gate}", {}).get(cell.feature)


# the page


def page(results: Mapping[str, Mapping[str, Outcome]]) -> str:
    words: list[str] = []
    tables = [_table(loop, results, words) for loop in AXES["loop"]]
    found = [(cell, of(results, cell)) for cell in all_cells()]
    count = Counter("refused" if isinstance(outcome, str) else "equal" for _, outcome in found)
    parts = TEXT.read_text(encoding="utf-8").format(
        cells=len(found), equal=count["equal"], refused=count["refused"], worst=_worst(found), **PRECISE
    )
    refusals = [f"{number}. `{text}`" for number, text in enumerate(words, 1)]
    return "\n".join([parts.rstrip(), "", "## Every cell", "", NINE, "", *tables, "## Refusals", "", *refusals, ""])


def _table(loop: str, results: Mapping[str, Mapping[str, Outcome]], words: list[str]) -> str:
    lines = [f"### {NAMES[loop]}", "", "| | token rows | whole sequences | strips |", "|---|---|---|---|"]
    for feature in AXES["feature"]:
        cells = []
        for gate in AXES["gate"]:
            found = [of(results, c) for c in all_cells() if (c.loop, c.feature, c.gate) == (loop, feature, gate)]
            texts: Counter[str] = Counter()
            for outcome in found:
                if isinstance(outcome, str) and outcome not in words:
                    words.append(outcome)
                texts[f"refused [{words.index(outcome) + 1}]" if isinstance(outcome, str) else "equal"] += 1
            cells.append(", ".join(f"{text} {n}" if len(texts) > 1 else text for text, n in texts.items()))
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _worst(found: Iterable[tuple[Cell, Outcome | None]]) -> str:
    lines = ["| | " + " | ".join(AXES["precision"]) + " |", "|---|---|---|---|"]
    largest: dict[tuple[str, str], float] = {}
    for cell, outcome in found:
        if isinstance(outcome, float):
            key = cell.loop, cell.precision
            largest[key] = max(largest.get(key, 0.0), outcome)
    for loop in AXES["loop"]:
        lines.append(f"| {NAMES[loop]} | " + " | ".join(f"{largest[loop, p]:.1e}" for p in AXES["precision"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
