"""Run folders, sweeps, samples and weights from any bytes: a value, one typed error, or a run that is left out by name."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from experiments.compare import _text_views
from experiments.comparison.collection import collect
from experiments.runs.folder import RunError, read_json
from experiments.runs.hydra_app import ConfigError
from experiments.runs.samples.model import load_weights
from experiments.runs.sweeps.reading import SweepError, read_sweep
from experiments.samples.arrays import load_arrays
from experiments.samples.pictures import read_idx
from experiments.samples.records import DataError
from tests import mutations
from tests.experiments.comparison.records import arm_record, deployed_record

SWEEP = {
    "folder": "runs/sweep/x",
    "settings": ["experiment=noisy"],
    "budget_tokens": 3000,
    "seeds": [0, 1],
    "base": ["experiment=clean"],
    "tuning_seed": 7,
    "arms": {"dense": {"grid": {"optim.lr": [0.1, 0.2]}}, "other": {"set": ["gate=surprise"], "budgets": [0.5, 1.0]}},
}
INFO = {"schema": 1, "kind": "train", "status": "finished", "stream": "clean", "arm": "dense", "seed": 0}
CURVE = [{"step": i, "reference_s": 2.0 * i, "val_loss_nats": 3.0 / (1 + i)} for i in range(4)]
RESULT = {
    **arm_record(1.7),
    "notes": ["a note"],
    "held_out": {"val": {"loss_nats": 1.7}, "known": {"loss_nats": 1.6}},
    "budget_reference_s": 20.0,
}
FOLDERS: dict[str, dict[str, str]] = {
    "train": {
        "run.json": json.dumps(INFO),
        "result.json": json.dumps(RESULT),
        "config.yaml": yaml.safe_dump({"optim": {"lr": 0.1}, "gate": {"name": "none"}}),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in CURVE),
    },
    "deploy": {"run.json": json.dumps({**INFO, "kind": "deploy"}), "deploy.json": json.dumps(deployed_record())},
}
RECORDS = [(kind, name) for kind, files in FOLDERS.items() for name in files]


def changed(text: str, name: str) -> st.SearchStrategy[bytes]:
    raw = mutations.bytes_of(text.encode())
    if name.endswith(".jsonl"):
        return raw
    made = mutations.yaml_of if name.endswith(".yaml") else mutations.json_of
    return made(yaml.safe_load(text)) | raw


def hold_folder(kind: str, name: str, folder: Path, examples: int) -> None:
    """A folder with one changed file is compared, or left out with a reason; a whole one beside it is compared always."""
    for place, files in (("sound", FOLDERS["train"]), ("odd", FOLDERS[kind])):
        (folder / place).mkdir()
        for file, text in files.items():
            (folder / place / file).write_text(text)
    (folder / "sound" / "run.json").write_text(json.dumps({**INFO, "arm": "sound", "stream": "sound"}))

    def read(path: Path) -> None:
        found = collect([folder], trial=_text_views)
        assert "sound" in found.streams
        _text_views(found)
        kept = [run.folder for s in found.streams.values() for arm in s.arms.values() for run in arm.runs]
        kept += [item.folder for s in found.streams.values() for group in s.deployed for item in group.items]
        assert str(path.parent) in [*kept, *(item.folder for item in found.excluded)]

    read(folder / "odd" / name)  # what the views load counts for no file

    @mutations.few(examples)
    @given(changed(FOLDERS[kind][name], name))
    def each(data: bytes) -> None:
        mutations.hold(read, folder / "odd" / name, data, ())

    each()


@pytest.mark.parametrize(("kind", "name"), RECORDS)
def test_a_changed_record_is_compared_or_left_out(kind: str, name: str, tmp_path: Path) -> None:
    hold_folder(kind, name, tmp_path, 8)


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "name"), RECORDS)
def test_many_changed_records(kind: str, name: str, tmp_path: Path) -> None:
    hold_folder(kind, name, tmp_path, 2000)


def archive(folder: Path) -> bytes:
    np.savez_compressed(folder / "x.npz", x=np.arange(40.0).reshape(10, 4), y=np.arange(10) % 3)
    return (folder / "x.npz").read_bytes()


def weights(folder: Path) -> bytes:
    save_file(nn.Linear(4, 3).state_dict(), folder / "w.safetensors")
    return (folder / "w.safetensors").read_bytes()


IDX = b"\0\0\x08\x03" + struct.pack(">3I", 5, 4, 4) + bytes(80)
FILES: dict[str, tuple[str, Callable[[Path], st.SearchStrategy[bytes]], Callable[[Path], Any], type[Exception]]] = {
    "record": ("run.json", lambda _: changed(json.dumps(INFO), "x.json"), read_json, RunError),
    "sweep": ("s.yaml", lambda _: changed(yaml.safe_dump(SWEEP), "s.yaml"), read_sweep, SweepError),
    "arrays": ("x.npz", lambda f: mutations.bytes_of(archive(f)), lambda p: load_arrays(p, calibration=4), DataError),
    "idx": ("x", lambda _: mutations.bytes_of(IDX), read_idx, DataError),
    "idx_gz": ("x.gz", lambda _: mutations.bytes_of(gzip.compress(IDX, mtime=0)), read_idx, DataError),
    "weights": (
        "w.safetensors",
        lambda f: mutations.bytes_of(weights(f)),
        lambda p: load_weights(nn.Linear(4, 3), p),
        ConfigError,
    ),
}


def hold_all(kind: str, folder: Path, examples: int) -> int:
    name, strategy, read, error = FILES[kind]
    refused = []

    @mutations.few(examples)
    @given(strategy(folder))
    def each(data: bytes) -> None:
        refused.append(mutations.hold(read, folder / name, data, (error,)))

    each()
    return sum(refused)


@pytest.mark.parametrize("kind", FILES)
def test_a_changed_file_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    assert hold_all(kind, tmp_path, 60) > 10


@pytest.mark.soak
@pytest.mark.parametrize("kind", FILES)
def test_many_changed_files(kind: str, tmp_path: Path) -> None:
    assert hold_all(kind, tmp_path, 3000) > 300
