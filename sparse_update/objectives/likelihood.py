"""Next-token likelihood: a batch is scored by the cross-entropy of its tokens, in nats.

Positions are tokens, or bags of neighbouring tokens where the step's plan says so (`growth/superposition.py`).

The gradient comes from autograd or from the sparse step (`step/backward.py`), whichever the table of component times found
faster for a plain step; a step that leaves something out always takes the sparse one.

Shape letters: B sequences of a step, T predicted tokens of a sequence, R tokens through the middle layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_update.clock.component import WATCHED_STEP as WATCHED
from sparse_update.clock.component import Component, at_depth
from sparse_update.clock.cost import Step
from sparse_update.clock.timing import Setting, step_probe
from sparse_update.gates.bias import cosines
from sparse_update.gates.gate import GatedBatch
from sparse_update.growth.superposition import bag_loss, bags_of
from sparse_update.growth.vocabulary import partial_logits, partial_loss
from sparse_update.loop.evaluation import evaluate
from sparse_update.objectives.objective import Given, Objective, by_autograd
from sparse_update.parallel.compiled import compile_blocks
from sparse_update.step.backward import Stepper
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import PLAIN, SparseStep
from sparse_update.transformer import token_loss
from sparse_update.weights.subset import Active


class Likelihood(Objective):
    """Mean cross-entropy of the next token, over the tokens that the gate lets through and weighed as it says."""

    predicts_parts = True

    def __init__(self, given: Given) -> None:
        self.given, self.model, self.gate = given, given.model, given.gate
        self.times = times = given.clock.times
        self.bf16 = times.precision == "bf16"
        self.stepper = self.engine = given.stepper
        if (times.variant == "engine_compiled") != times.compiled:
            dtype = torch.bfloat16 if self.bf16 else None
            self.engine = Stepper(self.model, dtype, times.variant == "engine_compiled", given.mesh.hold())
        compiled = times.variant == "autograd_compiled" or (given.adapted and times.compiled)
        self.module = given.mesh.module(self.model) if given.wrapped else self.model
        by_block = given.mesh.splits_weights  # a whole graph would hold what gathers and scatters the parts
        if compiled and by_block:
            compile_blocks(self.model)
        whole = compiled and not by_block
        # static shapes, one compilation for each: a resumed run compiles what the whole one had
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.module, dynamic=False) if whole else self.module
        self._by_block = compiled and by_block
        bags_compiled = (compiled or times.compiled) and not by_block
        self._on_bags: Callable[[Tensor], Tensor] = (
            torch.compile(self.module, dynamic=False) if bags_compiled else self.module
        )
        self.vocabulary = None if given.vocabulary is None else given.vocabulary.to(given.device)
        self._partial: Callable[..., Tensor] = (
            torch.compile(partial_logits, dynamic=False) if bags_compiled else partial_logits
        )
        self._part: dict[int, tuple[Tensor, Tensor, float]] = {}
        self.generator = torch.Generator(device=given.device).manual_seed(given.seed + 3)
        self._last: tuple[Tensor, Tensor, Step, Tensor | None] | None = None

    @property
    def compiles(self) -> bool:  # type: ignore[override]
        return self.times.compiled or self._by_block or self.forward is not self.module

    def gradients(self, batch: GatedBatch, step: Step) -> SparseStep:
        tokens_BT1 = batch.tokens.to(self.given.device)
        size = step.plan.bag
        x_BT = tokens_BT1[:, :-1].reshape(step.batch, step.length * size)
        y_BT = tokens_BT1[:, 1:].reshape(step.batch, step.length * size)
        weight_B = batch.weight_B
        if weight_B is not None:
            weight_B = weight_B.repeat_interleave(len(x_BT) // len(weight_B)).to(self.given.device)
        if size > 1:
            self._last = None
            return self._autograd(*bags_of(x_BT, y_BT, size), weight_B, self._on_bags, bag_loss)
        if step.plan.vocabulary:
            self._last = None
            return self._on_a_part(x_BT, y_BT, weight_B, step.plan.vocabulary)
        if self._by_autograd(step):
            self._let_flow(step)
            self._last = (x_BT, y_BT, step, None)
            return self._autograd(x_BT, y_BT, weight_B, self.module if self.gate.observing else self.forward, token_loss)
        places_BR = self.gate.bypass(batch, step.plan)
        if places_BR is not None:
            places_BR = places_BR.reshape(len(x_BT), -1).to(self.given.device)
        self._last = (x_BT, y_BT, step, places_BR)
        stepper = self.engine if _takes_all(step) else self.stepper
        return stepper.step(
            x_BT,
            y_BT,
            step.plan,
            self._active,
            choose=self.gate.choose if step.plan.sequences or step.plan.rows else None,
            bypass_BR=places_BR,
            skip=self.gate.skip(step.plan),
            weight_B=weight_B,
            generator=self._draws(),
            watched=self.gate.watched if self.gate.observing else frozenset(),
        )

    def _on_a_part(self, x_BT: Tensor, y_BT: Tensor, weight_B: Tensor | None, count: int) -> SparseStep:
        """A step that predicts the first `count` tokens of the vocabulary's order."""
        assert self.vocabulary is not None
        if count not in self._part:
            chosen = self.vocabulary
            self._part[count] = chosen.first(count), chosen.places(count), chosen.share(count)
        predicted_K, places_V, share = self._part[count]
        run = partial(self._partial, self.model, predicted_K=predicted_K)
        return self._autograd(x_BT, places_V[y_BT], weight_B, run, partial(partial_loss, share=share))

    def _by_autograd(self, step: Step) -> bool:
        """Whether autograd takes the step. A gate that observes needs hooks, which compiled autograd has not: there the
        engine hands the factors over."""
        variant = self.times.variant
        hooked = variant == "autograd" or not self.gate.observing
        always = self.given.adapted or self._whole_layers
        return always or (_takes_all(step) and variant.startswith("autograd") and hooked)

    @property
    def _whole_layers(self) -> bool:
        """Whether blocks are active as a whole and the sparse step, which would leave the others out, knows no heads that
        are divided among processes: there autograd leaves them out."""
        return self.given.mesh.kind == "tp" and self.given.subset.cfg.kind == "layers"

    def _let_flow(self, step: Step) -> None:
        """Have autograd form the gradients of active weights only."""
        if self._whole_layers:
            for name, p in self.model.named_parameters():
                p.requires_grad_(name in self._active.parts)

    def _autograd(
        self,
        x: Tensor,
        y: Tensor,
        weight_B: Tensor | None,
        run: Callable[[Tensor], Tensor],
        loss_of: Callable[[Tensor, Tensor], Tensor],
    ) -> SparseStep:
        cast = torch.autocast(self.given.device.type, torch.bfloat16, enabled=self.bf16)
        with self.gate.tap(self.model), cast:
            loss_BT = loss_of(run(x), y)
            loss = loss_BT.mean() if weight_B is None else (loss_BT * weight_B[:, None]).mean()
            loss.backward()
        return by_autograd(loss_BT, averaged=self.module is not self.model or self.given.mesh.splits_weights)

    def _draws(self) -> torch.Generator:
        """What a step draws inside its backward by: on each shard something else, from one stream that all have alike."""
        if self.given.mesh.shards == 1:
            return self.generator
        device = self.generator.device
        seed = int(torch.randint(2**62, (), generator=self.generator, device=device))
        return torch.Generator(device=device).manual_seed(seed + self.given.mesh.shard)

    @property
    def _active(self) -> Active:
        return self.given.subset.active

    def held_out(self, windows_NT1: Tensor) -> float:
        """Mean loss per token, nats."""
        return evaluate(self.model, windows_NT1)

    def flops(self, step: Step) -> int:
        found = plan_flops(step.of(self.model.cfg), step.batch, step.plan, step.active, step.length)
        return found.total + (found.recomputed if self.model.recompute else 0)

    def component(self, step: Step, key: str) -> str:
        by_engine = self.gate.observing and _takes_all(step) and self.times.variant == "autograd_compiled"
        return at_depth(WATCHED, step.layers) if by_engine else key

    def components(self) -> Mapping[str, Component]:
        needed = self.gate.cfg.unit == "auto" and self.times.variant == "autograd_compiled"
        depths = self.gate.context.depths or (self.model.cfg.layers,)
        keys = {depth: at_depth(WATCHED, None if depth == depths[-1] else depth) for depth in depths}
        return {key: Component(1, partial(self._watched_step, depth)) for depth, key in keys.items()} if needed else {}

    def _watched_step(self, layers: int) -> Callable[[], None]:
        """A plain step as one that is observed runs: by the engine, which has what is watched at hand."""
        times, clock = self.times, self.given.clock
        variant = "engine_compiled" if times.compiled else "engine"
        cfg = replace(self.model.cfg, layers=layers)
        setting = Setting(cfg, clock.optim, self.given.device, times.attention, times.precision, variant=variant)
        probe = step_probe(setting, Step(PLAIN, None, clock.batch_windows, self.model.cfg.context), WATCHED)

        def use() -> None:
            probe()

        return use

    def notes(self) -> Mapping[str, float]:
        """Bias by layer of the last step, where it left something out and `trainer.measure_bias` asks for it."""
        if not self.given.measure_bias or self._last is None or self._last[2].plan.plain:
            return {}
        x_BT, y_BT, step, places_BR = self._last
        found = cosines(self.stepper, x_BT, y_BT, step.plan, self._active, self.gate, places_BR, self.given.seed)
        return {f"bias/{name}": value for name, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        order = {} if self.vocabulary is None else {"vocabulary": self.vocabulary.state_dict()}
        return {"generator": self.generator.get_state(), **order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if (self.vocabulary is not None) != ("vocabulary" in state):
            raise ValueError(
                f"the checkpoint is of a run {'with' if 'vocabulary' in state else 'without'} trainer.vocabulary: resume "
                "with the settings of that run"
            )
        if self.vocabulary is not None:
            self.vocabulary.check(state["vocabulary"])
        self.generator.set_state(state["generator"])


def _takes_all(step: Step) -> bool:
    """Whether a step leaves nothing out, looks for nothing and updates every weight."""
    return step.plan == PLAIN and step.active is None
