"""`python -m experiments.studies.inference RUN [RUN ...]`: can a small model that answers often replace a larger one?

Each RUN is a finished run on tasks (`spikegate train objective=instruct task=... model=SIZE seed=S`); runs of one size are
its seeds, and all have the same tasks. Every run answers each question once by its likeliest tokens and `--n` times by
sampling. Rules choose among these outputs: majority votes, votes that stop once they are sure, more outputs for the
questions whose likeliest answer surprises the model, the sample that the model itself finds likeliest, and the first output
that the verifier accepts. What a rule costs is
counted: the prompt read once, each token of each output that it looked at. Settings are chosen on development questions
and read on held-out ones.

The verdict asks, for every pair of sizes and family of tasks: what does the smaller one reach at no more FLOPs than the
larger one's likeliest answer takes? The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments.runs.folder import RunError, git_state
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from experiments.studies.inference.answers import Answered, Tuned, answered, tuned
from experiments.studies.inference.compared import Point, Table, points, verdicts
from experiments.studies.inference.figure import save
from experiments.studies.inference.rules import rules
from sparse_update.loop.checkpoint import CheckpointError

SPLITS = ("development", "held_out")


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit code 0; 2 for bad arguments and runs that cannot be compared."""
    parser = argparse.ArgumentParser(prog="spikegate study inference", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run on tasks")
    parser.add_argument("--n", type=int, default=32, help="sampled outputs of each question (default: 32)")
    parser.add_argument("--questions", type=int, default=256, help="of each family and split (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the samples (default: 0.8)")
    parser.add_argument("--out", type=Path, default=Path("runs/inference"), help="folder of table and picture")
    add_json_argument(parser)
    options = parser.parse_args(argv)
    try:
        if options.n < 2 or options.questions < 1 or not options.temperature > 0:
            raise RunError("--n is at least 2, --questions at least 1, --temperature above 0")
        runs = sorted(map(tuned, options.runs), key=lambda run: run.model.cfg.width * len(run.model.blocks))
        check(runs)
    except (RunError, CheckpointError) as error:
        print(f"study inference: {error}", file=sys.stderr)
        return 2
    tables = studied(runs, options.n, options.questions, options.temperature)
    options.out.mkdir(parents=True, exist_ok=True)
    document = judged(tables) | {"runs": [str(path) for path in options.runs], "n": options.n, "git": git_state()}
    document |= {"questions": options.questions, "temperature": options.temperature, "folder": str(options.out)}
    write_json(options.out / "inference.json", document)
    shown = {task: {size: points(both[1]) for size, both in sizes.items()} for task, sizes in tables.items()}
    save(options.out / "inference.png", shown)
    text = written(shown, document["verdicts"])
    (options.out / "inference.md").write_text(text, encoding="utf-8")
    print(text)
    headline = ("folder", "best", "n", "questions", "temperature")
    finish(document, "study-inference", file=options.out / "inference.json", headline=headline)
    return 0


def check(runs: Sequence[Tuned]) -> None:
    """Raises RunError for runs of one size only, of different tasks, and for one that is named twice."""
    if len({run.name for run in runs}) < 2:
        raise RunError("runs of one size: a smaller and a larger one are compared")
    if len({(tuple(run.task.tasks), run.task.form) for run in runs}) > 1:
        raise RunError("the runs have different tasks or forms: train all of them with the same task=...")
    if len({(run.name, run.seed) for run in runs}) < len(runs):
        raise RunError("two runs of the same size and seed")


Studied = dict[str, dict[str, tuple[Table, Table]]]
"""Family of tasks -> size -> (development, held-out)."""


def studied(runs: Sequence[Tuned], n: int, questions: int, temperature: float) -> Studied:
    """Ask every run, and apply every rule."""
    asked: dict[tuple[str, str, str], list[Answered]] = {}
    for run in runs:
        for split in SPLITS:
            examples = run.examples(split, questions)
            for task, instances in examples.judged.items():
                print(f"{run.name}, seed {run.seed}: {len(instances)} {split} questions of {task}", file=sys.stderr)
                found = answered(run, examples, instances, n, temperature)
                asked.setdefault((task, run.name, split), []).append(found)
    tables: Studied = {}
    configs = {run.name: run.model.cfg for run in runs}
    for task, size, _ in asked:
        both = []
        known = [rules(n, development) for development in asked[task, size, SPLITS[0]]]
        for split in SPLITS:
            each = list(zip(known, asked[task, size, split], strict=True))
            both.append(
                {
                    family: {
                        setting: [mine[family][setting](configs[size], found) for mine, found in each]
                        for setting in settings
                    }
                    for family, settings in known[0].items()
                }
            )
        tables.setdefault(task, {})[size] = (both[0], both[1])
    return tables


def judged(tables: Studied) -> dict[str, Any]:
    """Verdicts of every pair of neighbouring sizes, and the rules behind them."""
    found = []
    for task, sizes in tables.items():
        for small, large in pairwise(sizes):
            found += [{"task": task, **one} for one in verdicts(sizes[small], sizes[large], (small, large))]
    without = [one for one in found if one["family"] not in ("verifier", "greedy") and one["setting"]]
    best = max(without, key=lambda one: one["difference"], default=None)
    return {
        "verdicts": found,
        "best": best,
        "points": {
            task: {size: [asdict(point) for point in points(both[1])] for size, both in sizes.items()}
            for task, sizes in tables.items()
        },
    }


def written(shown: dict[str, dict[str, list[Point]]], found: Sequence[dict[str, Any]]) -> str:
    """The tables in Markdown."""
    lines = ["| family | size | greedy | MFLOP |", "|---|---|---|---|"]
    for task, sizes in shown.items():
        for size, each in sizes.items():
            base = next(point for point in each if point.family == "greedy")
            lines.append(f"| {task} | {size} | {base.accuracy:.3f} | {base.flops / 1e6:.2f} |")
    lines += ["", "| family | sizes | rule | setting | solved | less the larger one's greedy | FLOPs over its | verdict |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for one in found:
        head = f"| {one['task']} | {one['small']} for {one['large']} | {one['family']} |"
        if one["setting"] is None:
            lines.append(f"{head} none is cheap enough | | | | |")
            continue
        interval = f"{one['difference']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"
        verdict = "beats it" if one["beaten"] else "reaches it" if one["reached"] else "falls short"
        solved = f"{one['point']['accuracy']:.3f}"
        lines.append(f"{head} {one['setting'] or '-'} | {solved} | {interval} | {one['flops_ratio']:.2f} | {verdict} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
