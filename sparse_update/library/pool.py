"""Sequences before the forward, out of a data loader of the user's own: pools are scored, batches of the chosen come out.

Shape letters: N sequences of a pool, B of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.data.records import Batch
from sparse_update.gates.policies import kept_count, make_policy
from sparse_update.signals import Signal, SignalContext, SignalError, make_signal

TOKENS = ("input_ids", "tokens")


@dataclass
class PoolConfig:
    """Sequences before the forward. Raises ValueError for a rate outside (0, 1] or a share that does not fit."""

    signal: str = "none"
    """"none", or any registered signal that needs tokens only: ngram, novelty, random, ..."""
    keep_fraction: float = 1.0
    policy: str = "band"
    pool: int = 256
    """Sequences scored together."""
    replay: float = 0.0
    """Share of what is kept that is drawn at random from what the policy left out."""
    tokens: str = ""
    """Key of the tokens where batches are mappings; empty: input_ids or tokens."""
    index: str = ""
    """Key of each sequence's number, for signals that remember (stale_loss)."""
    signal_options: dict[str, Any] = field(default_factory=dict)
    policy_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(f"before.keep_fraction = {self.keep_fraction}: must lie in (0, 1]")
        if self.signal == "none" and self.keep_fraction != 1:
            raise ValueError("before.keep_fraction below 1 needs before.signal, for instance 'ngram' or 'random'")
        if not 0 <= self.replay < 1:
            raise ValueError(f"before.replay = {self.replay}: must lie in [0, 1)")
        if self.pool < 2 or self.keep_fraction * self.pool < 1:
            raise ValueError(f"before.pool = {self.pool}: needs 2 sequences or more, and at least one of them kept")


class Pool:
    """Scores and keeps sequences; state goes with the gate's."""

    def __init__(self, cfg: PoolConfig, model: nn.Module, vocab_size: int, seed: int) -> None:
        self.cfg, self.model, self.vocab_size, self.seed = cfg, model, vocab_size, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.offered = self.kept = 0
        self.signal: Signal | None = None
        self.waiting: list[dict[str, Tensor]] = []
        self.queue: list[dict[str, Tensor]] = []
        self.current: Batch | None = None
        self._restored: Mapping[str, Any] | None = None
        if cfg.signal != "none":
            self.policy = make_policy(cfg.policy, dict(cfg.policy_options))
            if not self.policy.fixed:
                raise ValueError(
                    f"before.policy = {cfg.policy!r} keeps as many as the data says: batches of a fixed size from a "
                    "fixed pool need "
                    "band, top, uniform or another that keeps keep_fraction"
                )
            # Made once here so that unknown names and options are refused at once, and again when the length is known.
            self._signal(2)

    def _signal(self, length: int) -> Signal:
        if self.vocab_size < 1:
            raise SignalError(
                "before.signal needs the vocabulary's size, and the model has no nn.Embedding: set vocab_size"
            )
        context = SignalContext(self.vocab_size, length - 1, model=self.model, seed=self.seed)
        signal = make_signal(self.cfg.signal, context, self.cfg.signal_options)
        if signal.needs != "tokens":
            raise SignalError(
                f"before.signal = {self.cfg.signal!r} needs a {signal.needs}, and sequences are chosen before it: use "
                "backward.signal"
            )
        if hasattr(signal, "by") and not self.cfg.index:
            raise SignalError(
                f"before.signal = {self.cfg.signal!r} remembers sequences by number: batches must be mappings, "
                "before.index the key of it"
            )
        return signal

    def filter(self, batches: Iterable[Any], size: int = 0) -> Iterator[Any]:
        """Batches of `size` kept sequences (0: as many as the first batch has), of the form of those that come in.

        A batch is a tensor (B, T), a tuple or list of tensors whose first holds the tokens, or a mapping; every tensor in
        it counts sequences along its first dimension. Sequences that do not fill a last pool or batch wait for
        the next call.
        Raises ValueError where the lengths of sequences differ within a pool, or the batches end before one came out.
        """
        if self.signal is None and self.cfg.signal == "none":
            yield from batches
            return
        form: Any = None
        came = 0
        for batch in batches:
            form, columns = batch, _columns(batch)
            self._check(columns)
            size = size or len(columns[self._key(columns)])
            self.waiting += [{k: v[i] for k, v in columns.items()} for i in range(len(columns[self._key(columns)]))]
            while len(self.waiting) >= self.cfg.pool:
                pool, self.waiting = self.waiting[: self.cfg.pool], self.waiting[self.cfg.pool :]
                self.queue += self._choose(pool)
            while len(self.queue) >= size:
                now, self.queue = self.queue[:size], self.queue[size:]
                made = {k: torch.stack([item[k] for item in now]) for k in now[0]}
                self.current = self._batch(made)
                came += 1
                yield _like(form, made)
        if form is not None and not came and not self.queue:
            raise ValueError(
                f"the batches ended after {len(self.waiting)} sequences, and one pool is {self.cfg.pool}: lower before.pool"
            )

    def _key(self, columns: Mapping[str, Tensor]) -> str:
        for key in (self.cfg.tokens,) if self.cfg.tokens else (*TOKENS, "0"):
            if key in columns:
                return key
        raise ValueError(
            f"a batch has {', '.join(columns)}: its tokens are looked for under "
            f"{self.cfg.tokens or ' or '.join(TOKENS)}; set before.tokens"
        )

    def _check(self, columns: Mapping[str, Tensor]) -> None:
        tokens = columns[self._key(columns)]
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens of a batch are {tokens.dtype} {tuple(tokens.shape)}: whole numbers (B, T) are needed")
        if self.waiting and self.waiting[0].keys() != columns.keys():
            raise ValueError(
                f"batches of {', '.join(self.waiting[0])} and of {', '.join(columns)} in one pool: one form is needed"
            )
        for key, value in columns.items():
            if value.dim() == 0 or len(value) != len(tokens):
                raise ValueError(
                    f"batch entry {key} is {tuple(value.shape)}, the tokens {tuple(tokens.shape)}: one row each is needed"
                )
            if self.waiting and key in self.waiting[0] and self.waiting[0][key].shape != value[0].shape:
                raise ValueError(
                    f"sequences of {tuple(self.waiting[0][key].shape)} and {tuple(value[0].shape)} under {key} in one "
                    "pool: pad them "
                    "to one length before the gate"
                )

    def _batch(self, columns: Mapping[str, Tensor]) -> Batch:
        tokens = columns[self._key(columns)].long().cpu()
        number = columns[self.cfg.index].long().cpu() if self.cfg.index else torch.full((len(tokens),), -1)
        return Batch(tokens, torch.zeros(len(tokens), dtype=torch.int8), number)

    def _choose(self, pool: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        columns = {k: torch.stack([item[k] for item in pool]) for k in pool[0]}
        if self.cfg.index and self.cfg.index not in columns:
            raise ValueError(f"before.index = {self.cfg.index!r}: a batch has {', '.join(columns)}")
        batch = self._batch(columns)
        if int(batch.tokens.max()) >= self.vocab_size:
            raise ValueError(
                f"token {int(batch.tokens.max())} in a batch, the vocabulary has {self.vocab_size}: set vocab_size"
            )
        if self.signal is None:
            self.signal = self._signal(batch.tokens.shape[1])
            if self._restored is not None:
                self.signal.load_state_dict(self._restored)
                self._restored = None
        score = self.signal.score(batch)
        if score.dim() == 2:
            mask = (
                columns["attention_mask"][:, -score.shape[1] :].cpu()
                if "attention_mask" in columns
                else torch.ones_like(score)
            )
            score = (score * mask).sum(1) / mask.sum(1).clamp(min=1)
        kept = kept_count(len(pool), self.cfg.keep_fraction)
        again = round(kept * self.cfg.replay)
        index = self.policy.select(score, (kept - again) / len(pool), self.generator).index.cpu()
        if again:
            left = torch.ones(len(pool), dtype=torch.bool)
            left[index] = False
            others = left.nonzero().flatten()
            index = torch.cat((index, others[torch.randperm(len(others), generator=self.generator)[:again]])).sort().values
        self.offered += len(pool)
        self.kept += len(index)
        return [pool[i] for i in index.tolist()]

    def observe(self, loss_BT: Tensor) -> None:
        """What was trained on, for signals that learn from it; the batch that `filter` gave last."""
        batch = self.current
        if self.signal is None or batch is None or len(batch.tokens) != len(loss_BT):
            return
        predicted = batch.tokens.shape[1] - 1
        if loss_BT.shape[1] >= predicted:
            self.signal.observe(batch, loss_BT[:, :predicted].float().cpu(), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Signal, policy, draw, and the sequences that wait; where the loader stands is the loader's own state."""
        state: dict[str, Any] = {"generator": self.generator.get_state(), "offered": self.offered, "kept": self.kept}
        if self.cfg.signal != "none":
            state |= {"policy": self.policy.state_dict(), "waiting": _stack(self.waiting), "queue": _stack(self.queue)}
            if self.signal is not None:
                state["signal"] = self.signal.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.generator.set_state(state["generator"])
        self.offered, self.kept = int(state["offered"]), int(state["kept"])
        if self.cfg.signal != "none":
            self.policy.load_state_dict(state["policy"])
            self.waiting, self.queue = _unstack(state["waiting"]), _unstack(state["queue"])
            self.signal, self._restored = None, state.get("signal")


def _columns(batch: Any) -> dict[str, Tensor]:
    if isinstance(batch, Tensor):
        return {"0": batch}
    if isinstance(batch, Mapping):
        if strange := [k for k, v in batch.items() if not isinstance(v, Tensor)]:
            raise ValueError(
                f"batch entry {strange[0]} is no tensor: let the collate function make tensors of it, or leave it out"
            )
        return dict(batch)
    if isinstance(batch, (tuple, list)) and batch and all(isinstance(v, Tensor) for v in batch):
        return {str(i): v for i, v in enumerate(batch)}
    raise ValueError(f"a batch is a {type(batch).__name__}: a tensor, a tuple of tensors or a mapping to tensors is needed")


def _like(form: Any, columns: dict[str, Tensor]) -> Any:
    if isinstance(form, Tensor):
        return columns["0"]
    return columns if isinstance(form, Mapping) else type(form)(columns[str(i)] for i in range(len(columns)))


def _stack(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.stack([item[k] for item in items]) for k in items[0]} if items else {}


def _unstack(columns: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    length = len(next(iter(columns.values()))) if columns else 0
    return [{k: v[i] for k, v in columns.items()} for i in range(length)]
