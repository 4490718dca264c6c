"""Lightning, with automatic and with manual optimization."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparse_update.library.callbacks import lightning_callback
from tests.sparse_update.library.matrix.byhand import End
from tests.sparse_update.library.matrix.cells import Cell
from tests.sparse_update.library.matrix.parts import (
    CLIP,
    STEPS,
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


def lightning(cell: Cell, split: bool = False, folder: str = "") -> End:
    if not split:
        return _fit(cell, folder, STEPS, None)
    checkpoint = os.path.join(folder, "half.ckpt")
    _fit(cell, folder, STEPS // 2, None, checkpoint)
    return _fit(cell, folder, STEPS, checkpoint)


def _fit(cell: Cell, folder: str, steps: int, resume: str | None, save: str = "") -> End:
    import pytorch_lightning as pl
    from pytorch_lightning.plugins.precision import MixedPrecision

    manual = cell.loop == "lightning_manual"
    gate = lightning_callback(config(cell))

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual
            self.model = model_of(cell)
            self.copied: dict[str, Tensor] = {}
            self.average: Any = None

        def forward(self, x: Tensor) -> Tensor:
            return call(cell, self.model, x)

        def _loss(self, x: Tensor, y: Tensor) -> Tensor:
            return gate.loss(self(x), y, tokens=x)

        def on_train_batch_start(self, batch: Any, number: int) -> None:
            if cell.feature == "deepcopy" and self.trainer.global_step == STEPS // 2:
                self.copied = copy_gradients(self.model, *parts_of(cell, STEPS // 2)[0])

        def training_step(self, batch: Any, number: int) -> Any:
            if not manual:
                return self._loss(*batch)
            optimizer, schedule = self.optimizers(), self.lr_schedulers()
            optimizer.zero_grad()
            parts = len(batch)
            for x, y in batch:
                self.manual_backward(self._loss(x, y) / parts)
            if cell.feature == "clipping":
                self.clip_gradients(optimizer, CLIP * self.scale(), "norm")
            optimizer.step()
            if schedule is not None:
                schedule.step()
            return None

        def scale(self) -> float:
            """Under manual optimization Lightning clips gradients that are still scaled."""
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            return 1.0 if scaler is None else scaler.get_scale()

        def on_train_batch_end(self, *args: Any) -> None:
            if cell.feature == "ema":
                if self.average is None:
                    self.average = [average_of(self.model)]
                self.average[0].update_parameters(self.model)

        def configure_optimizers(self) -> Any:
            optimizer = optimizer_of(cell, self.model.named_parameters())
            schedule = schedule_of(cell, optimizer)
            if schedule is None:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    task = Task()
    precision: dict[str, Any] = {"precision": {"fp32": "32-true", "bf16": "bf16-mixed"}.get(cell.precision)}
    if cell.precision == "fp16":  # Lightning's own setting becomes bfloat16 on a CPU
        precision = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler_of(cell))]}
    automatic: dict[str, Any] = {
        "accumulate_grad_batches": count_of(cell),
        "gradient_clip_val": CLIP if cell.feature == "clipping" else None,
    }
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[gate],
        default_root_dir=folder,
        **precision,
        **({} if manual else automatic),
    )
    batches: list[Any] = [parts_of(cell, step) for step in range(STEPS)]
    if not manual:
        batches = [part for parts in batches for part in parts]
    fitted: Any = task
    if cell.compile == "whole" and not manual:
        fitted = torch.compile(task, backend=cell.backend)
    else:
        compile_in_place(task.model, cell)
    trainer.fit(fitted, _Loader(batches), ckpt_path=resume, **({"weights_only": True} if resume else {}))
    if save:
        trainer.save_checkpoint(save)
    average = moved(task.average[0].named_parameters(), False) if task.average else {}
    return End(moved(task.model.named_parameters(), False), average, task.copied)


class _Loader:
    """Batches as they are, from where a saved loader was."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.at = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        while self.at < len(self):
            self.at += 1
            yield self.batches[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]
