"""Published methods as settings of an attached gate, by name: `attach(model, method="lisa")`.

The values are those of `configs/published`, the same methods in our own trainer; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """`settings`: nested plain values, as `AttachConfig.from_dict` takes them. `source`: where the rule and its values are
    published. `needs`: what the user must supply, "" for nothing."""

    settings: Settings
    source: str
    needs: str = ""


METHODS: dict[str, Method] = {
    "rho1": Method(
        {
            "backward": {
                "unit": "token",
                "below": "exact",
                "signal": "excess",
                "policy": "top",
                "keep_fraction": 0.6,
            }
        },
        "Rho-1, Lin et al., NeurIPS 2024, arXiv 2404.07965: loss on the 60 % of the tokens of largest excess",
        "reference",
    ),
    "rho_loss": Method(
        {"before": {"signal": "excess", "policy": "top", "keep_fraction": 0.1, "pool": 256}},
        "RHO-LOSS, Mindermann et al., ICML 2022, arXiv 2206.07137: the tenth of a pool of largest excess",
        "reference",
    ),
    "infobatch": Method(
        {
            "before": {
                "signal": "stale_loss",
                "policy": "soft",
                "policy_options": {"drop": 0.5},
                "anneal_fraction": 0.125,
            }
        },
        "InfoBatch, Qin et al., ICLR 2024, arXiv 2303.04947: half of what was below the mean at its last visit is dropped, "
        "the other half weighs 1 / (1 - 0.5); nothing is dropped in the last 12.5 %",
        "before.index, total_steps",
    ),
    "selective_backprop": Method(
        {
            "before": {
                "signal": "token_loss",
                "policy": "cdf",
                "policy_options": {"beta": 1.0, "history": 1024},
                "keep_fraction": 0.5,
            }
        },
        "Selective-Backprop, Jiang et al. 2019, arXiv 1910.00762: kept with probability CDF(loss)^beta over the last 1,024 "
        "losses",
    ),
    "vcas": Method(
        {"gradient": {"unit": "vcas"}},
        "VCAS, Chen et al., ICLR 2024, arXiv 2402.17227: sequences of activation gradients and rows of weight gradients, "
        "sampled at rates that a variance test sets every 100 steps (tau 0.025, alpha 0.01, beta 0.95, M = 2)",
    ),
    "lisa": Method(
        {"weights": {"kind": "layers", "policy": "random", "active_layers": 1, "change_every_steps": 20}},
        "LISA, Pan et al. 2024, arXiv 2403.17919: one layer, drawn anew every 20 steps, with embedding and head",
    ),
    "badam": Method(
        {
            "weights": {
                "kind": "layers",
                "policy": "rotate",
                "active_layers": 1,
                "change_every_steps": 50,
                "train_embeddings": False,
            }
        },
        "BAdam, Luo et al. 2024, arXiv 2404.02827: one layer at a time, 50 steps each; embedding and head frozen",
    ),
    "frugal": Method(
        {
            "weights": {
                "kind": "blocks",
                "policy": "random",
                "active_fraction": 0.25,
                "change_every_steps": 200,
                "inactive": "sign",
            }
        },
        "FRUGAL, Zmushko et al., ICML 2025, arXiv 2411.07837: a quarter of each matrix by the optimizer, drawn anew every "
        "200 steps, the rest by the gradient's sign at the same rate (sign_scale; 0.1 for fine-tuning)",
    ),
}


def known() -> str:
    """The names, for messages."""
    return ", ".join(sorted(METHODS))


def with_method(given: Settings) -> dict[str, Any]:
    """Settings with those of their `method` under them: what is given wins, value by value.

    Raises ValueError for an unknown method, with the known ones.
    """
    settings = {key: value for key, value in given.items() if key != "method"}
    name = given.get("method") or ""
    if not name:
        return settings
    if name not in METHODS:
        raise ValueError(f"method = {str(name)[:60]!r}: one of {known()}")
    return _over(METHODS[name].settings, settings)


def _over(below: Settings, above: Settings) -> dict[str, Any]:
    found = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = _over(found[key], value) if both else value
    # options belong to the signal or policy that they were written for
    for kind in ("signal", "policy"):
        if above.get(kind, below.get(kind)) != below.get(kind) and f"{kind}_options" not in above:
            found.pop(f"{kind}_options", None)
    return found
