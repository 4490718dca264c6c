"""Several real processes of a mesh: the prompts, the outputs and the updates of one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_update.gates.config import GateConfig
from sparse_update.objectives.instruction.instruct import Instruct
from sparse_update.objectives.reinforcement.reinforce import Reinforce
from sparse_update.objectives.reinforcement.settings import PromptGateConfig, RlConfig, preset
from sparse_update.objectives.sampled import RewardError
from sparse_update.objectives.settings import SampleConfig
from sparse_update.parallel.make import make_mesh
from sparse_update.parallel.settings import MeshConfig
from tests.sparse_update.objectives.house import build, examples_of, model_of
from tests.sparse_update.objectives.toy import SMALL, Lengths, reinforced

RANDOM = {"unit": "sequence", "signal": "random", "policy": "random", "keep_fraction": 0.5, "pool_windows": 8}


def mesh_of(kind: str) -> Any:
    return make_mesh(MeshConfig(kind=kind, processes=0), torch.device("cpu"))


def told(trainer: Any) -> dict[str, Any]:
    result = trainer.run()
    objective = trainer.updates.objective
    phase = getattr(objective, "phase", None)
    weights = objective.given.mesh.weights(trainer.updates.model)
    return {
        "step": result.step,
        "flops": result.flops,
        "reference_s": result.reference_s,
        "accuracy": result.scores["task/accuracy"],
        "empty": result.empty,
        "weights": {name: p.detach().numpy().copy() for name, p in weights.items()},
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


def pushed(folder: Path, kind: str) -> dict[str, Any]:
    """`rl` with a reference to stay near, and a gate of prompts that reads the model."""
    examples = examples_of()
    cfg = RlConfig(preset("grpo", kl=0.1), PromptGateConfig("surprise", keep_fraction=0.5))
    sample = SampleConfig(**SMALL, shares=2)
    stream = examples.prompts(sample.new_tokens)

    class Low(Reinforce):
        rewards = Lengths.rewards

    make = lambda given: Low(given, examples, sample, stream, cfg)  # noqa: E731
    model = model_of().double()
    trainer, _ = build(make, stream, examples, folder, steps=6, windows=8, mesh=mesh_of(kind), model=model)
    return told(trainer)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process does, by job; each once."""
    return cache(lambda job: job(tmp_path_factory.mktemp("one"), "single"))


def check(found: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    assert alone["step"] > alone["empty"]
    for rank in found:
        for name in ("step", "flops", "tokens", "windows", "empty", "accuracy"):
            assert rank[name] == alone[name], name
        assert rank["reference_s"] == pytest.approx(alone["reference_s"])
        for name, weight in alone["weights"].items():
            np.testing.assert_allclose(rank["weights"][name], weight, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
@pytest.mark.parametrize("job", [sampled, tuned, pushed])
def test_two_processes_take_the_updates_of_one(job, kind, two, alone, tmp_path):
    check(two.run(job, tmp_path, kind), alone(job))


def test_a_grid_of_four_processes_takes_the_updates_of_one(four, alone, tmp_path):
    check(four.run(pushed, tmp_path, "fsdp_tp"), alone(pushed))


def test_what_one_process_cannot_judge_ends_both(two, tmp_path):
    first, second = two.run(failing, tmp_path, "ddp")
    assert "another process" in first
    assert "no finite numbers" in first
    assert "no finite numbers" in second
