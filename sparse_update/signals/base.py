"""What a signal is, and how one is found by name: `make_signal("ngram", SignalContext(256, 128), {"bits": 20})`.

Shape letters: N windows offered, B windows of a step, T predicted tokens of a window, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sparse_update.data.records import Batch

LEVELS = ("token", "sequence", "block")
NEEDS = ("tokens", "forward", "backward")


class SignalError(ValueError):
    """A signal or an option that there is not, or that this model or stream cannot give."""


class Seen(Protocol):
    """What a training forward leaves behind: `backward.View`."""

    @property
    def loss_BT(self) -> Tensor: ...

    @property
    def signals(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True, eq=False)
class SignalContext:
    """What signals are made from. Only those that need the model, a reference or known text ask for it."""

    vocab_size: int
    context: int
    model: nn.Module | None = None
    """the model being trained, not a copy"""
    device: torch.device | str = "cpu"
    seed: int = 0
    reference: str = ""
    """folder of a checkpoint: the reference model"""
    known_tokens: Tensor | None = None
    """int64 (tokens,): text that the model knows already"""


class Signal:
    """How much is to be learnt from data, per token or per window, and what it costs to ask.

    needs "tokens": `score(batch)`, before any forward; called once on everything offered, in the order of the stream,
    and online signals learn there. needs "forward": `read(view, batch)`, out of the training forward. needs "backward":
    `take(gradients)`. `observe` is told after each step what was trained on. Scores are float32, (N, T) at level "token",
    (N,) at level "sequence"; high is surprising, in nats where it is a surprise.
    """

    name: ClassVar[str] = ""
    level: str = "token"
    needs: str = "tokens"
    want: frozenset[str] = frozenset()
    """entries of `View.signals` that `read` uses; a step plan's `want`"""

    def __init__(self, context: SignalContext) -> None:
        self.context = context

    def score(self, batch: Batch) -> Tensor:
        """Scores of windows before their forward, made with what was known before them. (N, T) or (N,)."""
        raise self._refusal("before the forward", "tokens")

    def per_window(self, batch: Batch) -> Tensor:
        """`score` as one number a window, (N,): the mean over its tokens."""
        score = self.score(batch)
        return score.mean(-1) if score.dim() == 2 else score

    def read(self, view: Seen, batch: Batch) -> Tensor:
        """Scores of the windows that went through a forward, (B, T) or (B,), without gradient."""
        raise self._refusal("out of the forward", "forward")

    def take(self, gradients: Mapping[str, Tensor | tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """Scores of blocks of weights out of the gradients of one backward: parameter -> (blocks,)."""
        raise self._refusal("out of the backward", "backward")

    def observe(self, batch: Batch, loss_BT: Tensor, progress: float) -> None:
        """Told after each step: what was trained on, its loss in nats (B, T), the share of the budget spent."""

    def flops(self, windows: int) -> int:
        """Floating-point operations of using the signal on so many windows, its own learning included."""
        return 0

    @property
    def cost_key(self) -> str:
        """Its key in the table of component times; counted once per window scored. Empty: free."""
        return f"signal[{self.name}]" if self.needs == "tokens" else ""

    def probe(self, windows: int) -> Callable[[], None]:
        """One use on `windows` fresh windows, for the table of component times (moves this signal's state)."""
        if self.needs != "tokens":
            raise SignalError(f"signal {self.name!r} comes with the training {self.needs}: time it with that step")
        generator = torch.Generator().manual_seed(0)
        shape, first = (windows, self.context.context + 1), [0]

        def once() -> None:
            # fresh tokens each time: a table slot seen a moment ago would lie in the cache
            tokens = torch.randint(0, self.context.vocab_size, shape, generator=generator).to(self.context.device)
            number = torch.arange(first[0], first[0] + windows)
            first[0] += windows
            self.per_window(Batch(tokens, torch.zeros(windows, dtype=torch.int8), number)).argsort()

        return once

    def state_dict(self) -> dict[str, Any]:
        """All that the next score depends on: nested dicts of tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""

    def _refusal(self, moment: str, needed: str) -> SignalError:
        others = [name for name, cls in SIGNALS.items() if cls.needs == needed]
        return SignalError(f"signal {self.name!r} cannot be had {moment}; these can: {', '.join(sorted(others))}")

    def _require(self, **given: Any) -> None:
        if missing := [key for key, value in given.items() if value is None or value == ""]:
            raise SignalError(f"signal {self.name!r} needs {', '.join(missing)}, which this gate was not given")

    def _positive(self, **values: float) -> None:
        for key, value in values.items():
            if not value > 0:
                raise SignalError(f"signal {self.name!r}: {key} = {value} must be positive")


SIGNALS: dict[str, type[Signal]] = {}
S = TypeVar("S", bound=type[Signal])


def register_signal(name: str) -> Callable[[S], S]:
    """Class decorator: makes a Signal known under `name`, so that YAML can ask for it. A taken name is refused."""

    def keep(cls: S) -> S:
        if not (isinstance(cls, type) and issubclass(cls, Signal)):
            raise SignalError(f"signal {name!r}: {cls!r} is no subclass of sparse_update.signals.Signal")
        for key, value, known in (("level", cls.level, LEVELS), ("needs", cls.needs, NEEDS)):
            if value not in known:
                raise SignalError(f"signal {name!r}: {key} = {value!r} is none of {', '.join(known)}")
        if name in SIGNALS:
            raise SignalError(f"signal {name!r} is taken by {SIGNALS[name].__qualname__}: choose another name")
        cls.name = name
        SIGNALS[name] = cls
        return cls

    return keep


def signal_names(needs: str | None = None) -> list[str]:
    """Known signals, or those that need this much."""
    return sorted(name for name, cls in SIGNALS.items() if needs is None or cls.needs == needs)


def signal_options(name: str) -> list[str]:
    """Names of the options of signal `name`. Raises SignalError for an unknown one, with the list."""
    if name not in SIGNALS:
        raise SignalError(f"there is no signal {name!r}: one of {', '.join(signal_names())}, or register_signal your own")
    return [p for p in inspect.signature(SIGNALS[name].__init__).parameters if p not in ("self", "context")]


def make_signal(name: str, context: SignalContext, options: Mapping[str, Any] | None = None) -> Signal:
    """The signal `name` with its options. Raises SignalError for an unknown name or option, with the known ones."""
    known, chosen = signal_options(name), dict(options or {})
    if unknown := sorted(set(chosen) - set(known)):
        raise SignalError(f"signal {name!r} has no option {', '.join(unknown)}: it takes {', '.join(known) or 'none'}")
    return SIGNALS[name](context, **chosen)
