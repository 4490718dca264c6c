"""Real processes of torch.distributed on gloo, forked once and asked many things."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Pool:
    """`size` ranks. `run(function, *arguments)`: what the function gives on each of them, in the order of their ranks."""

    def __init__(self, size: int, folder: Path) -> None:
        context = torch.multiprocessing.get_context("fork")
        self.ends, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, folder, there), daemon=True)
            process.start()
            self.ends.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60) -> list[Any]:
        for end in self.ends:
            end.send((function, arguments))
        found: dict[int, Any] = {}
        until = time.monotonic() + timeout_s
        while len(found) < len(self.ends):
            for rank, end in enumerate(self.ends):
                if rank not in found and end.poll(0.005):
                    good, found[rank] = end.recv()
                    if not good:  # the others wait for it, and for ever
                        self.kill()
                    assert good, f"rank {rank}:\n{found[rank]}"
            if time.monotonic() > until:
                self.kill()
                raise AssertionError(f"only ranks {sorted(found)} answered in {timeout_s:.0f} s")
        return [found[rank] for rank in range(len(self.ends))]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        for end, process in zip(self.ends, self.processes, strict=True):
            if process.is_alive():
                end.send(None)
        for process in self.processes:
            process.join(20)
            process.kill()


def _serve(rank: int, size: int, folder: Path, end: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    while (asked := end.recv()) is not None:
        function, arguments = asked
        try:
            end.send((True, function(*arguments)))
        except BaseException:
            end.send((False, traceback.format_exc()))
    dist.barrier()
    os._exit(0)  # a fork of a test worker would wait at its exit for threads that only its parent has
