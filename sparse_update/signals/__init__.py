"""What data is worth: signals by name.

`make_signal("ngram", SignalContext(256, 128))` makes one, `@register_signal("mine")` adds one.
"""

from sparse_update.signals import containment, forward, gradients, memory, novelty, proxies, reference  # noqa: F401
from sparse_update.signals.base import (
    SIGNALS,
    Signal,
    SignalContext,
    SignalError,
    make_signal,
    register_signal,
    signal_names,
    signal_options,
)

__all__ = [
    "SIGNALS",
    "Signal",
    "SignalContext",
    "SignalError",
    "make_signal",
    "register_signal",
    "signal_names",
    "signal_options",
]
