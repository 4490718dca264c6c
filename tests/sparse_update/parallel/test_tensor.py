"""Matrices in parts over processes that see the same windows; and what is really sent for each product."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_update.parallel.make import make_mesh
from sparse_update.parallel.products import products, table, totals
from sparse_update.parallel.settings import MeshConfig
from sparse_update.transformer import ModelConfig, Transformer, token_loss
from sparse_update.weights.masking import MaskConfig
from sparse_update.weights.settings import OptimConfig
from tests.sparse_update.parallel import job
from tests.sparse_update.parallel.test_ddp import GATES, SUBSETS, same, text  # noqa: F401

SHAPE = ModelConfig(**{**job.MODEL, "layers": 3})


@pytest.mark.parametrize("name", ["dense", "band", "own loss"])
def test_tensor_parallel_trains_as_one_process(two, text, tmp_path, name):  # noqa: F811
    alone = job.trained(text, tmp_path / "one", gate=GATES[name])
    first, second = two.run(job.trained_small, text, tmp_path / "two", "tp", {"gate": GATES[name]})
    same(first, alone)
    assert first["losses"] == second["losses"]
    assert first["bytes"]["state"] <= 0.55 * alone["bytes"]["state"]
    assert first["bytes"]["weights"] <= 0.55 * alone["bytes"]["weights"]


@pytest.mark.parametrize("name", ["layers", "signs", "masks"])
def test_whole_layers_and_masks_of_whole_matrices(two, text, tmp_path, name):  # noqa: F811
    settings = {
        "layers": {"subset": {**SUBSETS["signs"], "inactive": "frozen"}},
        "signs": {"subset": SUBSETS["signs"]},
        "masks": {"optim": OptimConfig(mask=MaskConfig(kind="agreement", keep=0.5))},
    }[name]
    alone = job.trained(text, tmp_path / "one", **settings)
    first, _ = two.run(job.trained_small, text, tmp_path / "two", "tp", settings)
    same(first, alone)
    assert first["bytes"]["state"] <= 0.55 * alone["bytes"]["state"]


def test_a_grid_of_data_and_tensor_trains_as_one_process(four, text, tmp_path):  # noqa: F811
    alone = job.trained(text, tmp_path / "one", gate=GATES["band"])
    found = four.run(job.trained_small, text, tmp_path / "four", "fsdp_tp", {"gate": GATES["band"]})
    same(found[0], alone)
    assert all(rank["bytes"]["state"] <= 0.30 * alone["bytes"]["state"] for rank in found)


def test_muon_under_tensor_parallel(two, text, tmp_path):  # noqa: F811
    settings = {"optim": OptimConfig(name="muon"), "steps": 8}
    alone = job.trained(text, tmp_path / "one", **settings)
    first, _ = two.run(job.trained_small, text, tmp_path / "two", "tp", settings)
    np.testing.assert_allclose(first["losses"], alone["losses"], atol=2e-3, rtol=0)


class Watched(TorchDispatchMode):
    """Counts collectives as they are dispatched: name -> calls, and bytes given to them."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        for operation in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"):
            if "c10d" in name and operation in name.replace("allgather", "all_gather").replace("allreduce", "all_reduce"):
                self.calls[operation] += 1
                self.bytes[operation] += args[0].nbytes
        return function(*args, **(kwargs or {}))


def sent_by_a_step():
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    make_mesh(MeshConfig(kind="tp"), job.CPU).prepare(model)
    tokens = torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(1))
    watched = Watched()
    with watched:
        token_loss(model(tokens[:, :-1]), tokens[:, 1:]).mean().backward()
    return dict(watched.calls), dict(watched.bytes)


def test_the_table_of_products_is_what_is_sent(two):
    expected = totals(products(SHAPE, 4, 16, 1, 2))
    for calls, size in two.run(sent_by_a_step):
        assert {name: (calls[name], size[name]) for name in calls} == expected


def test_products_of_the_table_multiply_what_they_say():
    """Against einsum itself: the axes of each product give the shape of its result, and its FLOPs."""
    size = {"b": 4, "t": 16, "s": 16, "d": 16, "h": 2, "k": 8, "f": 64, "v": 256}
    found = products(SHAPE, 4, 16, 1, 1)
    for product in found:
        left, right, out = product.einsum.replace("->", ",").split(",")
        made = torch.einsum(product.einsum, *(torch.ones([size[a] for a in axes]) for axes in (left, right)))
        assert list(made.shape) == [size[a] for a in out]
        if product.flops:
            many = 3 if product.name == "q, k, v" else 1
            assert product.flops == many * 2 * int(np.prod([size[a] for a in set(left + right)]))
    assert totals(found) == {}
    assert table(found).count("\n") == len(found) + 1
