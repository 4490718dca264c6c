"""Memory of `bench attach`: what a gate promises, from one forward, and what a fresh process then takes.

    promise = parameters + gradients + the optimizer's state + what autograd keeps + the gradient of the logits

All of them are there when the backward of a step's last micro-batch begins, so two micro-batches a step are measured. On
the CPU the peak is that of torch's allocations, event by event from its profiler; on a GPU `max_memory_allocated`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from experiments.benches.attach_arms import Arm, Shape, build, tokens

MICRO_BATCHES = 2
STEPS = 3


@dataclass(frozen=True)
class Promise:
    """Bytes of a training step, as counted before its first backward. `saved`: what autograd keeps for it, parameters and
    buffers apart, each memory once; `logits`: their gradient, with which the backward begins."""

    parameters: int
    gradients: int
    optimizer: int
    saved: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Peak:
    """Peak bytes of a process that made some steps, and what was promised."""

    promised: Promise
    measured: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        whole = {"promised": self.promised.total, **{f"promised_{k}": v for k, v in asdict(self.promised).items()}}
        return {**whole, "measured": self.measured, "ratio": self.measured / self.promised.total}


def promise(arm: Arm) -> Promise:
    """What a step of this arm will take, from one forward; AdamW's two moments have the types of their parameters."""
    arm.loss()  # a gate may look at the model once, in its first loss
    own = [*arm.model.parameters(), *arm.model.buffers()]
    known = {p.untyped_storage().data_ptr() for p in own}
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        memory = saved.untyped_storage()
        if memory.data_ptr() not in known:
            kept[memory.data_ptr()] = memory.nbytes()
        return saved.detach()  # an output that holds itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss = arm.loss()
    del loss
    gradients = sum(p.nbytes for p in arm.parameters)
    vocab = next(p.shape[0] for p in arm.model.parameters() if p.dim() == 2)  # the embedding's rows
    return Promise(
        parameters=sum(p.nbytes for p in own),
        gradients=gradients,
        optimizer=2 * gradients + 4 * len(arm.parameters),  # and a count of steps each
        saved=sum(kept.values()),
        logits=arm.x.numel() * vocab * 4,
    )


def peak(name: str, shape: Shape, config: Mapping[str, Any] | None, device_name: str, threads: int) -> Peak:
    """Train in this process, which should be a new one, and say what it took."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)

    def train() -> Promise:
        arm = Arm(build(name, shape, device), *tokens(shape, device), config)
        promised = promise(arm)
        for _ in range(STEPS):
            arm.step(MICRO_BATCHES)
        return promised

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        promised = train()
        torch.cuda.synchronize(device)
        return Peak(promised, torch.cuda.max_memory_allocated(device))
    with _unheard(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        promised = train()
    return Peak(promised, _highest(record))


def peak_apart(name: str, shape: Shape, config: Mapping[str, Any] | None, device: torch.device, threads: int) -> Peak:
    """`peak` in a process of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak, name, shape, config, str(device), threads).result()


@contextmanager
def _unheard() -> Iterator[None]:
    """Standard error closed for the profiler, whose library writes there that it starts and stops; errors are raised."""
    held = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(held, 2)
            os.close(held)


def _highest(record: profile) -> int:
    """The largest sum of what was allocated and freed so far."""
    results: Any = record.profiler
    events = results.kineto_results.events()
    found = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = highest = 0
    for _, change in found:
        now += change
        highest = max(highest, now)
    return highest
