"""VCAS (Chen et al., ICLR 2024, arXiv 2402.17227) on any stack of blocks: unbiased sampling inside the backward.

On entering a block from above, its output's gradient keeps a share of the sequences, drawn by their norms and weighted
by 1/p; the gated layers below leave the other sequences out. The weight gradients of the blocks' gated layers are formed
from a share of the token rows, drawn by |gradient row| |input row|, the paper's leverage score, and weighted by 1/p. A test
of variance sets the shares (`gates.sampling`).

The test looks at one batch: the gradients of its M parts give the variance of a batch's gradient, M more backwards what
each kind of sampling adds to it. Our trainer takes M batches in the place of the parts; what is estimated is the same.

Shape letters: B sequences, T tokens, L blocks, K rows, I inputs, O outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.gates.sampling import VarianceRates, distance
from sparse_update.library.linear import Layer
from sparse_update.library.tracking.rows import GateError, Rows
from sparse_update.step.draw import draw

UNITS = ("none", "vcas")


@dataclass
class GradientConfig:
    """Sampling of the gradient. Raises ValueError for values out of range. Defaults are the paper's."""

    unit: str = "none"
    """"none" | "vcas"."""
    tau: float = 0.025
    """Variance that each kind of sampling may add, over that of a batch's gradient."""
    every: int = 100
    """Steps between two tests."""
    repetitions: int = 2
    """M: parts of the batch that is tested, and backwards for each kind of sampling."""
    alpha: float = 0.01
    """Step of the share of the gradient norm that kept sequences hold."""
    beta: float = 0.95
    """Factor on the share of rows."""
    rows: float = 1.0
    """Share of rows to begin with."""

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"gradient.unit = {self.unit!r}: one of {', '.join(UNITS)}")
        for key in ("tau", "alpha"):
            if getattr(self, key) <= 0:
                raise ValueError(f"gradient.{key} = {getattr(self, key)}: must be positive")
        if self.every < 1 or self.repetitions < 2:
            raise ValueError("gradient.every must be at least 1, gradient.repetitions at least 2")
        if not 0 < self.beta < 1 or not 0 < self.rows <= 1:
            raise ValueError(f"gradient.beta = {self.beta}, gradient.rows = {self.rows}: in (0, 1), and in (0, 1]")


class Vcas:
    """Samples in the backwards of a gate's losses.

    Args:
        cfg: rates and tests.
        blocks: the model's repeated blocks from below, by name.
        layers: its gated layers; weight gradients of those inside the blocks are sampled.
        rows: what tells them which rows are kept.
        seed: of the draws.
    """

    def __init__(
        self,
        cfg: GradientConfig,
        blocks: Sequence[tuple[str, nn.Module]],
        layers: Sequence[Layer],
        rows: Rows,
        seed: int,
    ) -> None:
        self.cfg, self.rows = cfg, rows
        self.rates = VarianceRates(len(blocks), cfg.rows, cfg.tau, cfg.alpha, cfg.beta)
        self.generator = torch.Generator().manual_seed(seed)
        self.inside = {
            layer.number for layer in layers if any(f"{layer.name}.".startswith(f"{name}.") for name, _ in blocks)
        }
        self.tested = 0
        self.act = self.thin = False
        """whether this backward samples sequences, and rows"""
        self.task = -1
        self.shape = (0, 0)
        self.kept_S = torch.zeros(0, dtype=torch.int64)
        self.norms_LB: Tensor | None = None
        """filled on the way down, where a test wants to know"""
        me = weakref.ref(self)
        self.handles = [block.register_forward_hook(_Hook(me, index, name)) for index, (name, block) in enumerate(blocks)]

    def close(self) -> None:
        """Take the hooks off the blocks."""
        for handle in self.handles:
            handle.remove()

    # in a backward

    def begin(self, batch: int, length: int, act: bool, thin: bool) -> None:
        self.task, self.shape, self.act, self.thin = torch._C._current_graph_task_id(), (batch, length), act, thin
        self.kept_S = torch.arange(batch)
        self.rows.sampler = self if thin and self.rates.rows < 1 else None
        torch.autograd.Variable._execution_engine.queue_callback(self.end)

    def end(self) -> None:
        self.task, self.rows.sampler = -1, None
        self.rows.disarm()

    def enter(self, index: int, name: str, g: Tensor) -> Tensor:
        """The gradient of block `index`'s output, (B, T, ...): its kept sequences, scaled; the others zero."""
        if self.task != torch._C._current_graph_task_id():
            return g
        batch = self.shape[0]
        if g.shape[0] != batch:
            raise GateError(
                f"{name}: its output's gradient is {tuple(g.shape)} and the loss has {batch} sequences: method 'vcas' "
                "needs blocks whose outputs are (B, T, ...), batch first"
            )
        norm_B = torch.linalg.vector_norm(g.detach().float().flatten(1), dim=1)
        if self.norms_LB is not None:
            self.norms_LB[index] += norm_B.to(self.norms_LB.device)
        count = max(1, round((self.rates.sequences or (1.0,) * (index + 1))[index] * batch))
        if not self.act or count >= len(self.kept_S):
            return g
        self.kept_S = self.kept_S.to(g.device)
        drawn, inverse = draw(norm_B[self.kept_S], count, self.generator)
        self.kept_S = self.kept_S[drawn]
        scale_B = torch.zeros(batch, dtype=g.dtype, device=g.device).index_copy_(0, self.kept_S, inverse.to(g.dtype))
        self.rows.keep(self.kept_S, self.shape)
        return g * scale_B.view(batch, *[1] * (g.dim() - 1))

    def pick(self, layer: Layer, g_KO: Tensor, x_KI: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of both factors of a weight gradient that stand for all."""
        if layer.number not in self.inside or len(g_KO) < 2:
            return g_KO, x_KI
        norm_K = torch.linalg.vector_norm(g_KO.float(), dim=1) * torch.linalg.vector_norm(x_KI.float(), dim=1)
        index, inverse = draw(norm_K, max(1, round(self.rates.rows * len(g_KO))), self.generator)
        return g_KO[index] * inverse.to(g_KO.dtype)[:, None], x_KI[index]

    # around a loss

    def sampled(self, loss: Tensor, batch: int, length: int) -> Tensor:
        """The loss, whose backward samples at today's rates."""
        found: Tensor = _Begin.apply(loss, self, batch, length, True, True)
        return found

    def due(self, steps: int) -> bool:
        """Whether a test comes before the step after so many."""
        return steps > 0 and steps % self.cfg.every == 0 and self.tested != steps

    def test(
        self, steps: int, loss_of: Callable[[Tensor], Tensor], shape: tuple[int, int], leaves: Sequence[Tensor]
    ) -> None:
        """Set the rates by one batch. `loss_of(weight_B)`: its loss, each sequence's part times a weight, () with graph.

        Raises GateError for a batch of fewer sequences than parts.
        """
        self.tested = steps
        batch, parts = shape[0], self.cfg.repetitions
        if batch < parts:
            raise GateError(
                f"method 'vcas' compares the gradients of {parts} parts of a batch, and this one has {batch} sequences: "
                "take larger batches"
            )
        self.norms_LB = torch.zeros(len(self.rates.rho), batch)
        each = []
        for part in range(parts):
            weight_B = torch.zeros(batch)
            weight_B[part::parts] = parts
            each.append(self._gradients(loss_of(weight_B), shape, leaves, False, False))
        norms, self.norms_LB = self.norms_LB, None
        exact = _mean(each)
        noise = sum(distance({"": g}, {"": exact}) for g in each) / (parts - 1) / parts
        act = rows = 0.0
        whole = torch.ones(batch)
        for _ in range(parts):
            if self.rates.sequences:
                found = self._gradients(loss_of(whole), shape, leaves, True, False)
                act += distance({"": found}, {"": exact}) / parts
            if self.rates.rows < 1:
                found = self._gradients(loss_of(whole), shape, leaves, False, True)
                rows += distance({"": found}, {"": exact}) / parts
        self.rates.update(noise, act, rows, [norms])

    def _gradients(
        self, loss: Tensor, shape: tuple[int, int], leaves: Sequence[Tensor], act: bool, thin: bool
    ) -> tuple[Tensor, ...]:
        head = _Begin.apply(loss, self, *shape, act, thin)
        try:
            found = torch.autograd.grad(head, leaves, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if isinstance(error, GateError):
                raise
            raise GateError(
                f"method 'vcas' tests a batch by several backwards of one forward, which failed here ({error}): do not "
                "compile the model, and give torch.utils.checkpoint use_reentrant=False"
            ) from error
        return tuple(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True))

    # state

    def report(self) -> dict[str, Any]:
        """Today's rates."""
        return {"sequences": list(self.rates.sequences) or [1.0] * len(self.rates.rho), "rows": self.rates.rows}

    def state_dict(self) -> dict[str, Any]:
        return {**self.rates.state_dict(), "tested": self.tested, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["rho"]) != len(self.rates.rho):
            raise ValueError(
                f"this state is of a model of {len(state['rho'])} blocks, this one has {len(self.rates.rho)}: resume with "
                "the model of that run"
            )
        self.rates.load_state_dict(state)
        self.tested = int(state["tested"])
        self.generator.set_state(state["generator"])


class _Hook:
    """Has the gradient of a block's output looked at as it arrives."""

    def __init__(self, vcas: weakref.ref[Vcas], index: int, name: str) -> None:
        self.vcas, self.index, self.name = vcas, index, name

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        vcas = self.vcas()
        if vcas is None or not torch.is_grad_enabled():
            return output
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor):
            raise GateError(
                f"{self.name}: its output is a {type(output).__name__}, and method 'vcas' needs a tensor, or a tuple that "
                "begins with one"
            )
        if first.requires_grad:
            first.register_hook(partial(vcas.enter, self.index, self.name))
        return output

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(lambda: None, self.index, self.name)  # type: ignore[arg-type]

    def __reduce__(self) -> Any:
        return _Plain, ()


class _Plain:
    """What is left of a hook in a pickled model: nothing."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, vcas: Vcas, batch: int, length: int, act: bool, thin: bool) -> Tensor:
        ctx.vcas, ctx.how = vcas, (batch, length, act, thin)
        return loss.clone()  # no view: trainers scale losses in place

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise GateError("gate.loss under create_graph=True: method 'vcas' forms no gradient of a gradient")
        if ctx.vcas.task == torch._C._current_graph_task_id():
            raise GateError(
                "one backward runs through two gated losses, which are sampled apart: call backward() once for each "
                "gate.loss(...) (gradients add up), or put both batches into one"
            )
        ctx.vcas.begin(*ctx.how)
        return g, None, None, None, None, None


def _mean(each: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(parts).mean(0) for parts in zip(*each, strict=True))
