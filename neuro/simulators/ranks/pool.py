"""Processes that simulate together: started once, given one run after the other.

    with Ranks(2) as ranks:
        activity = ranks.simulate(graph, inputs, by="populations")

Each is a process of `torch.multiprocessing`; they tell one another their messages by `torch.distributed` (gloo).
"""

from __future__ import annotations

import multiprocessing.connection
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from hardware.text import quoted, short
from neuro.graph import SpikingGraph
from neuro.simulators.activity import Activity, Messages, recorded
from neuro.simulators.fixed_point import Fused, check_mode, simulate
from neuro.simulators.inputs import Integers, bounded_run
from neuro.simulators.ranks.merging import merged, refusable
from neuro.simulators.ranks.part import simulate_part
from neuro.simulators.ranks.splitting import Port, SplitError, checked, partition, shares
from neuro.simulators.tally import Placement, checked_placement

WAYS = ("batch", "populations")
START_S = 120.0


class RankError(RuntimeError):
    """A process of the simulation ended, failed or did not answer in time; the message names it. The others are ended."""


class Ranks:
    """`processes` processes of `threads` threads each, which run graphs together.

    Args:
        processes: how many, from 1.
        threads: of each.
        limit_s: seconds that a run, or the start, may take before all are ended.

    Raises:
        SplitError: fewer than one process or thread.
        RankError: they did not start.
    """

    def __init__(self, processes: int, threads: int = 1, limit_s: float = 600.0) -> None:
        for name, value in (("processes", processes), ("threads", threads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SplitError(f"{name} is {quoted(value)}; a whole number from 1 is needed")
        self.processes, self.limit_s = processes, limit_s
        self._folder = tempfile.TemporaryDirectory(prefix="spikegate-ranks-")
        context = torch.multiprocessing.get_context("spawn")
        store = str(Path(self._folder.name) / "store")
        self._pipes: list[Any] = []
        self._workers: list[Any] = []
        for rank in range(processes):
            here, there = context.Pipe()
            worker = context.Process(
                target=_work, args=(there, rank, processes, threads, store, limit_s), daemon=True, name=f"rank {rank}"
            )
            worker.start()
            there.close()
            self._pipes.append(here)
            self._workers.append(worker)
        self._answers(max(limit_s, START_S))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; a second time does nothing."""
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.join(1.0)
            if worker.is_alive():
                worker.kill()
                worker.join()
        self._pipes, self._workers = [], []
        self._folder.cleanup()

    def simulate(
        self,
        graph: SpikingGraph,
        inputs: Mapping[str, Integers],
        *,
        by: str = "populations",
        split: Mapping[str, int] | None = None,
        mode: str = "lava",
        strict: bool = False,
        record: Iterable[str] = ("spikes",),
        placement: Placement | None = None,
        fused: Fused = None,
        steps: int | None = None,
    ) -> Activity:
        """Run a graph from rest on all processes; the result is that of `neuro.simulators.fixed_point.simulate`, in every
        value and count.

        Args:
            by: "batch", samples are shared out and no process hears of another; "populations", each has populations of the
                graph, and messages between them are exchanged as often as the shortest delay between them asks for.
            split: population -> process, by populations only; by default `partition`.
            graph, inputs, mode, strict, record, placement, fused, steps: as in `simulate`. Everything lies on the CPU. A
                strict run in which something leaves its register is made again in this process, which says what came first.

        Raises:
            SplitError: no such way, more processes than populations, or a split that does not fit.
            RankError: a process ended or failed; all are ended, and a new `Ranks` is needed.
            ValueError, GraphError, InputError, FixedPointOverflow: as `simulate`.
        """
        if not self._pipes:
            raise RankError("the processes are ended; make a new Ranks")
        if by not in WAYS:
            raise SplitError(f"by is {quoted(by)}; there is: {', '.join(WAYS)}")
        if split is not None and by != "populations":
            raise SplitError("split is given, which only by='populations' takes")
        check_mode(graph, mode)
        record = tuple(record) if not isinstance(record, str) else record
        recorded(graph, record)
        checked_placement(graph, placement)
        values, _, batch, _ = bounded_run(graph, inputs, steps, "cpu")
        arrays = {name: value.numpy() for name, value in values.items()}
        options = {"mode": mode, "record": record, "placement": placement, "fused": fused, "steps": steps}
        if by == "batch":
            jobs: list[Any] = [
                (graph, {name: value[rows] for name, value in arrays.items()}, None, options)
                for rows in shares(batch, self.processes)
            ]
        else:
            assignment = partition(graph, self.processes) if split is None else checked(graph, split, self.processes)
            jobs = [(graph, arrays, assignment, options)] * self.processes
        for rank, job in enumerate(jobs):
            try:
                self._pipes[rank].send(job)
            except OSError:
                self._gone(rank)
        found = [_unpacked(part) for part in self._answers(self.limit_s, len(jobs))]
        activity = merged(found, graph, by == "batch")
        if strict and refusable(activity):
            return simulate(
                graph, values, mode=mode, strict=True, record=record, placement=placement, fused=fused, steps=steps
            )
        return activity

    def _answers(self, limit_s: float, count: int | None = None) -> list[Any]:
        """What the first `count` processes say, in their order."""
        pipes = self._pipes[:count]
        found: dict[int, Any] = {}
        while len(found) < len(pipes):
            open_ = [pipe for rank, pipe in enumerate(pipes) if rank not in found]
            ready = multiprocessing.connection.wait(open_, limit_s)
            if not ready:
                missing = [rank for rank in range(len(pipes)) if rank not in found]
                self._fail(f"process {missing[0]} of {self.processes} did not answer within {limit_s:g} s")
            for rank in [pipes.index(pipe) for pipe in ready]:
                try:
                    done, what = pipes[rank].recv()
                except (EOFError, OSError):
                    self._gone(rank)
                if not done:  # of a run that another one left, perhaps: that one is to be named
                    multiprocessing.connection.wait([worker.sentinel for worker in self._workers], 0.5)
                    for other, worker in enumerate(self._workers):
                        if worker.exitcode not in (None, 0):
                            self._gone(other)
                    self._fail(f"process {rank} of {self.processes} failed: {short(what)}")
                found[rank] = what
        return [found[rank] for rank in range(len(pipes))]

    def _gone(self, rank: int) -> NoReturn:
        self._workers[rank].join(5.0)
        self._fail(f"process {rank} of {self.processes} ended with exit code {self._workers[rank].exitcode}")

    def _fail(self, reason: str) -> NoReturn:
        for worker in self._workers:
            worker.kill()
        self.close()
        raise RankError(f"{reason}; all processes of this simulation are ended")


def _work(pipe: Any, rank: int, size: int, threads: int, store: str, limit_s: float) -> None:
    """A process: join the others, then one run after the other until the pipe is closed."""
    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=limit_s)
        )
        pipe.send((True, None))
        while True:
            graph, inputs, assignment, options = pipe.recv()
            if assignment is None:
                activity = simulate(graph, inputs, **options)
            else:
                activity = simulate_part(graph, inputs, assignment, rank, gathered, **options)
            pipe.send((True, _packed(activity)))
    except EOFError:
        pass
    except Exception as error:
        pipe.send((False, f"{type(error).__name__}: {error}"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def gathered(
    sent: dict[Port, Tensor], crossing: Sequence[tuple[Port, int, int, bool]], steps: int, batch: int
) -> dict[Port, Tensor]:
    """The messages of all processes of torch.distributed's group, by one gather of bytes: what `simulate_part` is given."""
    rank, size = dist.get_rank(), dist.get_world_size()
    lengths = [0] * size
    for _, part, neurons, small in crossing:
        lengths[part] += steps * batch * neurons * (1 if small else 4)
    mine = torch.zeros(max(lengths), dtype=torch.uint8)
    at = 0
    for port, part, _, small in crossing:
        if part == rank:
            raw = sent[port].to(torch.int8 if small else torch.int32).contiguous().view(torch.uint8).flatten()
            mine[at : at + len(raw)] = raw
            at += len(raw)
    whole = torch.empty(size * len(mine), dtype=torch.uint8)
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the latter's name until 2.13
    gather(whole, mine)
    found, places = {}, [part * len(mine) for part in range(size)]
    for port, part, neurons, small in crossing:
        length = steps * batch * neurons * (1 if small else 4)
        raw = whole[places[part] : places[part] + length].clone()
        found[port] = raw.view(torch.int8 if small else torch.int32).view(steps, batch, neurons)
        places[part] += length
    return found


def _packed(activity: Activity) -> dict[str, Any]:
    """A result as arrays, for the way between processes."""
    found = {key: getattr(activity, key) for key in activity.__dataclass_fields__}
    found["spikes"] = {name: value.numpy() for name, value in activity.spikes.items()}
    found["states"] = {name: {key: value.numpy() for key, value in kept.items()} for name, kept in activity.states.items()}
    return found


def _unpacked(found: dict[str, Any]) -> Activity:
    tensor = lambda value: torch.from_numpy(np.ascontiguousarray(value))  # noqa: E731
    found["spikes"] = Messages({name: tensor(value) for name, value in found["spikes"].items()})
    found["states"] = {name: {key: tensor(value) for key, value in kept.items()} for name, kept in found["states"].items()}
    return Activity(**found)
