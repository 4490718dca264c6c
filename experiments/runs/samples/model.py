"""The module that is deployed: what PACKAGE:FUNCTION returns, with the weights of a file where one is named."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from experiments.runs.hydra_app import ConfigError
from experiments.runs.own.reference import called
from hardware.text import listed, quoted


def trained_module(word: str, weights: str = "") -> nn.Module:
    """The torch module, in eval mode.

    Args:
        word: PACKAGE:FUNCTION.
        weights: a .safetensors file of its state; "" for none.

    Raises ConfigError where there is no such function, it fails or returns something else, or the weights are not its own.
    """
    model = called(word, returns="a trained torch module")
    if not isinstance(model, nn.Module):
        function = word.partition(":")[2]
        raise ConfigError(
            f"module = {word}: {function}() returns {type(model).__name__}; a trained torch.nn.Module is needed"
        )
    if weights:
        load_weights(model, Path(weights))
    return model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the tensors of a .safetensors file into `model`.

    Raises ConfigError for a file that is missing or damaged, and for tensors that the module does not have, lacks, or has
    in another shape.
    """
    if not path.is_file():
        raise ConfigError(f"weights = {path}: there is no such file")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"weights = {path}: not readable as safetensors, or cut short: {quoted(str(error))}") from error
    own = model.state_dict()
    name = type(model).__name__
    foreign = [key for key in found if key not in own]
    if foreign:
        raise ConfigError(f"weights = {path}: {name} has no {quoted(foreign[0])}; it has {listed(own)}")
    for key, value in found.items():
        if value.shape != own[key].shape:
            raise ConfigError(
                f"weights = {path}: {quoted(key)} has shape {tuple(value.shape)}, that of {name} {tuple(own[key].shape)}"
            )
    if odd := next((key for key, value in found.items() if value.is_complex() and not own[key].is_complex()), None):
        raise ConfigError(f"weights = {path}: {quoted(odd)} holds complex numbers, that of {name} {own[odd].dtype}")
    held = {own[key].data_ptr() for key in found}  # tied tensors are saved once
    missing = [key for key, value in own.items() if key not in found and value.data_ptr() not in held]
    if missing:
        raise ConfigError(f"weights = {path}: the file lacks {listed(missing)}, which {name} needs")
    model.load_state_dict(found, strict=False)
