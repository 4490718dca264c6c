"""`spikegate study overoptimisation`: what happens to the true reward when a learned, flawed one is followed.

Annotators who like long answers judge pairs; a reward model learns from them; best-of-n and reinforcement follow it. For
each seed: true reward and proxy over sqrt(KL), the published forms of over-optimisation fitted, where they turn, the flag,
and four remedies in the same picture (`experiments.studies.rewards.seed`). The folder holds `result.json`, `picture.svg`,
`page.html`, a TensorBoard run for each
arm, and the models; the page is written anew as arms end. What is finished is not made again.

The last line is JSON. Exit codes: 0 both fits explain 0.95 of the variance and the flag went up before a tenth of the gain
was lost, in every seed; 1 one does not, or nothing could be measured; 2 the command is wrong or the folder is taken.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.runs.folder import RunError, git_state, read_json
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import plain, write_json, write_text
from experiments.studies.rewards.picture import draw
from experiments.studies.rewards.seed import ARMS, SeedRun, StudyConfig, say
from experiments.studies.rewards.summary import summarise, tables, verdicts
from experiments.views.page import picture, shell, table
from hardware.markdown import row
from sparse_update.loop.checkpoint import CheckpointError
from sparse_update.objectives.preference.errors import PreferenceError
from sparse_update.objectives.preference.pairs import Annotator

CAPTION = (
    "True reward (share of right answers) and proxy (learned reward) over the distance from the reference, d = sqrt(KL). "
    "Dots are seeds, lines their means. The dashed line is the published form fitted to the mean, which turns at the grey "
    "line."
)


def write(folder: Path, cfg: StudyConfig, seeds: Sequence[Mapping[str, Any]], command: str) -> dict[str, Any]:
    """Result, picture and page of what there is so far; returns the summary."""
    found = summarise(seeds)
    said, _ = verdicts(found)
    document = {"command": command, "git": git_state(), "config": asdict(cfg), "verdicts": said, **found, "seeds": seeds}
    write_json(folder / "result.json", document)
    figure = draw(seeds)
    figure.savefig(folder / "picture.svg", metadata={"Date": None})
    flags = [
        f"<li>seed {seed['seed']}, {html.escape(arm)}: flagged at step {run['flag']['step']}</li>"
        for seed in seeds
        for arm, run in seed["reinforcement"].items()
        if run["flag"]
    ]
    parts = [
        "<h1>Over-optimisation of a learned reward</h1>",
        f"<p><code>{html.escape(command)}</code></p>",
        '<section class="card"><h2>Verdicts</h2><ul>'
        + "".join(f"<li>{html.escape(s)}</li>" for s in said)
        + "</ul></section>",
        '<section class="card" id="flags"><h2>Runs whose true reward falls while the proxy rises</h2><ul>'
        + ("".join(flags) or "<li>none so far</li>")
        + "</ul></section>",
        picture(figure, CAPTION, 0),
        *map(table, tables(found, seeds)),
    ]
    write_text(folder / "page.html", shell("Over-optimisation", parts))
    return found


def _arm(name: str, one: SeedRun) -> None:
    one.arm(name)


def _claim(folder: Path, cfg: StudyConfig) -> None:
    """Take a folder for these settings, whichever seeds and arms. Raises RunError where it holds others."""
    same = {key: value for key, value in plain(asdict(cfg)).items() if key not in ("arms", "members", "dpo_betas")}
    path = folder / "config.json"
    if path.exists() and read_json(path) != same:
        raise RunError(f"{folder} was made with other settings: choose another folder with --out")
    write_json(path, same)


def config(args: argparse.Namespace) -> StudyConfig:
    """The settings that the words of a command mean. Raises ValueError for ones that cannot be."""
    base = StudyConfig()
    if (
        min(args.steps, args.every, args.watched, args.members, args.pair_prompts, args.tuning_steps) < 1
        or args.outputs < 8
    ):
        raise ValueError("numbers of steps, prompts and models are at least 1, --outputs at least 8")
    arms = tuple(word for word in args.arms.split(",") if word)
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"--arms {unknown[0]}: known are {', '.join(ARMS)}")
    training = replace(base.training, steps=args.steps, every=args.every, watched_prompts=args.watched, lr=args.lr)
    annotator = Annotator(quality_weight=base.setting.annotator.quality_weight, length_weight=args.likes_length)
    setting = replace(base.setting, pair_prompts=args.pair_prompts, tuning_steps=args.tuning_steps, annotator=annotator)
    return replace(
        base, training=training, setting=setting, members=args.members, best_outputs=args.outputs, kl=args.kl, arms=arms
    )


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module for exit codes."""
    base = StudyConfig()
    parser = argparse.ArgumentParser(prog="spikegate study overoptimisation", description="follow a flawed learned reward")
    parser.add_argument("--out", type=Path, default=Path("runs/overoptimisation"), help="(default: runs/overoptimisation)")
    parser.add_argument("--seeds", default="0,1,2", help="(default: 0,1,2)")
    parser.add_argument("--arms", default=",".join(ARMS), help="rewards that are followed (default: all four)")
    numbers = (
        ("--steps", base.training.steps, "updates of reinforcement"),
        ("--every", base.training.every, "updates between two evaluations"),
        ("--watched", base.training.watched_prompts, "development questions that policies are watched on"),
        ("--outputs", base.best_outputs, "outputs of each of them that best-of-n is estimated from"),
        ("--members", base.members, "reward models"),
        ("--pair-prompts", base.setting.pair_prompts, "questions that pairs are made of"),
        ("--tuning-steps", base.setting.tuning_steps, "steps on demonstrations"),
    )
    for name, default, meaning in numbers:
        parser.add_argument(name, type=int, default=default, help=f"{meaning} (default: {default})")
    weights = (
        ("--lr", base.training.lr, "of reinforcement"),
        ("--kl", base.kl, "weight of the KL term"),
        ("--likes-length", base.setting.annotator.length_weight, "annotators' log-odds for each token more"),
    )
    for name, value, meaning in weights:
        parser.add_argument(name, type=float, default=value, help=f"{meaning} (default: {value:g})")
    add_json_argument(parser)
    args = parser.parse_args(argv)
    try:
        cfg, numbers_of = config(args), [int(word) for word in args.seeds.split(",")]
    except ValueError as error:
        print(f"overoptimisation: {error}", file=sys.stderr)
        return 2
    command = " ".join(["spikegate study overoptimisation", *(argv or sys.argv[1:])])
    runs = [SeedRun(cfg, seed, args.out) for seed in numbers_of]
    pieces: list[tuple[str, Callable[[SeedRun], None]]] = [
        ("setting", SeedRun.prepare),
        ("best-of-n", SeedRun.best_of_n),
    ]
    for arm in cfg.arms:
        pieces.append((arm, partial(_arm, arm)))
        if arm == cfg.arms[0]:
            pieces.append(("DPO", SeedRun.controls))
    found: dict[str, Any] = {}
    try:
        _claim(args.out, cfg)
        for what, piece in pieces:  # of all seeds first what matters most
            for one in runs:
                piece(one)
            say(f"{what}: all seeds done")
            found = write(args.out, cfg, [one.found for one in runs], command)
    except (PreferenceError, OSError, CheckpointError) as error:
        print(f"overoptimisation: {error}", file=sys.stderr)
        return 1
    except RunError as error:
        print(f"overoptimisation: {error}", file=sys.stderr)
        return 2
    said, met = verdicts(found)
    for block in tables(found, [one.found for one in runs]):
        print(f"\n{block.title}\n")
        print(row(block.header), row("---" for _ in block.header), *map(row, block.rows), sep="\n")
    print(*said, sep="\n")
    document = {"holds": met, "verdicts": said, "fits": found["fits"], "flags": found["flags"], "ends": found["ends"]}
    finish(document, "overoptimisation", file=args.out / "result.json", headline=("holds", "verdicts"))
    say(f"page: {args.out / 'page.html'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
