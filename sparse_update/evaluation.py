"""Held-out loss, and weights to start from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparse_update.checkpoint import checkpoint_of, load_checkpoint
from sparse_update.transformer import Transformer, token_loss


@torch.no_grad()
def evaluate(model: torch.nn.Module, windows_NT1: Tensor, batch: int = 64) -> float:
    """Mean loss in nats per token over held-out windows, int64 (N, T + 1), in the parameters' own precision."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = 0.0
    for part in windows_NT1.split(batch):
        tokens = part.to(device)
        total += float(token_loss(model(tokens[:, :-1]), tokens[:, 1:]).double().sum())
    model.train(training)
    return total / windows_NT1[:, 1:].numel()


def start_from(model: Transformer, folder: str | Path) -> None:
    """Load the weights of a run folder or checkpoint, read safely. Raises CheckpointError, or ValueError for a model of
    another shape or vocabulary."""
    weights = load_checkpoint(checkpoint_of(folder)).model
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights or weights[name].shape != tensor.shape:
            have = tuple(weights[name].shape) if name in weights else "nothing"
            what = "vocabulary" if name in ("embed.weight", "head.weight") else "shape"
            raise ValueError(
                f"trainer.init_from = {folder}: its {name} is {have}, this model's {tuple(tensor.shape)}: a model "
                f"of another {what}; train with the settings of that run (model, data.tokenizer, data.vocab_size)"
            )
    model.load_state_dict(weights)
