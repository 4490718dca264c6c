"""Weight gradients at strips: torch's products against slices of the whole one, Triton's (in its interpreter) too."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest
import torch

from sparse_update.step import gradients, kernels
from sparse_update.step.backward import Stepper
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.subset import SubsetConfig, choose

PARTS = {
    "one strip of rows": ((0, 16, 48),),
    "rows that end inside of a tile": ((0, 3, 20), (0, 41, 130)),
    "one row": ((0, 7, 8),),
    "columns": ((1, 0, 10), (1, 90, 100)),
    "columns wider than a tile": ((1, 5, 99),),
    "nearly all": ((0, 0, 149),),
}


def factors(dtype=torch.float32, rows=77, outputs=150, inputs=100):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, size, generator=generator).to(dtype) for size in (outputs, inputs))


def sliced(g_NO, x_NI, parts):
    """The whole product in float64, cut afterwards."""
    whole = g_NO.double().t() @ x_NI.double()
    return [whole.narrow(dim, start, stop - start) for dim, start, stop in parts]


@pytest.fixture(scope="module")
def by_triton():
    """Triton's kernel in its interpreter. Where Triton is missing: pip install triton (Linux; torch for CUDA brings it)."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module("sparse_update.step.triton_strips").by_triton
    sys.modules.pop("sparse_update.step.triton_strips", None)


def close(found, wanted, tolerance):
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * 20)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_strips_by_torch_are_slices_of_the_whole_product(parts):
    g, x = factors()
    close(kernels.strip_products(g, x, parts), sliced(g, x, parts), 1e-5)


def test_strips_that_cover_the_matrix_come_from_one_product():
    g, x = factors()
    found = kernels.strip_products(g, x, ((0, 0, 60), (0, 60, 150)))
    close(found, sliced(g, x, ((0, 0, 60), (0, 60, 150))), 1e-5)
    assert found[0].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3)])
def test_triton_forms_what_torch_forms(by_triton, parts, dtype, tolerance):
    """Not in bfloat16: the interpreter of Triton 3.9.0 multiplies its bit patterns, for numpy has no such type."""
    g, x = factors(dtype)
    found = by_triton(g, x, parts)
    assert {t.dtype for t in found} == {dtype}
    close(found, sliced(g, x, parts), tolerance)
    assert all(torch.equal(a, b) for a, b in zip(found, by_triton(g, x, parts), strict=True))


def test_triton_takes_factors_as_they_lie_in_memory(by_triton):
    """One of three matrices side by side in g; x transposed in memory."""
    wide, x = factors(outputs=450)
    g = wide.split(150, dim=1)[1]
    x = x.t().contiguous().t()
    assert not g.is_contiguous()
    assert not x.is_contiguous()
    close(by_triton(g, x, PARTS["columns"]), sliced(g, x, PARTS["columns"]), 1e-5)


@pytest.mark.parametrize("kind", ["blocks", "block_columns"])
def test_a_step_has_the_same_gradients_by_triton(by_triton, kind, monkeypatch):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(width=32, layers=2, heads=2, context=16, vocab_size=20))
    active = choose(model, SubsetConfig(kind=kind, active_fraction=0.25, block_rows=4, strips=2), 1, 0)
    tokens = torch.randint(0, 20, (3, 17))
    stepper = Stepper(model)
    ours = stepper.step(tokens[:, :-1], tokens[:, 1:], active=active).gradients
    asked = []

    def chosen(device, dtype):
        asked.append(device)
        return by_triton

    monkeypatch.setattr(kernels, "strips_on", chosen)
    theirs = stepper.step(tokens[:, :-1], tokens[:, 1:], active=active).gradients
    assert len(asked) >= 2 * 6  # every matrix of both blocks
    assert ours.keys() == theirs.keys()
    for name, wanted in ours.items():
        for a, b in zip(wanted, theirs[name], strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_who_forms_them(monkeypatch):
    monkeypatch.setattr(kernels, "_by_triton", lambda: "triton")
    cuda = torch.device("cuda")
    assert kernels.strips_on(torch.device("cpu"), torch.float32) is kernels.by_torch
    assert kernels.strips_on(cuda, torch.bfloat16) == "triton"
    assert kernels.strips_on(cuda, torch.float64) is kernels.by_torch
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    kernels._by_triton.cache_clear()
    assert kernels.strips_on(cuda, torch.float32) is kernels.by_torch
    kernels._by_triton.cache_clear()


def test_triton_is_not_loaded_without_a_gpu():
    code = (
        "import sys, torch; from sparse_update.step import kernels;"
        "kernels.strip_products(torch.ones(3, 4), torch.ones(3, 5), ((0, 0, 2),));"
        "print('sparse_update.step.triton_strips' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert gradients.strip_products is kernels.strip_products
