"""Two processes with gloo, DistributedDataParallel or fully_shard (FSDP2): one pair runs any number of cells."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sparse_update.library.attach import attach
from tests.sparse_update.library.matrix.byhand import End
from tests.sparse_update.library.matrix.cells import AXES, Cell
from tests.sparse_update.library.matrix.parts import (
    STEPS,
    Loop,
    average_of,
    blocks_of,
    compile_in_place,
    config,
    copy_gradients,
    model_of,
    moved,
    optimizer_of,
    parts_of,
    scaler_of,
    schedule_of,
)


class Paired(Loop):
    """One process's half of a loop."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.rank = cell, dist.get_rank()
        self.model = model_of(cell)
        self.average = average_of(self.model) if cell.feature == "ema" else None
        self.called: Any = self.model
        if cell.loop == "ddp":
            self.gate = attach(self.model, config(cell))
            self._distribute()
        else:  # a gate may come before the shards or after them
            after = AXES["feature"].index(cell.feature) % 2 == 1
            if after:
                self._shard()
            self.gate = attach(self.model, config(cell))
            if not after:
                self._shard()
            compile_in_place(self.model, cell)
        self.optimizer = optimizer_of(cell, self.gate.named_parameters())
        self.schedule = schedule_of(cell, self.optimizer)
        self.scaler = scaler_of(cell)

    def _distribute(self) -> None:
        if self.cell.compile == "regional":
            compile_in_place(self.model, self.cell)
        self.called = nn.parallel.DistributedDataParallel(self.model)
        if self.cell.compile == "whole":
            self.called = torch.compile(self.called, backend=self.cell.backend)

    def _shard(self) -> None:
        from torch.distributed.fsdp import fully_shard

        averaged = [] if self.average is None else [self.average.module]
        for model in [self.model, *averaged]:
            for block in blocks_of(model):
                fully_shard(block)
            fully_shard(model)

    def _share(self, last: bool) -> None:
        """Gradients are shared with the last part only."""
        if self.cell.loop == "ddp":
            wrapped = getattr(self.called, "_orig_mod", self.called)
            wrapped.require_backward_grad_sync = last
        else:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]


def paired(cell: Cell, split: bool = False, folder: str = "") -> End:
    loop = Paired(cell)
    copied = {}
    for step in range(STEPS):
        if step == STEPS // 2 and cell.feature == "deepcopy":
            x, y = (torch.cat(t) for t in zip(*(p for r in range(2) for p in parts_of(cell, step, r)), strict=True))
            copied = copy_gradients(loop.model, x, y)
        if step == STEPS // 2 and split:
            file = os.path.join(folder, f"rank{loop.rank}.pt")
            torch.save({name: part.state_dict() for name, part in loop.parts().items()}, file)
            loop = Paired(cell)
            state = torch.load(file, weights_only=True)
            for name, part in loop.parts().items():
                part.load_state_dict(state[name])
            if cell.precision == "fp16":  # a scaler looks at the optimizer before the gate does
                loop.gate.adopt(loop.optimizer)
        loop.step(step)
    average = {} if loop.average is None else moved(loop.average.named_parameters(), False)
    return End(moved(loop.model.named_parameters(), False), average, copied)


def _worker(rank: int, folder: str, questions: Any, answers: Any) -> None:
    from tests.sparse_update.library.matrix.run import Differs, run

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = 256, 4096
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    while (text := questions.get()) is not None:
        try:
            answers.put(run(Cell.of(text)))
        except Differs as error:
            answers.put(error)
        except BaseException:
            answers.put(RuntimeError(traceback.format_exc()))
        dist.barrier()
    dist.destroy_process_group()


class Pair:
    """Two processes that wait for cells. A cell's answer is that of both: the larger distance, or one refusal."""

    def __init__(self, folder: str) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.questions = [context.SimpleQueue() for _ in range(2)]
        self.answers = [context.SimpleQueue() for _ in range(2)]
        self.processes = [
            context.Process(target=_worker, args=(rank, folder, self.questions[rank], self.answers[rank]), daemon=True)
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def run(self, cell: Cell) -> float | str:
        for queue in self.questions:
            queue.put(str(cell))
        found = [queue.get() for queue in self.answers]
        for answer in found:
            if isinstance(answer, BaseException):
                raise answer
        if isinstance(found[0], str) or isinstance(found[1], str):
            words = [answer for answer in found if isinstance(answer, str)]
            if len(set(words)) != 1 or len(words) != 2:
                raise RuntimeError(f"{cell}: the two processes answer differently: {found}")
            return words[0]
        return max(found)

    def close(self) -> None:
        for queue in self.questions:
            queue.put(None)
        for process in self.processes:
            process.join(60)
            if process.is_alive():
                process.terminate()


def run_all(pair: Pair, cells: Iterable[Cell]) -> Iterator[tuple[Cell, float | str]]:
    for cell in cells:
        yield cell, pair.run(cell)
