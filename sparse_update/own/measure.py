"""A table of prices timed on this machine, for the arms of one comparison.

Every arm takes a step on a copy of the model. What those steps do is counted; each shape of matrix product in them is
timed by itself, and so are an element moved, an element through a function and an operation started. Then whole steps of
each arm are taken in turn with dense ones: the dense step sets the scale, and the ratio of the two, where it is above the
ratio of their counts, becomes the factor of the arm's kind.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hardware.meters.ratios import InTurn, Measured, Probe, Until, rounds_of, timed
from sparse_update.clock.timing import WARM_UP, Say
from sparse_update.library.attach import Gate
from sparse_update.own.arms import DENSE, OwnArm
from sparse_update.own.batches import Batches, seed_all
from sparse_update.own.counting import Counting, Product, Work, flops_of
from sparse_update.own.loop import losses_of, make_gate, step
from sparse_update.own.prices import MEASURED, Prices
from sparse_update.own.task import UserTask, to_device

ROUNDS = 9
STEPS = Until(least_rounds=ROUNDS, most_rounds=3 * ROUNDS, most_s=120.0, warm_up=WARM_UP, beside=1)
"""Of whole steps in turn with dense ones; what is noisy at the ceiling is taken as it is, and marked."""
SHORTEST_S = 2e-4
"""A product is repeated until one timing of it takes as long."""
WARM_STEPS = 2
OTHER = "other"
CHAIN = 64
"""Operations in a row whose start is timed."""


@dataclass
class Rehearsal:
    """One arm on a copy of the model, one batch over and over: its step and what that does."""

    arm: OwnArm
    take: Callable[[], None]
    work: Work
    gate: Gate | None
    model: nn.Module


def rehearse(task: UserTask, arm: OwnArm, seed: int, device: torch.device) -> Rehearsal:
    """Set an arm up, take its first steps and count one. The process's generators stay where they are.

    Raises what the parts of the task raise: an arm that cannot run is found before any training.
    """
    seed_all(seed)
    model = task.make_model(seed, device)
    gate = make_gate(task, model, arm, seed)
    parameters = gate.parameters() if gate else [p for p in model.parameters() if p.requires_grad]
    optimizer = task.make_optimizer(parameters)
    batch = to_device(next(iter(Batches(task, seed))), device)

    def take() -> None:
        step(task, model, gate, optimizer, batch, lambda part: nullcontext())

    for _ in range(WARM_STEPS):
        take()
    counting = Counting([*model.parameters(), *(gate.parameters() if gate else [])])
    step(task, model, gate, optimizer, batch, counting.part)
    return Rehearsal(arm, take, counting.work, gate, model)


def measure(
    task: UserTask,
    arms: Sequence[OwnArm],
    seed: int,
    device: torch.device,
    progress: Say = lambda text: None,
    rounds: int = ROUNDS,
) -> Prices:
    """The table for these arms; dense is measured along where it is not among them.

    Args:
        progress: told what is going on, a line at a time.
        rounds: timings of each thing, whose median counts.
    """
    progress("prices: the steps of every arm, counted")
    dense = rehearse(task, OwnArm(DENSE), seed, device)
    others = [arm for arm in arms if arm.config is not None]
    works = {DENSE: dense.work}
    for arm in others:
        works[arm.name] = rehearse(task, arm, seed, device).work
    products = sorted({p for work in works.values() for count in work.values() for p in count.products})
    progress(f"prices: {len(products)} shapes of products")
    products_ps = _products(products, device, rounds)
    bare = Prices(MEASURED, "measured", _others(dense.work, products, products_ps, device, rounds), {}, products_ps)
    factors: dict[str, float] = {}
    check: dict[str, Any] = {}
    dense_s: list[float] = []
    for arm in others:
        progress(f"prices: whole steps, dense and {arm.name} in turn")
        other = rehearse(task, arm, seed, device)
        found = beside_dense(dense.take, other.take, device, replace(STEPS, least_rounds=rounds, most_rounds=3 * rounds))
        dense_s += found.seconds[DENSE]
        ratio = found.ratios[OTHER]
        counted = bare.total_s(other.work, DENSE) / bare.total_s(dense.work, DENSE)
        check[arm.name] = {"kind": arm.kind, "measured_over_dense": ratio.typical, "counted_over_dense": counted}
        check[arm.name] |= {"interval": [ratio.low, ratio.high], "rounds": ratio.rounds, "verdict": ratio.verdict}
    dense_s = dense_s or rounds_of({DENSE: probe(dense.take, device)}, rounds)[DENSE]
    for kind in {arm.kind for arm in others}:
        ratios = [one["measured_over_dense"] / one["counted_over_dense"] for one in check.values() if one["kind"] == kind]
        factors[kind] = max(1.0, statistics.fmean(ratios))
    scale = statistics.median(dense_s) / bare.total_s(dense.work, DENSE)
    low, _, high = statistics.quantiles(dense_s, n=4)
    dense_times = {"dense_ms": 1000 * statistics.median(dense_s), "dense_spread": (high - low) / statistics.median(dense_s)}
    return Prices(
        MEASURED,
        "measured",
        bare.prices_ps,
        factors,
        products_ps,
        _signals(task, others, seed, device, rounds),
        scale,
        _machine(device),
        {"steps": check, **dense_times, "dense_flops": flops_of(dense.work)},
    )


def dense_step_s(task: UserTask, prices: Prices, seed: int, device: torch.device) -> float:
    """Reference seconds of one plain step on the task's first batch."""
    return prices.total_s(rehearse(task, OwnArm(DENSE), seed, device).work, DENSE)


def probe(use: Callable[[], object], device: torch.device, least_s: float = 0.0) -> Probe:
    """Seconds of one use; of this thread alone where it does all the work, so that a busy machine counts for less."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None
    return timed(use, time.thread_time if alone else time.perf_counter, wait, least_s)


def beside_dense(
    dense: Callable[[], object], other: Callable[[], object], device: torch.device, until: Until = STEPS
) -> Measured:
    """Two whole steps in turn: `ratios[OTHER]` is the other's time over the dense one's."""
    return InTurn({DENSE: probe(dense, device), OTHER: probe(other, device)}, DENSE, until, torch.get_num_threads()).run()


def _medians_ps(probes: Mapping[str, Probe], rounds: int) -> dict[str, float]:
    return {name: 1e12 * statistics.median(values) for name, values in rounds_of(probes, rounds).items()}


def _products(products: Sequence[Product], device: torch.device, rounds: int) -> dict[str, float]:
    """Picoseconds of one product of each shape, by its key."""
    return _medians_ps({product.key: _product_probe(product, device) for product in products}, rounds)


def _product_probe(product: Product, device: torch.device) -> Probe:
    left = _operand(product.b, product.m, product.k, product.layout[0], product.dtype, device)
    right = _operand(product.b, product.k, product.n, product.layout[1], product.dtype, device)

    def use() -> object:
        return torch.bmm(left, right) if product.b > 1 else torch.mm(left[0], right[0])

    return probe(use, device, SHORTEST_S)


def _operand(b: int, rows: int, columns: int, layout: str, dtype: str, device: torch.device) -> torch.Tensor:
    kind = getattr(torch, dtype)
    if layout == "n":
        return torch.ones(b, rows, columns, device=device).to(kind)
    return torch.ones(b, columns, rows, device=device).to(kind).transpose(1, 2)


def _others(
    dense: Work, products: Sequence[Product], products_ps: dict[str, float], device: torch.device, rounds: int
) -> dict[str, float]:
    """Prices of everything but products, and of products' operations for shapes that are not in the table."""
    operations = sum(count.operations for count in dense.values())
    size = max(1 << 15, sum(count.moved_bytes for count in dense.values()) // max(1, operations) // 12)
    one, two = torch.ones(size, device=device), torch.ones(size, device=device)
    tiny = torch.ones(1, device=device)
    leaf = torch.ones(1, device=device, requires_grad=True)

    def chain() -> None:
        value = leaf
        for _ in range(CHAIN):
            value = value * 1.0
        value.backward()

    ps = _medians_ps(
        {
            "add": probe(lambda: torch.add(one, two), device, SHORTEST_S),
            "exp": probe(lambda: torch.exp(one), device, SHORTEST_S),
            "tiny": probe(lambda: torch.add(tiny, tiny), device, SHORTEST_S),
            "chain": probe(chain, device),
        },
        rounds,
    )
    whole = sum(product.flops for product in products) or 1
    flop_ps = sum(products_ps[product.key] for product in products) / whole
    found = dict.fromkeys(("forward_flops", "dx_flops", "dw_flops"), flop_ps)
    return {
        **found,
        "moved_bytes": max(0.0, ps["add"] - ps["tiny"]) / (12 * size),  # two tensors read, one written, 4 bytes each
        "hard_elements": max(0.0, ps["exp"] - ps["tiny"]) / size,
        "operations": ps["chain"] / (2 * CHAIN),  # forward and backward
        "step": 0.0,
    }


def _signals(task: UserTask, arms: Sequence[OwnArm], seed: int, device: torch.device, rounds: int) -> dict[str, float]:
    """Picoseconds of scoring one sequence before its forward, by the signal's key."""
    found: dict[str, float] = {}
    for arm in arms:
        if arm.config is None or arm.config.before.signal == "none":
            continue
        seed_all(seed)
        gate = make_gate(task, task.make_model(seed, device), arm, seed)
        assert gate is not None
        next(gate.filter(Batches(task, seed), losses=losses_of(task)))  # the signal is made when it sees the length
        signal = gate.pool.signal
        if signal is None or not signal.cost_key:
            continue
        size = arm.config.before.pool
        found |= {
            key: ps / size for key, ps in _medians_ps({signal.cost_key: probe(signal.probe(size), device)}, rounds).items()
        }
    return found


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
        "processors": os.cpu_count() or 1,
        "date": time.strftime("%Y-%m-%d"),
    }
