"""`spikegate COMMAND ...`: finds the command and hands the words on. What a command needs is imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from experiments.commands import completion
from experiments.runs.folder import versions
from experiments.runs.output import entry

EXIT_INTERRUPTED = 130
HYDRA = {
    "train": "train one arm",
    "deploy": "put a trained run on the simulated chip",
    "compare": "one table over runs",
    "pays": "does it pay on a model of your own: all arms, one clock, the verdict",
}
"""Commands whose settings are Hydra's: `experiments.NAME`, with `main(argv) -> exit code`."""

HANDED_ON = {
    "sweep": "arms x seeds x budgets of one regime, resumable",
    "bench": "measurements beside a named baseline: bench gate, bench simulator, ...",
    "study": "experiments of their own: study activity, study spiking_lm, ...",
    "scale": "a scaling law from finished runs, its predictions, and how a gain moves with scale",
}
"""Commands that read their words themselves, in the same place."""

OWN = {
    "demo": "experiments.demo",
    "verify": "experiments.commands.verify",
    "simulate": "experiments.commands.simulate",
    "place": "experiments.commands.place",
    "account": "experiments.commands.account",
    "compat": "experiments.commands.compat",
    "export": "experiments.commands.export",
    "import": "experiments.commands.importing",
    "tokens": "experiments.commands.tokens",
    "reward": "experiments.commands.reward",
    "rerun": "experiments.rerun",
    "doctor": "experiments.commands.doctor",
    "completion": "experiments.commands.completion",
}
"""Commands with a module that has HELP, `add_arguments(parser)` and `run(args) -> exit code`."""


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Exit codes: 0 done; 1 the job failed; 2 the command or configuration is wrong; 130 interrupted.
    """
    words = list(argv or ())
    if completion.wanted():
        completion.answer(parser(completion.command()))
    try:
        with _plain_warnings():
            return _run(words)
    except KeyboardInterrupt:  # also while a command is still loading what it needs
        print(f"{words[0] if words else 'spikegate'}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line for people, without the place in the code that warns."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, category, filename, lineno, line=None: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _run(words: list[str]) -> int:
    if words and words[0] in (*HYDRA, *HANDED_ON):
        return int(importlib.import_module(f"experiments.{words[0]}").main(words[1:]))
    whole = parser(words[0] if words and words[0] in OWN else None)
    if not words:
        whole.print_help()
        return 0
    args = whole.parse_args(words)
    return int(args.run(args))


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """The command line; with `only` the arguments of that command alone ("" for none), so that no other module is
    imported."""
    made = argparse.ArgumentParser(
        prog="spikegate",
        description="Surprise-gated training, a spiking backend, and an honest account of both.",
        epilog="spikegate COMMAND --help says more. Every command takes --json. Tab completion: spikegate completion -h.",
    )
    made.add_argument("--version", action="version", version=f"spikegate {versions()['spikegate'] or '(not installed)'}")
    commands = made.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in HYDRA.items():
        completion.take_settings(commands.add_parser(name, help=f"{text} (Hydra: KEY=VALUE ...)", add_help=False), name)
    for name, text in HANDED_ON.items():
        completion.take_names(commands.add_parser(name, help=text, add_help=False), name)
    for name, place in OWN.items():
        if only not in (None, name):
            commands.add_parser(name, add_help=False)
            continue
        module = importlib.import_module(place)
        own = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(own)
        own.set_defaults(run=module.run)
    return made


if __name__ == "__main__":
    sys.exit(main())
