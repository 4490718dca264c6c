"""The sparse step: a forward that may let tokens pass by, a backward over what was chosen, gradients of active weights
only.

What is left out costs no matrix product, and every shape follows from the static `StepPlan`. The pair forward/backward is
written out (`blocks.py`) instead of hooked into autograd, since sequences and rows are chosen after the forward, by its own
token losses, and autograd would want every gradient padded back to full length at each layer.

Biased: `rows` without `rows_exact` (rows that are not kept count as constants, so keys and values of dropped tokens receive
nothing: the gradient of a model whose residual stream, keys and values are detached there) and `skip` (sub-blocks count as
constants). Exact for their own objective: sequences, rows_exact, bypass. Unbiased: dw_rows, sample.

Shape letters: B batch, T token, S kept sequence, R kept row, D width, H head, K head width, F hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_update.step.backprop import Backward
from sparse_update.step.forward import Forward, Hold
from sparse_update.step.gradients import Gradients
from sparse_update.step.kernels import Kernels
from sparse_update.step.plan import PLAIN, Choose, Chosen, SparseStep, StepPlan, View
from sparse_update.transformer import Packing, Transformer
from sparse_update.weights.subset import Active

RowChoice = Callable[[Tensor], Tensor | None]
"""token losses (B, T) in nats -> kept positions (B, R) int64, ascending in each row, or None for all of them."""


def sparse_step(
    model: Transformer,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    choose_rows: RowChoice | None = None,
    active: Active | None = None,
    dtype: torch.dtype | None = None,
) -> SparseStep:
    """Loss and sparse gradients of the mean token loss over the kept rows: `Stepper.step` for the commonest case.

    Args:
        tokens_BT, targets_BT: int64 (B, T).
        choose_rows: called with the token losses after the forward; None keeps every row.
        active: strips of the parameters that are updated; None updates all.
        dtype: compute type of the products; None takes the parameters'.

    With `choose_rows=None, active=None` the gradients equal autograd's up to rounding.
    """
    stepper = Stepper(model, dtype)
    if choose_rows is None:
        return stepper.step(tokens_BT, targets_BT, PLAIN, active)
    chooser = choose_rows

    def choose(view: View) -> Chosen:
        return Chosen(rows_SR=chooser(view.loss_BT))

    return stepper.step(tokens_BT, targets_BT, None, active, choose=choose)


def row_bias(
    model: Transformer, tokens_BT: Tensor, targets_BT: Tensor, rows_BR: Tensor, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Cosine of the row-compacted gradient to the exact gradient of the same masked loss, by layer.

    Keys: "embed", "blocks.0" ..., "norm", "head" (a tied head is part of "embed"). 1 means no bias in direction; it takes
    two steps.
    """
    stepper = Stepper(model, dtype)
    kinds = (StepPlan(rows=rows_BR.shape[1], rows_exact=exact) for exact in (False, True))
    compact, exact = (
        stepper.step(tokens_BT, targets_BT, plan, choose=lambda _: Chosen(rows_SR=rows_BR)).gradients for plan in kinds
    )
    layers: dict[str, list[str]] = {}
    for name in exact:
        parts = name.split(".")
        layers.setdefault(".".join(parts[: 2 if parts[0] == "blocks" else 1]), []).append(name)
    found = {}
    for layer, names in layers.items():
        ours, theirs = (torch.cat([g[name][0].flatten() for name in names]) for g in (compact, exact))
        found[layer] = max(-1.0, min(1.0, float(F.cosine_similarity(ours, theirs, dim=0))))
    return found


class Stepper:
    """Steps of one model; stateless between steps.

    Args:
        dtype: compute type of the products; None takes the parameters'. The residual stream keeps the parameters'.
        compiled: through torch.compile, one compilation for each static shape; eager where that fails.
        hold: gathers weights and scatters gradients where this process has a part of them only; gradients are then means
            over all processes, as far as they lie here.
    """

    def __init__(
        self, model: Transformer, dtype: torch.dtype | None = None, compiled: bool = False, hold: Hold | None = None
    ) -> None:
        self.model, self.hold = model, hold
        self.forward = Forward(model, dtype or model.embed.weight.dtype, Kernels(compiled), hold)

    @torch.no_grad()
    def step(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        plan: StepPlan | None = PLAIN,
        active: Active | None = None,
        *,
        choose: Choose | None = None,
        bypass_BR: Tensor | None = None,
        skip: frozenset[tuple[int, str]] = frozenset(),
        weight_B: Tensor | None = None,
        generator: torch.Generator | None = None,
        watched: frozenset[str] = frozenset(),
        packing: Packing | None = None,
    ) -> SparseStep:
        """Gradients of sum(weight x token loss over what is kept) / normaliser.

        The normaliser is the number of kept tokens without weights, and that of all B T tokens with them (1/p weights:
        unbiased).

        Args:
            plan: None takes the sizes that `choose` gives.
            active: None updates everything.
            choose: called after the forward; needed where the plan keeps sequences or rows.
            bypass_BR: int64, ascending: the tokens that go through the middle layers, (B, R), or (M, B, R) with an own
                choice for each of the M middle layers.
            skip: sub-blocks, (layer, "attn" or "mlp"), that the backward passes by.
            weight_B: of whole sequences, known before the forward; multiplies what `choose` gives.
            generator: for `dw_rows` and `sample`.
            watched: names of weights whose gradient's two factors are handed back too.
            packing: texts in a sequence that do not see each other, int64 (B, T) each.

        Raises:
            ValueError: for a plan that does not fit the batch or the model, or choices of another size than the plan's.
        """
        model = self.model
        active = active or Active.everything(model)
        sized = plan if plan is not None else PLAIN
        batch, length = tokens_BT.shape
        sized.check(batch, length, len(model.blocks))
        _check_bypass(sized, bypass_BR, tokens_BT, len(model.blocks))
        kept, loss_BT, signals = self.forward(tokens_BT, targets_BT, sized, active, bypass_BR, packing)
        view = View(loss_BT, signals)
        chosen = choose(view) if choose is not None else Chosen()
        if plan is not None:
            _check_chosen(plan, chosen, len(tokens_BT))
        dtype = model.embed.weight.dtype
        scatter = None if self.hold is None else self.hold.scatter
        gradients = Gradients(active, model.cfg.tie_embeddings, dtype, sized.dw_rows, generator, watched, scatter)
        backward = Backward(
            self.forward,
            kept,
            sized,
            chosen,
            gradients,
            tokens_BT,
            targets_BT,
            bypass_BR,
            skip,
            weight_B,
            generator,
            packing,
        )
        backward.go()
        return SparseStep(
            loss_BT, gradients.found, chosen, view, gradients.factors, backward.norms_LS, self.hold is not None
        )

    @torch.no_grad()
    def view(self, tokens_BT: Tensor, targets_BT: Tensor, want: frozenset[str] = frozenset()) -> View:
        """A forward alone, for scoring: token losses and the wanted signals."""
        nothing = Active({}, len(self.model.blocks))
        _, loss_BT, signals = self.forward(tokens_BT, targets_BT, StepPlan(want=want), nothing, None)
        if self.hold is not None:
            self.hold.leave(self.model)
        return View(loss_BT, signals)


def _check_bypass(plan: StepPlan, bypass_BR: Tensor | None, tokens_BT: Tensor, layers: int) -> None:
    if plan.bypass and bypass_BR is None:
        raise ValueError(f"plan.bypass = {plan.bypass} needs bypass_BR, the tokens that go through the middle layers")
    if bypass_BR is None:
        return
    wanted = (len(tokens_BT), plan.bypass)
    if tuple(bypass_BR.shape) not in (wanted, (len(plan.middle(layers)), *wanted)):
        raise ValueError(
            f"bypass_BR has shape {tuple(bypass_BR.shape)}, but plan.bypass = {plan.bypass} asks for {wanted}, or for "
            f"{len(plan.middle(layers))} of that, one for each middle layer"
        )


def _check_chosen(plan: StepPlan, chosen: Chosen, batch: int) -> None:
    sequences = 0 if chosen.sequences_S is None else len(chosen.sequences_S)
    rows = 0 if chosen.rows_SR is None else chosen.rows_SR.shape[1]
    if (sequences, rows) != (plan.sequences, plan.rows) and not (chosen.share and rows == plan.rows):
        raise ValueError(
            f"chosen are {sequences} sequences and {rows} rows (0: all), but the plan has sequences = {plan.sequences} and "
            f"rows = {plan.rows}: `choose` must keep what the plan says"
        )
    kept = sequences or batch
    if chosen.rows_SR is not None and len(chosen.rows_SR) != kept:
        raise ValueError(f"chosen rows are of {len(chosen.rows_SR)} sequences, but {kept} sequences are kept")
