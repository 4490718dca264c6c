"""The kept share over a run: constant, ramped, or steered to a compute budget; from a small fixed set of values, so that
shapes stay static and each value's step can be timed beforehand."""

from __future__ import annotations

from typing import Any

from sparse_update.gates.config import GateConfig


class Rate:
    """The kept share in force.

    "ramp": from `rate_from` to `keep_fraction` in `rate_levels` equal steps over the first `rate_over` of the budget.
    "budget": among `rate_levels` values from `keep_fraction` to 1, the largest that keeps the mean cost of a step, over a
    plain step's, at or below `rate_budget` so far.
    """

    def __init__(self, cfg: GateConfig) -> None:
        self.cfg = cfg
        self.spent = 0.0
        """Cost of all steps so far over a plain step's."""
        self.steps = 0
        self.cost: dict[float, float] = {}
        """Cost of a step at each level over a plain step's, as far as steps were taken at it."""
        self.now = self.levels()[-1]

    def levels(self) -> list[float]:
        """Every value below 1 that the run may use, falling; [1.0] where nothing is dropped."""
        cfg = self.cfg
        count = cfg.rate_levels
        if cfg.rate == "ramp":
            step = (cfg.keep_fraction - cfg.rate_from) / (count - 1)
            found = [cfg.rate_from + i * step for i in range(count)]
        elif cfg.rate == "budget":
            step = (cfg.keep_fraction - 1.0) / (count - 1)
            found = [1.0 + i * step for i in range(count)]
        else:
            found = [cfg.keep_fraction]
        return [round(value, 6) for value in found]

    def at(self, progress: float) -> float:
        """The kept share at `progress` of the budget; 1.0 in the last `anneal_fraction`."""
        cfg = self.cfg
        if self.annealed(progress):
            return 1.0
        levels = self.levels()
        if cfg.rate == "ramp":
            self.now = levels[min(len(levels) - 1, int(progress / cfg.rate_over * (len(levels) - 1)))]
        elif cfg.rate == "budget":
            allowed = cfg.rate_budget * (self.steps + 1) - self.spent
            self.now = next((k for k in levels if self.cost.get(k, k) <= allowed + 1e-9), levels[-1])
        else:
            self.now = levels[0]
        return self.now

    def annealed(self, progress: float) -> bool:
        """Whether the run is in its last, ungated share."""
        return self.cfg.anneal_fraction > 0 and progress >= 1 - self.cfg.anneal_fraction

    def observe(self, cost_over_plain: float) -> None:
        """Tell what the step just taken cost, over a plain step."""
        self.spent += cost_over_plain
        self.steps += 1
        self.cost[self.now] = cost_over_plain

    def state_dict(self) -> dict[str, Any]:
        return {"spent": self.spent, "steps": self.steps, "now": self.now, "cost": dict(self.cost)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spent, self.steps, self.now = float(state["spent"]), int(state["steps"]), float(state["now"])
        self.cost = {float(k): float(v) for k, v in state["cost"].items()}
