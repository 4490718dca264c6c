"""Settings of reinforcement by a learned reward, and of direct preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field

from hardware.text import quoted
from sparse_update.objectives.preference.errors import PreferenceError

RULES = ("mean", "least")
AT_FLAG = ("go_on", "hold")


@dataclass
class RewardConfig:
    """Which reward is followed, and how it is watched. Raises PreferenceError for values outside their range."""

    models: list[str] = field(default_factory=list)
    """Folders of reward models (`RewardModel.save`); several are an ensemble."""
    rule: str = "least"
    """"least" | "mean": what an ensemble says."""
    watch_prompts: int = 64
    """Development questions on which both rewards are compared at every evaluation; 0 for none."""
    watch_outputs: int = 8
    at_flag: str = "go_on"
    """"go_on" | "hold": no update any more once the true reward falls while the learned one rises."""
    alpha: float = 0.05
    """Probability of a false flag over a run, at most."""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise PreferenceError(f"objective.reward.rule = {quoted(self.rule)}: one of {', '.join(RULES)}")
        if self.at_flag not in AT_FLAG:
            raise PreferenceError(f"objective.reward.at_flag = {quoted(self.at_flag)}: one of {', '.join(AT_FLAG)}")
        if self.watch_prompts and not self.watch_prompts >= 8:
            raise PreferenceError(f"objective.reward.watch_prompts = {self.watch_prompts}: at least 8, or 0 for no watch")
        if self.at_flag == "hold" and not self.watch_prompts:
            raise PreferenceError(
                "objective.reward.at_flag = hold with watch_prompts = 0: there is no flag without a watch"
            )
        if self.watch_outputs < 1 or not 0 < self.alpha < 1:
            raise PreferenceError(
                f"objective.reward.watch_outputs = {self.watch_outputs}, alpha = {self.alpha}: at least 1, in (0, 1)"
            )


@dataclass
class DpoConfig:
    """Direct preference optimisation. Raises PreferenceError for a beta that is not positive."""

    beta: float = 0.1
    """How much the log-ratio to the reference counts: the smaller, the farther the policy may go."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise PreferenceError(f"objective.dpo.beta = {self.beta}: a positive number")
