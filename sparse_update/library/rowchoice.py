"""Which rows of a backward are kept, by what the forward of the user's own model shows.

Shape letters: B batch, T token, V vocabulary, N = B T, K kept rows, S kept sequences, R kept rows of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.data.records import Batch
from sparse_update.gates.policies import kept_count, make_policy
from sparse_update.library.methods.scoring import ExcessOver
from sparse_update.signals import Signal, SignalContext, SignalError, make_signal

UNITS = ("none", "sequence", "token")
BELOW = ("compact", "exact")


@dataclass
class BackwardConfig:
    """Rows of the backward. Raises ValueError for a rate outside (0, 1] or an unknown unit."""

    unit: str = "none"
    """"none" | "sequence": whole sequences after the forward, exact | "token": rows of every sequence."""
    keep_fraction: float = 1.0
    signal: str = "token_loss"
    """Any registered signal that comes out of the forward, "random", or "excess" over a reference model's loss."""
    policy: str = "band"
    """Any registered policy that keeps a fixed number of different items."""
    below: str = "compact"
    """unit "token": "compact" leaves dropped rows out in every layer (biased: their keys and values get no gradient);
    "exact" only where their gradient is exactly zero (head, last block but its keys and values)."""
    signal_options: dict[str, Any] = field(default_factory=dict)
    policy_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"backward.unit = {self.unit!r}: one of {', '.join(UNITS)}")
        if self.below not in BELOW:
            raise ValueError(f"backward.below = {self.below!r}: one of {', '.join(BELOW)}")
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(f"backward.keep_fraction = {self.keep_fraction}: must lie in (0, 1]")
        if self.unit == "none" and self.keep_fraction != 1:
            raise ValueError("backward.keep_fraction below 1 needs backward.unit = 'sequence' or 'token'")
        if self.unit != "token" and self.below == "exact":
            raise ValueError("backward.below = 'exact' needs backward.unit = 'token': whole sequences are exact anyway")


@dataclass(frozen=True, eq=False)
class Kept:
    """`flat_K`: kept rows among N = B T, ascending; `weight_K` multiplies their losses; `normaliser`: () divides the sum;
    `share`: () what a normaliser of one's own is multiplied with, the share of the loss that is kept."""

    flat_K: Tensor
    weight_K: Tensor
    normaliser: Tensor
    share: Tensor


@dataclass(frozen=True, eq=False)
class _View:
    loss_BT: Tensor
    signals: Mapping[str, Tensor]


class _NoTokens:
    """Stands for a batch whose tokens the gate was not given."""

    @property
    def tokens(self) -> Tensor:
        raise SignalError("this signal looks at the tokens: call gate.loss(logits, labels, tokens=inputs)")


class RowChoice:
    """Chooses as many rows each time, by signal and policy."""

    def __init__(self, cfg: BackwardConfig, model: nn.Module, vocab_size: int, seed: int) -> None:
        self.cfg = cfg
        self.generator = torch.Generator().manual_seed(seed)
        self.began = False
        if cfg.unit == "none":
            return
        self.policy = make_policy(cfg.policy, dict(cfg.policy_options))
        if not self.policy.fixed or cfg.policy == "importance":
            raise ValueError(
                f"backward.policy = {cfg.policy!r} keeps a varying number of rows or draws some twice: a backward of "
                "fixed shape "
                "needs band, top, uniform or another that keeps keep_fraction of different rows"
            )
        context = SignalContext(vocab_size, 0, model=model, seed=seed)
        self.signal: Signal = (
            ExcessOver(context) if cfg.signal == "excess" else make_signal(cfg.signal, context, cfg.signal_options)
        )
        if self.signal.needs != "forward" and cfg.signal != "random":
            raise SignalError(
                f"backward.signal = {cfg.signal!r} does not come out of the forward: choose sequences by it with "
                "before.signal"
            )

    def choose(
        self,
        loss_BT: Tensor,
        valid_BT: Tensor,
        logits: Tensor | None,
        labels: Tensor | None,
        tokens: Tensor | None,
        found: Any,
        reference_BT: Tensor | None = None,
    ) -> Kept:
        """The kept rows of this forward; `reference_BT`: losses of a reference, for the signal "excess".

        Raises SignalError where the signal asks for what the model did not give.
        """
        cfg, (batch, length) = self.cfg, loss_BT.shape
        with torch.no_grad():
            given = self._signals(logits, reference_BT)
            inputs: Any = _NoTokens()
            if tokens is not None:
                last = tokens[:, -1:] if labels is None else labels[:, -1:].clamp(min=0)
                inputs = Batch(torch.cat((tokens, last), 1), torch.zeros(batch, dtype=torch.int8), torch.full((batch,), -1))
            score = self.signal.read(_View(loss_BT, given), inputs).float()
            if cfg.unit == "sequence":
                if cfg.keep_fraction * batch < 1 and not self.began:  # a last, smaller batch keeps one
                    raise ValueError(
                        f"backward.keep_fraction = {cfg.keep_fraction} of a batch of {batch} is less than one sequence: "
                        f"raise it to {1 / batch:g}, or take larger batches"
                    )
                if score.dim() == 2:
                    score = (score * valid_BT).sum(1) / valid_BT.sum(1).clamp(min=1)
                pick = self.policy.select(score, cfg.keep_fraction, self.generator)
                index_S = self._check(pick.index, kept_count(batch, cfg.keep_fraction), batch)
                flat = (index_S[:, None] * length + torch.arange(length, device=index_S.device)).flatten()
                weight = None if pick.weight is None else pick.weight[:, None].expand(-1, length).flatten()
            else:
                if score.shape != loss_BT.shape:
                    raise SignalError(
                        f"signal {cfg.signal!r} gives {tuple(score.shape)}, tokens need {tuple(loss_BT.shape)}"
                    )
                if (length < 2 or cfg.keep_fraction * length < 1) and not self.began:
                    raise ValueError(
                        f"backward.keep_fraction = {cfg.keep_fraction} of {length} tokens is less than one row"
                    )
                flat, weight = self._tokens(score, valid_BT)
            self.began = True
            weight_K = torch.ones_like(flat, dtype=torch.float32) if weight is None else weight.to(flat.device)
            valid_K = valid_BT.flatten()[flat]
            weight_K = (weight_K * valid_K).to(loss_BT.dtype if loss_BT.dtype == torch.float64 else torch.float32)
            total = valid_BT.sum()
            unweighted = valid_K.sum()
            normaliser = unweighted if weight is None else total
            share = unweighted / total.clamp(min=1) if weight is None else torch.ones_like(unweighted, dtype=torch.float32)
            return Kept(flat, weight_K, normaliser.clamp(min=1), share)

    def _tokens(self, score: Tensor, valid_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens without a label are chosen last: they rank below all, and a band's noise cut is taken from the others."""
        cfg, (batch, length) = self.cfg, score.shape
        low = score.masked_fill(~valid_BT, float("-inf"))
        pick = self.policy.select(low, cfg.keep_fraction, self.generator)
        kept = kept_count(length, cfg.keep_fraction)
        index_BR = pick.index.to(score.device)
        if index_BR.shape != (batch, kept) or (index_BR.sort(1).values.diff(dim=1) == 0).any():
            raise ValueError(
                f"policy {cfg.policy!r} gave rows {tuple(index_BR.shape)}, not {kept} different ones of each of {batch} "
                "sequences"
            )
        flat = (index_BR.sort(1).values + torch.arange(batch, device=score.device)[:, None] * length).flatten()
        if pick.weight is None:
            return flat, None
        return flat, pick.weight.to(score.device).gather(1, index_BR.argsort(1)).flatten()

    @staticmethod
    def _check(index: Tensor, kept: int, offered: int) -> Tensor:
        index = index.sort().values
        if index.shape != (kept,) or (index.diff() == 0).any():
            raise ValueError(f"the policy gave {index.numel()} sequences of {offered}, not {kept} different ones")
        return index

    def _signals(self, logits: Tensor | None, reference_BT: Tensor | None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for want in self.signal.want:
            if want == "reference":
                assert reference_BT is not None
                found[want] = reference_BT.nan_to_num()  # no label there: chosen last whatever it is
                continue
            if want != "entropy":
                raise SignalError(
                    f"signal {self.cfg.signal!r} needs {want!r}, which the outputs of a model of one's own do not show: "
                    "choose token_loss, excess_entropy or random, or register a signal that computes it"
                )
            if logits is None:
                raise SignalError(
                    f"signal {self.cfg.signal!r} needs logits: call gate.loss(logits, labels), not gate.loss(losses)"
                )
            log_p = logits.float().log_softmax(-1)
            found[want] = -(log_p.exp() * log_p).sum(-1)
        return found

    def state_dict(self) -> dict[str, Any]:
        if self.cfg.unit == "none":
            return {}
        return {
            "generator": self.generator.get_state(),
            "policy": self.policy.state_dict(),
            "signal": self.signal.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.cfg.unit == "none":
            return
        self.generator.set_state(state["generator"])
        self.policy.load_state_dict(state["policy"])
        self.signal.load_state_dict(state["signal"])
