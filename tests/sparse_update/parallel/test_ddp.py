"""Processes that share the windows of a batch train like one process on all of them, whatever the gate."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_update.weights.settings import OptimConfig
from tests.sparse_update.parallel import job

GATES = {
    "dense": {},
    "random": {"unit": "sequence", "signal": "random", "keep_fraction": 0.5, "pool_windows": 32},
    "band": {"unit": "sequence", "signal": "ngram", "keep_fraction": 0.5, "noise_cut": 0.1, "pool_windows": 32},
    "own loss": {"unit": "sequence", "signal": "token_loss", "keep_fraction": 0.25, "pool_windows": 30},
    "importance": {"unit": "sequence", "signal": "gradient_norm", "policy": "importance", "keep_fraction": 0.5,
                   "pool_windows": 32, "policy_options": {"switch_on": 0.5}},
    "repeats": {"unit": "repeats", "signal": "ngram", "keep_fraction": 0.5, "repeats": 2, "pool_windows": 32},
    "rows": {"unit": "token", "signal": "token_loss", "keep_fraction": 0.5},
    "random rows": {"unit": "token_exact", "signal": "random", "keep_fraction": 0.5},
    "bypass": {"unit": "bypass", "signal": "ngram", "keep_fraction": 0.5, "bypass_stop": 0},
    "dropbp": {"unit": "subblock", "skip_rate": 0.25, "sensitivity_at": 0.3},
    "after": {"unit": "sequence_after", "signal": "token_loss", "keep_fraction": 0.5},
    "few after": {"unit": "sequence_after", "signal": "token_loss", "policy": "top", "keep_fraction": 0.125},
    "auto": {"unit": "auto", "pool_windows": 32},
}  # fmt: skip
"""A gate of each unit whose choice is the same for any number of processes."""
OWN_DRAWS = {
    "sampled rows": {"unit": "dw_rows", "dw_fraction": 0.5},
    "vcas": {"unit": "gradient", "vcas_every": 3},
}
"""Gates that draw inside the backward: each process for its own windows."""
SUBSETS = {
    "blocks": {"kind": "blocks", "active_fraction": 0.5, "block_rows": 4, "change_every_steps": 3},
    "fisher": {
        "kind": "block_columns",
        "active_fraction": 0.5,
        "block_rows": 4,
        "change_every_steps": 2,
        "policy": "fisher",
    },
    "signs": {"kind": "layers", "active_layers": 1, "change_every_steps": 2, "inactive": "sign"},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return job.write_text(tmp_path_factory.mktemp("text"))


def same(found, expected, *, rtol=1e-9, atol=1e-11):
    """Equal windows and counts; losses and weights equal but for the order of sums in double precision."""
    for name in ("windows", "step", "tokens", "flops", "offered", "keep", "gate_reference_s", "skipped"):
        assert found[name] == expected[name], name
    assert found["notes"] == pytest.approx(expected["notes"], rel=rtol)
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=rtol)
    assert found["val"] == pytest.approx(expected["val"], rel=rtol)
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][name], weight, rtol=1e3 * rtol, atol=1e3 * atol, err_msg=name)


@pytest.mark.parametrize("name", GATES)
def test_two_processes_train_as_one_under_each_gate(two, text, tmp_path, name):
    steps = 24 if name == "auto" else 8
    alone = job.trained(text, tmp_path / "one", gate=GATES[name], steps=steps)
    first, second = two.run(job.trained_small, text, tmp_path / "two", "ddp", {"gate": GATES[name], "steps": steps})
    assert alone["step"] == (4 if name == "dropbp" else steps)  # its test of sub-blocks costs steps
    same(first, alone)
    if name == "auto":
        assert alone["notes"]["auto/observed"] >= 4
    assert second["losses"] == first["losses"]
    assert all((first["weights"][n] == second["weights"][n]).all() for n in alone["weights"])
    assert (first["reports"], second["reports"]) == (alone["step"], 0)  # the first rank tells


@pytest.mark.parametrize("name", SUBSETS)
def test_blocks_of_weights_are_chosen_once_for_all(two, text, tmp_path, name):
    alone = job.trained(text, tmp_path / "one", subset=SUBSETS[name])
    first, _ = two.run(job.trained_small, text, tmp_path / "two", "ddp", {"subset": SUBSETS[name]})
    same(first, alone)


@pytest.mark.parametrize("name", OWN_DRAWS)
def test_draws_inside_a_backward_are_each_processs_own(two, text, tmp_path, name):
    alone = job.trained(text, tmp_path / "one", gate=OWN_DRAWS[name])
    first, second = two.run(job.trained_small, text, tmp_path / "two", "ddp", {"gate": OWN_DRAWS[name]})
    assert first["windows"] == alone["windows"]
    assert first["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-12)
    assert first["losses"] == second["losses"]
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=0.05)  # an unbiased estimate of the same gradient


def test_four_processes_train_as_one(four, text, tmp_path):
    gate = GATES["band"]
    alone = job.trained(text, tmp_path / "one", gate=gate, subset=SUBSETS["blocks"])
    found = four.run(job.trained_small, text, tmp_path / "four", "ddp", {"gate": gate, "subset": SUBSETS["blocks"]})
    same(found[0], alone)


def test_muon_and_single_precision_agree_within_their_rounding(two, text, tmp_path):
    """float32 has 2^-24 of relative error a rounding; Muon rounds its directions to bfloat16, 2^-9, and so a last bit that
    falls the other way in a sum comes back as a change of that size in one entry of a direction."""
    settings = {"double": False, "gate": GATES["band"], "steps": 16}
    for optim, most in ((OptimConfig(), 2e-5), (OptimConfig(name="muon"), 2e-3)):
        alone = job.trained(text, tmp_path / optim.name, optim=optim, **settings)
        first, _ = two.run(job.trained_small, text, tmp_path / f"{optim.name}2", "ddp", {**settings, "optim": optim})
        assert first["windows"] == alone["windows"]
        np.testing.assert_allclose(first["losses"], alone["losses"], atol=most, rtol=0)
