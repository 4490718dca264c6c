"""Text in, text out: `generate(model, tokenizer, ["17+25="], n=4, new_tokens=8)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_update.data.tokens import Tokenizer
from sparse_update.generation.sampler import Sampler
from sparse_update.generation.settings import GenerateConfig, GenerationError, Outputs
from sparse_update.tasks.base import END
from sparse_update.transformer import Transformer


@dataclass(frozen=True, eq=False)
class Texts:
    """Outputs as text: `texts[p][s]` is sample s of prompt p, without what ended it."""

    texts: list[list[str]]
    outputs: Outputs

    def __getitem__(self, prompt: int) -> list[str]:
        return self.texts[prompt]

    def __len__(self) -> int:
        return len(self.texts)


def stop_tokens(tokenizer: Tokenizer, stop: str = END) -> list[int]:
    """Every token that holds the character `stop`, one byte of UTF-8; [] for ""."""
    wanted = stop.encode()
    if len(wanted) > 1:
        raise GenerationError(f"stop = {stop!r}: one ASCII character, or none")
    return [token for token in range(tokenizer.vocab_size) if wanted and wanted in tokenizer.decode([token])]


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    stop: str = END,
    ids: Sequence[int] | None = None,
    **settings: Any,
) -> Texts:
    """Continue each prompt.

    Args:
        model: whose vocabulary is the tokenizer's.
        prompts: text, not empty.
        stop: an ASCII character that ends an output, "" for none.
        ids: the prompts' numbers (`Sampler.sample`).
        settings: of `GenerateConfig`: n, new_tokens, temperature, top_p, seed, ...

    Bytes that are no UTF-8 are shown as U+FFFD; `outputs` has the tokens themselves.

    Raises:
        GenerationError, PromptTooLong: as `Sampler`; a model of another vocabulary; an unknown setting.
    """
    if model.cfg.vocab_size != tokenizer.vocab_size:
        raise GenerationError(
            f"the model has {model.cfg.vocab_size} tokens and the tokenizer {tokenizer.vocab_size}: take the tokenizer "
            "that the model was trained with"
        )
    known = GenerateConfig.__dataclass_fields__
    if unknown := sorted(set(settings) - set(known)):
        raise GenerationError(f"generate has no setting {', '.join(unknown)}: it takes {', '.join(known)}")
    sampler = Sampler(model, GenerateConfig(**settings), stop_tokens(tokenizer, stop))
    tokens = [np.asarray(row, dtype=np.int64) for row in tokenizer.encode([prompt.encode() for prompt in prompts])]
    outputs = sampler.sample(tokens, ids)
    found = []
    for row in outputs:
        data = tokenizer.decode(row)
        found.append((data.partition(stop.encode())[0] if stop else data).decode(errors="replace"))
    return Texts([found[start : start + outputs.n] for start in range(0, len(found), outputs.n)], outputs)
