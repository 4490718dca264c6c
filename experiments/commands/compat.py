"""`spikegate compat MODEL --chip loihi2`: a verdict for every operation of a run, a module or a program."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.commands.models import HELP as MODEL_HELP
from experiments.commands.models import find_model
from experiments.commands.refusal import refuse
from experiments.runs.output import add_json_argument, entry, finish
from experiments.views.terminal import compatibility_text, terminal_width
from experiments.views.tracking import Tracker
from hardware.datafile import DataFileError
from hardware.placement import DoesNotFit

HELP = "what of a model a chip takes, operation by operation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--chip", default="loihi2", help="loihi1, loihi2, or a chip file (default: loihi2)")
    parser.add_argument("--chips", type=int, default=None, help="chips there are (default: as many as it takes)")
    parser.add_argument(
        "--route",
        choices=("graded", "sigma_delta", "rate", "lif"),
        default=None,
        help="default: lif for spiking neurons, else graded, and rate on binary spikes",
    )
    parser.add_argument(
        "--context", type=int, default=None, help="of a run: tokens in a row (default: the model's context)"
    )
    parser.add_argument(
        "--shape", default=None, metavar="1,28,28", help="of MODULE:FUNCTION: one float input of this shape, batch included"
    )
    parser.add_argument(
        "--tensorboard",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="also write the table there, as text for TensorBoard",
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit codes: 0 something maps; 1 nothing does, or the chips do not hold it; 2 the command or a file is wrong."""
    from neuro.analysis.compatibility import analyse
    from sparse_update.loop.checkpoint import CheckpointError

    try:
        if args.chips is not None and args.chips < 1:
            raise ValueError(f"--chips is {args.chips}; at least 1 is needed")
        found = find_model(args.model, args.context, args.shape)
        report = analyse(found.module, found.example, args.chip, route=args.route, chips=args.chips, strict=False)
        if args.tensorboard is not None:
            with Tracker(args.tensorboard) as tracker:
                tracker.text("compatibility", report.markdown())
    except DoesNotFit as failure:
        return refuse("compat", failure)
    except (OSError, CheckpointError, DataFileError, TypeError, ValueError) as error:
        print(f"compat: {error}", file=sys.stderr)
        return 2
    print(compatibility_text(report, terminal_width()))
    finish({"fits": True, **found.origin, **report.to_dict()}, "compat")
    return 0 if report.mapped else 1


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.commands.compat`."""
    own = argparse.ArgumentParser(prog="spikegate compat", description=HELP)
    add_arguments(own)
    return run(own.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
