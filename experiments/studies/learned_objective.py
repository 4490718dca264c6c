"""`spikegate study learned_objective`: likelihood of one reference, a verifier's reward, a learned reward, at equal cost.

On countdown many expressions are right, and the reference is one of them. A model is tuned by likelihood for a while, then
goes on for the same reference seconds, generation included, in three ways that differ in `objective=` alone: `instruct`
(likelihood of the reference), `rl` (the verifier says what is right) and `reward` (a reward model learned from pairs of the
tuned model's own answers says it; the pairs and the reward model's training are **not** on the clock). Rates are chosen for
each way on a seed of its own and development questions. Judged by the share of held-out questions that are solved greedily,
and by how many different right answers 16 samples hold.

Finished runs are not made again. The last line is JSON. Exit codes: 0 measured; 1 a run failed; 2 the command is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.comparison.statistics import TooFewSeeds, interval, paired_test
from experiments.runs.folder import RunError, git_state, read_json
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from experiments.studies.rewards.objectives import Questions, knows, learned_reward, run
from hardware.markdown import row
from sparse_update.objectives.preference.errors import PreferenceError

ARMS = {"likelihood": "instruct", "verifier": "rl", "learned": "reward"}
RATES = {"likelihood": (1e-3, 3e-3), "verifier": (3e-4, 1e-3), "learned": (3e-4, 1e-3)}
TUNING_SEED = 100
BASE = ("model=tiny", "model.context=64", "gate=dense", "data.tokenizer=bytes", "trainer.evaluations=4")
SAMPLED = ("objective.sample.n=8", "objective.sample.new_tokens=12", "trainer.batch_windows=32")


class Study:
    """Runs and reads what the study needs, in one folder."""

    def __init__(self, folder: Path, start_s: float, more_s: float, questions: int) -> None:
        self.folder, self.start_s, self.more_s, self.questions = folder, start_s, more_s, questions
        self.asked = Questions()

    def start(self, seed: int) -> Path:
        """The tuned model that all ways of a seed go on from."""
        folder = self.folder / f"start-s{seed}"
        words = [*BASE, *self.asked.words, "objective=instruct", f"trainer.budget_reference_s={self.start_s}"]
        run(folder, [*words, "trainer.batch_windows=16", f"seed={seed}"])
        return folder

    def reward(self, seed: int) -> tuple[Path, dict[str, Any]]:
        """The reward model of a seed, and how good it is."""
        folder = self.folder / f"reward-s{seed}"
        kept = self.folder / f"reward-s{seed}.json"
        if not kept.exists():
            write_json(kept, asdict(learned_reward(self.start(seed), folder, self.asked, self.questions, seed)))
        return folder, read_json(kept)

    def arm(self, name: str, rate: float, seed: int, split: str) -> Path:
        """One way from the tuned model on."""
        folder = self.folder / f"{name}-lr{rate:g}-s{seed}"
        words = [
            *BASE,
            *self.asked.words,
            f"objective={ARMS[name]}",
            f"trainer.init_from={self.start(seed)}",
            f"arm={name}",
        ]
        words += [f"optim.lr={rate:g}", f"seed={seed}", f"task.split={split}", f"trainer.budget_reference_s={self.more_s}"]
        words += ["trainer.batch_windows=16"] if name == "likelihood" else list(SAMPLED)
        if name == "learned":
            words += [f"objective.reward.models=[{self.reward(seed)[0]}]"]
        run(folder, words)
        return folder

    def rate(self, name: str, rates: Sequence[float]) -> float:
        """The rate that solves most development questions on the seed for tuning; one that is alone is not tried."""
        if len(rates) == 1:
            return rates[0]
        return max(rates, key=lambda rate: accuracy(self.arm(name, rate, TUNING_SEED, "development")))


def accuracy(folder: Path) -> float:
    """Share of the questions solved greedily at the end of a run."""
    return float(read_json(folder / "result.json")["task"]["task/accuracy"])


def compared(found: dict[str, list[float]]) -> list[str]:
    """Sentences: each reward against likelihood, paired by seed."""
    said = []
    for name in ("verifier", "learned"):
        try:
            test = paired_test([-v for v in found[name]], [-v for v in found["likelihood"]])
        except TooFewSeeds as error:
            said.append(f"{name} against likelihood: {error}")
            continue
        low, high = (None, None) if test.low is None or test.high is None else (-test.high, -test.low)
        spread = "" if low is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"  # type: ignore[operator]
        answer = "yes" if test.p < 0.05 else "no"
        said.append(
            f"{name} solves more than likelihood: {answer}; {-100 * test.difference:+.1f} points{spread}, n = {test.n}, "
            f"one-sided {test.method}, p = {test.p:.2g}"
        )
    return said


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module for exit codes."""
    parser = argparse.ArgumentParser(prog="spikegate study learned_objective", description="three objectives at equal cost")
    parser.add_argument("--out", type=Path, default=Path("runs/learned_objective"))
    parser.add_argument("--seeds", default="0,1,2", help="(default: 0,1,2)")
    parser.add_argument("--start", type=float, default=20.0, help="reference seconds of tuning (default: 20)")
    parser.add_argument("--more", type=float, default=15.0, help="reference seconds of each way after it (default: 15)")
    parser.add_argument("--questions", type=int, default=1000, help="that pairs are made of (default: 1000)")
    parser.add_argument("--judged", type=int, default=200, help="held-out questions that are asked often (default: 200)")
    parser.add_argument("--no-tuning", action="store_true", help="take the first rate of each way untried")
    add_json_argument(parser)
    args = parser.parse_args(argv)
    try:
        seeds = [int(word) for word in args.seeds.split(",")]
        if not (args.start > 0 and args.more > 0) or min(args.questions, args.judged) < 8:
            raise ValueError("--start and --more are positive, --questions and --judged at least 8")
    except ValueError as error:
        print(f"learned_objective: {error}", file=sys.stderr)
        return 2
    study = Study(args.out.resolve(), args.start, args.more, args.questions)
    try:
        tried = {name: RATES[name][: 1 if args.no_tuning else None] for name in ARMS}
        rates = {name: study.rate(name, tried[name]) for name in ARMS}
        runs = {name: [study.arm(name, rates[name], seed, "held_out") for seed in seeds] for name in ARMS}
        often = {name: [asdict(knows(folder, study.asked, args.judged, 16)) for folder in runs[name]] for name in ARMS}
        starts = [accuracy(study.start(seed)) for seed in seeds]
        models = [study.reward(seed)[1] for seed in seeds]
    except (RunError, PreferenceError, OSError) as error:
        print(f"learned_objective: {error}", file=sys.stderr)
        return 1
    solved = {name: [accuracy(folder) for folder in runs[name]] for name in ARMS}
    said = compared(solved)
    print(row(("objective", "rate", "solved greedily", "samples right", "solved by one of 16", "different right answers")))
    print(row(["---"] * 6))
    print(row(("tuned model before", "", f"{interval(starts).text(3)}", "", "", "")))
    for name in ARMS:
        cells = [interval([one[key] for one in often[name]]).text(3) for key in ("right", "solved", "different")]
        print(row((name, f"{rates[name]:g}", interval(solved[name]).text(3), *cells)))
    print(*said, sep="\n")
    document = {
        "verdicts": said,
        "rates": rates,
        "tuned": not args.no_tuning,
        "start": starts,
        "solved": solved,
        "often": often,
        "reward_models": [{key: model[key] for key in ("accuracy", "error", "floor", "pairs")} for model in models],
        "seconds": {"start": args.start, "more": args.more},
        "git": git_state(),
    }
    write_json(args.out / "result.json", document)
    finish(document, "learned_objective", file=args.out / "result.json", headline=("verdicts", "solved", "rates"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
