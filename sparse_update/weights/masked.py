"""Masked updates for an optimizer of one's own: hooks around its `step`, and its own checkpoint holds the mask's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_update.weights.masking import Mask, MaskConfig

Given = TypeVar("Given", bound=torch.optim.Optimizer)
KEY = "mask"
"""Entry of the optimizer's state dict."""
MOMENTA = ("exp_avg", "momentum_buffer")
"""Names that torch's optimizers give their first moment."""


def masked(
    optimizer: Given,
    kind: str = "agreement",
    *,
    keep: float = 0.5,
    scale: float = 1.0,
    temperature: float = 2.0,
    memory: float = 0.9,
    block_rows: int = 0,
    exclude: Iterable[Tensor] = (),
    seed: int = 0,
) -> Given:
    """The same optimizer, whose steps leave out blocks of the weights from now on while all moments are updated.

    Schedulers, scalers and wrappers see the optimizer that they know. `optimizer.state_dict()` holds the mask's state,
    under "mask", and `load_state_dict` takes it back. Weights with fewer than two dimensions always move.

    Args:
        optimizer: any optimizer of torch, also of a gate's parameters.
        kind: "random", "agreement" (Magma) or "surprise"; the other settings as of `MaskConfig`.
        exclude: weights that always move: embeddings and the head, for instance.
        seed: of the mask's own generator.

    With "agreement" the momentum is the optimizer's own ("exp_avg", "momentum_buffer"). Where it keeps none, a running mean
    of the gradients is kept here, with weight `memory` on the past.

    Raises ValueError for settings out of range, kind "none", an optimizer that is masked already; in `step` for a closure,
    sparse gradients and sharded weights; in `load_state_dict` for a state of another kind of mask.
    """
    cfg = MaskConfig("", kind, keep, scale, temperature, memory, block_rows)
    if kind == "none":
        raise ValueError("masked(kind='none') masks nothing: leave the call out")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"masked({type(optimizer).__name__}): an optimizer of torch is needed, the one inside of a wrapper"
        )
    if hasattr(optimizer, "_update_mask"):
        raise ValueError(f"this {type(optimizer).__name__} is masked already: make a new one for another mask")
    hooks = _Hooks(optimizer, Mask(cfg, seed), {id(w) for w in exclude})
    optimizer._update_mask = hooks  # type: ignore[attr-defined]
    return optimizer


class _Hooks:
    """What `masked` hangs on an optimizer. Weights go by their identity here, by their place in a checkpoint."""

    def __init__(self, optimizer: torch.optim.Optimizer, mask: Mask, exclude: set[int]) -> None:
        self.mask, self.exclude = mask, exclude
        self.momenta: dict[str, Tensor] = {}
        """Running means of gradients, for optimizers that keep none."""
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)
        optimizer.register_state_dict_post_hook(self.saved)
        optimizer.register_load_state_dict_pre_hook(self.loaded)

    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(a is not None for a in args[1:]) or kwargs.get("closure") is not None:
            raise ValueError("masked: step(closure) forms gradients inside of the step; call backward first, then step()")
        weights = {str(id(w)): w for w in _weights(optimizer) if w.dim() >= 2 and id(w) not in self.exclude}
        for w in weights.values():
            if type(w).__name__ == "DTensor" or (w.grad is not None and w.grad.is_sparse):
                raise ValueError(
                    f"masked: a weight of shape {tuple(w.shape)} is sharded or has a sparse gradient: masks need whole, "
                    "dense ones; put it into `exclude`"
                )
        self.mask.forget(weights)
        self.momenta = {name: m for name, m in self.momenta.items() if name in weights}
        self.mask.before(weights)

    def after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.mask.after(lambda name: self._momentum(optimizer, name))

    @torch.no_grad()
    def _momentum(self, optimizer: torch.optim.Optimizer, name: str) -> Tensor:
        w = self.mask.weights[name]
        state = optimizer.state.get(w, {})
        found = next((state[key] for key in MOMENTA if isinstance(state.get(key), Tensor)), None)
        if found is not None:
            return found
        assert w.grad is not None
        if name not in self.momenta:
            self.momenta[name] = torch.zeros_like(w.grad)
        return self.momenta[name].lerp_(w.grad, 1 - self.mask.cfg.memory)

    def saved(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        place = {str(id(w)): str(i) for i, w in enumerate(_weights(optimizer))}
        own = self.mask.state_dict()
        momenta = {place[name]: m for name, m in self.momenta.items() if name in place}
        remembered = {place[name]: m for name, m in own["memory"].items() if name in place}
        return {**state, KEY: {**own, "kind": self.mask.cfg.kind, "memory": remembered, "momenta": momenta}}

    def loaded(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        here, there = self.mask.cfg.kind, state.get(KEY, {}).get("kind", "none")
        if here != there:
            raise ValueError(
                f"this state was saved with updates masked by kind {there!r}, and the optimizer's mask is {here!r}: call "
                "masked with the settings of that run, or load before masked is called"
            )
        weights = _weights(optimizer)
        name = {str(i): str(id(w)) for i, w in enumerate(weights)}
        saved = state[KEY]
        self.mask.load_state_dict({**saved, "memory": {name[i]: m for i, m in saved["memory"].items()}})
        self.momenta = {name[i]: m.clone().to(weights[int(i)].device) for i, m in saved["momenta"].items()}


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [w for group in optimizer.param_groups for w in group["params"]]
