"""Compare finished runs: `python -m experiments.compare folder=runs/demo`, or `spikegate compare runs=[A,B]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.collection import collect
from experiments.comparison import Comparison
from experiments.figures import figure
from experiments.hydra_app import ConfigError, run_app
from experiments.plain_json import write_json
from experiments.tables import energy_markdown, markdown, table
from experiments.tracking import write_comparison


@dataclass
class CompareConfig:
    """What to compare and where to put it."""

    folder: str | None = None
    """Folder that holds runs and deployments, at any depth."""
    runs: list[str] = field(default_factory=list)
    """Or: the run folders themselves."""
    out: str | None = None
    """Folder for comparison.json, .md, .png, .svg and tensorboard/; FOLDER/comparison where nothing is said."""
    tensorboard: bool = True
    """Write the TensorBoard folder too."""

    def __post_init__(self) -> None:
        if not self.folder and not self.runs:
            raise ConfigError("nothing to compare: give folder=FOLDER (all runs below it) or runs=[RUN,RUN,...]")


def compare(cfg: CompareConfig) -> dict[str, Any]:
    """Read the runs, print table and verdicts, write the files, and return what `comparison.json` holds."""
    comparison = collect([*([cfg.folder] if cfg.folder else []), *cfg.runs])
    if not comparison.streams:
        reasons = "".join(f"\n  {item.folder}: {item.reason}" for item in comparison.excluded)
        raise NothingToCompare(f"no finished run in {cfg.folder or ', '.join(cfg.runs)}{reasons}")
    out = Path(cfg.out) if cfg.out else Path(cfg.folder or "runs") / "comparison"
    document = write(comparison, out, tensorboard=cfg.tensorboard)
    print(table(comparison))
    for sentence in document["verdicts"]:
        print(sentence)
    print(f"\nwritten to {out}: comparison.json, comparison.md, comparison.png, comparison.svg")
    if cfg.tensorboard:
        print(f"look at it: tensorboard --logdir {cfg.folder or out / 'tensorboard'}")
    return document


def write(comparison: Comparison, out: Path, *, tensorboard: bool = True) -> dict[str, Any]:
    """Write comparison.json, .md, .png, .svg and, if wanted, tensorboard/ into `out`; return the JSON document."""
    document = comparison.to_json()
    write_json(out / "comparison.json", document)
    picture = figure(comparison)
    picture.savefig(out / "comparison.png", dpi=150)
    picture.savefig(out / "comparison.svg")
    text = markdown(comparison)
    (out / "comparison.md").write_text(text + "\n![energy and training](comparison.png)\n", encoding="utf-8")
    if tensorboard:
        texts = {"comparison": text, "energy per token": energy_markdown(comparison)}
        write_comparison(out / "tensorboard", comparison, {"comparison": picture}, texts)
    return document


class NothingToCompare(ValueError):
    """No finished run in the folders given; the message lists what was found and why it was left out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `spikegate compare`; see `run_app` for exit codes."""
    return run_app("compare", CompareConfig, compare, argv, expected=(NothingToCompare, FileNotFoundError))


if __name__ == "__main__":
    sys.exit(main())
