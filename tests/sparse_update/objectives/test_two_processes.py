"""Two real processes of a mesh: the prompts, the outputs and the updates of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_update.gates.config import GateConfig
from sparse_update.objectives.instruction.instruct import Instruct
from sparse_update.objectives.sampled import RewardError
from sparse_update.parallel.make import make_mesh
from sparse_update.parallel.settings import MeshConfig
from tests.sparse_update.objectives.house import build, examples_of, model_of
from tests.sparse_update.objectives.toy import Lengths, reinforced

RANDOM = {"unit": "sequence", "signal": "random", "policy": "random", "keep_fraction": 0.5, "pool_windows": 8}


def mesh_of(kind: str) -> Any:
    return make_mesh(MeshConfig(kind=kind, processes=0), torch.device("cpu"))


def told(trainer: Any) -> dict[str, Any]:
    result = trainer.run()
    objective = trainer.updates.objective
    phase = getattr(objective, "phase", None)
    return {
        "step": result.step,
        "flops": result.flops,
        "reference_s": result.reference_s,
        "accuracy": result.scores["task/accuracy"],
        "empty": result.empty,
        "weights": {name: p.detach().numpy().copy() for name, p in trainer.updates.model.named_parameters()},
        "tokens": None if phase is None else phase.tokens_RT1.tolist(),
        "windows": None if phase is None else phase.batch.window.tolist(),
    }


def sampled(folder: Path, kind: str) -> dict[str, Any]:
    sample = {"shares": 2, "batches": 2, "epochs": 2}
    gate = GateConfig(**RANDOM)
    model = model_of().double()
    trainer, _ = reinforced(folder, sample=sample, steps=12, gate=gate, mesh=mesh_of(kind), model=model)
    return told(trainer)


def tuned(folder: Path, kind: str) -> dict[str, Any]:
    examples = examples_of(tasks=["sums:1-2", "brackets:1-2"])
    make = lambda given: Instruct(given, examples)  # noqa: E731
    trainer, _ = build(make, examples.examples(), examples, folder, steps=5, mesh=mesh_of(kind), model=model_of().double())
    return told(trainer)


def failing(folder: Path, kind: str) -> str:
    """A reward that one process cannot give: both are told, and nobody waits."""
    mesh = mesh_of(kind)

    class OnOne(Lengths):
        def rewards(self, instances: Any, texts: Any, stopped: Any) -> list[float]:
            return [float("nan") if mesh.rank == 1 else 1.0] * len(texts)

    trainer, _ = reinforced(folder, kind=OnOne, mesh=mesh)
    try:
        trainer.run()
    except RewardError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("job", [sampled, tuned])
def test_two_processes_take_the_updates_of_one(job, two, tmp_path):
    alone = job(tmp_path / "one", "single")
    found = two.run(job, tmp_path / "two", "ddp")
    for rank in found:
        for name in ("step", "flops", "tokens", "windows", "empty", "accuracy"):
            assert rank[name] == alone[name], name
        assert rank["reference_s"] == pytest.approx(alone["reference_s"])
        for name, weight in alone["weights"].items():
            np.testing.assert_allclose(rank["weights"][name], weight, rtol=1e-6, atol=1e-8, err_msg=name)


def test_what_one_process_cannot_judge_ends_both(two, tmp_path):
    first, second = two.run(failing, tmp_path, "ddp")
    assert "another process" in first
    assert "no finite numbers" in first
    assert "no finite numbers" in second
