"""Text token by token from a float or a deployed model: `generate(model, prompt, tokens)`.

How a module keeps its attention state is its own business. Two ways are known: `new_cache()` with `forward(tokens,
cache=...)`, as our Transformer has it, and Hugging Face's `past_key_values`. Any other module reads the whole text again
for every token. A deployed model's layers are called with the new tokens alone; its sigma-delta streams go on from call to
call (`Deployed.keep_state`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from neuro.analysis.tracing import evaluating
from neuro.deployment.deployed import Deployed

CONTEXT_KEYS = ("context", "n_positions", "max_position_embeddings")


def generate(
    model: nn.Module,
    prompt_BT: Tensor,
    tokens: int,
    *,
    cache: bool = True,
    context: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Continue a prompt; nothing of the model is changed.

    A text that fills the context goes on with its last half as the new context, with the cache and without.

    Args:
        model: a language model, (B, T) int64 -> logits (B, T, V) or an output with `.logits`; or what `deploy` made of it.
        prompt_BT: int64 (B, T) or (T,), at least one token.
        tokens: how many to add, at least 1.
        cache: keep keys and values from token to token where the module can; False reads everything again every time.
            Both give the same tokens up to the float rounding of what runs on the host.
        context: tokens that the model reads in a row; default: what its `cfg` or `config` says, else no limit.
        temperature: 0 takes the likeliest token, above 0 draws from softmax(logits / temperature).
        seed: of the draws.
        on_token: called with every new column (B,).

    Returns:
        int64 (B, T + tokens), or (T + tokens,) for a prompt (T,).

    Raises:
        ValueError: an empty prompt or one of another type, tokens below 1, a context below 2, a negative temperature;
            logits that are NaN or of another shape.
    """
    _check(prompt_BT, tokens, temperature)
    text_BT = prompt_BT if prompt_BT.dim() == 2 else prompt_BT[None]
    limit = _context(model) if context is None else context
    if limit is not None and limit < 2:
        raise ValueError(f"context is {limit}; generation needs at least 2 tokens in a row")
    reader = _Reader(model, cache)
    generator = torch.Generator(text_BT.device).manual_seed(seed)
    start, read = 0, 0  # the context begins at `start`; the cache holds the text up to `read`
    streams = model.keep_state() if reader.keeps and isinstance(model, Deployed) else nullcontext()
    with evaluating(model), streams:
        for _ in range(tokens):
            length = text_BT.shape[1]
            if limit is not None and length - start > limit:
                start = read = length - limit // 2
                reader.forget()
            if not reader.keeps:
                read = start
            logits_BV = reader(text_BT[:, read:], first=read == start)
            read = length
            new_B = _choose(logits_BV, temperature, generator)
            text_BT = torch.cat((text_BT, new_B[:, None]), dim=1)
            if on_token is not None:
                on_token(new_B)
    return text_BT if prompt_BT.dim() == 2 else text_BT[0]


def _check(prompt: Tensor, tokens: int, temperature: float) -> None:
    if prompt.dtype != torch.int64 or prompt.dim() not in (1, 2) or not prompt.numel():
        raise ValueError(f"the prompt is {prompt.dtype} {tuple(prompt.shape)}; int64 (B, T) or (T,), not empty, is needed")
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; at least 1 is needed")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; 0 takes the likeliest token, above 0 draws")


def _inner(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, Deployed) else model


def _context(model: nn.Module) -> int | None:
    """Tokens in a row that the model's own settings allow; None where they say nothing."""
    for settings in (getattr(_inner(model), name, None) for name in ("cfg", "config")):
        for key in CONTEXT_KEYS:
            value = getattr(settings, key, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


class _Reader:
    """Reads tokens and gives the logits after the last one (B, V), with the module's own cache where it has one."""

    def __init__(self, model: nn.Module, cache: bool) -> None:
        self.model = model
        parameters = inspect.signature(_inner(model).forward).parameters
        self.ours = cache and "cache" in parameters and hasattr(_inner(model), "new_cache")
        self.theirs = cache and not self.ours and {"past_key_values", "use_cache"} <= parameters.keys()
        self.uncached = "use_cache" in parameters
        if isinstance(model, Deployed) and not model.keeps_state:
            self.ours = self.theirs = False
        self.keeps = self.ours or self.theirs
        self._held: Any = None

    def forget(self) -> None:
        """The next call starts a new text."""
        self._held = None
        if self.keeps and isinstance(self.model, Deployed):
            self.model.reset_state()

    def __call__(self, tokens_BT: Tensor, first: bool) -> Tensor:
        if self.ours:
            if first:
                self._held = _inner(self.model).new_cache()  # type: ignore[operator]
            found = self.model(tokens_BT, cache=self._held)
        elif self.theirs:
            found = self.model(tokens_BT, past_key_values=None if first else self._held, use_cache=True)
            self._held = found.past_key_values
        else:
            found = self.model(tokens_BT, **({"use_cache": False} if self.uncached else {}))
        logits: Any = getattr(found, "logits", found)
        if not isinstance(logits, Tensor) or logits.shape[:-1] != tokens_BT.shape:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the model gave {shape}, not logits (B, T, V) for tokens {tuple(tokens_BT.shape)}")
        last: Tensor = logits[:, -1]
        if not bool(torch.isfinite(last).all()):
            raise ValueError("the model's logits hold NaN or infinite values")
        return last


def _choose(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    chance_BV = torch.softmax(logits_BV.double() / temperature, dim=-1)
    return torch.multinomial(chance_BV, 1, generator=generator)[:, 0]
