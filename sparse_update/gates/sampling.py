"""Gates of the backward itself: weight gradients from sampled rows, VCAS, DropBP. They take every window and decide how
much of its gradient is computed; what their tests cost is counted as whole steps.
`attach` has VCAS's rates (Chen et al., ICLR 2024, arXiv 2402.17227), as small as a test of variance allows, from here too.

Shape letters: B windows of a step, T token, L layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_update.gates.config import GateConfig
from sparse_update.gates.gate import Gate, GateContext, GatedBatch
from sparse_update.step.plan import PLAIN, SparseStep, StepPlan

GRID = 8
"""Rates are multiples of 1 / GRID, so that shapes take few values and each can be timed."""
Gradients = Mapping[str, tuple[Tensor, ...]]


class VarianceRates:
    """Shares of the sequences at each layer, and of the rows of weight gradients.

    `s`: share of the gradient norm that the kept sequences hold; `rho`: share of the sequences for each layer from below;
    `nu`: share of the rows.
    """

    def __init__(self, layers: int, nu: float, tau: float, alpha: float, beta: float) -> None:
        self.tau, self.alpha, self.beta = tau, alpha, beta
        self.s, self.nu, self.rho = 1.0, nu, [1.0] * layers

    @property
    def sequences(self) -> tuple[float, ...]:
        """rho on the grid, () where every layer keeps all."""
        found = tuple(on_grid(r) for r in self.rho)
        return () if min(found) == 1 else found

    @property
    def rows(self) -> float:
        """nu on the grid."""
        return on_grid(self.nu)

    def update(self, noise: float, act: float, rows: float, norms: Sequence[Tensor]) -> None:
        """After a test.

        Args:
            noise: variance of the mini-batch gradient.
            act, rows: what sampling sequences, and rows, adds to it.
            norms: for one or more batches the norm of each sequence's activation gradient at each layer, (L, B).
        """
        self.s = min(1.0, max(0.0, self.s + self.alpha * (1 if act > self.tau * noise else -1)))
        self.nu = min(1.0, max(1 / GRID, self.nu * self.beta ** (-1 if rows > self.tau * noise else 1)))
        needed = [sum(share_holding(n[layer], self.s) for n in norms) / len(norms) for layer in range(len(self.rho))]
        self.rho = [max(needed[: layer + 1]) for layer in range(len(self.rho))]

    def state_dict(self) -> dict[str, Any]:
        return {"s": self.s, "nu": self.nu, "rho": list(self.rho)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.s, self.nu, self.rho = float(state["s"]), float(state["nu"]), [float(r) for r in state["rho"]]


def on_grid(rate: float) -> float:
    """The next multiple of 1 / GRID."""
    return min(GRID, max(1, -int(-rate * GRID // 1))) / GRID


def distance(a: Gradients, b: Gradients) -> float:
    """Squared distance; a parameter without an entry has gradient 0."""
    total = 0.0
    for name in dict.fromkeys((*a, *b)):  # in one order: a set's differs between processes, and so would the last bit
        one, other = a.get(name), b.get(name)
        for i in range(len(one or other or ())):
            left = one[i].double() if one is not None else 0.0
            right = other[i].double() if other is not None else 0.0
            total += float(torch.as_tensor(left - right).square().sum())
    return total


def share_holding(norms_B: Tensor, s: float) -> float:
    """Smallest share of sequences, largest norms first, that holds `s` of the norms' sum."""
    ordered = norms_B.sort(descending=True).values.double()
    if not ordered.sum() > 0:  # nothing comes here: a layer below all that is updated
        return 1 / len(norms_B)
    held = ordered.cumsum(0) / ordered.sum()
    return (int((held < s - 1e-12).sum()) + 1) / len(norms_B)


class GradientGate(Gate):
    """Unit "dw_rows": every weight gradient of the blocks from a sampled share of its token rows, unbiased (1/p)."""

    def plan(self, progress: float, windows: int, length: int) -> StepPlan:
        return StepPlan() if self.rate.annealed(progress) else StepPlan(dw_rows=self.cfg.dw_fraction)

    def plans(self, windows: int, length: int) -> list[StepPlan]:
        rest = [StepPlan()] if self.cfg.anneal_fraction > 0 else []
        return [StepPlan(dw_rows=self.cfg.dw_fraction), *rest]


class _Testing(Gate):
    """What tests of the gradient have in common: batches to test on, and the count of what they cost."""

    def _split(self, batch: GatedBatch) -> tuple[Tensor, Tensor]:
        device = self.context.device
        return batch.tokens[:, :-1].to(device), batch.tokens[:, 1:].to(device)

    def _gradients(self, x_BT: Tensor, y_BT: Tensor, plan: StepPlan, **extra: Any) -> Gradients:
        return self._step(x_BT, y_BT, plan, **extra).gradients

    def _distance(self, a: Gradients, b: Gradients) -> float:
        """`distance` of two gradients, of which this process may have a part only."""
        found, mesh = distance(a, b), self.context.mesh
        return mesh.sum(found) if mesh.splits_weights else found

    def _step(self, x_BT: Tensor, y_BT: Tensor, plan: StepPlan, **extra: Any) -> SparseStep:
        context = self.context
        assert context.stepper is not None
        assert context.active is not None
        assert context.step_key is not None
        self.uses[context.step_key(PLAIN, *x_BT.shape)] += 1
        draws = torch.Generator(device=x_BT.device).manual_seed(int(torch.randint(2**31, (1,), generator=self.generator)))
        return context.stepper.step(x_BT, y_BT, plan, context.active(), generator=draws, **extra)


class VcasGate(_Testing):
    """Unit "gradient": VCAS (Chen et al., ICLR 2024, arXiv 2402.17227). Activation gradients keep a share rho_l of the
    sequences on entering layer l, weight gradients a share nu of the rows, both unbiased, as small as a variance test
    allows.

    The test, every `vcas_every` steps on the last M batches: V_s, the variance of the mini-batch gradient between them;
    V_act, what sampling sequences adds (M x M runs); V_w, what sampling rows adds (M runs). s moves by alpha towards
    V_act = tau V_s, rho_l is the smallest share whose sequences hold s of the gradient norm at layer l (and no layer
    keeps fewer than one below it); nu moves by the factor beta towards V_w = tau V_s. Departures: one nu for all
    matrices; rates are multiples of 1/8; V_w by runs.
    """

    def __init__(self, cfg: GateConfig, stream: Any, context: GateContext) -> None:
        super().__init__(cfg, stream, context)
        assert context.model is not None
        self.layers = len(context.model.blocks)  # type: ignore[arg-type]
        self.rates = VarianceRates(self.layers, cfg.dw_fraction, cfg.vcas_tau, cfg.vcas_alpha, cfg.vcas_beta)
        self.recent: list[Tensor] = []
        self.seen = 0

    def plan(self, progress: float, windows: int, length: int) -> StepPlan:
        if self.rate.annealed(progress):
            return StepPlan()
        return StepPlan(sample=self.rates.sequences, dw_rows=self.rates.rows)

    def plans(self, windows: int, length: int) -> list[StepPlan]:
        return list(dict.fromkeys([StepPlan(), self.plan(0.0, windows, length)]))

    def observe(self, batch: GatedBatch, step: SparseStep, progress: float, cost_over_plain: float) -> None:
        super().observe(batch, step, progress, cost_over_plain)
        self.recent = [*self.recent, batch.tokens][-self.cfg.vcas_repetitions :]
        self.seen += 1
        if self.seen % self.cfg.vcas_every == 0 and len(self.recent) == self.cfg.vcas_repetitions:
            self._test()

    def _test(self) -> None:
        count = self.cfg.vcas_repetitions
        exact, norms, act, rows = [], [], 0.0, 0.0
        now = self.plan(0.0, 0, 0)
        for tokens in self.recent:
            x_BT, y_BT = (part.to(self.context.device) for part in (tokens[:, :-1], tokens[:, 1:]))
            found = self._step(x_BT, y_BT, StepPlan(want=frozenset({"block_norms"})))
            assert found.norms_LS is not None
            exact.append(found.gradients)
            norms.append(found.norms_LS)
            if now.sample:
                for _ in range(count):
                    act += self._distance(self._gradients(x_BT, y_BT, StepPlan(sample=now.sample)), exact[-1]) / count**2
            if now.dw_rows < 1:
                rows += self._distance(self._gradients(x_BT, y_BT, StepPlan(dw_rows=now.dw_rows)), exact[-1]) / count
        mean = {
            name: tuple(torch.stack([g[name][i] for g in exact]).mean(0) for i in range(len(exact[0][name])))
            for name in exact[0]
        }
        noise = sum(self._distance(g, mean) for g in exact) / (count - 1)
        self.rates.update(noise, act, rows, norms)

    def notes(self) -> dict[str, float]:
        found = self.rates
        return {"vcas/s": found.s, "vcas/nu": found.nu, "vcas/rho_lowest": found.rho[0], "vcas/rho_top": found.rho[-1]}

    def state_dict(self) -> dict[str, Any]:
        own = {**self.rates.state_dict(), "recent": list(self.recent), "seen": self.seen}
        return {**super().state_dict(), "vcas": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        own = state["vcas"]
        self.rates.load_state_dict(own)
        self.seen, self.recent = int(own["seen"]), list(own["recent"])


class SubblockGate(_Testing):
    """Unit "subblock": DropBP (Woo et al., NeurIPS 2024). Each step passes a share of the attention and MLP sub-blocks
    by in the backward, drawn by rates that fall with a sub-block's sensitivity: the squared distance between the
    gradient without it and the whole one, measured once. The number skipped is fixed. Departure: rates go with
    sensitivity^-1/2 where the paper solves for them.
    """

    def __init__(self, cfg: GateConfig, stream: Any, context: GateContext) -> None:
        super().__init__(cfg, stream, context)
        assert context.model is not None
        layers = len(context.model.blocks)  # type: ignore[arg-type]
        self.places = [(layer, part) for layer in range(layers) for part in ("attn", "mlp")]
        self.count = round(cfg.skip_rate * len(self.places))
        if not 0 < self.count < len(self.places):
            raise ValueError(
                f"gate.skip_rate = {cfg.skip_rate}: of {len(self.places)} sub-blocks that is {self.count}; choose a rate "
                f"that skips some and keeps some, such as {1 / len(self.places):.2g}"
            )
        self.rates = torch.ones(len(self.places), dtype=torch.float64)
        self.measured = cfg.sensitivity_at == 0

    def plan(self, progress: float, windows: int, length: int) -> StepPlan:
        return StepPlan() if self.rate.annealed(progress) else StepPlan(skip_rate=self.count / len(self.places))

    def plans(self, windows: int, length: int) -> list[StepPlan]:
        return [StepPlan(), StepPlan(skip_rate=self.count / len(self.places))]

    def skip(self, plan: StepPlan) -> frozenset[tuple[int, str]]:
        if not plan.skip_rate:
            return frozenset()
        drawn = torch.multinomial(self.rates, self.count, generator=self.generator)
        return frozenset(self.places[i] for i in drawn.tolist())

    def observe(self, batch: GatedBatch, step: SparseStep, progress: float, cost_over_plain: float) -> None:
        super().observe(batch, step, progress, cost_over_plain)
        if not self.measured and progress >= self.cfg.sensitivity_at:
            self.measured = True
            x_BT, y_BT = self._split(batch)
            whole = self._gradients(x_BT, y_BT, PLAIN)
            one = StepPlan(skip_rate=1 / len(self.places))
            found = [
                self._distance(self._gradients(x_BT, y_BT, one, skip=frozenset({place})), whole) for place in self.places
            ]
            sensitivity = torch.tensor(found, dtype=torch.float64)
            self.rates = sensitivity.clamp(min=1e-3 * float(sensitivity.max())).rsqrt()

    def notes(self) -> dict[str, float]:
        shares = self.rates / self.rates.sum()
        return {f"dropbp/{layer}.{name}": float(s) for (layer, name), s in zip(self.places, shares, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "dropbp": {"rates": self.rates, "measured": self.measured}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.rates, self.measured = state["dropbp"]["rates"].clone(), bool(state["dropbp"]["measured"])
