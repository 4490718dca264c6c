"""Each process saves the part that it holds and reads the part that it needs; torch reads and writes the same form."""

from __future__ import annotations

import threading
import warnings
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from sparse_update.loop.checkpoint import CheckpointDamaged, CheckpointError, load_checkpoint, newest
from sparse_update.loop.saving.shards import Stored, write_shard
from sparse_update.parallel.split import box
from tests.sparse_update.parallel import job
from tests.sparse_update.parallel.test_ddp import GATES, SUBSETS, text  # noqa: F401

BLOCKS = {**SUBSETS["blocks"], "policy": "random"}


def shards(folder):
    return sorted(path.name for path in (folder / "checkpoint" / "model").iterdir())


@pytest.mark.parametrize("subset", [{}, BLOCKS], ids=["all", "blocks"])
def test_parts_of_two_open_for_one_and_for_four(two, four, text, tmp_path, subset):  # noqa: F811
    settings = {"gate": GATES["band"], "subset": subset, "steps": 12}
    whole = job.trained(text, tmp_path / "whole", **settings)
    folder = tmp_path / "legs"
    legs = [two.run(job.leg, text, folder, "fsdp", settings, 3, False)[0]]
    assert shards(folder) == [f"shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2)]
    legs.append(job.leg(text, folder, "single", settings, 6, True))
    assert not (folder / "checkpoint" / "model").exists()
    legs.append(four.run(job.leg, text, folder, "fsdp", settings, 9, True)[0])
    assert len(shards(folder)) == 4
    legs.append(two.run(job.leg, text, folder, "fsdp", settings, 99, True)[0])
    assert [leg["step"] for leg in legs] == [3, 6, 9, 12]
    assert [w for leg in legs for w in leg["windows"]] == whole["windows"]
    assert [loss for leg in legs for loss in leg["losses"]] == pytest.approx(whole["losses"], rel=1e-9)
    assert legs[-1]["val"] == pytest.approx(whole["val"], rel=1e-9)


def test_as_many_processes_go_on_to_the_bit(two, text, tmp_path):  # noqa: F811
    settings = {"steps": 6, "double": False, "subset": BLOCKS}
    whole = two.run(job.trained_small, text, tmp_path / "whole", "fsdp", settings)[0]
    legs = [two.run(job.leg, text, tmp_path / "legs", "fsdp", settings, stop, stop > 3)[0] for stop in (3, 99)]
    assert [loss for leg in legs for loss in leg["losses"]] == whole["losses"]
    assert all((legs[-1]["weights"][name] == weight).all() for name, weight in whole["weights"].items())


def saved(text, folder, mesh):  # noqa: F811
    """Of a run of three steps whose checkpoint is written: its whole weights and optimizer state, put together."""
    made, _ = job.trainer(text, folder, mesh, steps=3, model={"width": 24, "heads": 4, "context": 16})
    made.run()
    optimizer = {k: {n: dict(s) for n, s in part.items()} for k, part in made.updates.optimizer.state_dict().items()}
    return dict(made.mesh.weights(made.updates.model)), optimizer


def as_torch_places(text, folder, mesh):  # noqa: F811
    """Our place of each parameter's part beside torch's own, as DCP asks a DTensor for it."""
    made, _ = job.trainer(text, folder, mesh, steps=3, model={"width": 24, "heads": 4})
    found = []
    for name, p in made.updates.model.named_parameters():
        if isinstance(p, DTensor):
            ours = box(p.shape, p)
            for chunk in p.__create_chunk_list__():
                found.append((name, [(s.start, s.stop - s.start) for s in ours], [*zip(chunk.offsets, chunk.sizes)]))  # noqa: B905
    return found


@pytest.mark.parametrize("mesh", ["fsdp", "tp", "fsdp_tp"])
def test_what_parts_save_is_the_whole_and_lies_where_torch_says(two, four, text, tmp_path, mesh):  # noqa: F811
    pool = four if mesh == "fsdp_tp" else two
    weights, optimizer = pool.run(saved, text, tmp_path / "run", mesh)[0]
    found = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert found.model.keys() == weights.keys()
    assert all(torch.equal(found.model[name], weight) for name, weight in weights.items())
    for part, kept in optimizer.items():
        for number, moments in kept.items():
            for name, moment in moments.items():
                assert torch.equal(found.state["optimizer"][part][number][name], moment)
    for rank in pool.run(as_torch_places, text, tmp_path / "places", mesh):
        assert rank
        assert all(ours == theirs for _, ours, theirs in rank if all(size for _, size in theirs)), rank


def read_by_torch(text, folder):  # noqa: F811
    """What torch's own reader makes of our shards, beside what we make of them; and the share of bytes that we read."""
    made, _ = job.trainer(text, folder, "fsdp", steps=3)
    asked = {name: torch.zeros_like(p) for name, p in made.updates.model.state_dict().items()}
    dcp.load(asked, storage_reader=dcp.HuggingFaceStorageReader(str(folder / "checkpoint" / "model")))
    read, plain = [], Stored.read

    def counted(self, box=None):
        found = plain(self, box)
        read.append(found.nbytes if self.dim() else 0)
        return found

    with patch.object(Stored, "read", counted):
        made.resume(folder / "checkpoint")
    whole = sum(p.numel() * p.element_size() for p in asked.values())
    ours = made.updates.model.state_dict()
    return all(torch.equal(ours[name].to_local(), t.to_local()) for name, t in asked.items()), sum(read) / whole


def test_torch_reads_the_same_and_nobody_reads_what_others_need(two, text, tmp_path):  # noqa: F811
    two.run(job.trained_small, text, tmp_path, "fsdp", {"steps": 3})
    for equal, share in two.run(read_by_torch, text, tmp_path):
        assert equal
        assert share < 3 * 0.55  # weights and two moments, of each a half, and the gate's few numbers


def goes_on(text, folder):  # noqa: F811
    made, _ = job.trainer(text, folder, "fsdp", steps=6)
    try:
        made.resume(folder / "checkpoint")
    except CheckpointError as error:
        return type(error).__name__, str(error)
    return "", ""


def test_a_flipped_bit_in_a_shard_is_named_and_the_checkpoint_before_used(two, text, tmp_path):  # noqa: F811
    for stop in (2, 4):
        two.run(job.leg, text, tmp_path, "fsdp", {"steps": 6}, stop, stop > 2)
    shard = tmp_path / "checkpoint" / "model" / shards(tmp_path)[1]
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 4
    shard.write_bytes(raw)
    for kind, message in two.run(goes_on, text, tmp_path):  # one of them looks at that file, both learn of it
        assert kind == "CheckpointDamaged"
        assert f"model/{shard.name} is damaged" in message
    with pytest.raises(CheckpointDamaged, match=shard.name):
        load_checkpoint(tmp_path / "checkpoint", lazily=True)
    found = newest(tmp_path / "checkpoint", lazily=True)
    assert found.checkpoint.meta["step"] == 2
    assert isinstance(found.checkpoint.model["embed.weight"], Stored)
    assert shard.name in found.damaged[0]


def no_space(new, part, own, rank):
    raise OSError(28, "No space left on device")


def full_disk(text, folder):  # noqa: F811
    made, _ = job.trainer(text, folder, "fsdp", steps=6)
    made.resume(folder / "checkpoint")

    with patch("sparse_update.loop.saving.parts.write_shard", no_space if made.mesh.rank else lambda *a: {}):
        try:
            made.checkpoints.save()
        except CheckpointError as error:
            return str(error)
    return ""


def test_a_full_disk_of_one_process_is_told_to_all_and_the_checkpoint_stays(two, text, tmp_path):  # noqa: F811
    two.run(job.leg, text, tmp_path, "fsdp", {"steps": 6}, 2, False)
    for message in two.run(full_disk, text, tmp_path):
        assert message.startswith("process 1:")
        assert "No space left" in message
    assert load_checkpoint(tmp_path / "checkpoint").meta["step"] == 2


def written_beside(text, folder, fails):  # noqa: F811
    """A run that saves at steps 1 and 6, whose first shards are not written before step 5 (where it `fails`, one process
    cannot write them): its losses, the weights at each moment that was taken, the account, and the warnings."""
    made, reports = job.trainer(text, folder, "fsdp", steps=8, keep_checkpoints=9)
    keeper, tally, go_on, held = made.checkpoints.keeper, made.updates.tally, threading.Event(), {}
    taken, after_step = made.checkpoints._parts, made.checkpoints.after_step

    def noted(copied):
        weights = made.mesh.weights(made.updates.model)
        held[tally.step] = {name: w.clone() for name, w in weights.items()}
        return taken(copied)

    def late(*arguments):
        assert go_on.wait(30)
        if fails and made.mesh.rank and tally.step < 8:
            no_space(*arguments)
        return write_shard(*arguments)

    def after():
        if tally.step == 5:
            assert keeper._thread.is_alive()
            go_on.set()
            keeper._thread.join()
        after_step()

    keeper.due = lambda: tally.step in (1, 6)
    made.checkpoints._parts, made.checkpoints.after_step = noted, after
    with patch("sparse_update.loop.saving.parts.write_shard", late), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        losses = job.run(made, reports)["losses"]
    return losses, held, keeper.account(), [str(w.message) for w in told if "not saved" in str(w.message)]


def test_parts_are_written_while_training_goes_on(two, text, tmp_path):  # noqa: F811
    """What is on disk is the moment that was taken, four steps before it was written, and the steps are what they were."""
    plain = two.run(job.trained_small, text, tmp_path / "plain", "fsdp", {"steps": 8})[0]
    (losses, held, account, told), second = two.run(written_beside, text, tmp_path / "run", False)
    assert losses == second[0] == plain["losses"]
    kept = {load_checkpoint(place).meta["step"]: place for place in (tmp_path / "run" / "checkpoints").iterdir()}
    assert sorted(kept) == [1, 6]
    for step, place in kept.items():
        found = load_checkpoint(place).model
        assert all(torch.equal(found[name], weight) for name, weight in held[step].items())
    assert load_checkpoint(tmp_path / "run" / "checkpoint").meta["step"] == 8
    assert (account["written"], account["failed"], told) == (3, 0, [])


def test_what_one_process_cannot_write_beside_training_all_warn_of(two, text, tmp_path):  # noqa: F811
    for _, _, account, told in two.run(written_beside, text, tmp_path, True):
        assert (account["written"], account["failed"]) == (1, 2)
        assert len(told) == 2
        assert "process 1:" in told[0]
        assert "No space left" in told[0]
    assert load_checkpoint(tmp_path / "checkpoint").meta["step"] == 8
