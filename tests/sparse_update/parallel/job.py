"""A small training run, alone or as one of several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from sparse_update.clock.cost import ComponentTimes, identity
from sparse_update.data.corpus import DataConfig, load_corpus, val_windows
from sparse_update.data.stream import WindowStream
from sparse_update.gates.config import GateConfig
from sparse_update.gates.controller import AutoConfig, Controller
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.interrupt import Interruption
from sparse_update.loop.recorder import Listeners
from sparse_update.loop.records import TrainerConfig
from sparse_update.loop.trainer import Trainer
from sparse_update.parallel.make import make_mesh
from sparse_update.parallel.settings import MeshConfig
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.optimizer import storage_bytes
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import SubsetConfig

MODEL = {"width": 16, "layers": 2, "heads": 2, "context": 16, "vocab_size": 256, "attention": "explicit"}
ADAMW = OptimConfig()
CPU = torch.device("cpu")


def write_text(folder: Path) -> Path:
    """Twelve documents of letters that follow each other by a simple rule."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(12):
        steps = generator.choice([1, 1, 2, 5], 2000)
        (folder / f"{i}.txt").write_bytes(bytes((97 + np.cumsum(steps) % 26).astype(np.uint8)))
    return folder


def priced(times: ComponentTimes, steps: Any, components: Any) -> ComponentTimes:
    return times.extended({**{step.key: 10.0 for step in steps}, **dict.fromkeys(components, 0.0)}, 10.0)


def trainer(
    text: Path,
    folder: Path,
    mesh: str | dict[str, Any] = "single",
    *,
    gate: dict[str, Any] | None = None,
    subset: dict[str, Any] | None = None,
    optim: OptimConfig | None = None,
    steps: int = 8,
    windows: int = 8,
    double: bool = True,
    variant: str = "autograd",
    model: dict[str, Any] | None = None,
    precision: str = "fp32",
    **more: Any,
) -> tuple[Trainer, list[Any]]:
    """A trainer whose every step costs 10 reference milliseconds, and the reports it will make."""
    corpus = load_corpus(DataConfig(name="files", path=str(text)))
    torch.manual_seed(0)
    optim = optim or ADAMW
    made = Transformer(ModelConfig(**{**MODEL, **(model or {})}))
    made = made.double() if double else made
    ms = {"forward": 4.0, "backward_dx": 3.0, "backward_dw": 2.0, "optimizer": 1.0}
    table = ComponentTimes(ms, {}, "explicit", precision, variant, False, windows, identity(made.cfg, optim), {})
    cfg = TrainerConfig(
        budget_reference_s=steps * 0.010 + 1e-6,
        batch_windows=windows,
        log_every_steps=1,
        evaluations=1,
        **more,
    )
    reports: list[Any] = []
    settings = MeshConfig(kind=mesh) if isinstance(mesh, str) else MeshConfig(**mesh)
    found = make_trainer(
        made,
        Arm(gate=GateConfig(**(gate or {})), subset=SubsetConfig(**(subset or {})), optim=optim),
        cfg,
        Text(WindowStream(corpus, made.cfg.context, seed=0), {"val": val_windows(corpus, made.cfg.context, 512)}),
        Prices(table, priced),
        Place(folder),
        0,
        Listeners(reports.append),
        mesh=make_mesh(settings, CPU),
    )
    if found.gate.cfg.unit == "auto":  # so that a short run observes
        found.gate.controller = Controller(AutoConfig(phases=(0.1, 0.5), quotas=(0.3, 0.5), least=4))
    return found, reports


def trained(text: Path, folder: Path, mesh: Any = "single", **settings: Any) -> dict[str, Any]:
    """What a run of `trainer` comes to: loss of each step, windows it trained on, weights, the gate's numbers."""
    made, reports = trainer(text, folder, mesh, **settings)
    return run(made, reports)


def run(made: Trainer, reports: list[Any]) -> dict[str, Any]:
    seen: list[list[int]] = []
    take = made.updates.take

    def watched(batch: Any, step: Any, progress: float) -> Any:
        seen.append(batch.window.tolist())
        return take(batch, step, progress)

    made.updates.take = watched  # type: ignore[method-assign]
    losses: list[float] = []
    note = made.updates._update

    def update(loss: float, found: Any, progress: float) -> None:
        losses.append(loss)
        note(loss, found, progress)

    made.updates._update = update  # type: ignore[method-assign]
    result = made.run()
    return {
        "losses": losses,
        "windows": seen,
        "val": result.val_loss_nats,
        "step": result.step,
        "tokens": result.tokens,
        "flops": result.flops,
        "offered": result.windows_offered,
        "keep": result.keep_fraction,
        "gate_reference_s": result.gate_reference_s,
        "skipped": result.skipped,
        "reports": len(reports),
        "notes": made.gate.notes(),
        "weights": {name: whole(p).numpy().copy() for name, p in made.updates.model.named_parameters()},
        "bytes": held_bytes(made),
    }


def trained_small(text: Path, folder: Path, mesh: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """`trained`, with its settings in one argument, as a pool hands them over."""
    return trained(text, folder, mesh, **settings)


def whole(p: torch.Tensor) -> torch.Tensor:
    return p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach()


def held_bytes(made: Trainer) -> dict[str, int]:
    """What lies on this rank: weights, and the most that gradients and optimizer state took."""
    local = (p.to_local() if hasattr(p, "to_local") else p for p in made.updates.model.parameters())
    tally = made.updates.tally
    return {"weights": storage_bytes(local), "gradients": tally.peak_gradient, "state": tally.peak_optimizer}


def leg(text: Path, folder: Path, mesh: Any, settings: dict[str, Any], stop_at: int, goes_on: bool) -> dict[str, Any]:
    """A part of a run: from the beginning or from `folder`'s checkpoint, until an interruption at step `stop_at`."""
    made, reports = trainer(text, folder, mesh, **settings)
    if goes_on:
        made.resume(folder / "checkpoint")

    class Asked(Interruption):
        asked = property(lambda self: made.updates.tally.step >= stop_at, lambda self, value: None)  # type: ignore[assignment]

    with patch("sparse_update.loop.trainer.Interruption", Asked):
        return run(made, reports)
