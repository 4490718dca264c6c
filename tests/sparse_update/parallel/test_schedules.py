"""Schedules over several processes: the share of each follows the size of the batch."""

from __future__ import annotations

import pytest

from sparse_update.parallel.mesh import MeshError
from tests.sparse_update.parallel import job
from tests.sparse_update.parallel.test_ddp import GATES, same, text  # noqa: F401


@pytest.mark.parametrize("mesh", ["ddp", "fsdp"])
def test_two_processes_train_as_one_while_the_batch_grows(two, text, tmp_path, mesh):  # noqa: F811
    settings = {"batch_schedule": "2@0.3,4@0.6", "gate": GATES["random"], "steps": 10}
    alone = job.trained(text, tmp_path / "one", **settings)
    assert {len(windows) for windows in alone["windows"]} == {2, 4, 8}
    first, second = two.run(job.trained_small, text, tmp_path / "two", mesh, settings)
    same(first, alone)
    assert second["losses"] == first["losses"]


def test_a_size_that_processes_cannot_share_is_refused(two, text, tmp_path):  # noqa: F811
    found = two.run(refused, text, tmp_path)
    assert all("3 windows" in said and "multiple of 2" in said for said in found)


def refused(text, folder):  # noqa: F811
    with pytest.raises(MeshError) as caught:
        job.trainer(text, folder, "ddp", batch_schedule="3@0.5")
    return str(caught.value)
