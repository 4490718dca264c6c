"""Checkpoints: bit-exact, whole at every instant of a save, and clear about what they refuse."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_update.loop.checkpoint import CheckpointError, CheckpointVersionError, load_checkpoint, save_checkpoint
from sparse_update.loop.saving import files as checkpoint_files
from sparse_update.loop.saving import places as checkpoint_places
from sparse_update.nested import StateError, get_rng_state, pack, set_rng_state, unpack

ROOT = Path(__file__).resolve().parents[3]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().numpy(force=True).tobytes() == b.numpy().tobytes()


def save_number(folder: Path, number: int) -> None:
    save_checkpoint(folder, {"w": torch.full((3,), float(number))}, {"n": number}, {"step": number})


def read_number(folder: Path) -> int:
    saved = load_checkpoint(folder)
    assert saved.model["w"].tolist() == [saved.meta["step"]] * 3
    assert saved.state["n"] == saved.meta["step"]
    return saved.meta["step"]


def test_round_trip_is_exact(tmp_path):
    weird = torch.tensor([0.0, -0.0, math.nan, math.inf, 1e-45, 1 / 3])
    model = {
        "f32": weird,
        "f64": weird.double(),
        "f16": weird.half(),
        "i64": torch.tensor([2**63 - 1, -(2**63)]),
        "bool": torch.tensor([[True], [False]]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "part": torch.arange(10.0)[3:5],
    }
    state = {
        "optimizer": {
            "state": {0: {"exp_avg": torch.randn(3), "step": 7}, 1: {}},
            "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}],
        },
        "floats": [0.1, -0.0, math.inf, -math.inf, 5e-324],
        "big": 2**200,
        "none": None,
        "flag": True,
        "text": "é\n",
        "$odd": {"$tensor": 1},
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        1: torch.tensor(1),
        "1": torch.tensor(2),
    }
    save_checkpoint(tmp_path / "c", model, state, {"step": 3, "config": {"lr": 0.1, "names": ["x"]}})
    saved = load_checkpoint(tmp_path / "c")
    assert saved.model.keys() == model.keys()
    assert all(same_bits(model[k], saved.model[k]) for k in model)
    assert saved.meta == {"step": 3, "config": {"lr": 0.1, "names": ["x"]}}
    assert saved.state["optimizer"]["groups"] == state["optimizer"]["groups"]
    assert torch.equal(saved.state["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])
    for key in ("floats", "big", "none", "flag", "text", "$odd"):
        assert saved.state[key] == state[key]
    assert math.copysign(1, saved.state["floats"][1]) == -1
    assert (saved.state["a.b"].item(), saved.state["a"]["b"].item()) == (1, 0)
    assert (saved.state[1].item(), saved.state["1"].item()) == (1, 2)
    assert list(saved.state) == list(state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["meta.json", "model.safetensors", "state.safetensors"]


def test_bfloat16_is_exact(tmp_path):
    x = torch.randn(100, dtype=torch.bfloat16)
    save_checkpoint(tmp_path / "c", {"x": x}, {}, {})
    assert torch.equal(load_checkpoint(tmp_path / "c").model["x"].view(torch.int16), x.view(torch.int16))


def test_nan_survives_in_plain_values():
    _, outline = pack({"x": math.nan})
    json.dumps(outline, allow_nan=False)
    assert math.isnan(unpack(outline, {})["x"])


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    table = torch.nn.Parameter(torch.randn(50, 8))
    other = table.detach()[:10]
    save_checkpoint(tmp_path / "c", {"embed": table, "head": table, "part": other}, {}, {})
    saved = load_checkpoint(tmp_path / "c").model
    assert saved["embed"] is saved["head"]
    assert torch.equal(saved["embed"], table)
    assert torch.equal(saved["part"], other)
    assert (tmp_path / "c" / "model.safetensors").stat().st_size < 60 * 8 * 4 + 1000


def test_training_goes_on_bit_for_bit(tmp_path):
    def steps(model, opt, gen, n):
        for _ in range(n):
            x = torch.randn(4, 5, generator=gen)
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 5)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), torch.Generator().manual_seed(1)

    model, opt, gen = fresh()
    steps(model, opt, gen, 3)
    save_checkpoint(tmp_path / "c", model.state_dict(), {"opt": opt.state_dict(), "gen": gen.get_state()}, {"step": 3})
    expected = steps(model, opt, gen, 3)
    model, opt, gen = fresh()
    saved = load_checkpoint(tmp_path / "c")
    model.load_state_dict(saved.model)
    opt.load_state_dict(saved.state["opt"])
    gen.set_state(saved.state["gen"])
    assert same_bits(expected, steps(model, opt, gen, 3))


def test_random_generators_go_on(tmp_path):
    def draw():
        return random.random(), random.gauss(), np.random.random(), np.random.standard_normal(), torch.rand(3).tolist()  # noqa: NPY002

    random.gauss()  # leaves a second number waiting in Python's generator
    save_checkpoint(tmp_path / "c", {}, {"rng": get_rng_state()}, {})
    expected = draw()
    random.seed(5)
    torch.manual_seed(5)
    set_rng_state(load_checkpoint(tmp_path / "c").state["rng"])
    assert draw() == expected


class Crash(BaseException):
    """The process dies here: nothing after it runs."""


def crash_points(monkeypatch, die_at: int | None) -> list[str]:
    """Make every call that touches the disk countable; the `die_at`-th raises, before or after its effect."""
    calls: list[str] = []

    def wrap(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            for moment in ("before", "after"):
                if moment == "after":
                    result = real(*args, **kwargs)
                calls.append(f"{moment} {name}")
                if die_at is not None and len(calls) == die_at + 1:
                    raise Crash(calls[-1])
            return result

        monkeypatch.setattr(owner, name, call)

    wrap(checkpoint_files, "save_file")
    wrap(checkpoint_places.os, "rename")
    wrap(checkpoint_files.os, "replace")
    wrap(checkpoint_files.os, "fsync")
    wrap(checkpoint_places.shutil, "rmtree")
    wrap(Path, "write_bytes")
    wrap(Path, "mkdir")
    return calls


def test_a_save_that_dies_anywhere_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        save_number(tmp_path / "c", 1)
        calls = crash_points(patch, None)
        save_number(tmp_path / "c", 2)
    total = len(calls)
    assert total >= 20
    assert {"after rename", "before rmtree", "after write_bytes", "before fsync"} <= set(calls)
    read = []
    for point in range(total):
        folder = tmp_path / f"run{point}" / "c"
        save_number(folder, 1)
        with monkeypatch.context() as patch:
            crash_points(patch, point)
            with pytest.raises(Crash):
                save_number(folder, 2)
        read.append(read_number(folder))
        # A second save over the leftovers, dying at the same place, must not lose what there is either.
        with monkeypatch.context() as patch:
            crash_points(patch, point)
            with pytest.raises(Crash):
                save_number(folder, 3)
        assert read_number(folder) >= read[-1]
        save_number(folder, 4)
        assert read_number(folder) == 4
        assert [p.name for p in folder.parent.iterdir()] == ["c"]
    assert read == sorted(read)
    assert set(read) == {1, 2}


def test_a_first_save_that_dies_is_reported_as_none(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        crash_points(patch, 5)
        with pytest.raises(Crash):
            save_number(tmp_path / "c", 1)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "c")


def test_killed_process(tmp_path):
    """The same with a process that really ends, between the two moves."""
    save_number(tmp_path / "c", 1)
    code = """
import os, sys, torch
from sparse_update.loop import checkpoint
real = os.rename
def rename(a, b):
    real(a, b)
    os._exit(9)
os.rename = rename
checkpoint.save_checkpoint(sys.argv[1], {"w": torch.full((3,), 2.0)}, {"n": 2}, {"step": 2})
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], cwd=ROOT, check=False)
    assert done.returncode == 9
    assert not (tmp_path / "c").exists()
    assert read_number(tmp_path / "c") == 2


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "meta.json"])
@pytest.mark.parametrize("harm", ["truncated", "missing", "altered", "empty"])
def test_damage_is_named(tmp_path, name, harm):
    save_number(tmp_path / "c", 1)
    path = tmp_path / "c" / name
    data = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "altered":
        path.write_bytes(data[:-8] + bytes(b ^ 1 for b in data[-8:]))
    else:
        path.write_bytes(data[: len(data) // 2] if harm == "truncated" else b"")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_checkpoint(tmp_path / "c")


def test_other_schema_is_refused(tmp_path):
    save_number(tmp_path / "c", 1)
    meta = json.loads((tmp_path / "c" / "meta.json").read_text())
    (tmp_path / "c" / "meta.json").write_text(json.dumps({**meta, "schema": 3}))
    with pytest.raises(
        CheckpointVersionError, match=r"schema 3, this version of spikegate reads schemas 1, 2: read it with"
    ):
        load_checkpoint(tmp_path / "c")
    (tmp_path / "c" / "meta.json").write_text("{}")
    with pytest.raises(CheckpointVersionError, match="schema None"):
        load_checkpoint(tmp_path / "c")


def test_pickles_are_refused(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt is a pickle"):
        load_checkpoint(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt is a pickle"):
        load_checkpoint(tmp_path)
    save_number(tmp_path / "c", 1)
    shutil.copy(tmp_path / "model.pt", tmp_path / "c" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a pickle"):
        load_checkpoint(tmp_path / "c")


def test_what_cannot_be_kept_is_refused_before_anything_is_written(tmp_path):
    save_number(tmp_path / "c", 1)
    with pytest.raises(StateError, match=r"state\.opt\.fn is a function"):
        save_checkpoint(tmp_path / "c", {}, {"opt": {"fn": save_number}}, {})
    with pytest.raises(CheckpointError, match="not plain JSON"):
        save_checkpoint(tmp_path / "c", {}, {}, {"config": {1, 2}})
    with pytest.raises(CheckpointError, match=r"\['schema'\] are the checkpoint's own"):
        save_checkpoint(tmp_path / "c", {}, {}, {"schema": 3})
    assert read_number(tmp_path / "c") == 1


def test_a_folder_with_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(CheckpointError, match=r"holds other things \(thesis\.tex\)"):
        save_number(tmp_path, 1)
    with pytest.raises(CheckpointError, match="is a file"):
        save_number(tmp_path / "thesis.tex", 1)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_link_to_a_folder_is_followed(tmp_path):
    save_number(tmp_path / "real", 1)
    (tmp_path / "link").symlink_to("real")
    save_number(tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink()
    assert read_number(tmp_path / "real") == 2
