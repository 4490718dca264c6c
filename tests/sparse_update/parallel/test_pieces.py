"""A batch in pieces, one after the other; and what several processes cannot do."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_update.parallel.mesh import MeshError
from sparse_update.weights.masking import MaskConfig
from sparse_update.weights.settings import OptimConfig
from tests.sparse_update.parallel import job
from tests.sparse_update.parallel.test_ddp import GATES, SUBSETS, same, text  # noqa: F401


@pytest.mark.parametrize("subset", [{}, SUBSETS["blocks"]], ids=["all", "blocks"])
def test_pieces_one_after_the_other_take_the_same_step(text, tmp_path, subset):  # noqa: F811
    settings = {"gate": GATES["band"], "subset": subset}
    at_once = job.trained(text, tmp_path / "one", **settings)
    same(job.trained(text, tmp_path / "pieces", accumulate=4, **settings), at_once)


@pytest.mark.parametrize("subset", [{}, SUBSETS["blocks"]], ids=["all", "blocks"])
def test_two_processes_are_two_pieces_to_the_bit(two, text, tmp_path, subset):  # noqa: F811
    """Both add the same two sums, each halved, and a sum of two numbers does not depend on their order."""
    for optim in (OptimConfig(), OptimConfig(name="muon")):
        settings = {"gate": GATES["band"], "subset": subset, "double": False, "optim": optim}
        pieces = job.trained(text, tmp_path / "one", accumulate=2, **settings)
        first, _ = two.run(job.trained_small, text, tmp_path / "two", "ddp", settings)
        assert first["losses"] == pieces["losses"]
        assert all((first["weights"][name] == weight).all() for name, weight in pieces["weights"].items())


@pytest.mark.parametrize("mesh", ["ddp", "fsdp"])
def test_processes_and_pieces_together(two, text, tmp_path, mesh):  # noqa: F811
    alone = job.trained(text, tmp_path / "one")
    first, _ = two.run(job.trained_small, text, tmp_path / "two", mesh, {"accumulate": 2})
    same(first, alone)
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-9)


REFUSED = [
    ("ddp", {"windows": 7}, "multiple of 2"),
    ("ddp", {"measure_bias": True}, "mesh=single"),
    ("ddp", {"subset": {**SUBSETS["blocks"], "inactive": "sign8"}}, "Use sign or frozen"),
    ("ddp", {"accumulate": 3}, "multiple of 6"),
    ("ddp", {"accumulate": 2, "gate": GATES["rows"]}, "accumulate = 1"),
    ("fsdp", {"gate": {"unit": "sequence", "signal": "lagging"}}, "Use mesh=ddp"),
    ("fsdp", {"optim": OptimConfig(name="galore")}, "Use mesh=ddp"),
    ("tp", {"optim": OptimConfig(mask=MaskConfig(kind="random", block_rows=4))}, "block_rows=0"),
    ("tp", {"gate": GATES["rows"]}, "unit = sequence"),
    ("tp", {"subset": SUBSETS["blocks"]}, "mesh=fsdp"),
    ("tp", {"model": {"vocab_size": 257}}, "vocab_size=258"),
    ("tp", {"model": {"tie_embeddings": True}}, "mesh=fsdp or ddp"),
    ("tp", {"variant": "engine"}, "component_times=shipped"),
]


def refusals(text, folder):  # noqa: F811
    found = []
    for mesh, settings, _ in REFUSED:
        try:
            job.trainer(text, folder, mesh, **settings)
        except MeshError as error:
            found.append(str(error))
        else:
            found.append("")
    return found


def test_what_a_mesh_cannot_do_is_refused_with_what_to_use(two, text, tmp_path):  # noqa: F811
    for found in two.run(refusals, text, tmp_path):
        for (mesh, settings, remedy), message in zip(REFUSED, found, strict=True):
            assert remedy in message, (mesh, settings, message)
