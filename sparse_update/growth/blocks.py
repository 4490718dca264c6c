"""Blocks of the package's Transformer taken away and put on top, in place."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from sparse_update.transformer import Block, Transformer

OUTPUTS = ("attn.o.weight", "mlp.fc2.weight")
"""The two matrices of a block that write to the residual stream."""
SEEDS_APART = 1_000_003


def cut_to(model: Transformer, layers: int) -> None:
    """Leave the lowest `layers` blocks. The model's configuration follows."""
    del model.blocks[layers:]
    model.cfg = replace(model.cfg, layers=layers)


def grow_to(model: Transformer, layers: int, new_blocks: str, seed: int) -> None:
    """Put blocks on top until there are `layers`, made as `GrowthConfig.new_blocks` says. The configuration follows.

    What is drawn depends on `seed` and on the block's number alone; torch's global generator is left as it was.
    """
    old = len(model.blocks)
    like = model.embed.weight
    model.cfg = replace(model.cfg, layers=layers)
    for number in range(old, layers):
        if new_blocks.startswith("copied"):
            block = copy.deepcopy(model.blocks[number % old])
        else:
            block = _drawn(model, number, seed).to(device=like.device, dtype=like.dtype)
        with torch.no_grad():
            for name in OUTPUTS:
                if new_blocks.endswith("zero"):
                    block.get_parameter(name).zero_()
        for p in block.parameters():
            p.grad = None
        model.blocks.append(block.train(model.training))


def _drawn(model: Transformer, number: int, seed: int) -> Block:
    """A block drawn as `Transformer` draws its own, outputs with standard deviation 1 / sqrt(fan in x 2 blocks) (Radford
    et al. 2019 scale residual outputs so)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * SEEDS_APART + number)
        block = Block(model.cfg)
        for name, p in block.named_parameters():
            if p.dim() == 2:
                scale = (2 * model.cfg.layers) ** -0.5 if name in OUTPUTS else 1.0
                torch.nn.init.normal_(p, std=scale * p.shape[1] ** -0.5)
    return block
