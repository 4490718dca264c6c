"""The command `spikegate bench scale`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from experiments.benches.scaling import plan
from experiments.runs.hydra_app import EXIT_FAILED
from experiments.runs.output import FOLDER, add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from hardware.clusters.layout import LayoutError
from hardware.datafile import DataFileError
from hardware.text import listed, quoted

MEASURED = "experiments.benches.scaling.measured"
UNMEASURED: dict[str, Any] = {
    "ddp": {"speedup": None},
    "fsdp": {"bytes_ratio": None},
    "tp": {"bytes_ratio": None},
    "gate_share": None,
}
"""What stands where nothing was measured."""


def measured(words: Sequence[str]) -> dict[str, Any]:
    """What `measured.figures(words)` returns, with the keys of :data:`UNMEASURED`; that itself where there is none."""
    if importlib.util.find_spec(MEASURED) is None:
        return dict(UNMEASURED)
    figures: dict[str, Any] = importlib.import_module(MEASURED).figures(list(words))
    return {**UNMEASURED, **figures}


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and the JSON line.

    Exit code 0; 1 where a measuring process failed; 2 for a model, machine or number of GPUs that cannot be planned.
    """
    parser = argparse.ArgumentParser(
        prog="spikegate bench scale",
        description="Many processes measured on this machine, published tables reproduced, and up to 10,000 GPUs planned.",
        epilog=f"models: {', '.join(plan.MODELS)}",
    )
    parser.add_argument("--machine", default="h100_80gb", help="machine to plan for: a shipped name or a file (h100_80gb)")
    parser.add_argument("--models", default="", help="models to plan, with commas between them (all)")
    parser.add_argument("--gpus", default="", help="numbers of GPUs, with commas between them (8 to 10,000)")
    parser.add_argument("--plan-only", action="store_true", help="measure nothing on this machine")
    parser.add_argument("--measure", default="", metavar="WORDS", help="arguments of the measured part, in one word")
    add_json_argument(parser)
    given = parser.parse_args(argv)
    try:
        models = given.models.split(",") if given.models else list(plan.MODELS)
        unknown = [name for name in models if name not in plan.MODELS]
        if unknown:
            raise LayoutError(f"--models {quoted(unknown[0])}: there is {listed(plan.MODELS)}")
        try:
            gpus = [int(word) for word in given.gpus.split(",")] if given.gpus else list(plan.GPUS)
        except ValueError:
            raise LayoutError(f"--gpus {quoted(given.gpus)}: whole numbers with commas between them") from None
        if min(gpus) < 1:
            raise LayoutError(f"--gpus {min(gpus)}: whole numbers from 1")
        machine = plan.machine_named(given.machine)
        tables = plan.reproduced()
        print("\n".join(plan.table_lines(tables)))
        print(f"\nplanned on {machine.title}")
        entries = [plan.entry(*found) for found in plan.planned(machine, models, gpus)]
        print("\n".join(plan.plan_lines(entries)))
        found = dict(UNMEASURED) if given.plan_only else measured(given.measure.split())
    except (LayoutError, DataFileError, FileNotFoundError) as error:
        print(f"bench scale: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"bench scale: {error}", file=sys.stderr)
        return EXIT_FAILED
    published = {table.name: numbers for table, numbers in tables}
    whole = {**found, "plan": entries, "published": published, "machine": machine.name}
    short = {
        **found,
        "plan": [plan.headline(each) for each in entries],
        "published": {
            name: [numbers["mean_absolute_error"], numbers["worst_error"]] for name, numbers in published.items()
        },
    }
    finish(short, "bench-scale", file=write_json(FOLDER / "bench-scale.json", whole))
    return 0
