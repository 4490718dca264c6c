"""The parts of somebody's own training: model, data, loss, optimizer; each checked when it is first used.

    UserTask(model=MyModel, train=loader, held_out=held_out_loader, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-4))

Shape letters: B batch, T token, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardware.text import short
from sparse_update.library.rowloss import NO_LABEL, shifted


class TaskError(ValueError):
    """A part of the task that cannot be used; the message says which, what it is and what is needed."""


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's AdamW at a learning rate of 1e-3, where the task names no optimizer."""
    return torch.optim.AdamW(parameters, lr=1e-3)


@dataclass
class UserTask:
    """What is trained, on what, and how: given once, used by every arm and seed in the same way.

    Raises TaskError for a part of the wrong kind.
    """

    model: nn.Module | Callable[[], nn.Module]
    """A function that makes the model (called with torch's generator at the seed), or a model, of which every arm gets a
    copy: then all seeds start from the same weights, as in fine-tuning."""
    train: Any
    """Training batches: anything that can be iterated again and again (a DataLoader, a list), or a function that makes an
    iterator, with or without the seed as its argument. It starts anew where it ends."""
    held_out: Any
    """Held-out batches, in the same way; every evaluation reads all of them."""
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = adamw
    """Parameters -> their optimizer."""
    loss: Callable[[nn.Module, Any], Any] | None = None
    """(model, batch) -> (logits (B, T, V), labels (B, T) with -100 for none), or (logits (B, V), labels (B,)), or losses of
    your own, one for each token (B, T) or sample (B,), with their graph. None takes the usual batches: a tensor (B, T + 1)
    of tokens, a pair (inputs, labels), or a mapping with labels or input_ids as transformers' models take it."""
    schedule: Callable[[float], float] | None = None
    """Share of the budget that is spent -> factor on the learning rate; None keeps it."""
    reference: Any = None
    """A trained model with the same outputs, or the folder of its checkpoint, for gates that count losses from its own
    (method "rho1", "rho_loss"; signal "excess"). It is not trained."""
    name: str = ""
    """In tables and folders; empty: the model's class."""
    bytes_per_token: float = 0.0
    """Of the held-out text, for bits per byte; 0: not known."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module) and not callable(self.model):
            raise TaskError(f"model is {_what(self.model)}: a torch module, or a function that makes one, is needed")
        for field in ("train", "held_out"):
            value = getattr(self, field)
            if not callable(value) and not isinstance(value, Iterable) and not hasattr(value, "__getitem__"):
                raise TaskError(f"{field} is {_what(value)}: batches to iterate over, or a function that makes an iterator")
            if isinstance(value, Iterator):
                raise TaskError(
                    f"{field} is {_what(value)}, which can be read once only, and every arm reads it: give the loader "
                    "itself, a list, or the function that makes the iterator (without calling it)"
                )
        if not callable(self.optimizer):
            raise TaskError(
                f"optimizer is {_what(self.optimizer)}: a function from parameters to their optimizer is needed, such as "
                "lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)"
            )
        for field in ("loss", "schedule"):
            if getattr(self, field) is not None and not callable(getattr(self, field)):
                raise TaskError(f"{field} is {_what(getattr(self, field))}: a function is needed")

    @property
    def title(self) -> str:
        """What the task is called in tables and folders."""
        if self.name:
            return self.name
        if isinstance(self.model, nn.Module):
            return type(self.model).__name__
        return str(getattr(self.model, "__name__", type(self.model).__name__)).strip("<>")

    def make_model(self, seed: int, device: torch.device) -> nn.Module:
        """The model that an arm starts from, in training mode on `device`; torch's generator is at `seed` before it.

        Raises TaskError where the function makes something else.
        """
        torch.manual_seed(seed)
        if isinstance(self.model, nn.Module):
            model = copy.deepcopy(self.model)
        else:
            model = self.model()
        if not isinstance(model, nn.Module):
            raise TaskError(f"the model's function made {_what(model)}: a torch module is needed")
        if not any(p.requires_grad for p in model.parameters()):
            raise TaskError(f"{type(model).__name__} has no parameter that asks for a gradient: there is nothing to train")
        return model.to(device).train()

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Raises TaskError where the function makes something else, or an optimizer of other parameters."""
        made = self.optimizer(parameters)
        if not isinstance(made, torch.optim.Optimizer):
            raise TaskError(f"the optimizer's function made {_what(made)}: a torch.optim.Optimizer is needed")
        held = {id(p) for group in made.param_groups for p in group["params"]}
        if strange := held - {id(p) for p in parameters}:
            raise TaskError(
                f"the optimizer holds {len(strange)} tensors that are none of the parameters it was given: make it of the "
                "function's argument, since every arm has a model of its own"
            )
        return made

    def batches(self, field: str, seed: int) -> Iterator[Any]:
        """A new iterator over `train` or `held_out`. Raises TaskError where there is none."""
        value = getattr(self, field)
        if callable(value) and not isinstance(value, Iterable):
            value = value(seed) if _takes_one(value) else value()
        generator = getattr(value, "generator", None)
        if isinstance(generator, torch.Generator):  # a DataLoader's own: every arm must meet it at the same place
            generator.manual_seed(seed)
        try:
            return iter(value)
        except TypeError:
            raise TaskError(f"{field} gave {_what(value)}: batches to iterate over are needed") from None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the model said of a batch: logits (B, T, V) with labels (B, T), or losses (B, T) alone."""

    logits: Tensor
    labels: Tensor | None

    @property
    def tokens(self) -> int:
        """Tokens (or samples) that went through the model."""
        return (self.logits if self.labels is None else self.labels).numel()

    def sum_and_count(self) -> tuple[Tensor, int]:
        """Summed loss in nats, and the tokens with a label that it is of."""
        if self.labels is None:
            return self.logits.double().sum(), self.logits.numel()
        loss = F.cross_entropy(_wide(self.logits).flatten(0, 1), self.labels.flatten(), reduction="sum")
        return loss.double(), int((self.labels != NO_LABEL).sum())

    def each(self) -> Tensor:
        """Loss of every token in nats (B, T), NaN for one without a label."""
        if self.labels is None:
            return self.logits
        flat = F.cross_entropy(_wide(self.logits).flatten(0, 1), self.labels.flatten(), reduction="none")
        return flat.view(self.labels.shape).masked_fill(self.labels == NO_LABEL, float("nan"))

    def mean(self) -> Tensor:
        """The plain loss: mean over all tokens with a label."""
        if self.labels is None:
            return self.logits.mean()
        return F.cross_entropy(_wide(self.logits).flatten(0, 1), self.labels.flatten())


def outcome(task: UserTask, model: nn.Module, batch: Any) -> Outcome:
    """Run the model on a batch. Raises TaskError for a batch or an answer of no known form."""
    if task.loss is not None:
        said = task.loss(model, batch)
        return _own(said)
    if isinstance(batch, Tensor):
        if batch.dim() != 2 or batch.is_floating_point():
            raise TaskError(f"a batch is {_tensor(batch)}: tokens are whole numbers (B, T + 1); for others give a loss")
        return _checked(model(batch[:, :-1]), batch[:, 1:])
    if isinstance(batch, Mapping):
        given = {str(key): value for key, value in batch.items()}
        if "labels" in given:
            labels = given.pop("labels")
        elif "input_ids" in given:
            labels = given["input_ids"]
            if isinstance(mask := given.get("attention_mask"), Tensor):
                labels = labels.masked_fill(mask == 0, NO_LABEL)
        else:
            raise TaskError(f"a batch has {', '.join(given)}: labels or input_ids are needed, or a loss of your own")
        return _checked(model(**given), shifted(labels))
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return _checked(model(batch[0]), batch[1])
    raise TaskError(
        f"a batch is {_what(batch)}: a tensor of tokens, a pair (inputs, labels) or a mapping is needed; for any other "
        "give loss = a function of (model, batch)"
    )


def _own(said: Any) -> Outcome:
    if isinstance(said, (tuple, list)) and len(said) == 2:
        return _checked(said[0], said[1])
    if isinstance(said, Tensor) and said.dim() in (1, 2) and said.is_floating_point():
        return Outcome(said[:, None] if said.dim() == 1 else said, None)
    what = _tensor(said) if isinstance(said, Tensor) else _what(said)
    raise TaskError(
        f"loss gave {what}: a pair (logits, labels) is needed, or one loss for each token (B, T) or sample (B,), since "
        "rows are chosen by their losses (no mean over the batch)"
    )


def _checked(output: Any, labels: Any) -> Outcome:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        raise TaskError(
            f"the model gave {_what(logits)} and the labels are {_what(labels)}: tensors are needed, or an output with "
            "logits; for any other model give loss = a function of (model, batch)"
        )
    if logits.dim() == 2 and labels.dim() == 1:
        logits, labels = logits[:, None], labels[:, None]
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise TaskError(
            f"logits are {_tensor(logits)} and labels {_tensor(labels)}: (B, T, V) and (B, T), or (B, V) and (B,), are "
            "needed"
        )
    if labels.is_floating_point():
        raise TaskError(f"labels are {_tensor(labels)}: whole numbers are needed; for others give a loss of your own")
    return Outcome(logits, labels)


def check_labels(found: Outcome) -> None:
    """Raise TaskError for a label that the logits have no place for."""
    if found.labels is None or not found.labels.numel():
        return
    least, most, vocabulary = int(found.labels.min()), int(found.labels.max()), found.logits.shape[-1]
    if most >= vocabulary or (least < 0 and least != NO_LABEL):
        wrong = most if most >= vocabulary else least
        raise TaskError(
            f"a label is {wrong} and the model has {vocabulary} outputs: labels lie in 0..{vocabulary - 1}, -100 for none; "
            "is the tokenizer the model's own?"
        )


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device, of the same form."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [to_device(value, device) for value in batch]
    return batch


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _what(value: Any) -> str:
    return f"{type(value).__name__} {short(value, 60)}" if isinstance(value, (str, int, float)) else type(value).__name__


def _tensor(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
