"""Which weights are updated: layers, or strips of each matrix; the rest costs no moments, mostly no gradient.

Part      a contiguous strip of one parameter and the rule that moves it
Active    the strips of a whole model, frozen and hashable by shape
Subset    chooses them turn by turn, learns from the gradients it is shown, and is part of a checkpoint
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparse_update.transformer import Transformer
from sparse_update.weights.places import Grid, Question, gaps, pick, register_subset_policy
from sparse_update.weights.subset_settings import SIGNS, SubsetConfig

__all__ = ["SIGNS", "Active", "Part", "Subset", "SubsetConfig", "choose", "register_subset_policy"]

RULES = ("optimizer", *SIGNS, "look")
NEVER = 1 << 40
"""Age of a place that was never active."""


@dataclass(frozen=True)
class Part:
    """A contiguous strip of a parameter: [start, stop) along dimension 0 (rows) or 1 (columns).

    `rule`: "optimizer" | "sign": moved by lr * sign(gradient), no state | "sign8": the same, the gradient handed over as
    int8 signs | "look": gradient formed and read, never moved.
    Raises ValueError for an empty strip or an unknown rule.
    """

    dim: int
    start: int
    stop: int
    rule: str = "optimizer"

    def __post_init__(self) -> None:
        if self.dim not in (0, 1) or not 0 <= self.start < self.stop or self.rule not in RULES:
            raise ValueError(f"{self}: dim 0 or 1, 0 <= start < stop and a rule of {', '.join(RULES)} are needed")

    def whole(self, tensor: Tensor) -> bool:
        """Whether the strip is all of a tensor of the parameter's shape."""
        return self.stop - self.start == tensor.shape[self.dim]

    def of(self, tensor: Tensor) -> Tensor:
        """The strip of a tensor of the parameter's shape, as a view."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class Active:
    """Parameter name -> its strips, disjoint and ascending along one dimension. Names that are missing are frozen.

    `lowest_block`: index of the lowest block that a gradient must reach; `number of blocks` if none.
    """

    parts: Mapping[str, tuple[Part, ...]]
    lowest_block: int

    @staticmethod
    def everything(model: torch.nn.Module) -> Active:
        return Active({name: _whole(p) for name, p in model.named_parameters()}, 0)

    def fraction(self, model: torch.nn.Module) -> float:
        """Share of all parameters that the optimizer moves (strips under other rules do not count)."""
        shapes = {name: p.shape for name, p in model.named_parameters()}
        total = sum(shape.numel() for shape in shapes.values())
        return self._numel(shapes, ("optimizer",)) / total

    def gradient_fraction(self, model: torch.nn.Module) -> float:
        """Share of all parameters whose gradient is formed, whatever becomes of it."""
        shapes = {name: p.shape for name, p in model.named_parameters()}
        return self._numel(shapes, RULES) / sum(shape.numel() for shape in shapes.values())

    def _numel(self, shapes: Mapping[str, torch.Size], rules: Sequence[str]) -> int:
        return sum(
            shapes[name].numel() // shapes[name][part.dim] * (part.stop - part.start)
            for name, parts in self.parts.items()
            for part in parts
            if part.rule in rules
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """What the time of a step depends on: sizes and rules of the strips by role, not their places. Hashable."""
        shapes: Counter[tuple[Any, ...]] = Counter()
        for name, parts in self.parts.items():
            role = re.sub(r"\.\d+\.", ".*.", name)
            tiled = all(a.stop == b.start for a, b in pairwise(parts)) and parts[0].start == 0
            if (
                tiled and len({part.rule for part in parts}) > 1
            ):  # one product, split afterwards: where it is split is no matter
                sizes: Counter[tuple[int, str]] = Counter()
                for part in parts:
                    sizes[part.dim, part.rule] += part.stop - part.start
                shapes[role, tuple(sorted((*k, v) for k, v in sizes.items()))] += 1
            else:
                shapes[role, tuple(sorted((p.dim, p.rule, p.stop - p.start) for p in parts))] += 1
        return (self.lowest_block, *sorted((*shape, n) for shape, n in shapes.items()))

    @property
    def rows(self) -> dict[str, tuple[int, int]]:
        """(start, stop) of parameters with one strip of rows, for callers that know no other."""
        return {n: (p[0].start, p[0].stop) for n, p in self.parts.items() if len(p) == 1 and p[0].dim == 0}


def _whole(p: Tensor) -> tuple[Part, ...]:
    return (Part(0, 0, p.shape[0]),)


def choose(model: Transformer, cfg: SubsetConfig, turn: int, seed: int) -> Active:
    """The active weights of the `turn`-th choice where nothing was observed; a pure function of its arguments."""
    subset = Subset(model, cfg, seed)
    for _ in range(turn if cfg.kind != "all" and (cfg.scored or cfg.policy not in ("rotate", "random")) else 0):
        subset.advance()
    return subset.active if subset.turn == turn or cfg.kind == "all" else subset.at(turn)


Together = Callable[[list[tuple[str, Tensor]]], list[Tensor]]
"""(parameter, what a process has found in its part) -> sums over the processes."""


class Subset:
    """The active weights of a run, turn by turn.

    Before each step: `if subset.due(step, progress): optimizer.activate(subset.advance())`. After each step's gradients,
    before they are clipped: `subset.observe(gradients, loss)`. A turn's choice depends on the configuration, the seed, the
    turn and what was observed, so that a resumed run repeats it.
    """

    def __init__(self, model: Transformer, cfg: SubsetConfig, seed: int) -> None:
        self.cfg, self.seed = cfg, seed
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.layers = len(model.blocks)
        self.grids = self._grids()
        self.turn, self.piece = 0, -1
        self._next: tuple[int, int] | None = None
        self._score = {name: torch.full((g.count,), float("nan")) for name, g in self.grids.items()}
        self._weight = {name: torch.zeros(g.count) for name, g in self.grids.items()}
        self._age = {name: torch.full((g.count,), NEVER, dtype=torch.int64) for name, g in self.grids.items()}
        self._loss_mean = float("nan")
        self._loss_spread = 0.0
        self.chosen: dict[str, list[int]] = {}
        self._choose(0)
        self.active = self._active()

    # what there is to choose from

    def _grids(self) -> dict[str, Grid]:
        cfg = self.cfg
        if cfg.kind in ("all", "lora"):
            return {}
        if cfg.kind == "layers":
            wanted = cfg.active_layers or max(1, round(cfg.active_fraction * self.layers))
            if wanted > self.layers:
                raise ValueError(f"subset.active_layers = {wanted}: the model has {self.layers} layers")
            return {"layers": Grid(self.layers, 1, wanted)}
        gated = {n: s for n, s in self.shapes.items() if len(s) == 2 and (n.startswith("blocks.") or self._stripped(n))}
        return {n: Grid.of(s[self._dim(n)], cfg.active_fraction, cfg.block_rows, cfg.strips) for n, s in gated.items()}

    def strip_dim(self, name: str) -> int | None:
        """The dimension that a parameter's strips are cut along, None where it is active as a whole or not at all."""
        return self._dim(name) if name in self.grids else None

    def _stripped(self, name: str) -> bool:
        return self.cfg.train_embeddings and self.cfg.embedding_strips and not name.startswith("blocks.")

    def _dim(self, name: str) -> int:
        """Rows of an embedding are tokens: it is cut along its width."""
        return 1 if self.cfg.kind == "block_columns" or not name.startswith("blocks.") else 0

    # turns

    def due(self, step: int, progress: float = 0.0) -> bool:
        """Whether `advance` is to be called before this step; `progress` is the share of the budget that is spent."""
        if self.cfg.kind in ("all", "lora"):
            return False
        self._next = self._phase(step, progress)
        return self._next != (self.turn, self.piece)

    def _phase(self, step: int, progress: float) -> tuple[int, int]:
        """(turn, piece of the look that ends it or -1); turn -1: everything is active from now on."""
        cfg = self.cfg
        if self.turn < 0 or progress >= cfg.until < 1:
            return -1, -1
        turn, place = divmod(step, cfg.change_every_steps)
        if cfg.look_every_turns and (turn + 1) % cfg.look_every_turns == 0:
            return turn, max(-1, place - (cfg.change_every_steps - cfg.look_steps))
        return turn, -1

    def advance(self, stats: Mapping[str, Tensor] | None = None) -> Active:
        """Go to what `due` announced, or to the next turn.

        Args:
            stats: scores in place of what was observed: matrix name (or "layers") -> float (N,); the highest are chosen.
        """
        turn, piece = self._next or (self.turn + 1, -1)
        self._next = None
        for name, score in (stats or {}).items():
            self._score[name] = score.float().cpu().clone()
            self._weight[name] = torch.ones(len(score))
        if turn != self.turn and turn >= 0:
            self._choose(turn)
        self.turn, self.piece = turn, piece
        self.active = self._active()
        return self.active

    def at(self, turn: int, piece: int = -1) -> Active:
        """The choice of any turn (and piece of its look) with what was observed so far; the subset goes there."""
        self._next = (turn, piece)
        return self.advance()

    def _choose(self, turn: int) -> None:
        cfg = self.cfg
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        explore = cfg.explore if cfg.scored else 0.0
        for name, grid in self.grids.items():
            question = Question(
                name, grid.count, grid.chosen, turn, self._score[name].cpu().float(), self._age[name], generator
            )
            self.chosen[name] = pick(cfg.policy, question, explore)
            self._age[name] = (self._age[name] + 1).clamp_(max=NEVER)
            self._age[name][self.chosen[name]] = 0
            if cfg.policy != "fisher":  # what follows replaces what was seen at its last turn; a running mean goes on
                self._weight[name][self.chosen[name]] = 0

    # strips

    def _active(self) -> Active:
        cfg = self.cfg
        if cfg.kind == "all" or self.turn < 0:
            return Active({name: (Part(0, 0, shape[0]),) for name, shape in self.shapes.items()}, 0)
        if cfg.kind == "lora":
            factors = {name: (Part(0, 0, shape[0]),) for name, shape in self.shapes.items() if ".lora_" in name}
            if not factors:
                raise ValueError(
                    "subset.kind = lora: this model has no LoRA factors; add_lora (lowrank.py) puts them there"
                )
            return Active(factors, 0)
        parts: dict[str, tuple[Part, ...]] = {}
        for name, shape in self.shapes.items():
            if found := self._parts(name, shape):
                parts[name] = found
        blocks = [int(name.split(".")[1]) for name in parts if name.startswith("blocks.")]
        lowest = 0 if "embed.weight" in parts else min(blocks, default=self.layers)
        return Active(parts, lowest)

    def _parts(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        whole = Part(0, 0, shape[0])
        if self.cfg.kind == "layers" and name.startswith("blocks."):
            layer = int(name.split(".")[1])
            if layer in self.chosen["layers"]:
                return (whole,)
            rule = self._idle_rule(layer % self.cfg.look_steps)
            return (Part(0, 0, shape[0], rule),) if rule else ()
        if name not in self.grids:
            return (whole,) if self.cfg.train_embeddings or name.startswith("blocks.") else ()
        grid, dim = self.grids[name], self._dim(name)
        spans = grid.spans(self.chosen[name])
        found = [Part(dim, a, b) for a, b in spans]
        for a, b in gaps(spans, shape[dim]):
            if self.cfg.inactive in SIGNS:
                found.append(Part(dim, a, b, self.cfg.inactive))
            elif self.piece >= 0:
                low, high = ((b - a) * i // self.cfg.look_steps + a for i in (self.piece, self.piece + 1))
                if low < high:
                    found.append(Part(dim, low, high, "look"))
        return tuple(sorted(found, key=lambda part: part.start))

    def _idle_rule(self, piece: int) -> str:
        """What happens to an inactive layer: "" if nothing."""
        if self.cfg.inactive in SIGNS:
            return self.cfg.inactive
        return "look" if self.piece == piece else ""

    # what was seen

    def observe(
        self, gradients: Mapping[str, Sequence[Tensor] | Tensor], loss: float, together: Together | None = None
    ) -> None:
        """Learn from a step's gradients, aligned with `active.parts`, and its loss in nats; for scored policies only.

        `together`: where gradients are of the parts of weights that this process holds, sums over all processes.
        """
        if not self.cfg.scored or self.turn < 0:
            return
        weight = self._surprise(loss) if self.cfg.policy == "surprise" else 1.0
        if self.cfg.kind == "layers":
            self._learn("layers", self._layer_energies(gradients, together), weight)
            return
        found = {
            name: self._energies(name, grid.size, _tuple(gradients[name]), together is None)
            for name, grid in self.grids.items()
            if name in gradients and name in self.active.parts
        }
        if together is not None:
            sums = zip(found, together(list(found.items())), strict=True)
            found = {name: value / self.shapes[name][1 - self._dim(name)] for name, value in sums}
        for name, value in found.items():
            self._learn(name, self.grids[name].pool(value), weight)

    def _energies(self, name: str, size: int, strips: Sequence[Tensor], whole: bool) -> Tensor:
        """Mean squared gradient of each row (or column), (size,), NaN where none was formed; of parts their sum."""
        values = torch.full((size,), float("nan"), device=strips[0].device)
        for part, g in zip(self.active.parts[name], strips, strict=True):
            if part.rule != "sign8":
                square = g.float().square()
                values[part.start : part.stop] = square.mean(1 - part.dim) if whole else square.sum(1 - part.dim)
        return values

    def _layer_energies(
        self, gradients: Mapping[str, Sequence[Tensor] | Tensor], together: Together | None = None
    ) -> Tensor:
        found = [
            (name, torch.stack([g.float().square().sum().cpu(), torch.tensor(float(g.numel()))]))
            for name, given in gradients.items()
            if name.startswith("blocks.")
            for g in _tuple(given)
            if g.is_floating_point()
        ]
        sums = [value for _, value in found] if together is None else together(found)
        total, count = torch.zeros(self.layers), torch.zeros(self.layers)
        for (name, _), (square, size) in zip(found, sums, strict=True):
            layer = int(name.split(".")[1])
            total[layer] += square
            count[layer] += size
        return total / count  # 0 / 0: not observed

    def _learn(self, name: str, energy_N: Tensor, weight: float) -> None:
        """Weighted mean of what is observed; "fisher": a running mean over all turns."""
        energy_N = energy_N.float()
        score, total = self._score[name].to(energy_N.device), self._weight[name].to(energy_N.device)
        total = total * FISHER_KEEP if self.cfg.policy == "fisher" else total
        seen = ~energy_N.isnan()
        after = torch.where(seen, total + weight, self._weight[name].to(energy_N.device))
        mixed = torch.where(total > 0, score.nan_to_num() * total + energy_N * weight, energy_N * weight) / after
        self._score[name] = torch.where(seen & (after > 0), mixed, score)
        self._weight[name] = after

    def _surprise(self, loss: float) -> float:
        """How far the loss lies above its running mean, in mean absolute deviations, at least 0.05."""
        if self._loss_mean != self._loss_mean:
            self._loss_mean = loss
        excess = loss - self._loss_mean
        self._loss_mean += 0.05 * excess
        self._loss_spread += 0.05 * (abs(excess) - self._loss_spread)
        return min(10.0, max(0.05, excess / self._loss_spread)) if self._loss_spread else 1.0

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Turn, choice and scores; `load_state_dict` also brings `active` back."""
        return {
            "turn": self.turn,
            "piece": self.piece,
            "loss_mean": self._loss_mean,
            "loss_spread": self._loss_spread,
            "chosen": {name: torch.tensor(places) for name, places in self.chosen.items()},
            "score": {name: v.cpu() for name, v in self._score.items()},
            "weight": {name: v.cpu() for name, v in self._weight.items()},
            "age": dict(self._age),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state. Raises ValueError where it belongs to another configuration or model."""
        found = {name: (len(state["score"][name]), len(places)) for name, places in state["chosen"].items()}
        wanted = {name: (grid.count, grid.chosen) for name, grid in self.grids.items()}
        if found != wanted:
            raise ValueError(
                f"the checkpoint's choice of weights is for {len(found)} groups {sorted(found.items())[:2]}..., this run "
                f"has {len(wanted)} {sorted(wanted.items())[:2]}...: resume with the subset and the model of that run"
            )
        self.turn, self.piece = int(state["turn"]), int(state["piece"])
        self._loss_mean, self._loss_spread = float(state["loss_mean"]), float(state["loss_spread"])
        self.chosen = {name: places.tolist() for name, places in state["chosen"].items()}
        self._score, self._weight = ({n: v.clone() for n, v in state[key].items()} for key in ("score", "weight"))
        self._age = {name: v.clone() for name, v in state["age"].items()}
        self._next = None
        self.active = self._active()


FISHER_KEEP = 0.99
"""Weight that a step's past keeps in the running mean of squared gradients."""


def _tuple(given: Sequence[Tensor] | Tensor) -> Sequence[Tensor]:
    return (given,) if isinstance(given, Tensor) else given
