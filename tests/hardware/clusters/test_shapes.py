"""Shapes against published parameter counts and against torch's own counter of operations."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hardware.clusters.shapes import Shape, load_shape, shapes
from hardware.datafile import DataFileError


@pytest.mark.parametrize("name", shapes())
def test_parameters_equal_the_published_count(name: str) -> None:
    shape = load_shape(name)
    assert shape.parameters == shape.published_parameters
    assert shape.source


class Block(nn.Module):
    """A block of a shape, to be counted by torch: attention over the whole square, a gated or plain MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        plain = shape.mlp == "plain"
        self.shape = shape
        self.q = nn.Linear(shape.width, shape.width, bias=plain)
        self.kv = nn.Linear(shape.width, 2 * shape.kv_width, bias=plain)
        self.out = nn.Linear(shape.width, shape.width, bias=plain)
        self.up = nn.Linear(shape.width, shape.hidden * (1 if plain else 2), bias=plain)
        self.down = nn.Linear(shape.hidden, shape.width, bias=plain)
        self.norms = nn.ModuleList(nn.LayerNorm(shape.width) if plain else nn.RMSNorm(shape.width) for _ in range(2))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        shape = self.shape
        batch, steps, _ = x_BTD.shape
        h = self.norms[0](x_BTD)
        q, kv = self.q(h).view(batch, steps, shape.heads, -1), self.kv(h).view(batch, steps, 2, shape.kv_heads, -1)
        k, v = (each.repeat_interleave(shape.heads // shape.kv_heads, 2) for each in kv.unbind(2))
        scores = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        x_BTD = x_BTD + self.out(torch.einsum("bhts,bshd->bthd", scores, v).flatten(2))
        h = self.up(self.norms[1](x_BTD))
        if shape.mlp == "gated":
            gate, h = h.chunk(2, -1)
            return x_BTD + self.down(nn.functional.silu(gate) * h)
        return x_BTD + self.down(nn.functional.gelu(h))


@pytest.mark.parametrize("name", ["mpt-125m", "llama3-8b"])
def test_a_block_is_counted_as_torch_counts_it(name: str) -> None:
    shape = dataclasses.replace(load_shape(name), width=64, hidden=192, heads=8, kv_heads=2 if name != "mpt-125m" else 8)
    with torch.device("meta"):
        block = Block(shape)
        x = torch.zeros(3, 16, 64)
    assert sum(p.numel() for p in block.parameters()) == shape.layer_parameters
    with FlopCounterMode(display=False) as counter:
        block(x)
    square = 2 * shape.attention_flops(16)  # ours is causal
    assert counter.get_total_flops() == 3 * 16 * (shape.layer_flops() + square)


def test_model_flops_give_the_published_utilisation() -> None:
    # torchtitan, docs/performance.md, counts the look-up of the embedding too: 2,973 tokens/s on an A100 (312 TFLOPS) are
    # 58.2 % in Llama 3 8B, 2,162 are 61.1 % in Llama 2 13B
    for name, sequence, tokens, share in (("llama3-8b", 8192, 2973, 0.582), ("llama2-13b", 4096, 2162, 0.611)):
        shape = load_shape(name)
        counted = shape.model_flops(sequence) + 6 * shape.vocabulary * shape.width
        assert tokens * counted / 312e12 == pytest.approx(share, abs=5e-4)


def test_kept_activations_are_those_of_the_literature() -> None:
    # arXiv 2205.05198, equation 1 without what a fused attention does not keep: 34 bytes a token, width and block, with a
    # byte of dropout mask in three places, which is not counted here
    shape = load_shape("mpt-7b")
    assert shape.kept_bytes() - 4 * shape.heads == (34 - 2) * shape.width


def test_an_unknown_shape_is_named_with_those_that_exist() -> None:
    with pytest.raises(DataFileError, match=r"llama9.*shipped: gpt2-124m"):
        load_shape("llama9")
