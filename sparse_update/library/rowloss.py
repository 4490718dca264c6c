"""The loss of a gated model: per token, over the rows that the gate keeps; and which layers drop rows exactly.

Shape letters: B batch, T token, V vocabulary, N = B T, K kept rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_update.library.layers import Found
from sparse_update.library.linear import MIXED, UNSEEN, Layer
from sparse_update.library.methods.scoring import output_losses
from sparse_update.library.methods.vcas import Vcas
from sparse_update.library.processes import world_size
from sparse_update.library.rowchoice import BackwardConfig, RowChoice
from sparse_update.library.tracking.keptloss import Arm, Aside, KeptLoss
from sparse_update.library.tracking.rows import GateError, Rows
from sparse_update.library.tracking.trace import Trace

NO_LABEL = -100
"""torch's own label of a token that is not predicted."""


def plain_loss(
    logits: Tensor,
    labels: Tensor | None,
    shift: bool = False,
    normaliser: Tensor | float | None = None,
    weight_B: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy over all tokens with a label, or of per-token losses (B, T) without `labels`; see `Gate.loss`.

    `weight_B` multiplies the losses of each sequence, not the number that divides them.
    """
    if labels is None:
        losses = logits if weight_B is None else logits * weight_B[:, None].to(logits)
        return losses.mean() if normaliser is None else losses.sum() / normaliser
    if shift:
        labels = shifted(labels)
    if weight_B is None:
        total = F.cross_entropy(_wide(logits).flatten(0, 1), labels.flatten(), reduction="sum")
    else:
        each = F.cross_entropy(_wide(logits).flatten(0, 1), labels.flatten(), reduction="none")
        total = (each.view(labels.shape) * weight_B[:, None].to(each)).sum()
    return total / ((labels != NO_LABEL).sum().clamp(min=1) if normaliser is None else normaliser)


def shifted(labels: Tensor) -> Tensor:
    """Inputs as labels, (B, T): row t predicts the token after it, the last one nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=NO_LABEL)


NOT_FOLLOWED = (
    "the gate could not follow the loss's tokens to any gated layer, so every row of every layer is computed and nothing "
    "is saved: give gate.loss the logits (or losses) that come out of the model's own forward, with their graph"
)


FOREIGN = "the loss's tokens or samples were not found in what the watched forward gave"
UNCALLED = "it was not called in the forward that was watched"


class RowLoss:
    """Chooses rows by their losses and leaves the others out of the backward.

    Args:
        cfg: signal, policy, share and place of the choice.
        found, rows: the gated layers, and what tells them which rows are kept.
        model, vocab_size, seed: for the signal.
        reference: a model whose losses the signal "excess" is counted from; None where they are given.
    """

    def __init__(
        self,
        cfg: BackwardConfig,
        found: Found,
        rows: Rows,
        model: nn.Module,
        vocab_size: int,
        seed: int,
        reference: nn.Module | None = None,
    ) -> None:
        self.cfg, self.found, self.rows, self.model, self.reference = cfg, found, rows, model, reference
        self.choice = RowChoice(cfg, model, vocab_size, seed)
        self.vcas: Vcas | None = None
        """what samples the gradient, where it is sampled"""
        self.last_BT: Tensor | None = None
        """Losses per token of the last forward, nats."""
        self.missed = 0
        """products of layers that are not sure of their rows, formed in full until the last watched forward"""
        self.step_flops = math.nan
        """of the watched forward with its backward"""
        self.steps = 0
        """Optimizer steps so far."""

    def start(self) -> None:
        """Make the layers leave dropped rows out, where rows are dropped at all."""
        if self.vcas is None and (self.cfg.unit == "none" or self.cfg.keep_fraction == 1):
            return
        self.rows.wanted = True
        for layer in self.found.layers:
            layer.compact = self.cfg.below == "compact"
        self.rows.trace = Trace(self.cfg.unit == "sequence" or self.vcas is not None)
        self.watch()

    def watch(self) -> None:
        """Watch the next forward, to learn where the tokens are among each layer's rows."""
        assert self.rows.trace is not None
        gated = {id(m) for m in self.found.gated}
        holders = [m for m in self.model.modules() if any(id(part) in gated for part in m.modules())]
        self.rows.trace.arm(holders)

    def watch_again(self) -> None:
        """Forget what was seen of a forward, and watch the next one; nothing where no rows are dropped."""
        if self.rows.trace is not None:
            self.rows.trace.disarm()
            self.watch()

    def look(self, output: Tensor, leaves: Callable[[], Sequence[Tensor]]) -> None:
        """Read a watched forward by its logits (B, T, V) or (B, V), and find the exact layers where that is asked for."""
        wide = output if output.dim() == 3 else output.unsqueeze(0 if self.cfg.unit == "token" else 1)
        batch, length = wide.shape[:2]
        if self.rows.trace is not None:
            self._learn(output, batch, length, True)
        if self.cfg.below == "exact":
            self.probe(output, (batch, length), leaves())

    def stop(self) -> None:
        """Watch no more."""
        if self.rows.trace is not None:
            self.rows.trace.disarm()

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        shift: bool,
        tokens: Tensor | None,
        normaliser: Tensor | float | None,
        others: Tensor | None,
        leaves: Callable[[], Sequence[Tensor]],
        weight_B: Tensor | None = None,
        reference_BT: Tensor | None = None,
    ) -> Tensor:
        """The loss, as `Gate.loss` describes it.

        `leaves`: gives what is updated, for the look at one backward. `weight_B`: of whole sequences, known before the
        forward.
        """
        given = logits
        logits, labels = _as_batch(logits, labels, self.cfg.unit)
        if labels is not None and shift:
            tokens = labels if tokens is None else tokens
            labels = shifted(labels)
        loss_BT = _per_token(logits, labels)
        self.last_BT = loss_BT
        valid_BT = torch.ones_like(loss_BT, dtype=torch.bool) if labels is None else labels != NO_LABEL
        if self.vcas is not None and torch.is_grad_enabled():
            self._learn(given, len(loss_BT), loss_BT.shape[1], labels is not None)
            return self._beside(self._sampled(self.vcas, logits, labels, valid_BT, normaliser, leaves, weight_B), others)
        if self.cfg.unit == "none" or not torch.is_grad_enabled():
            return _with(plain_loss(logits, labels, False, normaliser, weight_B), others)
        if self.cfg.signal == "excess":
            reference_BT = self._reference(loss_BT, labels, tokens, reference_BT)
        kept = self.choice.choose(
            loss_BT, valid_BT, logits if labels is not None else None, labels, tokens, self.found, reference_BT
        )
        count = kept.normaliser if normaliser is None else torch.as_tensor(normaliser, device=logits.device) * kept.share
        batch, length = loss_BT.shape
        if self.rows.trace is not None:
            self._learn(given, batch, length, labels is not None)
        if self.cfg.below == "exact" and any(layer.exact is None for layer in self.found.layers):
            self.probe(given, (batch, length), leaves())
        weight_K = kept.weight_K
        if weight_B is not None:
            weight_K = weight_K * weight_B.to(weight_K)[kept.flat_K // length]
        if labels is None:
            loss = (logits.reshape(-1).index_select(0, kept.flat_K) * weight_K).sum() / count
        else:
            loss = KeptLoss.apply(logits, labels.flatten(), kept.flat_K, weight_K, count)
        if not self.rows.wanted:
            return _with(loss, others)
        units = kept.flat_K[::length] // length if self.cfg.unit == "sequence" else kept.flat_K
        armed: Tensor = Arm.apply(loss, self.rows, units, (batch, length))
        return self._beside(armed, others)

    def _beside(self, armed: Tensor, others: Tensor | None) -> Tensor:
        """A gated loss and another, whose gradient is formed for all rows."""
        if others is None:
            return armed
        if world_size() > 1:
            raise GateError(
                "gate.loss(..., others=...) with several processes: gradients would be shared before they are complete. "
                "Run two backwards, the first inside model.no_sync()"
            )
        found: Tensor = Aside.apply(armed, others.detach(), [others], self.rows)
        return found

    def _learn(self, result: Tensor, batch: int, length: int, has_columns: bool) -> None:
        """Read the watched forward, or watch another where what is known does not hold for this batch."""
        trace = self.rows.trace
        assert trace is not None
        if not trace.armed:
            more = batch > 1 and (length > 1 or trace.whole)
            unsure = self._unsure()
            if unsure and (more or sum(layer.dense_calls for layer in unsure) > self.missed):
                self.watch()
            return
        if not trace.forwards:
            return
        layouts = trace.layouts(result, batch, length, has_columns)
        if layouts is None or all(isinstance(found, str) for found in layouts.values()):
            warnings.warn(NOT_FOLLOWED, stacklevel=4)
        for layer in self.found.layers:
            layer.products = trace.count.own.get(layer, 0.0)
            if layer.why_dense in UNSEEN:
                continue
            found = MIXED if layer.mixed else FOREIGN if layouts is None else layouts.get(layer, UNCALLED)
            layer.layout, layer.why_dense = (None, found) if isinstance(found, str) else (found, "")
        clean = trace.clean(layer for layer in self.found.layers if layer.layout is not None)
        for layer in self.found.layers:
            layer.clean = layer in clean
        self.step_flops = math.inf if layouts is None else trace.count.step  # nothing of it is reached
        self.missed = sum(layer.dense_calls for layer in self._unsure())
        trace.disarm()

    def _unsure(self) -> list[Layer]:
        return [layer for layer in self.found.layers if layer.layout is not None and layer.layout.unsure]

    def reach(self) -> float | None:
        """Of the FLOPs of a forward and backward, the share in backward products that fall with the rows that are kept;
        None where no forward was watched yet, or its count is not known."""
        own = sum(layer.products for layer in self.found.layers if layer.layout is not None and layer.compact)
        share = own / self.step_flops if self.step_flops else math.nan
        return share if math.isfinite(share) else None

    def _sampled(
        self,
        vcas: Vcas,
        logits: Tensor,
        labels: Tensor | None,
        valid_BT: Tensor,
        normaliser: Tensor | float | None,
        leaves: Callable[[], Sequence[Tensor]],
        weight_B: Tensor | None,
    ) -> Tensor:
        """The plain loss, whose backward samples; before it a test of the rates, where it is time for one."""
        count = valid_BT.sum().clamp(min=1) if normaliser is None else normaliser
        batch, length = valid_BT.shape

        def loss_of(part_B: Tensor) -> Tensor:
            weights_B = part_B if weight_B is None else part_B * weight_B.to(part_B)
            return plain_loss(logits, labels, False, count, weights_B)

        if vcas.due(self.steps):
            vcas.test(self.steps, loss_of, (batch, length), leaves())
        return vcas.sampled(plain_loss(logits, labels, False, count, weight_B), batch, length)

    def _reference(self, loss_BT: Tensor, labels: Tensor | None, tokens: Tensor | None, given_BT: Tensor | None) -> Tensor:
        """Losses of the reference, (B, T) on the losses' device: those that are given, else by its forward."""
        if given_BT is not None:
            if given_BT.shape != loss_BT.shape:
                raise ValueError(
                    f"gate.loss: reference_losses {tuple(given_BT.shape)} for losses {tuple(loss_BT.shape)}: one each"
                )
            return given_BT.detach().to(loss_BT.device)
        if self.reference is None:
            raise GateError("gate.loss(..., reference_losses=...): this gate was attached with reference = 'given'")
        if labels is None or tokens is None:
            raise GateError(
                "the reference model needs inputs and labels: gate.loss(logits, labels, tokens=inputs), or give its losses "
                "with gate.loss(..., reference_losses=...)"
            )
        if bool((tokens < 0).any()):
            raise GateError(
                "labels hold -100 and so are not the inputs of the reference model: gate.loss(..., tokens=inputs), or "
                "reference_losses=..."
            )
        return output_losses(self.reference, tokens, labels).to(loss_BT.device)

    def state_dict(self) -> dict[str, Any]:
        """Of the choice, and of what samples the gradient."""
        state = self.choice.state_dict()
        return state if self.vcas is None else {**state, "vcas": self.vcas.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.choice.load_state_dict(state)
        if self.vcas is not None:
            self.vcas.load_state_dict(state["vcas"])

    def probe(self, output: Tensor, shape: tuple[int, int], leaves: Sequence[Tensor]) -> None:
        """Find the layers where dropped rows have an exactly zero gradient: NaN is put into the gradient of one token of
        the output, and what it does not reach in the other rows is independent of it."""
        batch, length = shape
        taint = torch.zeros_like(output)
        taint.view(batch * length, -1)[length - 1] = float("nan")
        others = torch.cat([torch.arange(length - 1), torch.arange(length, batch * length)]).to(output.device)
        self.rows.keep(others, shape)
        self.rows.probing = True
        try:
            torch.autograd.grad(output, leaves, taint, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise GateError(
                f"backward.below = 'exact' looks at one backward first, which failed here ({error}); with torch.compile "
                "call gate.probe(inputs) before compiling"
            ) from error
        finally:
            self.rows.probing = False
            self.rows.disarm()
        for layer in self.found.layers:
            layer.exact = bool(layer.exact)
            layer.compact = layer.exact


def _with(loss: Tensor, others: Tensor | None) -> Tensor:
    return loss if others is None else loss + others


def _as_batch(logits: Tensor, labels: Tensor | None, unit: str) -> tuple[Tensor, Tensor | None]:
    """Logits (B, T, V) and labels (B, T), or losses (B, T). Where the loss has one row for a sample, T is 1; rows without
    samples, (N, V) or (N,), are one sequence of N tokens where tokens are chosen."""
    lead = logits.shape if labels is None else logits.shape[:-1]
    if (labels is not None and (logits.dim() < 2 or labels.shape != lead)) or len(lead) not in (1, 2):
        if labels is None:
            raise ValueError(
                f"gate.loss(losses): per-token losses are (B, T) or (B,), these are {tuple(logits.shape)}; for logits give "
                "labels"
            )
        raise ValueError(
            f"gate.loss: logits {tuple(logits.shape)} and labels {tuple(labels.shape)} are not (B, T, V) and (B, T), nor "
            "(B, V) and (B,)"
        )
    if len(lead) == 2:
        return logits, labels
    dim = 0 if unit == "token" else 1
    return logits.unsqueeze(dim), None if labels is None else labels.unsqueeze(dim)


@torch.no_grad()
def _per_token(logits: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        return logits.detach()
    flat = F.cross_entropy(_wide(logits).flatten(0, 1), labels.flatten(), reduction="none", ignore_index=NO_LABEL)
    return flat.view(labels.shape)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
