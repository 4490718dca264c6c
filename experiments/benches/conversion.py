"""`python -m experiments.bench conversion`: what putting a trained model on the simulated chip costs and saves.

Of one training run (--run, or a mid-sized one that this command trains once, by a budget of tokens): held-out loss of the
graded W8A8 conversion less the float model's, with the paired 95 % interval over windows; share of the MACs that is
mapped; tokens per second of the deployed model (our simulator, all events counted) against the float one, both timed in
turns in this process; and the fewest synaptic operations, as a share of the dense MACs of all mapped layers, at no more
than +0.05 nats against a float control of as many further steps: from a frontier.json of `experiments.studies.activity`
(--frontier), or from a short setting of it, run here: more steps reach fewer operations.

The last line is JSON: `delta_nats_w8a8`, `synops_fraction_at_0.05` (null where no point qualifies or none was measured:
`frontier` says which), `mapped_mac_share`, `tokens_per_s` and, token by token, `generated_tokens_per_s` {"float",
"deployed", "ratio" (null where too noisy), its interval, "ratio_best", "at_least" and "target", and the machine with its
load}, and what they come from.
Exit codes: 0 done; 1 a run or a file cannot be used; 2 the command is wrong.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benches import ratios
from experiments.benches.families import report
from experiments.benches.families.table import table
from experiments.benches.peers.report import judged
from experiments.deploy import DeployConfig, calibration_windows, converted, load_run
from experiments.runs.deployment import held_out_loss
from experiments.runs.folder import RunError, read_json
from experiments.runs.output import add_json_argument, entry, finish
from experiments.studies.activity import qualifying, summary
from experiments.studies.frontier import Frontier, Points
from hardware.meters.ratios import InTurn, Until
from hardware.placement import DoesNotFit
from neuro.analysis.compatibility import NothingToMap
from neuro.analysis.tracing import evaluating
from neuro.deployment.deployed import deploy
from neuro.deployment.generation import generate
from sparse_update.data.records import CorpusError
from sparse_update.data.regimes import held_out
from sparse_update.loop.checkpoint import CheckpointError

FOLDER = Path("runs/bench/conversion")
OWN_MODEL = "mid"
OWN_BATCH = 16
TIMED_WINDOWS = 8
PROMPT, GENERATED = 16, 32
READING_TARGET, GENERATING_TARGET = 0.8, 0.5
"""Of the float model's tokens per second."""
EXPECTED = (RunError, CorpusError, CheckpointError, NothingToMap, DoesNotFit)


def own_run(folder: Path, tokens: int) -> Path:
    """A mid-sized model trained by `experiments.train` on so many tokens of the demo corpus; read back once finished.

    Raises RunError when the training fails, or the folder holds another one.
    """
    run = folder / f"{OWN_MODEL}-{tokens}"
    if (run / "run.json").exists():
        if read_json(run / "run.json").get("status") == "finished":
            say(f"{run} is there already")
            return run
        raise RunError(f"{run} holds an unfinished run: finish it (the command that began it goes on with it) or remove it")
    say(f"training {OWN_MODEL} on {tokens:,} tokens into {run}")
    words = [
        "experiment=clean",
        "gate=dense",
        f"model={OWN_MODEL}",
        f"run={run}",
        f"trainer.budget_offered_tokens={tokens}",
    ]
    words.append(f"trainer.batch_windows={OWN_BATCH}")
    done = subprocess.run([sys.executable, "-m", "experiments.train", *words], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise RunError(f"training into {run} failed with exit code {done.returncode}")
    return run


def tokens_per_s(
    work: Mapping[str, Callable[[], object]], tokens: int, least: float, until: Until, clock: str
) -> dict[str, Any]:
    """Speed of "float" and "deployed", measured in turn: medians, and the deployed model's share of the float one's.

    `ratio` is null where it is too noisy; its interval and the best, out of the shortest times, are there all the same.
    `at_least` is the share that is wanted, and `target` says whether the interval lies on one side of it.

    Args:
        work: what each of the two does for so many `tokens`.
    """
    probes = {name: ratios.probe(call, torch.device("cpu"), clock) for name, call in work.items()}
    found = InTurn(probes, "float", until, torch.get_num_threads()).run(lambda text: say(f"tokens a second: {text}"))
    slower = found.ratios["deployed"]  # its time over the float model's: the speeds' ratio is the inverse
    ends = None if slower.low is None or slower.high is None else [1 / slower.high, 1 / slower.low]
    return {
        **{name: tokens / found.median_s(name) for name in ("float", "deployed")},
        "ratio": None if slower.median is None else 1 / slower.median, "ratio_best": 1 / slower.best,
        "ratio_interval": ends, "verdict": slower.verdict, "rounds": slower.rounds, "machine": asdict(found.machine),
        "at_least": least, "target": judged(dict(zip(("low", "high"), ends or (None, None), strict=True)), least),
    }  # fmt: skip


def speeds(plain: nn.Module, deployed: nn.Module, windows: Tensor, until: Until, clock: str) -> dict[str, dict[str, Any]]:
    """Of reading windows, and of generating token by token; each as `tokens_per_s`."""
    read, prompt = windows[:TIMED_WINDOWS, :-1], windows[0, :PROMPT]
    arms = {"float": plain, "deployed": deployed}
    reading = {name: partial(arm, read) for name, arm in arms.items()}
    generating = {name: partial(generate, arm, prompt, GENERATED) for name, arm in arms.items()}
    with evaluating(plain), evaluating(deployed):
        read_per_s = tokens_per_s(reading, read.numel(), READING_TARGET, until, clock)
    return {
        "tokens_per_s": read_per_s,
        "generated_tokens_per_s": tokens_per_s(generating, GENERATED, GENERATING_TARGET, until, clock),
    }


def frontier(run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """{"source", "rows", "synops_fraction_at_0.05", ...}, read from a file or measured in a short setting.

    Raises RunError for a file that holds no frontier.
    """
    if args.frontier is not None:
        found = read_json(args.frontier)
        missing = [key for key in ("run", "rows", "synops_fraction_at_0.05", "goal_nats") if key not in found]
        if missing:
            raise RunError(f"{args.frontier} has no {missing[0]}: it is no frontier.json of experiments.studies.activity")
        if found["goal_nats"] != 0.05:
            raise RunError(f"{args.frontier} is for {found['goal_nats']} nats, not 0.05")
        kept = {key: found.get(key) for key in ("run", "steps", "rows", "synops_fraction_at_0.05")}
        return {"source": str(args.frontier), **kept}
    if not args.frontier_steps:
        return {"source": "not measured (--frontier-steps 0)", "rows": [], "synops_fraction_at_0.05": None}
    cfg = Frontier(
        run=str(run),
        out=str((args.folder if args.run is None else run) / f"activity-{args.frontier_steps}"),
        targets=args.targets,
        steps=args.frontier_steps,
        distil=args.distil,
        teacher="control" if args.distil else "start",
        eval_tokens=args.eval_tokens,
    )
    say(f"frontier: {cfg.steps} further steps of every model, into {cfg.folder}")
    rows = summary(Points(cfg).all())
    source = f"{cfg.steps} further steps, targets {', '.join(map(str, cfg.targets))}; {cfg.folder}"
    return {
        "source": source,
        "run": str(run),
        "steps": cfg.steps,
        "rows": rows,
        "synops_fraction_at_0.05": qualifying(rows),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The document."""
    run = own_run(args.folder, args.tokens) if args.run is None else args.run
    model, corpus, data, trained = load_run(run)
    cfg = DeployConfig(run=str(run), eval_tokens=args.eval_tokens, calibration_tokens=args.calibration_tokens)
    context = model.cfg.context
    report, plan = converted(cfg, model, calibration_windows(cfg, corpus, data, context, trained["seed"]))
    windows = held_out(corpus, data, context, cfg.eval_tokens)["val"]
    say(f"evaluating on {windows[:, 1:].numel():,} held-out tokens")
    plain = held_out_loss(model, windows)
    twin = held_out_loss(deploy(model, plan, "quantised"), windows)
    simulated = deploy(model, plan)
    chip = held_out_loss(simulated, windows)
    mapped = [c for c in simulated.counts() if not c.host]
    less = chip.less(plain)
    timed = speeds(model, simulated, windows, ratios.until(args), args.clock)
    found = frontier(run, args)
    return {
        "delta_nats_w8a8": less["mean"],
        "synops_fraction_at_0.05": found["synops_fraction_at_0.05"],
        "mapped_mac_share": report.mac_share,
        **timed,
        "delta_nats_w8a8_interval": [less["low"], less["high"]],
        "delta_nats_quantised": twin.less(plain)["mean"],
        "loss_float_nats": plain.nats,
        "eval_tokens": windows[:, 1:].numel(),
        "synops_fraction_w8a8": sum(c.synops for c in mapped) / sum(c.dense_macs for c in mapped),
        "frontier": found,
        "run": str(run),
        "model": model.cfg.name,
        "chip": report.chip,
        "threads": torch.get_num_threads(),
        "clock": args.clock,
    }


def print_table(found: dict[str, Any]) -> None:
    """The document for people."""
    low, high = found["delta_nats_w8a8_interval"]
    spread = "" if low is None else f" [{low:+.4f}, {high:+.4f}]"
    best = found["synops_fraction_at_0.05"]
    tokens, plain = found["eval_tokens"], found["loss_float_nats"]
    less, twin = found["delta_nats_w8a8"], found["delta_nats_quantised"]
    print(f"{found['run']} ({found['model']}), {tokens:,} held-out tokens, float {plain:.4f} nats")
    print(f"  W8A8 less float           {less:+.4f}{spread} nats; twin {twin:+.4f}")
    print(f"  synaptic operations       {found['synops_fraction_w8a8']:.1%} of dense MACs as converted")
    print(f"  at most +0.05 nats        {'none' if best is None else f'{best:.1%}'} ({found['frontier']['source']})")
    print(f"  mapped                    {found['mapped_mac_share']:.1%} of all MACs")
    for what, key in (("read", "tokens_per_s"), ("generated", "generated_tokens_per_s")):
        speed = found[key]
        print(
            f"  tokens/s, {what:<15} float {speed['float']:,.0f}, deployed {speed['deployed']:,.0f}: "
            f"{ratios.shown(speed['ratio'], 4)}, at least {speed['at_least']:g} wanted: {speed['target']}"
        )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="spikegate bench conversion", description="a model on the simulated chip")
    made.add_argument("--run", type=Path, default=None, help="folder of a finished training run (default: train one)")
    made.add_argument("--folder", type=Path, default=FOLDER, help=f"where the own run goes (default: {FOLDER})")
    made.add_argument("--tokens", type=positive, default=1_500_000, help="of the own run (default: 1500000)")
    made.add_argument("--eval-tokens", type=positive, default=32768, help="held-out tokens (default: 32768)")
    made.add_argument("--calibration-tokens", type=positive, default=8192, help="(default: 8192)")
    made.add_argument("--frontier", type=Path, default=None, help="frontier.json of python -m experiments.studies.activity")
    made.add_argument(
        "--frontier-steps", type=int, default=400, help="else: further steps of each of its models; 0: none (default: 400)"
    )
    made.add_argument("--targets", type=shares, default=(0.25, 0.12), help="shares it trains towards (default: 0.25,0.12)")
    made.add_argument(
        "--distil", type=float, default=0.9, help="share of its gated models' loss that is distillation (default: 0.9)"
    )
    made.add_argument(
        "--families",
        nargs="?",
        const="all",
        default="",
        metavar="NAME,NAME",
        help="in place of all that: a table over model families (default: all of them)",
    )
    made.add_argument(
        "--record", type=Path, default=None, metavar="FOLDER", help="write that table there, as page and JSON"
    )
    ratios.add_arguments(made, most_s=120.0)
    ratios.add_clock_argument(made)
    made.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    add_json_argument(made)
    return made


def table_of_families(args: argparse.Namespace) -> int:
    """The table over model families; exit code 2 for an unknown one or a package that is missing."""
    try:
        rows = report.measure(report.families(args.families))
    except (ValueError, ModuleNotFoundError) as error:
        print(f"bench conversion: {error}", file=sys.stderr)
        return 2
    print(*table(rows), sep="\n")
    found: dict[str, Any] = {"families": rows}
    if args.record is not None:
        found["files"] = [str(path) for path in report.record(rows, args.record)]
    finish(found, "bench-conversion")
    return 0


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 1")
    return number


def shares(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module for exit codes."""
    args = parser().parse_args(argv)
    try:
        ratios.until(args)
    except ValueError as error:
        print(f"bench conversion: {error}", file=sys.stderr)
        return 2
    if args.frontier_steps < 0 or args.threads < 0:
        print("bench conversion: --frontier-steps and --threads are at least 0", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.families:
        return table_of_families(args)
    try:
        found = measure(args)
    except EXPECTED as error:
        print(f"bench conversion: {error}", file=sys.stderr)
        return 1
    print_table(found)
    finish(found, "bench-conversion")
    return 0


if __name__ == "__main__":
    sys.exit(main())
