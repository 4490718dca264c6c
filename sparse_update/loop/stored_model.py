"""The Transformer that a checkpoint holds, never built larger than its tensors are, whatever its settings say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from hardware.text import quoted, short
from sparse_update.loop.checkpoint import Checkpoint, CheckpointError
from sparse_update.transformer import ModelConfig, Transformer

MOST_CONTEXT = 2**20
"""Tokens. The rotary tables are made from the settings alone, and no tensor of a checkpoint has their length."""


def stored_shape(found: Checkpoint, prefix: str = "") -> ModelConfig:
    """The model's settings, held against the shapes of the tensors whose names begin with `prefix`.

    Raises:
        CheckpointError: there are no settings, none of a Transformer, or they ask for other sizes than the tensors have.
    """
    given = found.meta.get("model")
    if not isinstance(given, Mapping):
        raise CheckpointError(
            f"{found.folder}: this checkpoint does not say which model it holds; use one that `spikegate train` wrote"
        )
    kinds = {field.name: type(field.default) for field in fields(ModelConfig)}
    for name, value in given.items():
        kind = kinds.get(name)
        if kind is None or (type(value) is not kind and (kind, type(value)) != (float, int)):
            raise CheckpointError(f"{found.folder}: model.{short(name)} = {quoted(value)} is no setting of a Transformer")
    try:
        cfg = ModelConfig(**given)
    except ValueError as error:
        raise CheckpointError(f"{found.folder} holds no model: {error}") from error
    if cfg.context > MOST_CONTEXT:
        raise CheckpointError(f"{found.folder}: model.context = {cfg.context:,} tokens, at most {MOST_CONTEXT:,} are read")
    _hold_against(found, cfg, prefix)
    return cfg


def stored_model(found: Checkpoint, cfg: ModelConfig | None = None, prefix: str = "") -> Transformer:
    """The model with its weights, on the CPU, in the mode of training.

    Args:
        cfg: what :func:`stored_shape` gave, perhaps with another way of attention.

    Raises:
        CheckpointError: as `stored_shape`, and for tensors that are missing, too many or of another shape.
    """
    model = Transformer(stored_shape(found, prefix) if cfg is None else cfg)
    held = {name.removeprefix(prefix): value for name, value in found.model.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(held)
    except RuntimeError as error:
        raise CheckpointError(f"{found.folder} does not hold the model of its settings: {short(str(error))}") from error
    return model


def _hold_against(found: Checkpoint, cfg: ModelConfig, prefix: str) -> None:
    """Every size that memory goes with is that of a tensor."""
    hidden = cfg.hidden_ratio * cfg.width
    expected = {"embed.weight": (cfg.vocab_size, cfg.width)}
    if cfg.layers:
        expected["blocks.0.mlp.fc1.weight"] = (hidden, cfg.width)
    for name, shape in expected.items():
        tensor = found.model.get(prefix + name)
        held = None if tensor is None else tuple(tensor.shape)
        if held != shape:
            raise CheckpointError(
                f"{found.folder}: by its settings {prefix}{name} is {quoted(shape)}, the checkpoint has {quoted(held)}: it "
                "does not hold the model of its settings"
            )
    parts = [name.removeprefix(prefix).split(".") for name in found.model if name.startswith(prefix)]
    blocks = {part[1] for part in parts if part[0] == "blocks" and len(part) > 1}
    if len(blocks) != cfg.layers:
        raise CheckpointError(f"{found.folder}: model.layers = {cfg.layers:,}, the checkpoint has tensors of {len(blocks)}")
