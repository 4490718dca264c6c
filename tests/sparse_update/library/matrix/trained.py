"""The Trainer of transformers, by its own settings: torch_compile, bf16, gradient_checkpointing, max_grad_norm."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparse_update.library.callbacks import trainer_callback
from tests.sparse_update.library.matrix.byhand import End
from tests.sparse_update.library.matrix.cells import Cell
from tests.sparse_update.library.matrix.parts import (
    CLIP,
    STEPS,
    B,
    average_of,
    batch,
    compile_in_place,
    config,
    copy_gradients,
    count_of,
    model_of,
    moved,
    optimizer_of,
    schedule_of,
)


class Functional(nn.Module):
    """Gives the inner model its parameters from outside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return functional_call(self.inner, dict(self.inner.named_parameters()), (), {"input_ids": input_ids})


def trainer(cell: Cell, split: bool = False, folder: str = "") -> End:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    if split:
        _train(cell, folder, STEPS // 2, None)
        return _train(cell, folder, STEPS, os.path.join(folder, f"checkpoint-{STEPS // 2}"))
    return _train(cell, folder, STEPS, None)


def _train(cell: Cell, folder: str, steps: int, resume: str | None) -> End:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=B,
        gradient_accumulation_steps=count_of(cell),
        max_grad_norm=CLIP if cell.feature == "clipping" else 0.0,
        torch_compile=cell.compile == "whole",
        torch_compile_backend=cell.backend if cell.compile == "whole" else None,
        bf16=cell.precision == "bf16",
        fp16=cell.precision == "fp16",
        gradient_checkpointing=cell.feature.startswith("checkpoint"),
        gradient_checkpointing_kwargs={"use_reentrant": cell.feature == "checkpoint_reentrant"},
        save_strategy="steps" if cell.feature == "resume" else "no",
        save_steps=STEPS // 2,
        train_sampling_strategy="sequential",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    model = model_of(cell)
    if cell.compile == "regional":
        compile_in_place(model, cell)
    given = Functional(model) if cell.feature == "functional_call" else model
    optimizer = optimizer_of(cell, model.named_parameters())
    schedule = schedule_of(cell, optimizer) or torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    gate = trainer_callback(config(cell))
    average, copied = [], {}

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if cell.feature == "ema":
                average.append(average_of(model))

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if cell.feature == "deepcopy" and state.global_step == STEPS // 2:
                copied.update(copy_gradients(model, *batch(state.global_step, True)))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if average:
                average[0].update_parameters(model)

    rows = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in batch(step, True, count_of(cell))[0]]
    Trainer(
        given,
        arguments,
        train_dataset=rows,
        callbacks=[gate, Watch()],
        compute_loss_func=gate.loss,
        optimizers=(optimizer, schedule),
    ).train(resume_from_checkpoint=resume)
    return End(
        moved(model.named_parameters(), True),
        moved(average[0].named_parameters(), True) if average else {},
        copied,
    )
