"""Layers of a network on the cores of one chip or several: what each core holds, and what stands in the way if it fails.

``place`` splits every layer into parts that fit one core, counts output axons, puts parts on cores and cores on chips.
Every figure is (used, limit); values that are inferred from published tool output are named in ``notes``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hardware.chips.budget import Budget
from hardware.chips.chip import Chip, load_chip
from hardware.placement.demand import Connection, Convolution, LayerDemand, check
from hardware.placement.layout import Options, lay_out
from hardware.placement.report import Core, DoesNotFit, LayerPlacement, Limit, Placement, plain_name
from hardware.placement.split import SPLITS
from hardware.text import listed, quoted

__all__ = [
    "Connection",
    "Convolution",
    "Core",
    "DoesNotFit",
    "LayerDemand",
    "LayerPlacement",
    "Limit",
    "Placement",
    "place",
]


def place(
    demands: Sequence[LayerDemand],
    chip: Chip | str | Path,
    chips: int | None = None,
    *,
    budget: str | None = None,
    split: str = "fewest",
    encoding: str | None = None,
    share: bool = False,
) -> Placement:
    """Put layers on cores.

    Args:
        demands: the layers; order does not matter.
        chip: a chip, its name, or the path of a chip file.
        chips: chips there are; None for as many as are needed. The fewest are used.
        budget: name of one of the chip's accountings; None for its first. Loihi 1: ``nxtf``, ``nengo``; Loihi 2:
            ``inferred``, ``inferred-2023``, ``brief``.
        split: ``"fewest"`` cores, or ``"compiler"``: as published logs of Intel's compiler show.
        encoding: ``"dense"`` or ``"sparse"`` for connections that name none; None for the budget's.
        share: let a core hold parts of several layers.

    Raises:
        DoesNotFit: names the binding limit, and what would make it fit (each remedy was tried).
        ValueError: demands that do not fit together, an unknown budget, split or encoding, chips below 1.
        FileNotFoundError, DataFileError: no such chip, or a chip file that cannot be trusted.
    """
    chip = chip if isinstance(chip, Chip) else load_chip(chip)
    if not chip.budgets:
        raise ValueError(
            f"chip {quoted(chip.name)} has no budgets: nothing can be placed on it; see hardware/chips/loihi2.yaml"
        )
    name = next(iter(chip.budgets)) if budget is None else budget
    if name not in chip.budgets:
        raise ValueError(f"chip {quoted(chip.name)} has no budget {quoted(name)}; it has: {listed(chip.budgets)}")
    if chips is not None and (isinstance(chips, bool) or not isinstance(chips, int) or chips < 1):
        raise ValueError(f"chips is {quoted(chips)}; a whole number from 1 is needed, or None for as many as it takes")
    if split not in SPLITS:
        raise ValueError(f"split {quoted(split)} is unknown; known: {', '.join(SPLITS)}")
    if encoding not in (None, "dense", "sparse"):
        raise ValueError(f"encoding {quoted(encoding)} is unknown; known: dense, sparse")
    _speaks(check(demands), chip)
    options = Options(split, encoding, share)
    try:
        return lay_out(demands, chip, chip.budgets[name], chips, options)
    except DoesNotFit as failure:
        if failure.binding.resource != "cores" or failure.remedies:
            raise  # one layer stands in the way, and the failure says what to do about it
        remedies = _remedies(demands, chip, chip.budgets[name], chips, options)
        raise DoesNotFit(failure.what, failure.binding, remedies) from None


def _speaks(layers: Mapping[str, LayerDemand], chip: Chip) -> None:
    """Refuse messages and neurons that the chip does not have at all."""
    for layer in layers.values():
        what = plain_name(layer.name)
        if layer.payload_bits > chip.payload_bits:
            limit = Limit("payload_bits", layer.payload_bits, chip.payload_bits)
            remedy = f"messages of {chip.payload_bits} bits" if chip.graded else "binary spikes"
            raise DoesNotFit(
                what, limit, (f"{remedy} from {what}", *(() if chip.graded else ("a chip with graded messages: loihi2",)))
            )
        if layer.programmable and not chip.graded:
            raise DoesNotFit(
                what, Limit("programmable_neurons", layer.neurons, 0), ("a chip with programmable neurons: loihi2",)
            )


def _remedies(
    demands: Sequence[LayerDemand], chip: Chip, budget: Budget, chips: int | None, options: Options
) -> tuple[str, ...]:
    """What was tried and works, mildest first."""
    found: list[str] = []

    def attempt(text: str, change: Callable[[], Placement]) -> None:
        try:
            result = change()
        except DoesNotFit:
            return
        cores, many = len(result.cores), result.chips
        found.append(f"{text} ({cores:,} core{'s' * (cores > 1)} on {many:,} chip{'s' * (many > 1)})")

    if not options.share:
        shared = dataclasses.replace(options, share=True)
        attempt("let layers share cores", lambda: lay_out(demands, chip, budget, chips, shared))
    widest = max((c.weight_bits for demand in demands for c in demand.connections), default=0)
    for bits in (8, 6, 4, 2):
        if bits < widest and not any(text.startswith(f"{bits + 2}-bit") for text in found):
            fewer = [_narrow(demand, bits) for demand in demands]
            attempt(f"{bits}-bit weights", lambda fewer=fewer: lay_out(fewer, chip, budget, chips, options))  # type: ignore[misc]
    if (options.encoding or budget.encoding) == "sparse":
        dense = dataclasses.replace(options, encoding="dense")
        attempt("index-free synapses", lambda: lay_out(demands, chip, budget, chips, dense))
    if chips is not None:
        attempt("more chips", lambda: lay_out(demands, chip, budget, None, options))
    return tuple(found)


def _narrow(demand: LayerDemand, bits: int) -> LayerDemand:
    connections = tuple(dataclasses.replace(c, weight_bits=min(bits, c.weight_bits)) for c in demand.connections)
    return dataclasses.replace(demand, connections=connections)
