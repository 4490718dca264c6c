"""Coverage-guided fuzzing of one reader by atheris (libFuzzer): what mutators that know a format do not think of.

    python -m tests.guided READER FOLDER RUNS

FOLDER/seeds holds lawful files. Whatever a reader does but return or raise its own error ends the run with a traceback and
exit code 77, and the bytes that did it stay in FOLDER as crash-*. Needs atheris (pip install atheris; 3.0.0 was tried).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST = 4096
ROOT = Path(__file__).resolve().parents[1]
SEEDS = {
    "json": (),
    "graph": ("tests/neuro/golden/graphs/lif_loop.graph.npz",),
    "sweep": (),
    "idx": (),
}
"""Reader -> lawful files that are there; others are made."""
TEXTS = {
    "idx": [bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(6)],
    "json": [b'{"schema": 1, "a": [1, -2.5e3, null, true, "x\\u00e9"], "b": {"c": {}}}', b"[[[1]], {}]"],
    "sweep": [
        b"folder: runs/x\nseeds: [0]\nbudget_tokens: 10\narms: {dense: {}, s: {set: ['gate=surprise'], grid: {a: [1]}}}"
    ],
}


def prepare(reader: str, folder: Path) -> None:
    """Lawful files of the kind, in `folder`/seeds."""
    seeds = folder / "seeds"
    seeds.mkdir(parents=True)
    for number, text in enumerate(TEXTS.get(reader, [])):
        (seeds / f"text-{number}").write_bytes(text)
    for name in SEEDS[reader]:
        shutil.copy(ROOT / name, seeds)


def readers() -> dict[str, tuple[str, Callable[[Path], Any], tuple[type[Exception], ...]]]:
    """Reader -> (name of the file, how it is read, what it may raise)."""
    from experiments.runs.sweeps.reading import SweepError, read_sweep
    from experiments.samples.pictures import read_idx
    from experiments.samples.records import DataError
    from hardware.datafile import DataFileError
    from hardware.documents import read_json
    from neuro.graph import GraphFileError, load_graph

    return {
        "json": ("x.json", lambda path: read_json(path, DataFileError), (DataFileError,)),
        "graph": ("x.graph.npz", load_graph, (GraphFileError,)),
        "sweep": ("x.yaml", read_sweep, (SweepError,)),
        "idx": ("x", read_idx, (DataError,)),
    }


def main(reader: str, folder: str, runs: str) -> None:
    import atheris

    with atheris.instrument_imports(include=["hardware", "neuro.graph", "experiments.runs", "experiments.samples"]):
        name, read, errors = readers()[reader]
    path = Path(folder) / name

    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read(path)
        except errors as error:
            if not str(error):
                raise AssertionError("an error without a word") from error

    options = [
        f"-runs={runs}",
        "-seed=1",
        f"-max_len={LONGEST}",
        f"-artifact_prefix={folder}/",
        "-timeout=60",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, f"{folder}/seeds"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:4])
