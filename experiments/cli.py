"""`spikegate COMMAND ...`: train, deploy and compare go to Hydra, the rest is argparse."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import demo
from experiments.commands import compat, export, importing, place, simulate, verify

HYDRA = {
    "train": "train one arm",
    "deploy": "put a trained run on the simulated chip",
    "compare": "one table over runs",
}


HANDED_ON = {
    "sweep": "arms x seeds x budgets of one regime, resumable",
    "bench": "measurements: bench gate, bench simulator, bench conversion, bench account",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Exit codes: 0 done; 1 the job failed; 2 the command or configuration is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in (*HYDRA, *HANDED_ON):
        return importlib.import_module(f"experiments.{words[0]}").main(words[1:])
    args = _parser().parse_args(words)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikegate",
        description="Surprise-gated training, a spiking backend, and an honest account of both.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in HYDRA.items():
        commands.add_parser(name, help=f"{text} (Hydra: KEY=VALUE ...)", add_help=False)
    for name, text in HANDED_ON.items():
        commands.add_parser(name, help=text, add_help=False)
    rerun = commands.add_parser("rerun", help="repeat a run from its folder")
    rerun.add_argument("folder", type=Path, help="folder of a training run or a deployment")
    rerun.add_argument("--out", type=Path, default=None, help="folder of the repetition (default: FOLDER-rerun)")
    rerun.set_defaults(run=_rerun)
    own_parsers = {
        "demo": demo,
        "verify": verify,
        "simulate": simulate,
        "place": place,
        "compat": compat,
        "export": export,
        "import": importing,
    }
    for name, module in own_parsers.items():
        own = commands.add_parser(name, help=module.HELP)
        module.add_arguments(own)
        own.set_defaults(run=module.run)
    doctor = commands.add_parser("doctor", help="what stands between this machine and a Loihi board")
    doctor.add_argument("graph", type=Path, nargs="?", default=None, help="a NAME.graph.npz: does it fit the board too?")
    doctor.add_argument("--chip", default="loihi2", help="chip of the board (default: loihi2)")
    doctor.add_argument("--chips", type=int, default=None, help="chips of the board")
    doctor.set_defaults(run=_doctor)
    return parser


def _rerun(args: argparse.Namespace) -> int:
    from experiments.rerun import rerun

    return rerun(args.folder, args.out)


def _doctor(args: argparse.Namespace) -> int:
    from experiments.runs.plain_json import dump_line
    from hardware.boards.loihi import probe

    demands = None
    if args.graph is not None:
        from neuro.graph import GraphError, load_graph
        from neuro.graph.demand import layer_demands

        try:
            demands = layer_demands(load_graph(args.graph))
        except (GraphError, OSError) as error:
            print(f"doctor: {error}", file=sys.stderr)
            return 2
    report = probe(demands=demands, chip=args.chip, chips=args.chips)
    print(report)
    print(dump_line(report.to_dict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
