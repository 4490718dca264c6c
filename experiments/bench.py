"""`python -m experiments.bench WHAT [...]`: measurements; each prints a table, and one JSON document as its last line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

BENCHES = {
    "gate": "step times and FLOPs of every kind of sparse step against the fastest dense step",
    "simulator": "spikes per second of the fixed-point simulator",
    "conversion": "loss, operations and speed of a trained model on the simulated chip",
    "account": "modelled joules and time of published networks against what was measured",
}
"""Name -> what it measures; each lives in `experiments.benches.NAME`, with `main(arguments) -> exit code`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one bench and return its exit code; 2 for an unknown name."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    wanted = arguments[0] if arguments else ""
    if wanted in BENCHES:
        return int(importlib.import_module(f"experiments.benches.{wanted}").main(arguments[1:]))
    asked_for_help = wanted in ("-h", "--help")
    out = sys.stdout if asked_for_help else sys.stderr
    if wanted and not asked_for_help:
        print(f"bench: no bench {wanted!r}", file=out)
    print("usage: python -m experiments.bench WHAT [arguments]   (WHAT --help lists the arguments)", file=out)
    for name, text in BENCHES.items():
        print(f"  {name:<10} {text}", file=out)
    return 0 if asked_for_help else 2


if __name__ == "__main__":
    sys.exit(main())
