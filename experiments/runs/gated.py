"""Our Transformer behind event thresholds: where the gates go, and in which axes its values are sparse."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuro.training.basis import Stream, sparse_axes, turn_heads
from neuro.training.insert import GateConfig, Gates, insert_thresholds
from sparse_update.loop.checkpoint import load_checkpoint
from sparse_update.transformer import Block, Transformer


def add_gates(model: Transformer, example: Tensor, *, one_sided: bool = False) -> Gates:
    """A gate of its own before every linear layer, head included; behind the squared ReLU one threshold for all."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    usual = GateConfig(two_sided=not one_sided)
    hidden = {name: GateConfig(two_sided=False, shared=True) for name in names if name.endswith("fc2")}
    mixed = {name: GateConfig() for name in names if name.endswith(".o")}  # attention output has no preferred sign
    return insert_thresholds(model, names, example, default=usual, special=hidden | mixed)


def turn_axes(model: Transformer, tokens_BT: Tensor, seed: int = 0) -> None:
    """Turn the residual stream and every head's values to axes in which they are sparse, in place: the same function.

    Raises ValueError for tied embeddings, which a turn would have to change in two ways.
    """
    seen: dict[nn.Module, Tensor] = {}
    blocks = [block for block in model.blocks if isinstance(block, Block)]

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[module] = args[0].reshape(-1, args[0].shape[-1])

    norms: list[nn.Module] = [*(norm for block in blocks for norm in (block.norm1, block.norm2)), model.norm]
    outputs = [block.attn.o for block in blocks]
    handles = [module.register_forward_pre_hook(keep) for module in (*norms, *outputs)]
    with torch.no_grad():
        model(tokens_BT)
    for handle in handles:
        handle.remove()
    rows_ND = torch.cat([F.rms_norm(seen[norm], seen[norm].shape[-1:]) for norm in norms])
    readers = [
        (norm, linears)
        for block in blocks
        for norm, linears in (
            (block.norm1, [block.attn.q, block.attn.k, block.attn.v]),
            (block.norm2, [block.mlp.fc1]),
        )
    ]
    writers = [linear for block in blocks for linear in (block.attn.o, block.mlp.fc2)]
    Stream([model.embed], writers, [*readers, (model.norm, [model.head])]).turn(sparse_axes(rows_ND, seed=seed))
    for block in blocks:
        heads = seen[block.attn.o].chunk(block.attn.heads, dim=-1)
        axes = [sparse_axes(head.contiguous(), steps=150, seed=seed) for head in heads]
        turn_heads(block.attn.v, block.attn.o, axes)


def restore(model: Transformer, checkpoint: Path) -> None:
    """Give `model`, in place, the gates and the weights of a point of `experiments.studies.activity`.

    Raises CheckpointError for a folder that holds no checkpoint.
    """
    saved = load_checkpoint(checkpoint)
    if saved.meta["gated"]:
        add_gates(model, torch.zeros(1, model.cfg.context, dtype=torch.int64), one_sided=saved.meta["one_sided"])
    model.load_state_dict(saved.model)
