"""A loop of one's own, and one with accelerate."""

from __future__ import annotations

import io
from typing import Any

import torch

from sparse_update.library.attach import attach
from tests.sparse_update.library.matrix.byhand import End
from tests.sparse_update.library.matrix.cells import Cell
from tests.sparse_update.library.matrix.parts import (
    CLIP,
    STEPS,
    Loop,
    average_of,
    call,
    compile_in_place,
    config,
    copy_gradients,
    count_of,
    model_of,
    moved,
    optimizer_of,
    parts_of,
    scaler_of,
    schedule_of,
)


def through_a_file(state: Any) -> Any:
    """As saved and loaded."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Plain(Loop):
    """Model, gate, optimizer and what else a loop of one's own makes."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.model = model_of(cell)
        self.gate = attach(self.model, config(cell))
        self.optimizer = optimizer_of(cell, self.gate.named_parameters())
        self.schedule = schedule_of(cell, self.optimizer)
        self.average = average_of(self.model) if cell.feature == "ema" else None
        self.scaler = scaler_of(cell)
        self.called = self.model
        if cell.compile == "whole":
            self.called = torch.compile(self.model, backend=cell.backend)
        else:
            compile_in_place(self.model, cell)


def plain(cell: Cell, split: bool = False, folder: str = "") -> End:
    """`split`: saved in the middle, and gone on with in a loop made anew."""
    loop = Plain(cell)
    copied = {}
    for step in range(STEPS):
        if step == STEPS // 2 and cell.feature == "deepcopy":
            copied = copy_gradients(loop.model, *parts_of(cell, step)[0])
        if step == STEPS // 2 and split:
            state = through_a_file({name: part.state_dict() for name, part in loop.parts().items()})
            loop = Plain(cell)
            for name, part in loop.parts().items():
                part.load_state_dict(state[name])
            if cell.precision == "fp16":  # a scaler looks at the optimizer before the gate does
                loop.gate.adopt(loop.optimizer)
        loop.step(step)
    average = {} if loop.average is None else moved(loop.average.named_parameters(), False)
    return End(moved(loop.model.named_parameters(), False), average, copied)


class Accelerated:
    """The same, prepared by accelerate: its accumulation, clipping, compilation, mixed precision and save_state."""

    def __init__(self, cell: Cell) -> None:
        from accelerate import Accelerator
        from accelerate.utils import TorchDynamoPlugin

        self.cell = cell
        dynamo = TorchDynamoPlugin(backend=cell.backend, use_regional_compilation=cell.compile == "regional")
        self.accelerator = Accelerator(
            cpu=True,
            mixed_precision={"fp32": "no"}.get(cell.precision, cell.precision),
            gradient_accumulation_steps=count_of(cell),
            dynamo_plugin=None if cell.compile == "none" else dynamo,
        )
        self.model = model_of(cell)
        self.gate = attach(self.model, config(cell))
        self.optimizer = optimizer_of(cell, self.gate.named_parameters())
        self.schedule = schedule_of(cell, self.optimizer)
        self.average = average_of(self.model) if cell.feature == "ema" else None
        self.called, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if self.schedule is not None:
            self.schedule = self.accelerator.prepare(self.schedule)
        self.accelerator.register_for_checkpointing(self.gate)

    def step(self, step: int) -> None:
        for x, y in parts_of(self.cell, step):
            with self.accelerator.accumulate(self.called):
                with self.accelerator.autocast():
                    logits = call(self.cell, self.called, x)
                loss = self.gate.loss(logits, y, tokens=x)
                self.accelerator.backward(loss)
                if self.cell.feature == "clipping" and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.gate.parameters(), CLIP)
                self.optimizer.step()
                self.gate.step(self.optimizer)
                self.optimizer.zero_grad()
                if self.schedule is not None:
                    self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)


def accelerate(cell: Cell, split: bool = False, folder: str = "") -> End:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    loop = Accelerated(cell)
    copied = {}
    for step in range(STEPS):
        if step == STEPS // 2 and cell.feature == "deepcopy":
            copied = copy_gradients(loop.model, *parts_of(cell, step)[0])
        if step == STEPS // 2 and split:
            loop.accelerator.save_state(folder)
            loop = Accelerated(cell)
            loop.accelerator.load_state(folder)
        loop.step(step)
    average = {} if loop.average is None else moved(loop.average.named_parameters(), False)
    return End(moved(loop.model.named_parameters(), False), average, copied)
