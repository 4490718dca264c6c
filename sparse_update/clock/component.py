"""What a run uses beside its steps, as the clock sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

SCORING_FORWARD = "scoring_forward"
"""Key of a forward of one window that only scores."""
WATCHED_STEP = "plain_step_watched"
"""Key of a plain step that the engine takes for a gate to observe, where others go by compiled autograd."""
_DEPTH = "|l="


def at_depth(key: str, layers: int | None) -> str:
    """Key of a component on a model of so many blocks, which is not what the table is of; `key` itself for None."""
    return key if layers is None else f"{key}{_DEPTH}{layers}"


def depth_of(key: str) -> tuple[str, int | None]:
    """What `at_depth` was given."""
    name, found, layers = key.partition(_DEPTH)
    return name, int(layers) if found else None


class Component(NamedTuple):
    """A component of the clock beside the steps themselves: scoring, a filter, what observing adds."""

    uses: int
    """Uses that one call stands for."""
    make: Callable[[], Callable[[], None]]
    """Makes the call, to be timed on this machine."""
    flops: int = 0
    """Counted operations of one call; 0 where none are counted. A shipped table prices by them."""
    work: Mapping[str, float] = MappingProxyType({})
    """Counted work of one call by the names of `work.COUNTS`, where a shipped table prices it by that."""
    kind: str = ""
    """Name of the factor on the prices of `work` (`shipped.added_factors`)."""
