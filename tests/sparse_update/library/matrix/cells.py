"""Which cells the matrix of loops has: one value of each axis, and the few that a test run of a minute takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass

AXES = {
    "loop": ("plain", "accelerate", "trainer", "lightning", "lightning_manual", "ddp", "fully_shard"),
    "compile": ("none", "whole", "regional"),
    "precision": ("fp32", "bf16", "fp16"),
    "feature": (
        "accumulation",
        "clipping",
        "checkpoint",
        "checkpoint_reentrant",
        "ema",
        "schedule",
        "groups",
        "frozen",
        "functional_call",
        "deepcopy",
        "resume",
    ),
    "gate": ("tokens", "sequences", "strips"),
}
PAIRED = ("ddp", "fully_shard")
"""Loops of two processes."""
PRECISE = {"fp32": 1e-4, "bf16": 0.04, "fp16": 5e-3}
"""Largest relative distance between what a loop changed of any parameter and what the float64 loop by hand did."""


REFUSALS = (
    (
        {"loop": "fully_shard", "gate": "strips"},
        r"GateError: .*sharded.*needs whole.*leave (it|weights.kind at) 'all', or shard nothing",
    ),
    (
        {"loop": "fully_shard", "feature": "deepcopy", "gate": ("tokens", "sequences")},
        r"AssertionError: FSDP does not support deepcopy\. Please use state dict for serialization\.",
    ),
)
"""Cells by their values, and the words of the refusal; every other cell must come to what the loop by hand does."""


@dataclass(frozen=True)
class Cell:
    loop: str
    compile: str
    precision: str
    feature: str
    gate: str

    def __str__(self) -> str:
        return " ".join(astuple(self))

    @classmethod
    def of(cls, text: str) -> Cell:
        return cls(*text.split())

    @property
    def refusal(self) -> str:
        """A pattern of the words with which this cell must be refused; "" where it must run."""
        for values, words in REFUSALS:
            if all(getattr(self, axis) in ((v,) if isinstance(v, str) else v) for axis, v in values.items()):
                return words
        return ""

    @property
    def backend(self) -> str:
        """Inductor where the feature touches the graph least, torch's eager backend elsewhere."""
        return "inductor" if self.feature == "schedule" and self.precision == "bf16" else "aot_eager"


def all_cells() -> Iterator[Cell]:
    """Those that share a compilation follow each other."""
    a = AXES
    for loop, comp, gate, precision, feature in itertools.product(
        a["loop"], a["compile"], a["gate"], a["precision"], a["feature"]
    ):
        yield Cell(loop, comp, precision, feature, gate)


COMPILED = {
    "plain": {"clipping": "whole", "checkpoint": "regional"},
    "accelerate": {"ema": "whole", "groups": "regional"},
    "trainer": {"groups": "whole"},
    "lightning": {"resume": "whole"},
    "lightning_manual": {"checkpoint": "regional"},
    "ddp": {"ema": "whole"},
    "fully_shard": {"resume": "regional"},
}
"""What the covering selection compiles: few graphs, for compilation is what takes long."""


def covering() -> list[Cell]:
    """Every pair of a loop and a feature; the other axes turn with them: each loop meets every precision and gate."""
    chosen = []
    for i, loop in enumerate(AXES["loop"]):
        for j, feature in enumerate(AXES["feature"]):
            if feature in COMPILED[loop]:
                chosen.append(Cell(loop, COMPILED[loop][feature], "fp32", feature, "tokens"))
                continue
            precision = AXES["precision"][(0, 1, 0, 2)[(i + j) % 4]]
            chosen.append(Cell(loop, "none", precision, feature, AXES["gate"][(0, 2, 0, 1, 2)[(i + j) % 5]]))
    return chosen


def only(cells: Iterable[Cell], wanted: Iterable[str]) -> list[Cell]:
    """Cells that have one of the wanted values on every axis that is named: "loop=plain,ddp"."""
    picks = {axis: set(values.split(",")) for axis, values in (text.split("=") for text in wanted)}
    for axis, values in picks.items():
        if unknown := values - set(AXES[axis]):
            raise ValueError(f"{axis} = {', '.join(unknown)}: one of {', '.join(AXES[axis])}")
    return [c for c in cells if all(getattr(c, axis) in values for axis, values in picks.items())]
