"""DPO on the model's own outputs: its gradient against autograd on whole answers, and the reference after a resume."""

from __future__ import annotations

import pytest
import torch

from sparse_update.objectives.choice import make_objective
from sparse_update.objectives.objective import ObjectiveError
from sparse_update.objectives.preference.dpo import answer_logp, dpo_loss
from sparse_update.objectives.preference.errors import PreferenceError
from sparse_update.objectives.preference.online import OnlineDpo
from sparse_update.objectives.preference.settings import DpoConfig
from sparse_update.objectives.reinforcement.settings import RlConfig, preset
from sparse_update.objectives.settings import ObjectiveConfig, SampleConfig
from tests.sparse_update.objectives.house import build, examples_of, model_of
from tests.sparse_update.objectives.test_sampled import same, stepped, weights
from tests.sparse_update.objectives.toy import SMALL, Lengths, reinforced


class ByLength(OnlineDpo):
    rewards = Lengths.rewards


def made(folder, beta=0.3, **more):
    return reinforced(
        folder,
        kind=lambda given, examples, sample, stream: ByLength(given, examples, sample, stream, DpoConfig(beta)),
        **more,
    )[0]


def test_the_gradient_is_that_of_the_loss_of_pairs(tmp_path):
    trainer = made(tmp_path, sample={"micro_rows": 2, "batches": 2})
    objective, model = trainer.updates.objective, trainer.updates.model
    step = trainer.budget.step(0.0)
    objective.prepare(trainer.gate.next(4), step, 0.0)
    with torch.no_grad():  # away from the reference, or every sigmoid is a half
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    found = objective.gradients(objective.held(), step)
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    phase, losses = objective.phase, []

    def logp(by, row):
        start, end = int(phase.start_R[row]), int(phase.end_R[row])
        tokens = phase.tokens_RT1[row].numpy()
        return answer_logp(by, [tokens[:start]], [tokens[start:end]])[0]

    for prompt in range(2):  # the first part of the phase
        rows = (phase.prompt_R == prompt).nonzero()[:, 0].tolist()
        best, worst = (pick(rows, key=lambda row: phase.reward_R[row]) for pick in (max, min))
        if phase.reward_R[best] == phase.reward_R[worst]:
            continue
        theirs = [logp(objective.reference, row).detach() for row in (best, worst)]
        losses.append(dpo_loss(logp(model, best), logp(model, worst), *theirs, 0.3))
    assert losses
    torch.stack(losses).mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert not found.empty


def test_preferred_outputs_become_commoner(tmp_path):
    trainer = made(tmp_path, sample={"n": 8}, steps=200)
    stepped(trainer, 1)
    before = trainer.updates.objective.notes()["rl/reward"]
    trainer.run()
    assert trainer.updates.objective.notes()["rl/reward"] > before + 0.2


@pytest.mark.parametrize("kind", ["dpo", "rl"])
def test_a_resumed_run_stays_near_the_model_that_the_first_started_from(tmp_path, kind):
    cfg = ObjectiveConfig(kind=kind, sample=SampleConfig(**SMALL), rl=RlConfig(preset("grpo")))

    def begun(folder, seed):
        torch.manual_seed(seed)
        model = model_of()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(seed * 0.1)
        examples = examples_of()
        trainer, _ = build(
            make_objective(cfg, examples), examples.prompts(SMALL["new_tokens"]), examples, folder, steps=50, model=model
        )
        return trainer

    first = begun(tmp_path, 1)
    stepped(first, 2)
    reference = {name: value.clone() for name, value in first.updates.objective.reference.state_dict().items()}
    first.checkpoints.save()
    first.checkpoints.close()
    again = begun(tmp_path, 0)  # as a resumed run does, which does not read what the first was initialised from
    again.budget.clock.times = first.budget.clock.times
    again.resume(tmp_path / "checkpoint")
    same(reference, again.updates.objective.reference.state_dict())
    same(weights(first), weights(again))
    with pytest.raises(ObjectiveError, match="holds no reference policy"):
        again.updates.objective.load_state_dict(
            {name: value for name, value in first.updates.objective.state_dict().items() if name != "reference"}
        )


def test_what_makes_no_pairs_is_refused(tmp_path):
    with pytest.raises(PreferenceError, match="a pair is two outputs"):
        made(tmp_path / "a", sample={"n": 1})
    with pytest.raises(PreferenceError, match="an even number"):
        made(tmp_path / "b", sample={"micro_rows": 3})
    with pytest.raises(PreferenceError, match="beta = 0"):
        DpoConfig(0)
