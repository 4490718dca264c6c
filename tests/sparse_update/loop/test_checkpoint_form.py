"""Every bit of a checkpoint is under a checksum, earlier ones step in, and shards open as one file does, either way."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from sparse_update.loop.checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    Snapshot,
    has_checkpoint,
    load_checkpoint,
    newest,
    save_checkpoint,
    snapshot,
    write_snapshot,
)
from sparse_update.loop.saving.files import open_checkpoint
from sparse_update.loop.saving.places import earlier, history, stage

ROOT = Path(__file__).resolve().parents[3]
OLD = Path(__file__).parent / "checkpoint_0_1"
FILES = ["meta.json", "model.safetensors", "state.safetensors"]


def save(folder: Path, number: int, keep: int = 1) -> None:
    state = {"n": number, "share": 0.25, "moment": torch.full((2,), float(number))}
    save_checkpoint(folder, {"w": torch.full((3,), float(number))}, state, {"step": number, "clock_s": 1.5}, keep=keep)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.soak), 23])
def test_every_flipped_bit_is_refused_with_the_files_name(tmp_path: Path, name: str, every: int) -> None:
    save(tmp_path / "c", 1)
    path = tmp_path / "c" / name
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), every):
        flip(path, bit)
        with pytest.raises(CheckpointDamaged) as caught:
            load_checkpoint(tmp_path / "c")
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 700
        path.write_bytes(whole)
    assert load_checkpoint(tmp_path / "c").meta == {"step": 1, "clock_s": 1.5}


@pytest.mark.parametrize("name", FILES)
def test_every_cut_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path / "c", 1)
    path = tmp_path / "c" / name
    whole = path.read_bytes()
    for length in range(0, len(whole), 5):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointDamaged, match=name.replace(".", r"\.")):
            load_checkpoint(tmp_path / "c")


def test_flips_in_the_head_of_an_old_form_end_in_a_typed_error_or_an_object(tmp_path: Path) -> None:
    """Version 0.1 had no checksum over meta.json: what its bits said is lost, but no error is untyped."""
    shutil.copytree(OLD, tmp_path / "c")
    path = tmp_path / "c" / "meta.json"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 401):
        flip(path, bit)
        with contextlib.suppress(CheckpointError):
            load_checkpoint(tmp_path / "c")
        path.write_bytes(whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    for number in (1, 2, 3, 4):
        save(target, number, keep=3)
    assert [place.name for place in earlier(target)] == ["step-00000003", "step-00000002"]
    flip(target / "state.safetensors", 701)
    flip(history(target) / "step-00000003" / "meta.json", 99)
    found = newest(target)
    assert found.checkpoint.meta["step"] == 2
    assert found.checkpoint.model["w"].tolist() == [2.0] * 3
    first, second = found.damaged
    assert "checkpoint/state.safetensors is damaged" in first
    assert "step-00000003/meta.json is damaged" in second
    assert sorted(place.name for place in history(target).iterdir()) == ["damaged-1", "damaged-2", "step-00000002"]
    save(target, 5, keep=3)
    assert newest(target).checkpoint.meta["step"] == 5
    assert newest(target).damaged == ()
    assert [place.name for place in earlier(target)] == ["step-00000002"]


def test_where_none_is_whole_all_are_named_and_nothing_is_moved(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    for number in (1, 2):
        save(target, number, keep=2)
    flip(target / "meta.json", 30)
    (history(target) / "step-00000001" / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        CheckpointDamaged, match=r"checkpoint/meta\.json is damaged.*model\.safetensors is damaged.*start anew"
    ):
        newest(target)
    assert sorted(place.name for place in tmp_path.rglob("*") if place.is_dir()) == [
        "checkpoint",
        "checkpoints",
        "step-00000001",
    ]
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        newest(tmp_path / "nothing")


def test_only_the_last_are_kept_and_the_best_is_used_where_it_is_newer(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    for number in range(1, 8):
        save(target, number, keep=2)
    assert [place.name for place in earlier(target)] == ["step-00000006"]
    save(target, 7, keep=2)  # the same step once more takes the place of itself
    assert [place.name for place in earlier(target)] == ["step-00000006"]
    save(history(target) / "best", 9)
    (target / "model.safetensors").unlink()
    assert newest(target).checkpoint.meta["step"] == 9
    save(target, 10)
    assert earlier(target) == []
    assert load_checkpoint(history(target) / "best").meta["step"] == 9


def test_a_first_save_that_died_while_it_wrote_its_head_is_no_checkpoint(tmp_path: Path) -> None:
    new = stage(tmp_path / "c")
    (new / ".meta.json").write_bytes(b'{"schema": 2')
    assert not has_checkpoint(tmp_path / "c")
    save(tmp_path / "c", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_snapshot_does_not_change_with_what_it_was_taken_of(tmp_path: Path) -> None:
    weight, table = torch.arange(4.0), torch.arange(10.0)
    moment = snapshot({"w": weight, "tied": weight, "part": table[2:5]}, {"m": table}, {"step": 1})
    assert isinstance(moment, Snapshot)
    assert moment.bytes == 4 * 4 + 3 * 4 + 10 * 4
    weight.zero_()
    table.zero_()
    found = load_checkpoint(write_snapshot(tmp_path / "c", moment))
    assert found.model["w"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert found.model["tied"] is found.model["w"]
    assert found.model["part"].tolist() == [2.0, 3.0, 4.0]
    assert found.state["m"].tolist() == list(range(10))


def test_what_a_head_says_of_files_leads_nowhere_else(tmp_path: Path) -> None:
    save(tmp_path / "c", 1)
    old = json.loads((OLD / "meta.json").read_text())
    for name in ("../model.safetensors", "/etc/passwd", "model/../../x.safetensors"):
        head = {**old, "files": {**old["files"], name: {"bytes": 1, "sha256": ""}}}
        (tmp_path / "c" / "meta.json").write_text(json.dumps(head))
        with pytest.raises(CheckpointDamaged, match="its list of files is not one"):
            open_checkpoint(tmp_path / "c")


SHARDS = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from sparse_update.loop.checkpoint import commit, seal, stage
from sparse_update.nested import pack
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = torch.arange(35.0).reshape(7, 5)
parts = {
    "rows": distribute_tensor(whole, mesh, [Shard(0)]),
    "columns": distribute_tensor(whole.T.contiguous(), mesh, [Shard(1)]),
    "both": distribute_tensor(torch.arange(3.0), mesh, [Replicate()]),
}
tensors, outline = pack({"moment": parts["rows"], "step": 7})
if rank == 0:
    for name in ("model", "state"):
        (stage(folder / "c") if name == "model" else folder / ".c.new").joinpath(name).mkdir()
dist.barrier()
files = {}
for name, part in (("model", parts), ("state", tensors)):
    place = folder / ".c.new" / name
    dcp.save(part, storage_writer=dcp.HuggingFaceStorageWriter(str(place), save_distributed=True))
    files |= {f"{name}/{path.name}": seal(path) for path in place.glob(f"shard-{rank + 1:05d}-*")}
gathered = [None, None]
dist.all_gather_object(gathered, files)
if rank == 0:
    commit(folder / "c", {"step": 7}, outline=outline, tied={"model": {"alias": "both"}}, files=gathered[0] | gathered[1])
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_shards_of_two_processes_open_as_whole_tensors_and_a_single_part_opens_for_torch(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", SHARDS, str(tmp_path), str(rank)], cwd=ROOT, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said.decode()[-2000:]
    folder, whole = tmp_path / "c", torch.arange(35.0).reshape(7, 5)
    assert {path.name for path in (folder / "model").iterdir()} > {"shard-00001-model-00001-of-00001.safetensors"}
    assert not list(tmp_path.rglob(".metadata"))
    found = load_checkpoint(folder)
    assert torch.equal(found.model["rows"], whole)
    assert torch.equal(found.model["columns"], whole.T)
    assert torch.equal(found.model["both"], torch.arange(3.0))
    assert found.model["alias"] is found.model["both"]
    assert torch.equal(found.state["moment"], whole)
    assert (found.state["step"], found.meta) == (7, {"step": 7})

    shard = folder / "model" / "shard-00002-model-00001-of-00001.safetensors"
    kept = shard.read_bytes()
    flip(shard, 8 * len(kept) - 3)
    with pytest.raises(CheckpointDamaged, match="model/shard-00002"):
        load_checkpoint(folder)
    shard.unlink()
    with pytest.raises(CheckpointDamaged, match=r"model/shard-00002-.* is missing"):
        load_checkpoint(folder)

    save_checkpoint(tmp_path / "single", {"rows": whole}, {"n": torch.ones(2)}, {"step": 1})
    asked = {"rows": torch.zeros(7, 5)}
    dcp.load(asked, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "single")), no_dist=True)
    assert torch.equal(asked["rows"], load_file(tmp_path / "single" / "model.safetensors")["rows"])
