"""No look at a module changes what it keeps from call to call, wherever it keeps it, also where its forward raises."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import neuro

snntorch = pytest.importorskip("snntorch")


class Slots:
    __slots__ = ("h", "late")

    def __init__(self) -> None:
        self.h = torch.zeros(8)


@dataclass
class Cache:
    h: Tensor
    inner: Slots
    calls: int = 0


class Memories(nn.Module):
    """State in a dictionary behind __getattr__, as SpikingJelly's neurons have it; membranes are numbers at first."""

    def __init__(self) -> None:
        super().__init__()
        self._memories: dict[str, Any] = {"v": 0.0}

    def __getattr__(self, name: str) -> Any:
        memories = self.__dict__.get("_memories", {})
        return memories[name] if name in memories else super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v + x
        spike = (v > 1).float()
        self._memories["v"] = v * (1 - spike)
        return spike


class Everything(nn.Module):
    """One of each: tensors in containers and objects, written to in place, through .data, resized, and replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8), persistent=False)
        self.register_buffer("shifted", torch.zeros(8))
        self.grown = torch.zeros(2)
        self.history, self.queue, self.seen = [torch.zeros(8)], deque([torch.zeros(8)], maxlen=2), {0}
        self.hooked = [torch.zeros(8)]  # a user's own name, though torch's hooks are called alike
        self.nested = {"a": [torch.zeros(8), (torch.zeros(8),)]}
        self.cache = Cache(torch.zeros(8), Slots())
        self.array, self.generator = np.zeros(8), torch.Generator().manual_seed(3)
        self.apart = [nn.BatchNorm1d(8)]  # in a plain list: torch does not know of it
        self.breaks_at, self.calls = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean(0)
        self.mean += mean
        self.shifted.data.add_(1)
        self.grown.resize_(3)
        self.history.append(mean)
        self.history[0].add_(1)
        self.queue[0].add_(1)
        self.queue.append(mean)
        self.seen.add(len(self.seen))
        self.hooked[0].add_(1)
        self.nested["a"][1][0].add_(1)
        self.nested["b"] = [mean]
        self.cache.h = self.cache.h + 1
        self.cache.calls += 1
        self.cache.inner.h += 1
        self.cache.inner.late = mean
        self.array += 1
        torch.rand(1, generator=self.generator)
        self.apart[0].train()(x)
        self.calls += 1
        if self.breaks_at and self.calls >= self.breaks_at:
            raise RuntimeError("broken")
        return x + 0 * self.cache.h


class Normed(nn.Module):
    """Batch statistics that are followed in eval mode too, as some fine-tuning recipes have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.train()(x)


def leaky() -> nn.Module:
    return snntorch.Leaky(0.9, init_hidden=True)


def synaptic() -> nn.Module:
    return snntorch.Synaptic(0.9, 0.8, init_hidden=True)


KINDS = {"leaky": leaky, "synaptic": synaptic, "memories": Memories, "everything": Everything, "normed": Normed}


def shown(value: Any) -> Any:
    """`value` as plain data that compare by content."""
    if isinstance(value, Tensor | np.ndarray):
        return (tuple(value.shape), value.tolist())
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple | deque | set):
        return [type(value).__name__, *map(shown, value)]
    if isinstance(value, nn.Module):
        own = {key: item for key, item in vars(value).items() if "_hooks" not in key}
        return shown(own | {"_parameters": dict(value._parameters)})
    if isinstance(value, Cache):
        return shown(vars(value))
    if isinstance(value, Slots):
        return shown({name: getattr(value, name, None) for name in Slots.__slots__})
    return repr(value)


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), KINDS[kind](), nn.ReLU(), nn.Linear(8, 8))


BEFORE = ("fresh", "after training steps", "after inference")
CASES = [(kind, before) for kind in KINDS for before in BEFORE]
CASES.remove(("everything", "after inference"))  # it would write to inference tensors, which torch lets nobody do


@pytest.mark.parametrize(("kind", "before"), CASES)
def test_analyse_calibrate_and_deploy_leave_all_state(kind: str, before: str) -> None:
    model, batches = model_of(kind), list(3 * torch.randn(3, 4, 8))
    if before != "fresh":
        with torch.inference_mode() if before == "after inference" else torch.enable_grad():
            model(batches[0])
    held = shown(model)
    report = neuro.analyse(model, batches[0])
    assert shown(model) == held
    ranges = neuro.calibrate(model, batches)
    assert shown(model) == held
    deployed = neuro.deploy(model, neuro.convert(model, ranges, report))
    with torch.no_grad():
        first = [deployed(batch) for batch in batches]
    assert shown(model) == held
    assert all(torch.isfinite(out).all() for out in first)
    with torch.no_grad():
        model(batches[0])
    assert shown(model) != held  # the model does keep something


@pytest.mark.parametrize("wrong", ["raises", "not finite"])
def test_a_forward_that_breaks_off_leaves_all_state(wrong: str) -> None:
    model, batches = model_of("everything"), list(torch.randn(3, 4, 8))
    model[1].breaks_at = 2 if wrong == "raises" else 0
    if wrong == "not finite":
        batches[2] = torch.full((4, 8), float("nan"))
    held = shown(model)
    with pytest.raises(ValueError, match="broken" if wrong == "raises" else "batch 2: the input of layer '0' holds NaN"):
        neuro.calibrate(model, batches)
    assert shown(model) == held
