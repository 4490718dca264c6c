"""bfloat16, activation checkpointing and torch.compile under a mesh."""

from __future__ import annotations

import warnings
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.sparse_update.parallel import job
from tests.sparse_update.parallel.test_ddp import GATES, text  # noqa: F401

STEPS = 12


@pytest.mark.parametrize("mesh", ["ddp", "fsdp", "tp"])
def test_a_second_forward_changes_no_bit_under_a_mesh(two, text, tmp_path, mesh):  # noqa: F811
    settings = {"gate": GATES["band"], "double": False, "steps": 6}
    plain, _ = two.run(job.trained_small, text, tmp_path / "plain", mesh, settings)
    less, _ = two.run(job.trained_small, text, tmp_path / "less", mesh, {**settings, "recompute": True})
    assert less["losses"] == plain["losses"]
    assert all((less["weights"][name] == weight).all() for name, weight in plain["weights"].items())
    assert less["flops"] > plain["flops"]


@pytest.mark.parametrize("variant", ["autograd", "engine"])
@pytest.mark.parametrize("mesh", ["ddp", "fsdp"])
def test_bfloat16_is_near_float32_and_near_one_process(two, text, tmp_path, mesh, variant):  # noqa: F811
    settings = {"double": False, "steps": STEPS, "variant": variant}
    exact = job.trained(text, tmp_path / "fp32", **settings)
    alone = job.trained(text, tmp_path / "bf16", **settings, precision="bf16")
    first, second = two.run(job.trained_small, text, tmp_path / mesh, mesh, {**settings, "precision": "bf16"})
    assert first["losses"] == second["losses"]
    assert np.abs(np.subtract(first["losses"], exact["losses"])).max() > 1e-4  # it is bfloat16; another order: 1e-6
    assert all(weight.dtype == np.float32 for weight in first["weights"].values())
    np.testing.assert_allclose(first["losses"], exact["losses"], atol=0.02, rtol=0)
    np.testing.assert_allclose(first["losses"], alone["losses"], atol=0.02, rtol=0)
    assert exact["losses"][-1] < exact["losses"][0] - 0.1  # and something was learnt


def compiled(text, folder, mesh, backend, variant, settings):  # noqa: F811
    """A run whose compilations are counted where they go to `aot_eager`: what torch.compile was given, by number."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs = []

    def counted(graph, inputs):
        graphs.append(len(inputs))
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    by = partial(torch.compile, backend=counted) if backend else torch.compile
    with patch("torch.compile", by), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own of parts of torch that it uses
        return job.trained(text, folder, mesh, **settings, variant=variant), len(graphs)


COMPILED = [
    ("ddp", "aot_eager", "autograd_compiled"),
    ("fsdp", "aot_eager", "autograd_compiled"),
    ("tp", "aot_eager", "autograd_compiled"),
    pytest.param("fsdp_tp", "aot_eager", "autograd_compiled", marks=pytest.mark.soak),
    *(
        pytest.param(mesh, "", variant, marks=pytest.mark.soak)
        for mesh, variant in (
            ("ddp", "autograd_compiled"),
            ("ddp", "engine_compiled"),
            ("fsdp", "autograd_compiled"),
            ("fsdp", "engine_compiled"),
            ("tp", "autograd_compiled"),
        )
    ),
]


@pytest.mark.parametrize(("mesh", "backend", "variant"), COMPILED)
def test_compiled_steps_train_alike_under_a_mesh(request, text, tmp_path, mesh, backend, variant):  # noqa: F811
    """Without inductor, which takes most of a minute, in every run of the tests; with it in `make soak`."""
    settings = {"gate": GATES["band"], "double": False, "steps": 6}
    pool = request.getfixturevalue("four" if mesh == "fsdp_tp" else "two")
    plain = pool.run(job.trained_small, text, tmp_path / "plain", mesh, settings)[0]
    found = pool.run(compiled, text, tmp_path / "compiled", mesh, backend, variant, settings, timeout_s=1500)
    (first, graphs), (second, _) = found[:2]
    assert first["losses"] == second["losses"]
    assert first["windows"] == plain["windows"]
    np.testing.assert_allclose(first["losses"], plain["losses"], atol=1e-4, rtol=0)
    if backend:
        assert graphs == 1  # blocks share theirs; ddp's is that of the whole model
