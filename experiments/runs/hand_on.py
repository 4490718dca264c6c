"""A command with several names under it: `bench gate`, `study digits`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

from hardware.text import short


def hand_on(
    command: str, package: str, known: Mapping[str, str], words: Sequence[str], modules: Mapping[str, str] | None = None
) -> int:
    """Call `main(the other words)` of the module `PACKAGE.NAME` that the first word names, and return its exit code.
    `modules`: name -> module, where they differ.

    Without a name, or with one that is not in `known` (name -> what it does), the names are listed: exit code 2, or 0
    where help was asked for.
    """
    wanted = words[0] if words else ""
    if wanted in known:
        return int(importlib.import_module(f"{package}.{(modules or {}).get(wanted, wanted)}").main(words[1:]))
    asked_for_help = wanted in ("-h", "--help")
    out = sys.stdout if asked_for_help else sys.stderr
    if wanted and not asked_for_help:
        print(f"{command}: there is no {command} {short(wanted)!r}", file=out)
    print(f"usage: spikegate {command} NAME [arguments]   (NAME --help lists the arguments)", file=out)
    for name, text in known.items():
        print(f"  {name:<13} {text}", file=out)
    return 0 if asked_for_help else 2
