"""Objectives that learn from their own outputs: the gradient, the phase, and what is resumed of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sparse_update.objectives.sampled import RewardError
from sparse_update.objectives.settings import SampleConfig
from sparse_update.tasks.base import VerifierError
from sparse_update.tasks.encoding import PromptTooLong
from tests.sparse_update.objectives.house import examples_of, model_of
from tests.sparse_update.objectives.toy import Lengths, Reinforced, reinforced


def stepped(trainer, count):
    """The loop's own steps, one after the other."""
    for _ in range(count):
        progress = trainer.budget.progress
        batch = trainer.updates.objective.held() or trainer.gate.next(trainer.budget.windows_at(progress), progress)
        step = trainer.budget.step(progress)
        batch = trainer.updates.objective.prepare(batch, step, progress)
        found = trainer.updates.take(batch, step, progress)
        trainer.gate.observe(batch, found, progress, 1.0)
        trainer.budget.settle()
    return found


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.updates.model.named_parameters()}


def same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_the_gradient_is_that_of_the_outputs_weighed_by_their_advantage(tmp_path):
    trainer, _ = reinforced(tmp_path)
    objective, model = trainer.updates.objective, trainer.updates.model
    step = trainer.budget.step(0.0)
    batch = objective.prepare(trainer.gate.next(4), step, 0.0)
    found = objective.gradients(batch, step)
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    phase = objective.phase
    total = torch.zeros(())
    for row in range(len(phase.prompt_R)):
        start, end = int(phase.start_R[row]), int(phase.end_R[row])
        tokens = phase.tokens_RT1[row, :end]
        loss_T = F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none")[start - 1 :]
        torch.testing.assert_close(-loss_T.detach(), phase.logp_RT[row, start - 1 : end - 1], rtol=1e-4, atol=1e-5)
        group = phase.reward_R[phase.prompt_R == phase.prompt_R[row]]
        total = total + float(phase.reward_R[row] - group.mean()) * loss_T.sum()
    total = total / float(phase.lengths_R.sum())
    total.backward()
    assert float(found.loss_BT.mean()) == pytest.approx(float(total.detach()), rel=1e-4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-7, msg=name)
    assert found.view.signals["reward"].shape == (4, 4)


def test_reinforcement_raises_the_reward_and_generation_is_on_the_clock(tmp_path):
    trainer, reports = reinforced(tmp_path, sample={"n": 16}, steps=90)
    stepped(trainer, 1)
    before = trainer.updates.objective.notes()["rl/reward"]
    result = trainer.run()
    objective = trainer.updates.objective
    assert objective.notes()["rl/reward"] > before + 0.3
    charged = sum(uses * (2e-5 if key.startswith("generate[row") else 1e-3) for key, uses in objective.uses.items())
    assert result.gate_reference_s == pytest.approx(charged)
    assert result.reference_s <= trainer.budget.limit + 0.05
    assert result.empty + len([report for report in reports if report.loss_nats == report.loss_nats]) >= 1


def test_a_run_goes_on_in_the_middle_of_a_phase_to_the_same_bits(tmp_path):
    sample = {"batches": 2, "epochs": 2}
    whole, _ = reinforced(tmp_path / "whole", sample=sample, steps=400)
    stepped(whole, 7)
    first, _ = reinforced(tmp_path / "cut", sample=sample, steps=400)
    stepped(first, 3)  # a phase is four updates
    assert first.updates.objective.phase.taken == 3
    first.checkpoints.save()
    first.checkpoints.close()
    again, _ = reinforced(tmp_path / "cut", sample=sample, steps=400)
    again.budget.clock.times = first.budget.clock.times  # a run's own table is in its folder
    torch.manual_seed(99)
    again.resume(tmp_path / "cut" / "checkpoint")
    assert again.updates.objective.phase.taken == 3
    stepped(again, 4)
    same(weights(whole), weights(again))
    assert again.budget.reference_s == whole.budget.reference_s
    assert again.updates.objective.uses == whole.updates.objective.uses
    assert again.updates.objective.phases == whole.updates.objective.phases == 2


def test_equal_rewards_are_no_update_and_counted(tmp_path):
    trainer, _ = reinforced(tmp_path, kind=Reinforced)  # an untrained model solves nothing
    before = weights(trainer)
    result = trainer.run()
    same(before, weights(trainer))
    assert result.empty == result.step > 0
    assert result.skipped == 0


def test_shares_change_nothing_but_what_is_sampled_together(tmp_path):
    one, _ = reinforced(tmp_path / "a", steps=50)
    two, _ = reinforced(tmp_path / "b", steps=50, sample={"shares": 2})
    stepped(one, 1), stepped(two, 1)
    a, b = one.updates.objective.phase, two.updates.objective.phase
    assert torch.equal(a.tokens_RT1, b.tokens_RT1)
    assert torch.equal(a.logp_RT, b.logp_RT)
    same(weights(one), weights(two))
    assert one.updates.objective.uses == two.updates.objective.uses  # charged by rows and prompts


def test_bad_input_is_told(tmp_path):
    class Nan(Lengths):
        def rewards(self, instances, texts, stopped):
            return [float("nan")] * len(texts)

    trainer, _ = reinforced(tmp_path / "a", kind=Nan)
    with pytest.raises(RewardError, match="16 of 16 rewards are no finite numbers"):
        trainer.run()
    examples = examples_of()

    def broken(instance, answer):
        raise RuntimeError("boom")

    examples.by_label["sums"].verify = broken
    trainer, _ = reinforced(tmp_path / "b", kind=Reinforced, examples=examples)
    with pytest.raises(VerifierError, match="boom"):
        trainer.updates.objective.scores([examples.judged["sums"][0]], ["12"], [True])
    with pytest.raises(PromptTooLong, match="48 new ones do not fit"):
        reinforced(tmp_path / "c", sample={"new_tokens": 48})[0].run()
    with pytest.raises(ValueError, match="likeliest tokens are the same"):
        SampleConfig(temperature=0.0)
    trainer, _ = reinforced(tmp_path / "d", sample={"batches": 3})
    with pytest.raises(ValueError, match="equal parts"):
        trainer.run()
    trainer, _ = reinforced(tmp_path / "e", accumulate=2)
    with pytest.raises(ValueError, match="micro_rows"):
        trainer.run()


def test_outputs_are_other_ones_in_another_phase(tmp_path):
    trainer, _ = reinforced(tmp_path, examples=examples_of(rows=4), steps=50)
    stepped(trainer, 1)
    first = trainer.updates.objective.phase
    stepped(trainer, 1)
    second = trainer.updates.objective.phase
    assert sorted(first.batch.window.tolist()) == sorted(second.batch.window.tolist())
    order = [first.batch.window.tolist().index(number) for number in second.batch.window.tolist()]
    texts = first.tokens_RT1.view(4, 4, -1)[order]
    assert texts.shape != second.tokens_RT1.view(4, 4, -1).shape or not torch.equal(texts, second.tokens_RT1.view(4, 4, -1))
    assert replace(second, taken=0).mask_RT.sum() == second.lengths_R.sum()
    assert model_of().cfg.context == 48
