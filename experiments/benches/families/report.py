"""The table measured, shown, and kept as a page with its numbers beside it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from experiments.benches.families.models import FAMILIES
from experiments.benches.families.table import row, table
from experiments.runs.folder import git_state
from experiments.runs.plain_json import write_json
from neuro.conversion.spiking.convert import PrecisionWarning

PAGE, NUMBERS = "families.md", "families.json"
PARTS = (
    "# What does conversion take of each family of models?",
    "**Question.** Which share of a model's multiply-accumulates (MACs) leaves the host, what does the answer lose, "
    "and how often do activations cross between host and chip?",
    "**Answer.** Linear layers go, whatever stands between them; attention scores, state space recurrences and "
    "experts in one batched product stay on the host. The last column has the two largest shares that stay.",
    "**Command.** `spikegate bench conversion --families --record docs/results/benches`, {versions}. Small models "
    "with random weights, stirred so that no bias is 0 and no gain 1; ranges are set on 8 samples, the error is on 4 "
    "others. A test holds every share against this table, so that no family slips back.",
    "{table}",
    "The error is the root mean square of the difference from the float model's answer over that of the answer about "
    "its mean. Of spiking networks it is that of how often each neuron spikes in a sample of 8 steps, and rows and "
    "crossings are of one step. A row is one input of a linear layer, as a token's; a layer that is called for each "
    "row crosses for each.",
    "## What it is not",
    "Trained models: random weights say what is mapped and whether arithmetic is right, not what a task loses "
    "({{doc}}`../conversion` does). Widths of 32 make quantisation look worse than it is: fewer values average out. "
    "Where a family's class keeps its experts in one tensor, as Mixtral's does, they are no linear layers and stay.",
)


def measure(names: Sequence[str], route: str = "graded") -> list[dict[str, Any]]:
    """Rows of the families, in their order."""
    rows = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrecisionWarning)  # the error stands in the row
            rows.append(row(name, route))
    return rows


def record(rows: Collection[Mapping[str, Any]], folder: Path) -> tuple[Path, Path]:
    """Write the page and the numbers beside it; returns both paths."""
    made = {name: _version(name) for name in ("torch", "transformers", "snntorch")}
    said = ", ".join(f"{name} {number}" for name, number in made.items() if number)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PAGE
    if commit := git_state()["commit"]:
        said += f", commit {commit[:7]}"
    text = "\n\n".join(PARTS).format(versions=said, table="\n".join(table(rows)))
    page.write_text(f"{text}\n", encoding="utf-8")
    return page, write_json(folder / NUMBERS, {"versions": made, "rows": list(rows)})


def families(text: str) -> list[str]:
    """Names from a list with commas; all of them for "all". Raises ValueError for one that is not known."""
    if text == "all":
        return list(FAMILIES)
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise ValueError(f"family {unknown[0]!r} is unknown; known: {', '.join(FAMILIES)}")
    return names


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
