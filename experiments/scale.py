"""`spikegate scale fit|predict|judge|gain|abilities RUNS`: a law of the loss over size and text, what it predicts, how the
gain of a gate moves with scale, and whether an ability jumps or only its metric. The runs are those of any sweep,
`spikegate sweep scaling` for one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from experiments.laws.abilities import abilities
from experiments.laws.compressed import compressed_nats
from experiments.laws.forecast import Forecast, judge, read, write
from experiments.laws.gain import gain_law
from experiments.laws.points import LawError, of_arm, read_points
from experiments.laws.report import Report, document, draw, report, table
from experiments.laws.resampling import DRAWS, LEVEL, PREDICTION_LEVEL
from experiments.runs.folder import RunError
from experiments.runs.hydra_app import EXIT_CONFIG
from experiments.runs.output import add_json_argument, entry, finish


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="spikegate scale", description=__doc__)
    actions = top.add_subparsers(dest="action", required=True, metavar="fit|predict|judge|gain|abilities")
    fit = actions.add_parser("fit", help="coefficients with intervals, and the best size for a budget in three ways")
    predict = actions.add_parser("predict", help="write down, before it starts, what a run will come to")
    for action in (fit, predict):
        _runs(action)
        action.add_argument(
            "--arm", default="dense", help="whose law; a name or a pattern such as 'dense*' (default: dense)"
        )
        action.add_argument(
            "--parameters", choices=("all", "without-embeddings"), default="all",
            help="what counts as size; published laws differ most in this (default: all)",
        )  # fmt: skip
    fit.add_argument("--irreducible-at-most", type=float, metavar="NATS", help="warn where the fit's E lies above it")
    fit.add_argument("--text", type=Path, help="a text of the source: bz2 and xz bound E by what they reach (byte tokens)")
    fit.add_argument("--figure", type=Path, help="write the picture there (.png or .svg)")
    predict.add_argument("--size", type=int, required=True, help="parameters of the run to come, as --parameters counts")
    predict.add_argument("--tokens", type=int, required=True, help="tokens of its steps")
    predict.add_argument("--to", type=Path, required=True, help="the file; it must not be there yet")
    held = actions.add_parser("judge", help="hold a prediction against the run")
    held.add_argument("prediction", type=Path)
    held.add_argument("run", type=Path)
    gain = actions.add_parser("gain", help="how a gate's gain at equal seconds moves with size and tokens a parameter")
    _runs(gain)
    gain.add_argument("--gated", default="surprise", help="the gated arm, a name or a pattern (default: surprise)")
    gain.add_argument("--dense", default="dense", help="the arm that it stands beside (default: dense)")
    able = actions.add_parser("abilities", help="share solved and likelihood of the answers over size: which of them jumps")
    _runs(able)
    able.add_argument("--arm", default="dense*", help="a name or a pattern (default: dense*)")
    able.add_argument("--stream", help="the stream, where the runs have several")
    for action in (fit, predict, gain):
        action.add_argument("--stream", help="the stream, where the runs have several")
        action.add_argument("--draws", type=int, default=DRAWS, help=f"of the bootstrap (default: {DRAWS})")
    for action in (fit, predict, held, gain, able):
        add_json_argument(action)
    return top


def _runs(action: argparse.ArgumentParser) -> None:
    action.add_argument("runs", nargs="+", type=Path, help="run folders, or folders that hold them")


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0; 1 where `judge` finds the prediction missed; 2 for runs or settings that do not allow it."""
    args = parser().parse_args(list(argv or ()))
    try:
        return {"fit": _fit, "predict": _predict, "judge": _judge, "gain": _gain, "abilities": _abilities}[args.action](
            args
        )
    except (LawError, RunError, FileNotFoundError, ValueError) as error:
        print(f"scale {args.action}: {error}", file=sys.stderr)
        return EXIT_CONFIG


def _fitted(args: argparse.Namespace, at_most: float | None = None) -> Report:
    if args.draws < 20:
        raise LawError(f"--draws {args.draws}: at least 20, or there is no interval")
    found = read_points(args.runs)
    points = of_arm(found.points, args.arm, args.stream)
    return report(
        points,
        found.left_out,
        arm=args.arm,
        embeddings=args.parameters == "all",
        draws=args.draws,
        irreducible_at_most=at_most,
    )


def _fit(args: argparse.Namespace) -> int:
    bounds = [] if args.irreducible_at_most is None else [args.irreducible_at_most]
    compressed = compressed_nats(args.text) if args.text else {}
    found = _fitted(args, min([*bounds, *compressed.values()], default=None))
    print(table(found))
    for name, nats in compressed.items():
        print(f"  {name} reaches {nats:.4f} nats a byte on {args.text}: E is at most that")
    if args.figure:
        draw(found, args.figure)
        print(f"  picture: {args.figure}")
    finish(document(found) | {"compressed_nats": compressed}, "scale-fit")
    return 0


def _predict(args: argparse.Namespace) -> int:
    if args.size < 1 or args.tokens < 1:
        raise LawError(f"--size {args.size}, --tokens {args.tokens}: both must be at least 1")
    found = _fitted(args)
    first = found.points[0]
    loss = found.resampled.predicted(args.size, args.tokens)
    forecast = Forecast(
        found.arm, first.stream, args.size, args.tokens, loss, datetime.now(UTC).isoformat(timespec="seconds"),
        max(p.flops for p in found.points), first.tokenizer, first.held_out, found.embeddings,
    )  # fmt: skip
    write(forecast, args.to)
    print(
        f"{args.size:,} parameters, {args.tokens:,} tokens: {loss.value:.4f} nats [{loss.low:.4f}, {loss.high:.4f}] "
        f"({PREDICTION_LEVEL:.0%}), written to {args.to}; after the run: spikegate scale judge {args.to} RUN"
    )
    finish({"predicted": vars(loss), "file": str(args.to)}, "scale-predict")
    return 0


def _judge(args: argparse.Namespace) -> int:
    forecast = read(args.prediction)
    (run,) = read_points([args.run]).points
    judged = judge(forecast, run)
    print(
        f"predicted {forecast.loss.value:.4f} [{forecast.loss.low:.4f}, {forecast.loss.high:.4f}], measured "
        f"{judged.measured_nats:.4f}: off by {judged.error_nats:+.4f} nats, {'inside' if judged.inside else 'outside'} the "
        f"interval; {judged.over_largest:.1f} times the FLOPs of the largest fitted run; "
        + ("met" if judged.met else "missed")
    )
    for note in judged.notes:
        print(f"  note: {note}")
    finish({**vars(judged), "met": judged.met}, "scale-judge")
    return 0 if judged.met else 1


def _gain(args: argparse.Namespace) -> int:
    found = read_points(args.runs)
    dense, gated = (of_arm(found.points, arm, args.stream) for arm in (args.dense, args.gated))
    try:
        law = report(dense, draws=20).resampled.fit.law
    except LawError:
        law = None  # too few dense runs for a law: gains without time ratios
    gains = gain_law(dense, gated, law, args.draws)
    ratios = [p.time_ratio for p in gains.pairs if p.time_ratio is not None]
    print(f"gain of {args.gated} over {args.dense}, nats at equal seconds, {len(gains.pairs)} pairs; {LEVEL:.0%} intervals")
    for name, part in (("in the middle", gains.at_middle), ("a doubling of size", gains.by_size),
                       ("a doubling of tokens a parameter", gains.by_tokens)):  # fmt: skip
        print(f"  {name:<33} {part.value:+.4f} [{part.low:+.4f}, {part.high:+.4f}]")
    print(f"  the middle is {gains.middle[0]:,.0f} parameters at {gains.middle[1]:.3g} tokens a parameter")
    if ratios:
        print(f"  time to the gated loss over the dense time, by the dense law: {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"  {gains.verdict}")
    for text in gains.left_out:
        print(f"  left out: {text}")
    zero = gains.zero_at(gains.middle[1])
    finish(
        {
            "at_middle": vars(gains.at_middle), "by_size": vars(gains.by_size), "by_tokens": vars(gains.by_tokens),
            "middle": list(gains.middle), "zero_at_parameters": zero, "verdict": gains.verdict,
            "pairs": [vars(pair) for pair in gains.pairs], "left_out": list(gains.left_out),
        },
        "scale-gain",
    )  # fmt: skip
    return 0


def _abilities(args: argparse.Namespace) -> int:
    found = read_points(args.runs)
    able = abilities(of_arm(found.points, args.arm, args.stream))
    print(f"{'parameters':>12}{'runs':>6}{'solved':>9}{'sd':>8}{'loss, nats':>12}{'sd':>8}")
    for one in able.sizes:
        print(
            f"{one.parameters:>12,}{one.runs:>6}{one.solved:>9.3f}{one.solved_sd:>8.3f}{one.loss_nats:>12.4f}{one.loss_sd:>8.4f}"
        )
    for name, jump, at in (("solved", able.solved_jump, able.solved_jump_at), ("loss", able.loss_jump, able.loss_jump_at)):
        print(f"  largest step of {name}: {jump:.0%} of the way, from {at[0]:,} to {at[1]:,} parameters")
    print(f"  solved = exp(-T loss) with T = {able.tokens:.2f} tokens leaves {able.off:.3f} (root mean square)")
    print(f"  {able.verdict}")
    for out in found.left_out:
        print(f"  left out: {out.folder}: {out.reason}")
    finish({**vars(able), "sizes": [vars(one) for one in able.sizes], "verdict": able.verdict}, "scale-abilities")
    return 0


if __name__ == "__main__":
    sys.exit(main())
