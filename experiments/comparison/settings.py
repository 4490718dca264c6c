"""The settings of a run as one flat mapping, and in which of them two runs differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hardware.text import short

# Where a run is written and how it shows itself; none of these changes what is trained.
NO_PART_OF_THE_EXPERIMENT = frozenset(
    ("run", "resume", "progress", "idle_s", "zeus", "trainer.component_times", "trainer.checkpoint_every_s")
)
NAMES = frozenset(("arm", "stream", "seed"))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one level: {"optim": {"lr": 1}} becomes {"optim.lr": 1}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def experiment_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved configuration (`config.yaml`) describes the experiment: all of it but its names and its places."""
    return {key: value for key, value in flat(config).items() if key not in NO_PART_OF_THE_EXPERIMENT | NAMES}


def differing(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all of these flat settings, in the order in which they first appear.

    A key that one of them lacks differs, unless the settings are empty: an empty mapping is a run that kept none.
    """
    known = [settings for settings in runs if settings]
    missing = object()
    keys = dict.fromkeys(key for settings in known for key in settings)
    return [key for key in keys if any(s.get(key, missing) != known[0].get(key, missing) for s in known[1:])]


def difference_text(ours: Mapping[str, Any], theirs: Mapping[str, Any], most: int = 4) -> str:
    """How two runs differ, as "optim.lr 0.008 and 0.004"; empty where they do not. At most `most` settings are named."""
    keys = differing((ours, theirs))
    said = [f"{key} {short(ours.get(key, 'not set'))} and {short(theirs.get(key, 'not set'))}" for key in keys[:most]]
    rest = len(keys) - most
    return ", ".join([*said, *([f"{rest} more"] if rest > 0 else [])])
