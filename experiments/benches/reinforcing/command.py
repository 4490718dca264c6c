"""`python -m experiments.bench reinforcement`: one GRPO step of ours beside one of TRL's `GRPOTrainer` (`make trl`).

Both start from the same weights (a Transformer that learnt sums by likelihood for a while, exported to transformers' Arcee
class), see the same prompts in the same order, sample the same number of outputs of at most the same length at temperature
1, score them alike and take one AdamW step on GRPO's loss (deviation of the group, mean over an output's tokens, clipping
at 0.2, no KL). TRL runs in a process of its own. A measurement is CPU seconds for each sampled token of a whole step, in
turn (`hardware.meters.ratios`); the ratio is theirs over ours, so 2 means twice the tokens a second. The mean rewards of
both are compared step by step, since step i has the same prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.benches import ratios
from experiments.benches.generating.command import SIZES
from experiments.benches.generating.peer import exported
from experiments.benches.reinforcing.ours import Ours, tuned
from experiments.runs.folder import git_state, versions
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from hardware.interpreters import clean_environment, find_interpreter
from hardware.meters.elsewhere import Elsewhere, ElsewhereError
from hardware.meters.ratios import InTurn, processor
from sparse_update.generation import GenerateConfig
from sparse_update.objectives.examples.rows import prompt_tokens
from sparse_update.objectives.examples.settings import TaskConfig
from sparse_update.tasks.base import END
from sparse_update.tasks.encoding import prompt_text
from sparse_update.transformer import ModelConfig

TARGET = 2.0
OURS, TRL = "ours", "trl"
WORKER = Path(__file__).parent / "trl_worker.py"
T_95 = 2.0
"""About the two-sided 95 % point of Student's t with 30 and more degrees of freedom."""


class NoTrl(RuntimeError):
    """There is no environment with TRL."""


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spikegate bench reinforcement", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the model (default: tiny)")
    parser.add_argument("--task", default="sums:1-2", help="NAME:LEVELS, with one right answer (default: sums:1-2)")
    parser.add_argument("--tune", type=int, default=250, help="steps of likelihood before (default: 250)")
    parser.add_argument("--prompts", type=int, default=16, help="of a step (default: 16)")
    parser.add_argument("--n", type=int, default=8, help="outputs of each prompt (default: 8)")
    parser.add_argument("--new-tokens", type=int, default=16, help="of an output, at most (default: 16)")
    parser.add_argument("--lr", type=float, default=1e-4, help="AdamW's rate (default: 1e-4)")
    parser.add_argument("--start", type=int, default=0, help="seed of weights, prompts and draws (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each (default: 1)")
    ratios.add_arguments(parser, most_s=300.0, most_rounds=100, least_rounds=30, warm_up=1)
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="also write the whole document there")
    add_json_argument(parser)
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and finish with the JSON line. Exit code 0; 2 for bad arguments and without TRL's environment."""
    options = arguments_parser().parse_args(argv)
    try:
        python = find_interpreter("SPIKEGATE_TRL_PYTHON", ".venv-trl", "TRL", "`make trl` makes it", NoTrl)
        with tempfile.TemporaryDirectory(prefix="spikegate-trl-") as folder:
            document = measured(options, python, Path(folder))
    except (NoTrl, ElsewhereError, ValueError, ModuleNotFoundError) as error:
        print(f"bench reinforcement: {error}", file=sys.stderr)
        return 2
    file = None if options.out is None else write_json(options.out, document)
    headline = ("targets", "speed", "rewards", "tokens_per_s", "threads", "processor", "interrupted")
    finish(document, "bench-reinforcement", file=file, headline=headline)
    return 0


def measured(options: argparse.Namespace, python: Path, folder: Path) -> dict[str, Any]:
    """Steps in turn, as many as the ratio takes."""
    until = ratios.until(options)
    torch.set_num_threads(options.threads)
    task = TaskConfig(tasks=[options.task], form="short", judged=64, new_tokens=options.new_tokens)
    cfg = ModelConfig(**{"name": options.size, "vocab_size": 256, "attention": "explicit", **SIZES[options.size]})
    ratios.say(f"tuning for {options.tune} steps")
    model, examples = tuned(cfg, task, options.tune, options.start)
    rounds = until.most_rounds + until.warm_up + 2
    stream = examples.prompts(options.new_tokens)
    rows = stream.rows(torch.arange(rounds * options.prompts))
    instances = [found[0] for found in rows.instances]
    tokens = [prompt_tokens(examples.tokenizer, instance, task.form) for instance in instances]
    answers = [instance.answer for instance in instances]
    peer: Any = exported(model)
    peer.save_pretrained(folder / "model")
    request = {
        "model": str(folder / "model"), "prompts": [prompt_text(instance, task.form) for instance in instances],
        "answers": answers, "per_step": options.prompts, "n": options.n, "new_tokens": options.new_tokens,
        "temperature": 1.0, "lr": options.lr, "stop": END, "threads": options.threads,
        "seed": options.start, "facts": str(folder / "facts.jsonl"), "work": str(folder / "work"),
    }  # fmt: skip
    write_json(folder / "request.json", request)
    generate = GenerateConfig(new_tokens=options.new_tokens, n=options.n, seed=options.start)
    ours, told = Ours(model, examples, generate, options.lr), []

    def step() -> float:
        part = slice(ours.steps * options.prompts, (ours.steps + 1) * options.prompts)
        start = time.process_time()
        reward, count = ours.step(tokens[part], answers[part])
        seconds = time.process_time() - start
        told.append({"reward": reward, "tokens": count})
        return seconds / count

    env = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with Elsewhere(TRL, [str(python), str(WORKER), str(folder / "request.json")], {**clean_environment(), **env}) as theirs:
        run = InTurn({OURS: step, TRL: theirs}, OURS, until, options.threads)
        interrupted = False
        try:
            run.run(ratios.say)
        except KeyboardInterrupt:
            interrupted = True
        facts = [json.loads(line) for line in (folder / "facts.jsonl").read_text(encoding="utf-8").splitlines()]
    found = run.measured()
    ratio = found.ratios[TRL]
    print("CPU seconds of a sampled token, TRL's over ours")
    print(f"{ratios.HEADER}\n{ratios.columns(ratio)}\n  {ratios.legend(found, 'cpu')}")
    rewards = compared([one["reward"] for one in told], [one["reward"] for one in facts])
    print(rewards["text"])
    met = None if ratio.low is None else ratio.low >= TARGET
    return {
        "targets": [
            {"what": "tokens/s over TRL's", "value": ratio.typical, "target": TARGET, "met": met},
            {
                "what": "0 is in the interval of the rewards' difference",
                "value": rewards["difference"],
                "met": rewards["alike"],
            },
        ],
        "speed": ratio.to_dict(),
        "tokens_per_s": {name: 1 / found.median_s(name) for name in (OURS, TRL)},
        "tokens": {OURS: statistics.mean(f["tokens"] for f in told), TRL: statistics.mean(f["tokens"] for f in facts)},
        "rewards": rewards,
        "steps": {OURS: told, TRL: facts},
        "settings": {key: str(value) for key, value in vars(options).items()},
        "threads": options.threads,
        "processor": processor(),
        "versions": versions(),
        "git": git_state(),
        "interrupted": interrupted,
    }


def compared(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Mean rewards of the same steps, halves apart, and their paired difference with its 95 % interval (Student's t)."""
    count = min(len(ours), len(theirs))
    differences = [a - b for a, b in zip(ours[:count], theirs[:count], strict=True)]
    mean = statistics.mean(differences)
    half = T_95 * statistics.stdev(differences) / count**0.5 if count > 1 else float("inf")
    begin, end = slice(0, count // 2), slice(count // 2, count)
    found: dict[str, Any] = {
        "steps": count,
        "first_half": {OURS: statistics.mean(ours[begin] or [0]), TRL: statistics.mean(theirs[begin] or [0])},
        "second_half": {OURS: statistics.mean(ours[end]), TRL: statistics.mean(theirs[end])},
        "difference": mean,
        "low": mean - half,
        "high": mean + half,
        "alike": mean - half <= 0 <= mean + half,
    }
    text = (
        f"mean reward over {count} steps: first half {found['first_half'][OURS]:.3f} ours, {found['first_half'][TRL]:.3f} "
        f"TRL's; second half {found['second_half'][OURS]:.3f} and {found['second_half'][TRL]:.3f}; difference {mean:+.3f} "
        f"[{mean - half:+.3f}, {mean + half:+.3f}]"
    )
    return {**found, "text": text}
