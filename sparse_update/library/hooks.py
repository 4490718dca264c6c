"""Hooks on the steps of every optimizer, for an object that may go out of use at any time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils.hooks import RemovableHandle

Owner = TypeVar("Owner")
Hook = Callable[[Any, Any, Any], None]
"""Of torch: optimizer, positional and keyword arguments of its step."""

_left: list[RemovableHandle] = []
"""Hooks of owners that are gone; taken out when the next one is registered."""


def on_every_step(
    register: Callable[[Hook], RemovableHandle], owner: Owner, call: Callable[[Owner, Any], None]
) -> Callable[[], None]:
    """Have `call(owner, optimizer)` made at every step, as long as the owner is in use, and return what ends it.

    The owner is held weakly. Its hook is not taken out when it is collected: that can happen at any time, and while torch
    goes through its hooks it must not ("OrderedDict mutated during iteration", torch 2.13). Until the next registration
    it stays, and does nothing.

    Args:
        register: `register_optimizer_step_pre_hook` or `register_optimizer_step_post_hook` of torch.
    """
    while _left:
        _left.pop().remove()
    me = weakref.ref(owner)

    def hook(optimizer: Any, args: Any, options: Any) -> None:
        found = me()
        if found is not None:
            call(found, optimizer)

    handle = register(hook)
    finalizer = weakref.finalize(owner, _left.append, handle)

    def end() -> None:
        if finalizer.detach() is not None:
            handle.remove()

    return end
