"""`spikegate completion bash`: what makes the Tab key complete commands, options, Hydra groups and shipped sweeps.

The shell asks `spikegate` itself, through argcomplete, so that what is offered is what this version has.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.resources import files

from experiments.bench import BENCHES
from experiments.runs.sweeps.shipped import shipped
from experiments.study import STUDIES

HELP = "print what the shell needs for Tab completion"
SHELLS = ("bash", "zsh")
USE = """\
bash: put this line into ~/.bashrc
    eval "$(spikegate completion bash)"

zsh: put these lines into ~/.zshrc
    autoload -U compinit && compinit
    eval "$(spikegate completion zsh)"

A new shell then completes commands (spikegate de<TAB>), options (spikegate place --<TAB>), settings of Hydra's groups
(spikegate train gate=<TAB>), shipped sweeps (spikegate sweep <TAB>), benches and studies.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = USE
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads it")


def run(args: argparse.Namespace) -> int:
    """Print the shell's code. Exit code 0."""
    import argcomplete

    sys.stdout.write(argcomplete.shellcode(["spikegate"], shell=args.shell))
    return 0


def wanted() -> bool:
    """Whether the shell asks for completions, instead of a person for a command."""
    return "_ARGCOMPLETE" in os.environ


def command() -> str:
    """The command that stands in the line so far, "" where there is none yet."""
    words = os.environ.get("COMP_LINE", "").split()
    return words[1] if len(words) > 1 else ""


def answer(parser: argparse.ArgumentParser) -> None:
    """Answer the shell, and exit."""
    import argcomplete

    argcomplete.autocomplete(parser)


def take_settings(parser: argparse.ArgumentParser, application: str) -> None:
    """Let the parser of a Hydra application complete GROUP=CHOICE."""

    def settings(prefix: str, **_: object) -> list[str]:
        return [word for word in groups(application) if word.startswith(prefix)]

    parser.add_argument("settings", nargs="*").completer = settings  # type: ignore[attr-defined]


def take_names(parser: argparse.ArgumentParser, command: str) -> None:
    """Let the parser of `sweep`, `bench` and `study` complete what there is of them."""

    def names(prefix: str, **_: object) -> list[str]:
        known = {"bench": BENCHES, "study": STUDIES, "sweep": shipped()}[command]
        return [name for name in known if name.startswith(prefix)]

    parser.add_argument("name", nargs="*").completer = names  # type: ignore[attr-defined]


def groups(application: str) -> list[str]:
    """GROUP=CHOICE of every shipped group that the application has."""
    if application not in ("train", "pays"):
        return []
    roots = [files("configs"), files("configs").joinpath("published")]
    found = {
        f"{group.name}={choice.name.removesuffix('.yaml')}"
        for root in roots
        for group in root.iterdir()
        if group.is_dir() and group.name not in ("sweep", "published", "modules")
        if application == "train" or group.name in ("gate", "subset")
        for choice in group.iterdir()
        if choice.name.endswith(".yaml")
    }
    return sorted(found)
