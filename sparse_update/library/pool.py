"""Sequences before the forward, out of a data loader of the user's own: pools are scored, batches of the chosen come out.

Signals that need tokens only cost no forward. Those that come out of a forward (the model's loss, its excess over a
reference) cost one without gradient for every sequence that is offered, and one of the reference.

Shape letters: N sequences of a pool, B of a batch, T tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.data.records import Batch
from sparse_update.gates.policies import kept_count, make_policy
from sparse_update.library.methods.scoring import ExcessOver, Losses, batch_losses, looking, mean_of
from sparse_update.signals import Signal, SignalContext, SignalError, make_signal
from sparse_update.step.plan import View

TOKENS = ("input_ids", "tokens")
WEIGHT = "weight of the gate"
"""Column of what waits in the queue: what the loss of a sequence is multiplied with."""
OUTSTANDING = 64
"""So many batches are remembered that came out of `filter` and went into no loss yet: loaders fetch ahead."""


@dataclass
class PoolConfig:
    """Sequences before the forward. Raises ValueError for a rate outside (0, 1] or a share that does not fit."""

    signal: str = "none"
    """"none"; any registered signal that needs tokens only: ngram, novelty, random, ...; or one that comes out of a forward
    of its own, without gradient: token_loss, and excess over a reference model's loss."""
    keep_fraction: float = 1.0
    policy: str = "band"
    """Any registered policy but importance. Those that keep a varying number (cdf, soft, threshold) fill the same queue,
    from which batches of one size come out; weights that a policy gives multiply the losses in `Gate.loss`."""
    pool: int = 256
    """Sequences scored together."""
    replay: float = 0.0
    """Share of what is kept that is drawn at random from what the policy left out."""
    tokens: str = ""
    """Key of the tokens where batches are mappings; empty: input_ids or tokens."""
    index: str = ""
    """Key of each sequence's number, for signals that remember (stale_loss); its place, such as "2", in a tuple."""
    reference: str = ""
    """Key of each sequence's losses under a reference model, (N,) or (N, T), for the signal "excess" without a model; taken
    out of what comes out."""
    anneal_fraction: float = 0.0
    """Last share of the training in which everything passes, unscored."""
    signal_options: dict[str, Any] = field(default_factory=dict)
    policy_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(f"before.keep_fraction = {self.keep_fraction}: must lie in (0, 1]")
        if self.signal == "none" and self.keep_fraction != 1:
            raise ValueError("before.keep_fraction below 1 needs before.signal, for instance 'ngram' or 'random'")
        for key in ("replay", "anneal_fraction"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"before.{key} = {getattr(self, key)}: must lie in [0, 1)")
        if self.pool < 2 or self.keep_fraction * self.pool < 1:
            raise ValueError(f"before.pool = {self.pool}: needs 2 sequences or more, and at least one of them kept")


@dataclass(eq=False)
class Given:
    """A batch that came out of `filter`; `weight_B`: weights of its sequences' losses, None for all alike; `loss_BT`: what
    they were in training, once it was."""

    batch: Batch
    weight_B: Tensor | None
    loss_BT: Tensor | None = None


class Pool:
    """Scores and keeps sequences; state goes with the gate's.

    `progress`: share of the training that is done, set by the gate.
    """

    def __init__(
        self, cfg: PoolConfig, model: nn.Module, vocab_size: int, seed: int, reference: nn.Module | None = None
    ) -> None:
        self.cfg, self.model, self.vocab_size, self.seed, self.reference = cfg, model, vocab_size, seed, reference
        self.progress = 0.0
        self.generator = torch.Generator().manual_seed(seed)
        self.offered = self.kept = 0
        self.signal: Signal | None = None
        self.waiting: list[dict[str, Tensor]] = []
        self.queue: list[dict[str, Tensor]] = []
        self.given: deque[Given] = deque(maxlen=OUTSTANDING)
        self.size = 0
        self.form: str | None = None
        """What a batch is: "tensor", "mapping", "tuple" or "list"."""
        self._restored: Mapping[str, Any] | None = None
        if cfg.signal != "none":
            self.policy = make_policy(cfg.policy, dict(cfg.policy_options))
            if cfg.policy == "importance":
                raise ValueError(
                    "before.policy = 'importance' draws some sequences twice and judges by the trained steps whether it "
                    "pays, which a filter before them cannot: take top, band, uniform, cdf or soft"
                )
            if cfg.replay and not self.policy.fixed:
                raise ValueError(
                    f"before.replay = {cfg.replay} is a share of a fixed number, and before.policy = {cfg.policy!r} keeps "
                    "as many as the data says: leave before.replay at 0"
                )
            # Made once here so that unknown names and options are refused at once, and again when the length is known.
            self._signal(2)

    def _signal(self, length: int) -> Signal:
        if self.vocab_size < 1:
            raise SignalError(
                "before.signal needs the vocabulary's size, and the model has no nn.Embedding: set vocab_size"
            )
        context = SignalContext(self.vocab_size, length - 1, model=self.model, seed=self.seed)
        if self.cfg.signal == "excess":
            return ExcessOver(context)
        signal = make_signal(self.cfg.signal, context, self.cfg.signal_options)
        if signal.needs == "backward" or (signal.needs == "forward" and signal.want):
            raise SignalError(
                f"before.signal = {self.cfg.signal!r} needs {', '.join(signal.want) or 'a backward'}, which a scoring "
                "forward of a model of one's own does not show: use backward.signal, or token_loss"
            )
        if hasattr(signal, "by") and not self.cfg.index:
            raise SignalError(
                f"before.signal = {self.cfg.signal!r} remembers sequences by number: batches must be mappings, "
                "before.index the key of it"
            )
        return signal

    def filter(self, batches: Iterable[Any], size: int = 0, losses: Losses | None = None) -> Iterator[Any]:
        """Batches of `size` kept sequences (0: as many as the first batch has), of the form of those that come in.

        A batch is a tensor (B, T), a tuple or list of tensors whose first holds the tokens, or a mapping; every tensor in
        it counts sequences along its first dimension. Sequences that do not fill a last pool or batch wait for
        the next call.

        `losses`: (model, batch) -> losses (B, T) or (B,) of a scoring forward, called with the model or the reference and a
        batch of the form that comes in; None takes next tokens, see `methods.scoring.batch_losses`.

        Raises ValueError where the lengths of sequences differ within a pool, or the batches end before one came out.
        """
        if self.signal is None and self.cfg.signal == "none":
            yield from batches
            return
        form: Any = None
        came, scored = 0, False
        if size in (0, self.size):
            yield from self._waiting_batches()
        for batch in batches:
            form, columns = batch, _columns(batch)
            self._check(columns)
            size = size or len(columns[self._key(columns)])
            self.size, self.form = size, _form(batch)
            self.waiting += [{k: v[i] for k, v in columns.items()} for i in range(len(columns[self._key(columns)]))]
            if self._annealed():
                self.queue += self._pass(self.waiting)
                self.waiting = []
            while len(self.waiting) >= self.cfg.pool:
                pool, self.waiting = self.waiting[: self.cfg.pool], self.waiting[self.cfg.pool :]
                self.queue += self._choose(pool, self.form, losses or self._losses, size)
                scored = True
            for made in self._waiting_batches():
                came += 1
                yield made
        if form is not None and not came and not self.queue and not scored:
            raise ValueError(
                f"the batches ended after {len(self.waiting)} sequences, and one pool is {self.cfg.pool}: lower before.pool"
            )

    def _waiting_batches(self) -> Iterator[Any]:
        """Whole batches of chosen sequences. A pool gives several: those that a checkpoint cut off come first after it."""
        while self.queue and len(self.queue) >= self.size:
            now, self.queue = self.queue[: self.size], self.queue[self.size :]
            made = {k: torch.stack([item[k] for item in now]) for k in now[0]}
            weight_B = made.pop(WEIGHT)
            given = Given(self._batch(made), None if bool((weight_B == 1).all()) else weight_B)
            if self._learns or given.weight_B is not None:
                self.given.append(given)
            made.pop(self.cfg.reference, None)
            yield _like(self.form, made)

    def _annealed(self) -> bool:
        return self.cfg.anneal_fraction > 0 and self.progress >= 1 - self.cfg.anneal_fraction

    def _pass(self, items: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Everything, with weight 1."""
        self.offered += len(items)
        self.kept += len(items)
        return [{**item, WEIGHT: torch.ones(())} for item in items]

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

    def _choose(
        self, pool: list[dict[str, Tensor]], form: str | None, losses: Losses, size: int
    ) -> list[dict[str, Tensor]]:
        columns = {k: torch.stack([item[k] for item in pool]) for k in pool[0]}
        for setting in ("index", "reference"):
            if (key := getattr(self.cfg, setting)) and key not in columns:
                raise ValueError(f"before.{setting} = {key!r}: a batch has {', '.join(columns)}")
        batch = self._batch(columns)
        if int(batch.tokens.max()) >= self.vocab_size:
            raise ValueError(
                f"token {int(batch.tokens.max())} in a batch, the vocabulary has {self.vocab_size}: set vocab_size"
            )
        self._start(batch.tokens.shape[1])
        assert self.signal is not None
        if self.signal.needs == "forward":
            score = self._forward(columns, batch, form, losses, size)
        else:
            score = self.signal.score(batch)
            if score.dim() == 2:
                mask = (
                    columns["attention_mask"][:, -score.shape[1] :].cpu()
                    if "attention_mask" in columns
                    else torch.ones_like(score)
                )
                score = (score * mask).sum(1) / mask.sum(1).clamp(min=1)
        again = round(kept_count(len(pool), self.cfg.keep_fraction) * self.cfg.replay)
        share = self.cfg.keep_fraction
        if self.policy.fixed:
            share = (kept_count(len(pool), share) - again) / len(pool)
        chosen = self.policy.select(score, share, self.generator, self.progress)
        index = chosen.index.cpu()
        weight = torch.ones(len(index))
        if chosen.weight is not None:  # their mean over what was offered is 1
            weight = chosen.weight.float().cpu() * (len(index) / len(pool))
        if again:
            left = torch.ones(len(pool), dtype=torch.bool)
            left[index] = False
            others = left.nonzero().flatten()
            index = torch.cat((index, others[torch.randperm(len(others), generator=self.generator)[:again]])).sort().values
            weight = torch.ones(len(index))
        self.offered += len(pool)
        self.kept += len(index)
        return [{**pool[i], WEIGHT: weight[n]} for n, i in enumerate(index.tolist())]

    def _start(self, length: int) -> None:
        """Make the signal for sequences of that many tokens, with the state that was loaded."""
        if self.signal is None:
            self.signal = self._signal(length)
            if self._restored is not None:
                self.signal.load_state_dict(self._restored)
                self._restored = None

    def _forward(self, columns: dict[str, Tensor], batch: Batch, form: str | None, losses: Losses, size: int) -> Tensor:
        """Scores (N,) out of a forward without gradient, as many sequences at a time as a batch has."""
        assert self.signal is not None
        own, other = [], []
        for at in range(0, len(batch.tokens), size):
            part = {k: v[at : at + size] for k, v in columns.items()}
            given = part.pop(self.cfg.reference, None)
            sequences = _like(form, part)
            with looking(self.model):
                own.append(losses(self.model, sequences).detach().float().cpu())
            if "reference" not in self.signal.want:
                continue
            if given is not None:
                other.append(given.float().cpu())
            else:
                assert self.reference is not None
                with looking(self.reference):
                    other.append(losses(self.reference, sequences).detach().float().cpu())
        loss = torch.cat(own)
        for found in (loss, *other):
            if found.dim() not in (1, 2) or found.is_complex():
                raise ValueError(f"losses of a scoring forward are {tuple(found.shape)}: (B, T) or (B,) are needed")
        if other:
            reference = torch.cat(other)
            if reference.shape != loss.shape:  # one of them is a number for each sequence
                loss, reference = mean_of(loss), mean_of(reference)
            return mean_of(self.signal.read(View(loss, {"reference": reference}), batch))
        return mean_of(self.signal.read(View(loss, {}), batch))

    def _losses(self, model: nn.Module, batch: Any) -> Tensor:
        return batch_losses(model, batch, self._key(batch) if isinstance(batch, Mapping) else "")

    # what was trained on

    @property
    def listens(self) -> bool:
        """Whether it matters which batch a loss is of: for weights, or a signal that learns from losses."""
        return self._learns or any(given.weight_B is not None for given in self.given)

    @property
    def _learns(self) -> bool:
        return self.signal is not None and type(self.signal).observe is not Signal.observe

    def of(self, labels: Tensor | None, shift: bool, batch: int) -> Given | None:
        """The batch out of `filter` that a loss of `batch` sequences is of: the newest with these labels as its tokens, as
        loaders fetch ahead; where labels are something else, or there are none, the newest of that size."""
        fits = [given for given in reversed(self.given) if len(given.batch.tokens) == batch]
        if len(fits) > 1 and labels is not None:
            own = labels.cpu() if shift else labels[:, : fits[0].batch.tokens.shape[1] - 1].cpu()
            for given in fits:
                tokens = given.batch.tokens if shift else given.batch.tokens[:, 1 : 1 + own.shape[1]]
                if tokens.shape == own.shape and bool(((own == tokens) | (own < 0)).all()):
                    return given
        return fits[0] if fits else None

    def trained(self, given: Given, loss_BT: Tensor, labels: Tensor | None, shift: bool) -> None:
        """Note the losses (B, T) of a batch, for `observe`; tokens without a label count as their sequence's mean."""
        loss_BT = loss_BT.detach().float().cpu()
        if shift:
            labels, loss_BT = None if labels is None else labels[:, 1:], loss_BT[:, :-1]
        if labels is not None and bool((labels < 0).any()):
            valid = (labels >= 0).cpu()
            mean = (loss_BT * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
            loss_BT = torch.where(valid, loss_BT, mean)
        given.loss_BT = loss_BT

    def observe(self, progress: float) -> None:
        """After a step: signals learn from the batches that were trained on since the last."""
        self.progress = progress
        for given in [g for g in self.given if g.loss_BT is not None]:
            predicted = given.batch.tokens.shape[1] - 1
            assert given.loss_BT is not None
            if self.signal is not None and given.loss_BT.shape[1] >= predicted:
                self.signal.observe(given.batch, given.loss_BT[:, :predicted], progress)
            self.given.remove(given)

    def state_dict(self) -> dict[str, Any]:
        """Signal, policy, draw, and the sequences that wait; where the loader stands is the loader's own state."""
        state: dict[str, Any] = {"generator": self.generator.get_state(), "progress": self.progress}
        state |= {"offered": self.offered, "kept": self.kept}
        if self.cfg.signal != "none":
            state |= {"policy": self.policy.state_dict(), "waiting": _stack(self.waiting), "queue": _stack(self.queue)}
            state |= {"size": self.size, "form": self.form}
            if self.signal is not None:
                state["signal"] = self.signal.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.generator.set_state(state["generator"])
        self.offered, self.kept = int(state["offered"]), int(state["kept"])
        self.progress = float(state.get("progress", 0.0))
        if self.cfg.signal != "none":
            self.policy.load_state_dict(state["policy"])
            self.waiting, self.queue = _unstack(state["waiting"]), _unstack(state["queue"])
            self.queue = [{WEIGHT: torch.ones(()), **item} for item in self.queue]
            self.given.clear()
            self.size, self.form = int(state.get("size", 0)), state.get("form")
            self.signal, self._restored = None, state.get("signal")
            if left := self.queue or self.waiting:  # it learns from what is left too
                self._start(len(left[0][self._key(left[0])]))


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


def _form(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return "tensor"
    return "mapping" if isinstance(batch, Mapping) else "tuple" if isinstance(batch, tuple) else "list"


def _like(form: str | None, columns: dict[str, Tensor]) -> Any:
    if form == "tensor":
        return columns["0"]
    if form not in ("tuple", "list"):
        return columns
    return (tuple if form == "tuple" else list)(columns[i] for i in sorted(columns, key=int))


def _stack(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.stack([item[k] for item in items]) for k in items[0]} if items else {}


def _unstack(columns: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    length = len(next(iter(columns.values()))) if columns else 0
    return [{k: v[i] for k, v in columns.items()} for i in range(length)]
