"""Tables of times and prices, states of gates, text and checkpoints from any bytes: a value, or one typed error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from sparse_update.clock.cost import ComponentTimes, ComponentTimesError
from sparse_update.clock.shipped import read_table, shipped_table
from sparse_update.data import sources
from sparse_update.data.corpus import DataConfig, load_corpus
from sparse_update.data.records import CorpusError
from sparse_update.library.callbacks import _save_gate_state, load_gate_state
from sparse_update.library.tracking.rows import GateError
from sparse_update.loop.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from sparse_update.own.prices import Prices
from sparse_update.transformer import ModelConfig
from sparse_update.weights.settings import OptimConfig
from tests import mutations
from tests.shared import once

TABLES = Path(str(files("sparse_update.clock").joinpath("tables")))
FOLDERS = ("meta.json", "state.safetensors", "model.safetensors")


def make(folder: Path) -> None:
    cfg = ModelConfig(vocab_size=256, width=8, layers=1, heads=2, context=16)
    times = shipped_table().times(cfg, OptimConfig(), 4, torch.device("cpu"), "fp32", False)
    times.save(folder / "component_times.json")
    shutil.copy(TABLES / "x86_1_thread.json", folder / "table.json")
    shutil.copy(TABLES / "any_module" / "any_module_x86_1_thread.json", folder / "prices.json")
    state = {"step": 3, "moments": {"a": torch.arange(6.0)}, "seen": [1, (2, 3)], "far": float("inf")}
    _save_gate_state(state, str(folder / "gate.safetensors"))
    (folder / "text.txt").write_bytes("Wer reitet so spät?\n".encode() * 40)
    save_checkpoint(folder / "checkpoint", {"w": torch.arange(4.0)}, state, {"config": {"x": 1}})


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "strange_sparse_update", make)


def corpus(path: Path) -> Any:
    sources.files(str(path))
    return load_corpus(DataConfig(name="files", path=str(path), holdout_fraction=0.2))


Case = tuple[str, st.SearchStrategy[bytes], Callable[[Path], Any], tuple[type[Exception], ...]]


def case(kind: str, whole: Path) -> Case:
    """(name of the file, changed bytes, how it is read, what it may raise)"""

    def document(name: str) -> st.SearchStrategy[bytes]:
        return mutations.json_of(json.loads((whole / name).read_text()))

    def raw(name: str) -> st.SearchStrategy[bytes]:
        return mutations.bytes_of((whole / name).read_bytes())

    times = (ComponentTimesError,)
    if kind in FOLDERS:
        changed = raw(f"checkpoint/{kind}")
        changed = changed | document("checkpoint/meta.json") if kind == "meta.json" else changed
        return kind, changed, lambda p: load_checkpoint(p.parent), (CheckpointError,)
    return {
        "component_times": ("t.json", document("component_times.json"), ComponentTimes.load, times),
        "table": ("t.json", document("table.json"), read_table, times),
        "prices": ("t.json", document("prices.json"), Prices.load, times),
        "gate": ("g.safetensors", raw("gate.safetensors"), lambda p: load_gate_state(str(p)), (GateError,)),
        "text": ("text.txt", raw("text.txt"), corpus, (CorpusError,)),
    }[kind]


KINDS = ("component_times", "table", "prices", "gate", "text", *FOLDERS)


def hold_all(kind: str, whole: Path, folder: Path, examples: int) -> int:
    name, changed, read, errors = case(kind, whole)
    if kind in FOLDERS:
        folder = Path(shutil.copytree(whole / "checkpoint", folder / "checkpoint"))
    return mutations.refusals(changed, read, folder / name, errors, examples)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_file_is_read_or_refused(kind: str, whole: Path, tmp_path: Path) -> None:
    assert hold_all(kind, whole, tmp_path, 15 if kind == "table" else 40) > 3


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_many_changed_files(kind: str, whole: Path, tmp_path: Path) -> None:
    assert hold_all(kind, whole, tmp_path, 300 if kind == "table" else 2000) > 100


def test_a_table_of_another_kind_says_what_is_wrong(whole: Path, tmp_path: Path) -> None:
    raw = json.loads((whole / "component_times.json").read_text())
    for change, why in (({"ms": {"embed": "x"}}, "ms is"), ({"batch": True}, "batch is"), ({"odd": 1}, "odd")):
        (tmp_path / "t.json").write_text(json.dumps({**raw, **change}))
        with pytest.raises(ComponentTimesError, match=why):
            ComponentTimes.load(tmp_path / "t.json")
