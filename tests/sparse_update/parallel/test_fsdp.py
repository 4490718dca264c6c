"""Weights, gradients and optimizer state in parts train like whole ones."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_update.weights.settings import OptimConfig
from tests.sparse_update.parallel import job
from tests.sparse_update.parallel.test_ddp import GATES, SUBSETS, same, text  # noqa: F401

PARTS = ("dense", "band", "own loss", "rows", "bypass")
ROTATING = {name: {**subset, "policy": "rotate"} for name, subset in SUBSETS.items()}


@pytest.mark.parametrize("name", PARTS)
def test_parts_train_as_one_process_under_each_gate(two, text, tmp_path, name):  # noqa: F811
    alone = job.trained(text, tmp_path / "one", gate=GATES[name])
    first, second = two.run(job.trained_small, text, tmp_path / "two", "fsdp", {"gate": GATES[name]})
    same(first, alone)
    assert first["losses"] == second["losses"]


@pytest.mark.parametrize("name", ROTATING)
def test_sparse_state_lives_with_the_part(two, text, tmp_path, name):  # noqa: F811
    alone = job.trained(text, tmp_path / "one", subset=ROTATING[name])
    found = two.run(job.trained_small, text, tmp_path / "two", "fsdp", {"subset": ROTATING[name]})
    same(found[0], alone)
    for rank in found:
        for kind in ("weights", "state"):
            assert rank["bytes"][kind] <= 0.55 * alone["bytes"][kind]


def test_muon_puts_one_matrix_after_the_other_together(two, text, tmp_path):  # noqa: F811
    """Its rounding to bfloat16 turns last bits into steps of 2^-9 of a direction's entry."""
    for subset in ({}, ROTATING["blocks"]):
        settings = {"optim": OptimConfig(name="muon"), "subset": subset, "steps": 12}
        alone = job.trained(text, tmp_path / "one", **settings)
        first, _ = two.run(job.trained_small, text, tmp_path / "two", "fsdp", settings)
        np.testing.assert_allclose(first["losses"], alone["losses"], atol=2e-3, rtol=0)
