"""The settings of an attached gate, from a dataclass or from nested plain dicts as read from YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparse_update.library.methods.presets import with_method
from sparse_update.library.methods.vcas import GradientConfig
from sparse_update.library.pool import PoolConfig
from sparse_update.library.rowchoice import BackwardConfig
from sparse_update.weights.subset import SubsetConfig


@dataclass
class AttachConfig:
    """All of a gate: sequences before the forward, rows of the backward, samples, weights. `from_dict` takes dicts."""

    before: PoolConfig = field(default_factory=PoolConfig)
    backward: BackwardConfig = field(default_factory=BackwardConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)
    weights: SubsetConfig = field(default_factory=SubsetConfig)
    """kinds all, blocks and block_columns (strips of every gated matrix but embeddings, tied weights and the head), layers;
    every policy of `SubsetConfig`, and those given to `register_subset_policy`"""
    sign_scale: float = 1.0
    """With weights.inactive = "sign": step of the inactive weights, as a share of their optimizer's learning rate."""
    exclude: tuple[str, ...] = ()
    """Names of modules that stay as they are; shell patterns, such as "encoder.*"."""
    vocab_size: int = 0
    """For signals; 0 takes that of the model's first embedding."""
    seed: int = 0
    total_steps: int = 0
    """Optimizer steps of the whole training, for settings that end before it does (before.anneal_fraction, weights.until);
    0: `Gate.step(progress=...)` says how far it is."""
    method: str = field(default="", init=False)
    """Name of the published method that these settings began with: the key "method" of `from_dict`."""

    def __post_init__(self) -> None:
        if self.total_steps < 0:
            raise ValueError(f"total_steps = {self.total_steps}: must not be negative")
        if self.sign_scale <= 0:
            raise ValueError(f"sign_scale = {self.sign_scale}: must be positive")
        if self.gradient.unit != "none" and self.backward.unit != "none":
            raise ValueError(
                f"gradient.unit = {self.gradient.unit!r} samples the gradient of all tokens, and backward.unit = "
                f"{self.backward.unit!r} leaves some out: leave one of them at none"
            )

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> AttachConfig:
        """From nested dicts, as read from YAML; "method" names a published method, whose settings the others then change.

        Raises ValueError for an unknown key or method, with the known ones.
        """
        if not isinstance(given, Mapping):
            return _from_dict(cls, given, "")
        found: AttachConfig = _from_dict(cls, with_method(given), "")
        found.method = str(given.get("method") or "")
        return found

    def plain(self) -> dict[str, Any]:
        """What a state depends on, name -> value: all about the weights; of the choices of rows and sequences their unit,
        signal and policy."""
        found = {f"weights.{k}": v for k, v in dataclasses.asdict(self.weights).items() if k != "name"}
        found |= {f"backward.{k}": getattr(self.backward, k) for k in ("unit", "signal", "policy")}
        found |= {f"before.{k}": getattr(self.before, k) for k in ("signal", "policy")}
        found["gradient.unit"] = self.gradient.unit
        return found | {"exclude": list(self.exclude), "seed": self.seed, "sign_scale": self.sign_scale}


def _from_dict(cls: Any, given: Any, at: str) -> Any:
    if not isinstance(given, Mapping):
        raise ValueError(f"{at or 'the gate config'} = {given!r}: must be a mapping of names to values")
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{at}{unknown[0]} is no setting of the gate; {at or 'the top level'} has {', '.join(known)}")
    values: dict[str, Any] = {}
    for key, value in given.items():
        make = known[key].default_factory
        if isinstance(make, type) and dataclasses.is_dataclass(make) and not dataclasses.is_dataclass(value):
            value = _from_dict(make, value, f"{at}{key}.")
        elif key == "exclude":
            if isinstance(value, str):
                raise ValueError(f"exclude = {value!r}: a list of module names, such as [{value!r}]")
            value = tuple(value)
        else:
            _check_type(f"{at}{key}", value, known[key])
        values[key] = value
    return cls(**values)


def _check_type(name: str, value: Any, f: dataclasses.Field[Any]) -> None:
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
    kind = kinds.get(str(f.type))
    if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and f.type != "bool")):
        raise ValueError(f"{name} = {value!r}: must be of type {f.type}")
