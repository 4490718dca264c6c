"""`spikegate compat CHECKPOINT --chip loihi2`: a verdict for every operation of a trained model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.commands.refusal import refuse
from experiments.runs.output import add_json_argument, entry, finish
from experiments.views.tracking import Tracker
from hardware.datafile import DataFileError
from hardware.placement import DoesNotFit

if TYPE_CHECKING:
    from sparse_update.transformer import Transformer

HELP = "what of a trained model a chip takes, operation by operation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("checkpoint", type=Path, help="folder of a training run, or of its checkpoint")
    parser.add_argument("--chip", default="loihi2", help="loihi1, loihi2, or a chip file (default: loihi2)")
    parser.add_argument("--chips", type=int, default=None, help="chips there are (default: as many as it takes)")
    parser.add_argument(
        "--route", choices=("graded", "sigma_delta", "rate"), default=None, help="default: graded; rate on binary spikes"
    )
    parser.add_argument("--context", type=int, default=None, help="tokens in a row (default: the model's context)")
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
    import torch

    from neuro.analysis.compatibility import analyse
    from sparse_update.loop.checkpoint import CheckpointError

    try:
        if args.chips is not None and args.chips < 1:
            raise ValueError(f"--chips is {args.chips}; at least 1 is needed")
        model = load_model(args.checkpoint)
        context = model.cfg.context if args.context is None else args.context
        if not 1 <= context <= model.cfg.context:
            raise ValueError(f"--context is {context}; this model reads 1 to {model.cfg.context} tokens in a row")
        tokens = torch.zeros(1, context, dtype=torch.long)
        report = analyse(model, tokens, args.chip, route=args.route, chips=args.chips, strict=False)
        if args.tensorboard is not None:
            with Tracker(args.tensorboard) as tracker:
                tracker.text("compatibility", report.markdown())
    except DoesNotFit as failure:
        return refuse("compat", failure)
    except (OSError, CheckpointError, DataFileError, ValueError) as error:
        print(f"compat: {error}", file=sys.stderr)
        return 2
    print(report.table())
    finish({"fits": True, "checkpoint": str(args.checkpoint), "context": context, **report.to_dict()}, "compat")
    return 0 if report.mapped else 1


def load_model(folder: Path) -> Transformer:
    """The model of a run folder or a checkpoint folder, in eval mode.

    Raises CheckpointError where there is none, or none that is whole.
    """
    from sparse_update.loop.checkpoint import CheckpointError, load_checkpoint
    from sparse_update.transformer import ModelConfig, Transformer

    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: name a training run, or its checkpoint folder")
    inside = folder / "checkpoint"
    checkpoint = load_checkpoint(inside if inside.is_dir() else folder)
    if "model" not in checkpoint.meta:
        raise CheckpointError(
            f"{folder}: the checkpoint does not say which model it holds; it was written by something else"
        )
    model = Transformer(ModelConfig(**checkpoint.meta["model"]))
    model.load_state_dict(checkpoint.model)
    return model.eval()


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.commands.compat`."""
    own = argparse.ArgumentParser(prog="spikegate compat", description=HELP)
    add_arguments(own)
    return run(own.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
