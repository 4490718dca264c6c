"""The arms of a comparison: plain training, a gate, and the same gate with chance in the place of its scores."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hardware.text import short
from sparse_update.gates.config import GateConfig
from sparse_update.library.settings import AttachConfig
from sparse_update.weights.subset import SubsetConfig

DENSE, RANDOM = "dense", "random"
UNITS = {"none": "none", "sequence_after": "sequence", "token": "token", "token_exact": "token"}
"""Unit of a gate's settings -> unit of the backward of an attached gate; "sequence" goes before the forward."""
OF_THE_FILES = {"name", "unit", "signal", "signal_options", "policy", "policy_options", "keep_fraction", "noise_cut"}
OF_THE_FILES |= {"pool_windows", "replay_fraction", "plugins", "ngram_orders", "ngram_bits", "ngram_strength"}
"""Settings of `gate=NAME` that an attached gate has too."""


@dataclass(frozen=True)
class OwnArm:
    """One arm: plain training where `config` is None, else a model with that gate on it."""

    name: str
    config: AttachConfig | None = None

    @property
    def kind(self) -> str:
        """What of a step is left out, "dense" for nothing; arms of one kind share a factor of the clock."""
        cfg = self.config
        if cfg is None:
            return DENSE
        unit = cfg.backward.unit
        parts = [] if unit == "none" else ["token_exact" if cfg.backward.below == "exact" else unit]
        parts += [] if cfg.weights.kind == "all" else [cfg.weights.kind]
        return "+".join(parts) or "attached"

    def keep_fraction(self, kept: int, offered: int) -> float:
        """Share of what was offered that is trained on: sequences so far, times rows of a step."""
        if self.config is None:
            return 1.0
        return (kept / offered if offered else 1.0) * self.config.backward.keep_fraction


def gated(name: str, config: AttachConfig | Mapping[str, Any]) -> OwnArm:
    """The arm of a gate's settings. Raises ValueError for settings that are none, or that leave nothing out."""
    cfg = config if isinstance(config, AttachConfig) else AttachConfig.from_dict(config)
    if cfg.before.signal == "none" and cfg.backward.unit == "none" and cfg.weights.kind == "all":
        raise ValueError(
            f"arm {name}: its gate leaves nothing out. Set before.signal, backward.unit or weights.kind, such as "
            "backward: {unit: token, keep_fraction: 0.5}"
        )
    return OwnArm(name, cfg)


def by_chance(arm: OwnArm, name: str = RANDOM) -> OwnArm:
    """The control of a gated arm: as many sequences, rows and weights, drawn at random."""
    assert arm.config is not None
    cfg = copy.deepcopy(arm.config)
    before, backward, weights = cfg.before, cfg.backward, cfg.weights
    if before.signal != "none":
        before = replace(before, signal="random", policy="uniform", signal_options={}, policy_options={})
    if backward.unit != "none":
        backward = replace(backward, signal="random", policy="uniform", signal_options={}, policy_options={})
    if weights.kind in ("blocks", "block_columns", "layers"):
        weights = replace(weights, policy="random")
    before = replace(before, reference="") if before.signal == "random" else before
    return OwnArm(name, replace(cfg, before=before, backward=backward, weights=weights))


def arms_of(gates: Mapping[str, AttachConfig | Mapping[str, Any]]) -> list[OwnArm]:
    """Dense, the random controls (one for each different one) and the gates, in that order.

    Raises ValueError for a gate that leaves nothing out, or a name that a control has.
    """
    found = [gated(name, config) for name, config in gates.items()]
    if taken := [arm.name for arm in found if arm.name == DENSE or arm.name.startswith((f"{DENSE}_", RANDOM))]:
        raise ValueError(f"an arm is called {short(taken[0])}: names that begin so are the controls'; choose another")
    controls: list[OwnArm] = []
    for arm in found:
        name = RANDOM if not controls else f"{RANDOM}_{arm.name}"
        control = by_chance(arm, name)
        if control.config not in [other.config for other in controls]:
            controls.append(control)
    return [OwnArm(DENSE), *controls, *found]


def attachable(gate: GateConfig, subset: SubsetConfig) -> dict[str, Any]:
    """Settings of `gate=NAME` and `subset=NAME` as those of an attached gate; {} for plain training.

    Raises ValueError for what an attached gate does not have.
    """
    if gate.unit not in (*UNITS, "sequence"):
        raise ValueError(
            f"gate.unit = {gate.unit!r} looks into the package's own Transformer; for a model of one's own there are none, "
            "sequence, sequence_after, token and token_exact"
        )
    usual = vars(GateConfig())
    strange = [key for key, value in vars(gate).items() if key not in OF_THE_FILES and value != usual[key]]
    if strange:
        raise ValueError(
            f"gate.{strange[0]} = {short(getattr(gate, strange[0]))}: a gate on a model of one's own has no such setting"
        )
    found: dict[str, Any] = {}
    options = {"signal_options": gate.options_of_signal(), "policy_options": gate.options_of_policy()}
    choice = {"signal": gate.signal, "policy": gate.policy, "keep_fraction": gate.keep_fraction, **options}
    if gate.unit == "sequence":
        found["before"] = {**choice, "pool": gate.pool_windows, "replay": gate.replay_fraction}
    elif gate.unit != "none":
        found["backward"] = {**choice, "unit": UNITS[gate.unit]}
        if gate.unit == "token_exact":
            found["backward"]["below"] = "exact"
    if subset.kind != "all":
        found["weights"] = subset
    return found
