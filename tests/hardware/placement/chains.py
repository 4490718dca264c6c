"""Chains of layers, and the chips with every one of their accountings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

import hardware
from hardware import load_chip
from hardware.placement import Connection, LayerDemand, Placement

CHIP_FOLDER = Path(hardware.__file__).parent / "chips"
CHIPS = [("loihi1", "nxtf"), ("loihi1", "nengo"), ("loihi2", "inferred"), ("loihi2", "inferred-2023"), ("loihi2", "brief")]


def chain(*sizes: int, bits: int = 8, names: tuple[str, ...] = ()) -> list[LayerDemand]:
    """An input on the host and dense layers."""
    found = [LayerDemand("in", sizes[0], on_chip=False)]
    for number, size in enumerate(sizes[1:]):
        name = names[number] if names else f"l{number}"
        found.append(LayerDemand(name, size, (Connection(found[-1].name, found[-1].neurons, bits),)))
    return found


def check(placement: Placement, demands: list[LayerDemand]) -> None:
    """What holds for every placement."""
    chip = load_chip(placement.chip)
    limits = chip.budgets[placement.budget].limits
    for core in placement.cores:
        assert set(core.used) == set(limits) - ({"axon_out", "axon_out_far"} - set(core.used))
        for name, limit in core.used.items():
            assert limit.limit == limits[name]
            assert 0 <= limit.used <= limit.limit, (core.number, name, limit)
        assert 0 <= core.slot < chip.cores
    if "axon_out" in limits:
        assert all({"axon_out", "axon_out_far"} <= set(core.used) for core in placement.cores)
    assert len({(core.chip, core.slot) for core in placement.cores}) == len(placement.cores)
    assert max(Counter(core.chip for core in placement.cores).values()) <= chip.cores
    assert {core.chip for core in placement.cores} == set(range(placement.chips))
    for demand in demands:
        if not demand.on_chip:
            continue
        # Every neuron is on one core, and every synapse of it is once on a core.
        mine = [part for core in placement.cores for part in core.parts if part.layer == demand.name]
        owned = np.concatenate([part.indices(demand.box) for part in mine if part.role != "partial"])
        assert sorted(owned.tolist()) == list(range(demand.neurons))
        assert min(placement.core_of(demand.name)) >= 0
        for number, connection in enumerate(demand.connections):
            seen = np.zeros(demand.neurons, dtype=np.int64)
            for part in mine:
                if part.role != "sum":
                    low, high = part.inputs[number] if part.inputs is not None else (0, connection.units)
                    seen[part.indices(demand.box)] += high - low
            assert (seen == connection.units).all()
