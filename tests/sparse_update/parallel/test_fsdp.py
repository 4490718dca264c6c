"""Weights, gradients and optimizer state in parts train like whole ones."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.masking import MaskConfig
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import SubsetConfig, choose
from tests.sparse_update.parallel import job
from tests.sparse_update.parallel.test_ddp import GATES, SUBSETS, same, text  # noqa: F401

PARTS = ("dense", "band", "own loss", "rows", "bypass", "after", "importance", "dropbp")
ROTATING = {name: {**subset, "policy": "rotate"} for name, subset in SUBSETS.items()}
SCORED = {
    "fisher": SUBSETS["fisher"],
    "energy of strips": {
        **SUBSETS["blocks"],
        "policy": "energy",
        "embedding_strips": True,
        "look_every_turns": 2,
        "look_steps": 1,
    },
    "surprise of layers": {**SUBSETS["signs"], "policy": "surprise"},
}
MASKS = {
    "coins": {"kind": "random", "keep": 0.5, "block_rows": 4},
    "agreement": {"kind": "agreement", "keep": 0.5},
    "agreement of rows": {"kind": "agreement", "keep": 0.5, "block_rows": 4},
    "surprise": {"kind": "surprise", "keep": 0.5, "block_rows": 4},
}


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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_process_holds_half_of_the_weights_and_of_what_is_active(two, text, tmp_path, name):  # noqa: F811
    """Counted from the shapes: one gradient, and one moment with Muon or two with AdamW, for each active weight."""
    subset = {**ROTATING["blocks"], "embedding_strips": True, "active_fraction": 0.25}
    model = Transformer(ModelConfig(**job.MODEL))
    active = choose(model, SubsetConfig(**subset), 0, 0)
    weights = gradients = state = 0
    for key, p in model.named_parameters():
        moved = sum((part.stop - part.start) * p.numel() // p.shape[part.dim] for part in active.parts[key])
        weights += p.numel()
        gradients += moved
        state += moved if name == "muon" and p.dim() == 2 and key.startswith("blocks.") else 2 * moved
    settings = {"subset": subset, "optim": OptimConfig(name=name), "steps": 4}
    for rank in two.run(job.trained_small, text, tmp_path / "two", "fsdp", settings):
        steps = rank["bytes"].pop("state") - 8 * state // 2
        assert rank["bytes"] == {"weights": 8 * weights // 2, "gradients": 8 * gradients // 2}
        assert steps in range(0, 4 * len(active.parts) + 1, 4)  # AdamW counts its steps for each tensor


@pytest.mark.parametrize("name", SCORED)
def test_weights_are_chosen_by_the_whole_of_their_gradients(two, text, tmp_path, name):  # noqa: F811
    alone = job.trained(text, tmp_path / "one", subset=SCORED[name], steps=12)
    first, second = two.run(job.trained_small, text, tmp_path / "two", "fsdp", {"subset": SCORED[name], "steps": 12})
    same(first, alone)
    assert first["losses"] == second["losses"]


@pytest.mark.parametrize("name", MASKS)
def test_masks_see_whole_blocks(two, text, tmp_path, name):  # noqa: F811
    optim = OptimConfig(mask=MaskConfig(**MASKS[name]))
    alone = job.trained(text, tmp_path / "one", optim=optim)
    first, second = two.run(job.trained_small, text, tmp_path / "two", "fsdp", {"optim": optim})
    same(first, alone)
    assert first["losses"] == second["losses"]


def test_four_processes_choose_as_one(four, text, tmp_path):  # noqa: F811
    settings = {
        "subset": SCORED["fisher"],
        "optim": OptimConfig(mask=MaskConfig(**MASKS["agreement"])),
        "gate": GATES["after"],
    }
    alone = job.trained(text, tmp_path / "one", **settings)
    same(four.run(job.trained_small, text, tmp_path / "four", "fsdp", settings)[0], alone)


def test_vcas_tests_with_whole_gradients(two, text, tmp_path):  # noqa: F811
    """Its steps draw inside the backward, each process for itself; what its first test finds is what one process finds."""
    settings = {"gate": {"unit": "gradient", "vcas_every": 3, "dw_fraction": 1.0}, "steps": 4}
    alone = job.trained(text, tmp_path / "one", **settings)
    first, second = two.run(job.trained_small, text, tmp_path / "two", "fsdp", settings)
    assert first["losses"] == second["losses"]
    assert first["losses"][:3] == pytest.approx(alone["losses"][:3], rel=1e-9)
    assert first["notes"] == pytest.approx(alone["notes"], rel=1e-9)
    assert alone["notes"]["vcas/s"] < 1


@pytest.mark.parametrize("mesh", ["fsdp", "single"])
def test_moments_that_wait_are_saved_in_parts(two, text, tmp_path, mesh):  # noqa: F811
    """A strip that comes back after a stop, on as many processes or on one, finds its moments."""
    settings = {"subset": ROTATING["blocks"], "optim": OptimConfig(frozen_moments="keep"), "steps": 12}
    whole = job.trained(text, tmp_path / "whole", **settings)
    folder = tmp_path / "legs"
    legs = [two.run(job.leg, text, folder, "fsdp", settings, 4, False)[0]]
    if mesh == "single":
        legs.append(job.leg(text, folder, "single", settings, 99, True))
    else:
        legs.append(two.run(job.leg, text, folder, "fsdp", settings, 99, True)[0])
    assert [loss for leg in legs for loss in leg["losses"]] == pytest.approx(whole["losses"], rel=1e-9)


def test_low_rank_factors_in_parts(two, text, tmp_path):  # noqa: F811
    pytest.importorskip("peft")
    settings = {"subset": {"kind": "lora", "rank": 2}, "steps": 8}
    whole = job.trained(text, tmp_path / "whole", **settings)
    folder = tmp_path / "legs"
    legs = [
        two.run(job.leg, text, folder, "fsdp", settings, 3, False)[0],
        two.run(job.leg, text, folder, "fsdp", settings, 5, True)[0],
        job.leg(text, folder, "single", settings, 99, True),
    ]
    assert [loss for leg in legs for loss in leg["losses"]] == pytest.approx(whole["losses"], rel=1e-9)
    assert whole["losses"][-1] != whole["losses"][0]


def test_muon_puts_one_matrix_after_the_other_together(two, text, tmp_path):  # noqa: F811
    """Its rounding to bfloat16 turns last bits into steps of 2^-9 of a direction's entry."""
    for subset in ({}, ROTATING["blocks"]):
        settings = {"optim": OptimConfig(name="muon"), "subset": subset, "steps": 12}
        alone = job.trained(text, tmp_path / "one", **settings)
        first, _ = two.run(job.trained_small, text, tmp_path / "two", "fsdp", settings)
        np.testing.assert_allclose(first["losses"], alone["losses"], atol=2e-3, rtol=0)
