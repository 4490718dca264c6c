"""A run goes on with another number of processes and another mesh: the same windows, the same losses."""

from __future__ import annotations

import pytest

from tests.sparse_update.parallel import job
from tests.sparse_update.parallel.test_ddp import GATES, SUBSETS, text  # noqa: F401


@pytest.mark.parametrize("subset", [{}, {**SUBSETS["blocks"], "policy": "random"}], ids=["all", "blocks"])
def test_two_then_one_then_four_processes(two, four, text, tmp_path, subset):  # noqa: F811
    settings = {"gate": GATES["band"], "subset": subset, "steps": 12}
    whole = job.trained(text, tmp_path / "whole", **settings)
    folder = tmp_path / "legs"
    legs = [
        two.run(job.leg, text, folder, "fsdp", settings, 4, False)[0],
        job.leg(text, folder, "single", settings, 8, True),
        four.run(job.leg, text, folder, "ddp", settings, 99, True)[0],
    ]
    assert [leg["step"] for leg in legs] == [4, 8, 12]
    assert [w for leg in legs for w in leg["windows"]] == whole["windows"]
    assert [loss for leg in legs for loss in leg["losses"]] == pytest.approx(whole["losses"], rel=1e-9)
    assert legs[-1]["val"] == pytest.approx(whole["val"], rel=1e-9)
    assert legs[-1]["gate_reference_s"] == whole["gate_reference_s"]


def test_one_process_opens_what_parts_saved_and_parts_what_one_saved(two, text, tmp_path):  # noqa: F811
    settings = {"steps": 8}
    whole = job.trained(text, tmp_path / "whole", **settings)
    job.leg(text, tmp_path / "run", "single", settings, 4, False)
    first, _ = two.run(job.leg, text, tmp_path / "run", "fsdp", settings, 99, True)
    assert first["losses"] == pytest.approx(whole["losses"][4:], rel=1e-9)
