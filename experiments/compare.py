"""Compare finished runs: `python -m experiments.compare folder=runs/demo`, or `spikegate compare runs=[A,B]`."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.comparison.accounts import layer_energies
from experiments.comparison.collection import collect
from experiments.comparison.document import to_json
from experiments.comparison.record import Comparison
from experiments.runs.hydra_app import ConfigError, run_app
from experiments.runs.output import finish
from experiments.runs.plain_json import plain, write_json
from experiments.views.figures import figure
from experiments.views.labels import plainly
from experiments.views.layer_figure import layer_figure
from experiments.views.page import page
from experiments.views.tables import energy_markdown, markdown, summary, table
from experiments.views.tracking import MOST_SELECTED, boards, write_comparison
from hardware import markdown as markdown_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class CompareConfig:
    """What to compare and where to put it."""

    folder: str | None = None
    """Folder that holds runs and deployments, at any depth."""
    runs: list[str] = field(default_factory=list)
    """Or: the run folders themselves."""
    out: str | None = None
    """Folder for comparison.json, .html, .md, .png, .svg, joules-*.png, .svg and tensorboard/; FOLDER/comparison where
    nothing is said."""
    tensorboard: bool = True
    """Write the TensorBoard folder too."""
    tables: bool = False
    """Print every table; otherwise the headline, and the files hold the rest."""

    def __post_init__(self) -> None:
        if not self.folder and not self.runs:
            raise ConfigError("nothing to compare: give folder=FOLDER (all runs below it) or runs=[RUN,RUN,...]")


def compare(cfg: CompareConfig) -> dict[str, Any]:
    """Read the runs, print table and verdicts, write the files, and return what `comparison.json` holds, with the
    `folder` of these files."""
    comparison = collect([*([cfg.folder] if cfg.folder else []), *cfg.runs], trial=_text_views)
    if not comparison.streams:
        reasons = "".join(f"\n  {item.folder}: {item.reason}" for item in comparison.excluded)
        raise NothingToCompare(f"no finished run in {cfg.folder or ', '.join(cfg.runs)}{reasons}")
    out = Path(cfg.out) if cfg.out else Path(cfg.folder or "runs") / "comparison"
    board = out / "tensorboard"
    within = cfg.folder is not None and out.resolve().is_relative_to(Path(cfg.folder).resolve())
    beside = len(boards(Path(cfg.folder), board)) if cfg.folder and within else 0
    document = write(comparison, out, tensorboard=cfg.tensorboard, beside=beside)
    width = shutil.get_terminal_size((0, 0)).columns  # of the terminal, or COLUMNS; elsewhere lines have no limit
    if cfg.tables:
        print(table(comparison, width))
    print(summary(comparison, width, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    print(f"written to {out}: comparison.html, .json, .md, .png, .svg")
    if cfg.tensorboard:
        print(f"look at it: tensorboard --logdir {cfg.folder if within else board}")
        if within and beside + len(boards(board)) > MOST_SELECTED:
            print(f"(TensorBoard ticks no run where there are more than {MOST_SELECTED}; {board} has the arms alone)")
    return {"folder": str(out), **document}


def _text_views(comparison: Comparison) -> None:
    """All that is said of a comparison in words; raises whatever a record of another form leads to."""
    plain(to_json(comparison))
    for view in (table, summary, markdown, energy_markdown, layer_pictures):
        view(comparison)


def write(comparison: Comparison, out: Path, *, tensorboard: bool = True, beside: int = 0) -> dict[str, Any]:
    """Write comparison.json, .html, .md, .png, .svg, for each deployed model joules-STREAM-MODEL.png and .svg, and, if
    wanted, tensorboard/ into `out`; return the JSON document. `beside`: other runs that one TensorBoard will show."""
    document = to_json(comparison)
    write_json(out / "comparison.json", document)
    picture = plainly(figure(comparison))
    picture.savefig(out / "comparison.png", dpi=150)
    picture.savefig(out / "comparison.svg")
    text = markdown(comparison)
    images = ["![energy and training](comparison.png)"]
    layers = layer_pictures(comparison)
    for old in out.glob("joules-*.*"):
        old.unlink()
    for name, drawn in layers.items():
        file = "joules-" + re.sub(r"[^A-Za-z0-9_.+-]+", "-", name).strip("-")
        drawn.savefig(out / f"{file}.png", dpi=150)
        drawn.savefig(out / f"{file}.svg")
        images.append(f"![where each joule goes: {markdown_text.line(name)}]({file}.png)")
    (out / "comparison.md").write_text("\n\n".join([text, *images]) + "\n", encoding="utf-8")
    shown = {f"{name}: energy against accuracy, and training": drawn for name, drawn in stream_pictures(comparison).items()}
    shown |= {f"{name}: where each joule goes, layer by layer": drawn for name, drawn in layers.items()}
    (out / "comparison.html").write_text(page(comparison, plain(document), shown), encoding="utf-8")
    if tensorboard:
        figures = {"comparison": picture, **{f"joules by layer/{name}": drawn for name, drawn in layers.items()}}
        texts = {"comparison": markdown(comparison, most_columns=8), "energy per token": energy_markdown(comparison)}
        write_comparison(out / "tensorboard", comparison, figures, texts, beside=beside)
    return document


def stream_pictures(comparison: Comparison) -> dict[str, Figure]:
    """Stream -> its part of the picture, for pages where one stands under the other."""
    return {name: plainly(figure(Comparison({name: stream}), flat=True)) for name, stream in comparison.streams.items()}


def layer_pictures(comparison: Comparison) -> dict[str, Figure]:
    """ "STREAM MODEL" -> where each joule goes in it (its first seed); those without joules by layer have no picture."""
    found = {}
    for stream in comparison.streams.values():
        for group in stream.deployed:
            energies, _ = layer_energies(group.items[0].record)
            seed = "" if group.items[0].seed is None else f", seed {group.items[0].seed}"
            if energies:
                name = f"{stream.name} {group.label}"
                found[name] = plainly(layer_figure(energies, f"{name}{seed}: where each joule goes", columns=2))
    return found


def headline_record(document: Mapping[str, Any]) -> dict[str, Any]:
    """Of a comparison what fits a line: each arm's held-out loss and seeds by stream, the verdicts, what was left out."""
    streams = {
        stream: {arm: {key: record.get(key) for key in HEADLINE if key in record} for arm, record in arms.items()}
        for stream, arms in document["streams"].items()
    }
    return {"folder": document["folder"], "streams": streams, **{key: document[key] for key in ("verdicts", "excluded")}}


HEADLINE = ("loss_nats", "n", "reference_s", "keep_fraction", "loss_float_nats", "loss_simulated_nats", "mapped_mac_share")


def _tell(document: Mapping[str, Any]) -> None:
    finish(headline_record(document), "compare", file=Path(document["folder"]) / "comparison.json")


class NothingToCompare(ValueError):
    """No finished run in the folders given; the message lists what was found and why it was left out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `spikegate compare`; see `run_app` for exit codes."""
    return run_app("compare", CompareConfig, compare, argv, expected=(NothingToCompare, FileNotFoundError), tell=_tell)


if __name__ == "__main__":
    sys.exit(main())
