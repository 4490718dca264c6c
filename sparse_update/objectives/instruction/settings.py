"""Settings of instruction tuning."""

from __future__ import annotations

from dataclasses import dataclass

AVERAGES = ("tokens", "answers")


@dataclass
class InstructConfig:
    """Settings of `Instruct`. Raises ValueError at construction for a value outside its range."""

    average: str = "tokens"
    """What the loss is a mean over: tokens (long answers weigh more) or answers (all weigh alike)"""

    def __post_init__(self) -> None:
        if self.average not in AVERAGES:
            raise ValueError(f"objective.instruct.average = {self.average!r}: one of {', '.join(AVERAGES)}")
