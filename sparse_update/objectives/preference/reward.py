"""A reward model: the Transformer with one number read out of the state after a row's last token.

A row is a prompt with an answer, closing token included. Rewards are learned from pairs up to a constant, so `calibrate`
sets their mean and deviation over rows of the policy that training starts from (as Gao et al. 2022, section 2.3, set the
mean): 0 is that policy's usual reward.

Shape letters: R rows, T tokens of the longest row, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sparse_update.data.tokens import Tokenizer
from sparse_update.loop.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from sparse_update.loop.stored_model import stored_shape
from sparse_update.objectives.preference.errors import PreferenceError, VocabularyMismatch
from sparse_update.tasks.encoding import PromptTooLong
from sparse_update.transformer import Transformer

KIND = "reward_model"


class RewardModel(nn.Module):
    """Reward of rows of tokens, in the units of Bradley and Terry's log-odds until `calibrate`.

    Args:
        trunk: read up to its last normalised state; its own head is not used.
        tokenizer: record of the tokenizer whose tokens it reads (`Tokenizer.record()`).
    """

    def __init__(self, trunk: Transformer, tokenizer: Mapping[str, Any]) -> None:
        super().__init__()
        self.trunk = trunk
        self.tokenizer = dict(tokenizer)
        self.reward = nn.Linear(trunk.cfg.width, 1, bias=False)
        nn.init.zeros_(self.reward.weight)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @staticmethod
    def of(model: Transformer, tokenizer: Tokenizer) -> RewardModel:
        """One that starts from a copy of `model`. Raises VocabularyMismatch where the tokenizer is not the model's."""
        if model.cfg.vocab_size != tokenizer.vocab_size:
            raise VocabularyMismatch(
                f"the model has {model.cfg.vocab_size} tokens and the tokenizer {tokenizer.vocab_size}: take the tokenizer "
                "that the model was trained with"
            )
        return RewardModel(copy.deepcopy(model), tokenizer.record())

    def forward(self, tokens_RT: Tensor, lengths_R: Tensor) -> Tensor:
        """Rewards (R,). `tokens_RT`: int64, rows begin in column 0; what is behind a row's length has no effect on it."""
        hidden_RTD = self.trunk.hidden(tokens_RT)
        last_RD = hidden_RTD[torch.arange(len(tokens_RT), device=tokens_RT.device), lengths_R - 1]
        raw_R = self.reward(last_RD)[:, 0]
        return (raw_R - cast(Tensor, self.shift)) / cast(Tensor, self.scale)

    @torch.no_grad()
    def score(self, rows: Sequence[np.ndarray], batch_rows: int = 256) -> np.ndarray:
        """Rewards of rows of tokens, float64 (rows,); rows of like length are read together.

        Raises PreferenceError for an empty row or a token that the model has not, PromptTooLong beyond its context.
        """
        found = np.empty(len(rows))
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self._check(rows, lengths)
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(rows), batch_rows):
            chosen = order[start : start + batch_rows]
            tokens, length = padded([rows[i] for i in chosen], self.trunk.embed.weight.device)
            found[chosen] = self(tokens, length).double().cpu().numpy()
        return found

    def _check(self, rows: Sequence[np.ndarray], lengths: np.ndarray) -> None:
        vocab, context = self.trunk.cfg.vocab_size, self.trunk.cfg.context
        if len(rows) and not lengths.min():
            raise PreferenceError(f"row {int(lengths.argmin())} is empty: a reward needs a token to be read after")
        if len(rows) and lengths.max() > context:
            raise PromptTooLong(
                f"row {int(lengths.argmax())} has {lengths.max()} tokens, the reward model reads {context}: take one with "
                "a longer context, or shorter answers"
            )
        for number, row in enumerate(rows):
            if row.min() < 0 or row.max() >= vocab:
                raise VocabularyMismatch(
                    f"row {number} holds token {int(row.max() if row.max() >= vocab else row.min())}, the reward model has "
                    f"tokens 0 to {vocab - 1}: it was made for another vocabulary"
                )

    @torch.no_grad()
    def calibrate(self, rows: Sequence[np.ndarray]) -> None:
        """Set mean 0 and deviation 1 over these rows. Raises PreferenceError where their rewards are all equal."""
        cast(Tensor, self.shift).zero_()
        cast(Tensor, self.scale).fill_(1.0)
        raw = self.score(rows)
        if len(raw) < 2 or not raw.std() > 0:
            raise PreferenceError(f"{len(raw)} rows with equal rewards: no deviation to calibrate by; train it first")
        cast(Tensor, self.shift).fill_(float(raw.mean()))
        cast(Tensor, self.scale).fill_(float(raw.std()))

    def save(self, folder: str | Path, meta: Mapping[str, Any] | None = None) -> Path:
        """Write it as a checkpoint (safetensors, every file under a checksum) and return the folder."""
        own = {"kind": KIND, "model": asdict(self.trunk.cfg), "tokenizer": self.tokenizer}
        return save_checkpoint(folder, self.state_dict(), {}, {**(meta or {}), **own})

    @staticmethod
    def load(folder: str | Path, tokenizer: Tokenizer | None = None) -> RewardModel:
        """Read one that `save` wrote.

        Args:
            tokenizer: the policy's; another one than the reward model's is refused.

        Raises:
            VocabularyMismatch: it reads other tokens than `tokenizer` makes.
            CheckpointError: the folder holds none, a damaged one, or another kind of checkpoint.
        """
        found = load_checkpoint(folder)
        if found.meta.get("kind") != KIND:
            raise CheckpointError(
                f"{folder} is no reward model but a checkpoint of kind {found.meta.get('kind')!r}: name the folder that "
                "RewardModel.save wrote"
            )
        try:
            model = RewardModel(Transformer(stored_shape(found, "trunk.")), found.meta["tokenizer"])
            model.load_state_dict(found.model)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{folder} does not hold the reward model that it says it does: {error}") from error
        if tokenizer is not None:
            check_vocabulary(model, tokenizer)
        return model.eval()


def check_vocabulary(model: RewardModel, tokenizer: Tokenizer) -> None:
    """Raises VocabularyMismatch unless the reward model reads the tokens that `tokenizer` makes."""
    theirs = tokenizer.record()
    if model.tokenizer != theirs or model.trunk.cfg.vocab_size != tokenizer.vocab_size:
        raise VocabularyMismatch(
            f"the reward model reads {model.trunk.cfg.vocab_size} tokens of kind {model.tokenizer.get('kind')!r}, the "
            f"policy writes {tokenizer.vocab_size} of kind {theirs.get('kind')!r}"
            f"{', with other merges' if model.tokenizer.get('kind') == theirs.get('kind') else ''}: the same number means "
            "another text to each; train a reward model with the policy's tokenizer"
        )


def padded(rows: Sequence[np.ndarray], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows as one int64 tensor (R, T), zeros behind each, and their lengths (R,)."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    tokens = np.zeros((len(rows), int(lengths.max(initial=1))), dtype=np.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    return torch.from_numpy(tokens).to(device), torch.from_numpy(lengths).to(device)
