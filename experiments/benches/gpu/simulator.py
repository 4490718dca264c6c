"""The simulator on the GPU: the same integers as on the CPU, and how many synaptic operations it makes in a second."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from experiments.benches import ratios
from experiments.benches.gpu.setting import Emit, Setting
from experiments.benches.simulator import network, spikes
from hardware.meters.ratios import InTurn, Until
from neuro.graph import SpikingGraph
from neuro.simulators.activity import Activity, compare
from neuro.simulators.fixed_point import simulate

RECORD = ("spikes", "u", "v")
SIZES = ((256, 256, 64), (1024, 64, 64), (1024, 1, 512), (4096, 64, 32))
"""Neurons of a layer, samples, steps."""


def measure(setting: Setting, emit: Emit) -> dict[str, Any]:
    """For each size and both modes: values that differ from the CPU's (0 is right), and the speed of a default call.

    `synops_per_s` counts the synaptic operations of both layers over the median time; `ratio_to_cpu` is the device's time
    over the CPU's in the same run.
    """
    found: dict[str, Any] = {}
    begin = time.monotonic()
    for n, batch, steps in ((16, 3, 12),) if setting.toy else SIZES:
        if time.monotonic() - begin > 0.7 * setting.seconds:
            break
        graph, inputs = network(n, vths=(n // 2, n // 2)), spikes(n, batch, steps)
        different = {mode: _different(graph, inputs, mode, setting.device) for mode in ("lava", "chip")}
        row: dict[str, Any] = {"different": different}
        found[f"n{n} batch{batch} steps{steps}"] = row
        emit({"sizes": found})
        there = inputs.to(setting.where)
        here = simulate(graph, {"x": inputs})
        synops = sum(projection.synops for projection in here.projections.values())
        calls = {
            "device": partial(simulate, graph, {"x": there}, record=()),
            "cpu": partial(simulate, graph, {"x": inputs}, record=()),
        }
        probes = {name: ratios.probe(call, setting.where) for name, call in calls.items()}
        until = Until(most_s=0.1 * setting.seconds, most_rounds=2 if setting.toy else 100)
        timed = InTurn(probes, "cpu", until).run()
        row |= {
            "synops": synops, "synops_per_s": synops / timed.median_s("device"),
            "cpu_synops_per_s": synops / timed.median_s("cpu"), "ratio_to_cpu": timed.ratios["device"].to_dict(),
        }  # fmt: skip
        emit({"sizes": found})
    return {"sizes": found}


def _different(graph: SpikingGraph, inputs: torch.Tensor, mode: str, device: str) -> int:
    """Recorded values and counts that are not the CPU's."""
    here = simulate(graph, {"x": inputs}, mode=mode, record=RECORD)
    there = simulate(graph, {"x": inputs.to(device)}, mode=mode, record=RECORD)
    return compare(here, there).mismatches + _different_counts(here, there)


def _different_counts(here: Activity, there: Activity) -> int:
    projections = sum(count != there.projections[name] for name, count in here.projections.items())
    return projections + sum(count != there.populations[name] for name, count in here.populations.items())
