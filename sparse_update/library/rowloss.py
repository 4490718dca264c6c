"""The loss of a gated model: per token, over the rows that the gate keeps; and which layers drop rows exactly.

Shape letters: B batch, T token, V vocabulary, N = B T, K kept rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_update.library.layers import Found
from sparse_update.library.linear import Arm, GateError, KeptLoss, Rows
from sparse_update.library.methods.scoring import output_losses
from sparse_update.library.rowchoice import BackwardConfig, RowChoice

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
        self.cfg, self.found, self.rows, self.reference = cfg, found, rows, reference
        self.choice = RowChoice(cfg, model, vocab_size, seed)
        self.last_BT: Tensor | None = None
        """Losses per token of the last forward, nats."""

    def start(self) -> None:
        """Make the layers leave dropped rows out, where rows are dropped at all."""
        if self.cfg.unit != "none":
            self.rows.embeddings = self.cfg.below == "compact"
            for layer in self.found.layers:
                layer.compact = self.cfg.below == "compact"

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        shift: bool,
        tokens: Tensor | None,
        normaliser: Tensor | float | None,
        leaves: Sequence[Tensor],
        weight_B: Tensor | None = None,
        reference_BT: Tensor | None = None,
    ) -> Tensor:
        """The loss, as `Gate.loss` describes it.

        `leaves`: what is updated, for the look at one backward. `weight_B`: of whole sequences, known before the forward.
        """
        _check_shapes(logits, labels)
        if labels is not None and shift:
            tokens = labels if tokens is None else tokens
            labels = shifted(labels)
        loss_BT = _per_token(logits, labels)
        self.last_BT = loss_BT
        valid_BT = torch.ones_like(loss_BT, dtype=torch.bool) if labels is None else labels != NO_LABEL
        if self.cfg.unit == "none" or not torch.is_grad_enabled():
            return plain_loss(logits, labels, False, normaliser, weight_B)
        if self.cfg.signal == "excess":
            reference_BT = self._reference(loss_BT, labels, tokens, reference_BT)
        kept = self.choice.choose(
            loss_BT, valid_BT, logits if labels is not None else None, labels, tokens, self.found, reference_BT
        )
        count = kept.normaliser if normaliser is None else torch.as_tensor(normaliser, device=logits.device) * kept.share
        batch, length = loss_BT.shape
        if self.cfg.below == "exact" and any(layer.exact is None for layer in self.found.layers):
            self.probe(logits, (batch, length), leaves)
        weight_K = kept.weight_K
        if weight_B is not None:
            weight_K = weight_K * weight_B.to(weight_K)[kept.flat_K // length]
        if labels is None:
            loss = (logits.reshape(-1).index_select(0, kept.flat_K) * weight_K).sum() / count
        else:
            loss = KeptLoss.apply(logits, labels.flatten(), kept.flat_K, weight_K, count)
        return Arm.apply(loss, self.rows, kept.flat_K, (batch, length))

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

    def probe(self, output: Tensor, shape: tuple[int, int], leaves: Sequence[Tensor]) -> None:
        """Find the layers where dropped rows have an exactly zero gradient: NaN is put into the gradient of one token of
        the output, and what it does not reach in the other rows is independent of it."""
        batch, length = shape
        taint = torch.zeros_like(output)
        taint[0, -1] = float("nan")
        others = torch.cat([torch.arange(length - 1), torch.arange(length, batch * length)]).to(output.device)
        self.rows.flat_K, self.rows.shape, self.rows.probing = others, shape, True
        try:
            torch.autograd.grad(output, leaves, taint, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise GateError(
                f"backward.below = 'exact' looks at one backward first, which failed here ({error}); with torch.compile "
                "call gate.probe(inputs) before compiling"
            ) from error
        finally:
            self.rows.flat_K, self.rows.probing = None, False
        for layer in self.found.layers:
            layer.exact = bool(layer.exact)
            layer.compact = layer.exact


def _check_shapes(logits: Tensor, labels: Tensor | None) -> None:
    if labels is None and logits.dim() != 2:
        raise ValueError(
            f"gate.loss(losses): per-token losses are (B, T), these are {tuple(logits.shape)}; for logits give labels"
        )
    if labels is not None and (logits.dim() != 3 or labels.shape != logits.shape[:2]):
        raise ValueError(
            f"gate.loss: logits {tuple(logits.shape)} and labels {tuple(labels.shape)} are not (B, T, V) and (B, T)"
        )


@torch.no_grad()
def _per_token(logits: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        return logits.detach()
    flat = F.cross_entropy(_wide(logits).flatten(0, 1), labels.flatten(), reduction="none", ignore_index=NO_LABEL)
    return flat.view(labels.shape)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
