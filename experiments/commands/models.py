"""The model that a command is to look at: a trained run, a function of somebody's own, or an exported program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hardware.text import short

if TYPE_CHECKING:
    from torch import nn

    from sparse_update.transformer import Transformer

EXPORTED = ".pt2"
HELP = (
    "folder of a training run or of its checkpoint; MODULE:FUNCTION that returns a module, (module, example inputs) or a"
    f" sparse_update.UserTask; or an exported program NAME{EXPORTED}"
)
NEEDED = "return (module, example inputs), or give --shape"


@dataclass(frozen=True)
class Found:
    """A module, inputs that it runs on, and what the document says of where it came from."""

    module: nn.Module
    example: Any
    origin: dict[str, Any]


def find_model(word: str, context: int | None, shape: str | None) -> Found:
    """The model that a word names.

    Args:
        word: as in `HELP`.
        context: tokens in a row, for a trained run only.
        shape: "1,28,28": shape of one float input with its batch, for a function that returns a module alone.

    Raises:
        ValueError: CheckpointError, ExportedError, a function that cannot be used (ConfigError), settings that do not go
            with the model. FileNotFoundError: no such program.
    """
    path = Path(word)
    reference = ":" in word and not path.exists()
    if context is not None and (reference or path.suffix == EXPORTED):
        raise ValueError(f"--context is {context}; it goes with a trained run, and {word} is none")
    if shape is not None and not reference:
        raise ValueError(f"--shape goes with MODULE:FUNCTION, and {word} brings its own inputs")
    if reference:
        return _referenced(word, shape)
    if path.suffix == EXPORTED:
        from neuro.exchange.exported import read_exported

        module, example = read_exported(path)
        return Found(module, example, {"program": str(path)})
    return _trained(path, context)


def _trained(folder: Path, context: int | None) -> Found:
    import torch

    model = load_model(folder)
    longest = model.cfg.context
    length = longest if context is None else context
    if not 1 <= length <= longest:
        raise ValueError(f"--context is {length}; this model reads 1 to {longest} tokens in a row")
    return Found(model, torch.zeros(1, length, dtype=torch.long), {"checkpoint": str(folder), "context": length})


def _referenced(word: str, shape: str | None) -> Found:
    from torch import nn

    from experiments.runs.own.reference import called
    from sparse_update.own.task import TaskError, UserTask

    made = called(word, plain=(TaskError,))
    if isinstance(made, UserTask):
        module, example = (made.model if isinstance(made.model, nn.Module) else made.model()), _first_inputs(word, made)
    elif isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        module, example = made
    elif isinstance(made, nn.Module):
        module, example = made, None
    else:
        raise ValueError(
            f"{word} returns {short(type(made).__name__)}; a torch module, (module, example inputs) or a UserTask is needed"
        )
    if shape is not None:
        example = _of_shape(shape)
    return Found(module, _guessed(word, module) if example is None else example, {"module": word})


def _of_shape(shape: str) -> Any:
    import torch

    try:
        sizes = tuple(int(part) for part in shape.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ValueError(f"--shape is {short(shape)}; whole numbers from 1 with commas are needed, such as 1,28,28")
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


def _guessed(word: str, module: nn.Module) -> Any:
    """One row for a module whose first layer is linear: the one shape that a module says by itself."""
    import torch
    from torch import nn

    first = next((part for part in module.modules() if any(True for _ in part.parameters(recurse=False))), None)
    if not isinstance(first, nn.Linear):
        raise ValueError(f"{word} returns a module alone, and its inputs cannot be told from its first layer; {NEEDED}")
    return torch.randn(1, first.in_features, generator=torch.Generator().manual_seed(0), dtype=first.weight.dtype)


def _first_inputs(word: str, task: Any) -> Any:
    """Inputs of a task's first held-out batch, in one of the usual forms."""
    from torch import Tensor

    batches = task.held_out() if callable(task.held_out) else task.held_out
    batch = next(iter(batches), None)
    if isinstance(batch, Tensor):
        return batch[:, :-1]
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Tensor):
        return batch[0]
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}
    raise ValueError(f"{word}: the task's first held-out batch is {short(type(batch).__name__)}; {NEEDED}")


def load_model(folder: Path) -> Transformer:
    """The model of a run folder or a checkpoint folder, in eval mode.

    Raises CheckpointError where there is none, or none that is whole.
    """
    from sparse_update.loop.checkpoint import CheckpointError, load_checkpoint
    from sparse_update.loop.stored_model import stored_model

    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder: name a training run, its checkpoint folder, MODULE:FUNCTION or NAME{EXPORTED}"
        )
    inside = folder / "checkpoint"
    checkpoint = load_checkpoint(inside if inside.is_dir() else folder)
    return stored_model(checkpoint).eval()
