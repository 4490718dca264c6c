"""AdamW, Muon, sign descent or GaLore over the active weights only: state exists for active strips and for nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.weights.lowrank import galore_adamw
from sparse_update.weights.masking import Mask
from sparse_update.weights.settings import OptimConfig, schedule
from sparse_update.weights.subset import SIGNS, Active, Part

WIDENS = ("blocks.", "head.")
"""Starts of the names of matrices whose inputs widen with the model; a tied head is the embedding, whose do not."""


class Optimizer:
    """torch's own optimizers on the active strips of a module's parameters.

    A fully active parameter is handed over itself; a strip is a view of it that shares storage. A new `Active` makes new
    optimizers: strips that stay active keep their moments, those of strips that went inactive are freed (or kept, see
    `OptimConfig.frozen_moments`), and frozen weights neither decay nor move. Strips under the rule "sign" move by
    lr * sign(gradient) and have no state; "look" strips never move.

    `split`: a `parallel.split.Split` where each process holds a part of the parameters; leaves, gradients and state are
    then those of the part, and `state_dict` those of the whole.

    `leaves`: what is updated, by name, or by name and place for a strip. With `cfg.mask` the updates of some blocks of the
    matrices in "blocks." are taken back after each step; `seed` is that of its coins.
    """

    def __init__(self, module: nn.Module, active: Active, cfg: OptimConfig, seed: int = 0, split: Any = None) -> None:
        self.module, self.cfg, self.split = module, cfg, split
        together = {} if split is None else {"together": split.added}
        self.mask = Mask(cfg.mask, seed, **together) if cfg.mask.kind != "none" else None
        self.parked: dict[str, dict[str, Tensor]] = {}
        self.parts: list[torch.optim.Optimizer] = []
        self.leaves: dict[str, Tensor] = {}
        self.look: list[Tensor] = []
        self.signs: dict[str, Tensor] = {}
        self.gradient_peak_bytes = self.peak_bytes = 0
        self.activate(active)

    def activate(self, active: Active) -> None:
        """Make `active` what is updated; moments of strips that stay are kept, new strips start from zero."""
        before = {**self.parked, **self._moments()}
        self.active, self.look, self.signs = active, [], {}
        self.leaves = {}
        self.signed: dict[str, Tensor] = {}
        self._keys: dict[str, tuple[str | None, ...]] = {}
        self.names: dict[str, str] = {}
        self.outer: dict[str, Tensor] = {}
        for name, p in self.module.named_parameters():
            parts = active.parts.get(name, ())
            whole = len(parts) == 1 and parts[0].rule == "optimizer" and parts[0].whole(p)
            if not whole:
                p.grad = None
            keys: list[str | None] = []
            for part in parts:
                if part.rule == "look":
                    keys.append(None)
                    continue
                key = name if whole else _key(name, part)
                leaf = self._leaf(name, p, part, whole, key)
                self.names[key] = name
                (self.signed if part.rule in SIGNS else self.leaves)[key] = leaf
                keys.append(key)
            self._keys[name] = tuple(keys)
        self.parts = self._build()
        self.peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]
        for key, owner, leaf in self._owners():
            if key in before:
                owner.state[leaf] = before.pop(key)
        self.parked = before if self.cfg.frozen_moments == "keep" else {}
        if self.mask is not None:
            self.mask.forget(self.leaves)
            if self.split is not None and self.mask.cfg.block_rows:
                for key in self._masked():
                    self.split.need_rows(self.names[key])

    def _masked(self) -> dict[str, Tensor]:
        """The leaves that a mask may leave out."""
        return {key: p for key, p in self.leaves.items() if p.dim() == 2 and key.startswith("blocks.")}

    def _leaf(self, name: str, p: Tensor, part: Part, whole: bool, key: str) -> Tensor:
        if self.split is None:
            return p if whole else part.of(p.detach()).requires_grad_()
        held = self.split.local(p.detach())
        if whole or part.whole(p):
            self.outer[key] = p
            return held.requires_grad_() if held is not p else p
        return self.split.strip(name, part.dim, part.start, part.stop, held).requires_grad_()

    def collect(self) -> None:
        """Take over the gradients that a backward by autograd left at parameters of which this process holds a part."""
        for key, p in self.outer.items():
            if p.grad is not None:
                leaf = (self.leaves if key in self.leaves else self.signed)[key]
                if leaf is not p:
                    leaf.grad, p.grad = self.split.gradient(p), None

    def _build(self) -> list[torch.optim.Optimizer]:
        cfg = self.cfg
        if cfg.name == "sign":
            self.signed, self.leaves = {**self.signed, **self.leaves}, {}
        matrices = {n: p for n, p in self.leaves.items() if p.dim() == 2}
        vectors = [p for p in self.leaves.values() if p.dim() != 2]
        apart = cfg.name in ("muon", "galore")
        inner = {n: p for n, p in matrices.items() if n.startswith("blocks.")} if apart else {}
        decayed = {n: p for n, p in matrices.items() if n not in inner}
        wide = [p for n, p in decayed.items() if cfg.base_width and n.startswith(WIDENS)]
        alike = [p for p in decayed.values() if not any(p is w for w in wide)]
        # torch's fused AdamW ignores strides on a CPU (2.13): on a view of columns it writes into frozen weights
        parts: list[torch.optim.Optimizer] = []
        for dense in (True, False):
            some, scaled, rest = ([p for p in of if p.is_contiguous() == dense] for of in (alike, wide, vectors))
            groups = [{"params": some, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}]
            if scaled:
                lr = cfg.lr * cfg.base_width / self.module.cfg.width  # type: ignore[union-attr, operator]
                groups.append({"params": scaled, "weight_decay": cfg.weight_decay, "lr": lr})
            groups = [g for g in groups if g["params"]]
            if groups:
                parts.append(torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=dense))
        if inner and cfg.name == "muon":
            if self.split is None:
                parts.append(torch.optim.Muon(list(inner.values()), lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
            else:
                parts.append(self.split.muon(inner, self.names, lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
        elif inner:
            parts.append(galore_adamw(list(inner.values()), cfg))
        return parts

    def _owners(self) -> Iterable[tuple[str, torch.optim.Optimizer, Tensor]]:
        names = {id(leaf): key for key, leaf in self.leaves.items()}
        for part in self.parts:
            for group in part.param_groups:
                for leaf in group["params"]:
                    yield names[id(leaf)], part, leaf

    def _moments(self) -> dict[str, Any]:
        return {key: part.state[leaf] for key, part, leaf in self._owners() if leaf in part.state}

    def set_gradients(self, gradients: Mapping[str, Sequence[Tensor] | Tensor]) -> None:
        """Hand over the sparse step's gradients, aligned with `active.parts`; what has no entry stays as it is."""
        self.look, self.signs = [], {}
        for name, keys in self._keys.items():
            given = gradients.get(name)
            tensors = (given,) if isinstance(given, Tensor) else given or (None,) * len(keys)
            for key, g in zip(keys, tensors, strict=True):
                if key is not None and g is not None and g.dtype == torch.int8:
                    self.signs[key] = g
                elif key is not None:
                    leaf = (self.leaves if key in self.leaves else self.signed)[key]
                    leaf.grad = g.contiguous() if g is not None and leaf.is_contiguous() else g
                elif g is not None:
                    self.look.append(g)

    def step(self, progress: float, scale: float = 1.0) -> float:
        """Clip, update by `scale` times the schedule's rate at `progress`, clear. Returns the gradient's norm before
        clipping (0.0 where clipping is off).

        A norm that is not finite is returned without an update: nothing moves and no moment changes.
        """
        norm = 0.0
        gradient_bytes = self.gradient_bytes()
        if self.cfg.grad_clip > 0:
            norm = self._clip()
            if not math.isfinite(norm):
                self.clear()
                return norm
        factor = scale * schedule(progress, self.cfg)
        if self.mask is not None:
            self.mask.before(self._masked())
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            part.step()
        if self.mask is not None:
            self.mask.after(self._momentum)
        self._descend(self.cfg.lr * factor)
        self.gradient_peak_bytes = max(self.gradient_peak_bytes, gradient_bytes)
        self.peak_bytes = max(self.peak_bytes, gradient_bytes + self.state_bytes())
        self.clear()
        return norm

    def _clip(self) -> float:
        """Scale all gradients so that their norm is at most `grad_clip`; the norm before."""
        moved = {**self.leaves, **self.signed}
        if self.split is None:
            return float(nn.utils.clip_grad_norm_(list(moved.values()), self.cfg.grad_clip))
        by_name: dict[str, list[Tensor]] = {}
        for key, leaf in moved.items():
            if leaf.grad is not None:
                by_name.setdefault(self.names[key], []).append(leaf.grad)
        norm = self.split.norm(by_name)
        factor = min(1.0, self.cfg.grad_clip / (norm + 1e-6))  # as clip_grad_norm_ has it
        for g in (g for parts in by_name.values() for g in parts):
            g.mul_(factor)
        return norm

    def _momentum(self, key: str) -> Tensor:
        """First moment of a leaf that was just updated."""
        leaf = self.leaves[key]
        state = next(part.state[leaf] for part in self.parts if leaf in part.state)
        return state["momentum_buffer" if "momentum_buffer" in state else "exp_avg"]

    @torch.no_grad()
    def _descend(self, lr: float) -> None:
        """w <- w (1 - lr decay) - lr scale sign(g), decay on matrices only (signSGD; FRUGAL's state-free rule)."""
        for key, leaf in self.signed.items():
            signs = leaf.grad.sign_() if leaf.grad is not None else self.signs.get(key)
            if signs is not None:
                if leaf.dim() == 2:
                    leaf.mul_(1 - lr * self.cfg.weight_decay)
                leaf.add_(signs, alpha=-lr * self.cfg.sign_scale)

    def clear(self) -> None:
        """Drop the gradients without an update."""
        self.look, self.signs = [], {}
        for leaf in (*self.leaves.values(), *self.signed.values()):
            leaf.grad = None

    def gradient_bytes(self) -> int:
        """Bytes of the gradients that are allocated now, a shared storage counted once and whole."""
        return storage_bytes(
            [*(p.grad for p in (*self.leaves.values(), *self.signed.values())), *self.signs.values(), *self.look]
        )

    def state_bytes(self) -> int:
        """Bytes of optimizer state that are allocated now, parked moments and a mask's copy of the weights included."""
        states: list[Any] = [*(s for part in self.parts for s in part.state.values()), *self.parked.values()]
        states += [] if self.mask is None else self.mask.tensors
        return storage_bytes(t for state in states for t in _tensors(state))

    def state_dict(self, parts: bool = False) -> dict[str, Any]:
        """Moments by part and parameter number; the numbering follows the module and the active strips.

        `parts`: where each process has a part, leave them apart, as DTensors.
        """
        found = {str(i): {str(k): v for k, v in self._whole(part, parts).items()} for i, part in enumerate(self.parts)}
        together = None if self.split is None else self.split.held if parts else self.split.whole
        found |= {"parked": self._parked(self.parked, together)} if self.parked else {}
        return found | ({"mask": self.mask.state_dict()} if self.mask is not None else {})

    def _whole(self, part: torch.optim.Optimizer, apart: bool) -> dict[int, Any]:
        """State by number of the parameter, put together where each process has a part."""
        found: dict[int, Any] = part.state_dict()["state"]
        if self.split is None:
            return found
        leaves = self._numbered(part)
        together = self.split.held if apart else self.split.whole
        return {
            n: {k: together(leaves[n][0], v) if _like(v, leaves[n][1]) else v for k, v in kept.items()}
            for n, kept in found.items()
        }

    def _here(self, part: torch.optim.Optimizer, found: dict[int, Any]) -> dict[int, Any]:
        """What of such a state lies on this process."""
        if self.split is None:
            return found
        leaves = self._numbered(part)
        return {
            n: {k: self.split.here(leaves[n][0], v) if v.dim() == leaves[n][1].dim() else v for k, v in kept.items()}
            for n, kept in found.items()
        }

    def _parked(self, kept: Mapping[str, Any], of: Any) -> dict[str, dict[str, Any]]:
        """Moments that wait, by key, each as `of(name of its parameter, moment)` has it."""
        return {
            key: {k: of(key.split("[")[0], v) if of is not None and v.dim() else v for k, v in moments.items()}
            for key, moments in kept.items()
        }

    def _numbered(self, part: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
        """(name of the parameter, leaf) in the order of an optimizer's numbers."""
        keys = {id(leaf): key for key, leaf in self.leaves.items()}
        return [(self.names[keys[id(leaf)]], leaf) for group in part.param_groups for leaf in group["params"]]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            own = part.state_dict()
            own["state"] = self._here(part, {int(k): v for k, v in state.get(str(i), {}).items()})
            part.load_state_dict(own)
        self.parked = self._parked(state.get("parked", {}), None if self.split is None else self.split.here)
        if (self.mask is not None) != ("mask" in state):
            raise ValueError(
                f"the checkpoint's updates were {'masked' if 'mask' in state else 'not masked'} and this run has "
                f"optim.mask.kind = {self.cfg.mask.kind}: resume with the mask of that run"
            )
        if self.mask is not None:
            self.mask.load_state_dict(state["mask"])


def _like(value: Any, leaf: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == leaf.shape


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind tensors: what is allocated, each storage once, a view's whole storage."""
    found = {}
    for t in tensors:
        if t is not None:
            storage = t.untyped_storage()
            found[t.device, storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _tensors(value: Any) -> Iterable[Tensor]:
    """All tensors in an optimizer's state, in dicts and in helper objects (GaLore's projectors) too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def _key(name: str, part: Part) -> str:
    return f"{name}[{part.start}:{part.stop}]" if part.dim == 0 else f"{name}[:, {part.start}:{part.stop}]"
