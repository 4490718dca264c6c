"""Every shipped gate and subset with every objective on tasks: it trains and goes on from a checkpoint to the same bits, or
it is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from sparse_update.data.tokens import ByteTokenizer
from sparse_update.gates.config import GateConfig
from sparse_update.objectives.choice import KINDS, make_objective, task_stream
from sparse_update.objectives.objective import ObjectiveError
from sparse_update.objectives.preference.reward import RewardModel
from sparse_update.objectives.preference.settings import RewardConfig
from sparse_update.objectives.sampled import Sampled
from sparse_update.objectives.settings import ObjectiveConfig, SampleConfig
from sparse_update.weights.subset import SubsetConfig
from tests.sparse_update.objectives.house import build, examples_of, model_of
from tests.sparse_update.objectives.test_sampled import same, stepped, weights
from tests.sparse_update.objectives.toy import Lengths

CONFIGS = Path(__file__).parents[3] / "configs"


def shipped(what):
    """Files of a Hydra group, relative to `configs`."""
    found = (*CONFIGS.glob(f"{what}/*.yaml"), *CONFIGS.glob(f"published/{what}/*.yaml"))
    return sorted(path.relative_to(CONFIGS).as_posix() for path in found)


ON_TEXT = {"gate/auto.yaml", "published/gate/rho1.yaml", "published/gate/rho_loss.yaml"}
"""Asked for windows of text that a run on tasks has not (refused with the other settings of a run), or for a reference."""
SOME = {
    "gate/random.yaml", "gate/surprise.yaml", "gate/repeats.yaml", "gate/dw_rows.yaml", "published/gate/dropbp.yaml",
    "subset/blocks.yaml", "published/subset/lora.yaml", "published/subset/frugal.yaml",
}  # fmt: skip
"""Tried with the kinds that differ from `rl` in what they make of outputs alone."""
OF_ROWS = {"sequence_after", "token", "token_exact", "bypass", "gradient"}


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    torch.manual_seed(5)
    model = RewardModel.of(model_of(), ByteTokenizer())
    torch.nn.init.normal_(model.reward.weight)
    return str(model.save(tmp_path_factory.mktemp("reward") / "model"))


def made(kind, path, folder, reward):
    found = yaml.safe_load((CONFIGS / path).read_text())
    gate, subset = GateConfig(), SubsetConfig()
    if "subset/" in path:
        subset = SubsetConfig(**{**found, "block_rows": 4} if "blocks" in found.get("kind", "") else found)
    else:
        small = {"pool_windows": 16} if found.get("unit") in ("sequence", "repeats") else {}
        small |= {"bypass_stop": 0} if found.get("unit") == "bypass" else {}  # of two layers
        gate = GateConfig(**{**found, **small})
    examples = examples_of(tasks=["brackets:1"], judged=2)
    cfg = ObjectiveConfig(
        kind=kind,
        sample=SampleConfig(n=4, new_tokens=4, micro_rows=8, epochs=2),
        reward=RewardConfig([reward], watch_prompts=0),
    )
    trainer, _ = build(
        make_objective(cfg, examples), task_stream(cfg, examples), examples, folder, steps=40, gate=gate, subset=subset,
        model=model_of(width=16),
    )  # fmt: skip
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_every_arm_trains_or_is_refused(kind, reward, tmp_path, monkeypatch):
    monkeypatch.setattr(Sampled, "scores", Lengths.rewards)  # an untrained model solves nothing
    tried = set()
    for path in sorted({*shipped("gate"), *shipped("subset")} - ON_TEXT) if kind in ("instruct", "rl") else sorted(SOME):
        told = yaml.safe_load((CONFIGS / path).read_text())
        rows = (
            kind != "instruct" and "gate/" in path and (told.get("unit") in OF_ROWS or told.get("policy") == "importance")
        )
        folder = tmp_path / path
        if rows:
            with pytest.raises(ObjectiveError, match="its windows are prompts"):
                made(kind, path, folder, reward)
            continue
        first = made(kind, path, folder, reward)
        stepped(first, 1)
        first.checkpoints.save()
        first.checkpoints.close()
        again = made(kind, path, folder, reward)
        again.budget.clock.times = first.budget.clock.times
        again.resume(folder / "checkpoint")
        stepped(first, 2), stepped(again, 2)
        same(weights(first), weights(again))
        begun = weights(made(kind, path, folder, reward))
        assert any(not torch.equal(value, begun[name]) for name, value in weights(first).items()), path
        assert again.budget.reference_s == first.budget.reference_s, path
        tried.add(path)
    assert tried >= SOME
