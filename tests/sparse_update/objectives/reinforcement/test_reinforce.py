"""Reinforcement in the training loop: its gradient, its gates, its clock, and going on from a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparse_update.objectives.reinforcement.reinforce import Reinforce
from sparse_update.objectives.reinforcement.rejection import Rejection
from sparse_update.objectives.reinforcement.settings import (
    PromptGateConfig,
    ReinforcementError,
    RejectionConfig,
    RlConfig,
    TokenGateConfig,
    preset,
)
from sparse_update.objectives.settings import SampleConfig
from tests.sparse_update.objectives.house import build, examples_of

SMALL = {"n": 4, "new_tokens": 4, "micro_rows": 8}


class ByLength:
    """Rewards a low first byte, so that an untrained model's outputs differ in it."""

    def rewards(self, instances, texts, stopped):
        return [float(len(text) and ord(text[0]) < 100) for text in texts]


class Reinforced(ByLength, Reinforce):
    pass


class Rejected(ByLength, Rejection):
    pass


def made(folder, cfg=None, kind=Reinforced, sample=None, examples=None, **more):
    examples = examples or examples_of()
    settings = SampleConfig(**{**SMALL, **(sample or {})})
    stream = examples.prompts(settings.new_tokens)
    cfg = cfg or RlConfig()
    trainer, _ = build(
        lambda given: kind(given, examples, settings, stream, cfg), stream, examples, folder, **{"steps": 400, **more}
    )
    return trainer


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


def gradient_of(trainer):
    objective, model = trainer.updates.objective, trainer.updates.model
    step = trainer.budget.step(0.0)
    batch = objective.prepare(trainer.gate.next(trainer.budget.windows_at(0.0)), step, 0.0)
    objective.gradients(batch, step)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found, objective.phase


def check_gradient(trainer, loss_of):
    """Our gradient against autograd of `loss_of(phase, row, token losses of its output)`, summed over the outputs."""
    ours, phase = gradient_of(trainer)
    model = trainer.updates.model
    total = torch.zeros(())
    for row in range(len(phase.prompt_R)):
        start, end = int(phase.start_R[row]), int(phase.end_R[row])
        tokens = phase.tokens_RT1[row, :end]
        loss_T = F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none")[start - 1 :]
        total = total + loss_of(phase, row, loss_T)
    total.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)


def group_of(phase, row):
    return phase.reward_R[phase.prompt_R == phase.prompt_R[row]]


def test_the_gradient_of_leave_one_out_is_that_of_its_definition(tmp_path):
    def loss_of(phase, row, loss_T):
        group = group_of(phase, row)
        others = (group.sum() - phase.reward_R[row]) / (len(group) - 1)
        return float(phase.reward_R[row] - others) * loss_T.sum() / len(phase.prompt_R)

    check_gradient(made(tmp_path, RlConfig(preset("rloo"))), loss_of)


def test_the_gradient_of_grpo_is_that_of_its_definition(tmp_path):
    def loss_of(phase, row, loss_T):
        group = group_of(phase, row)
        advantage = (phase.reward_R[row] - group.mean()) / (group.std() + 1e-4)
        return float(advantage) * loss_T.mean() / len(phase.prompt_R)

    check_gradient(made(tmp_path, RlConfig(preset("grpo", kl=0.0))), loss_of)


def test_the_gradient_of_dapo_is_that_of_its_definition(tmp_path):
    def loss_of(phase, row, loss_T):
        group = group_of(phase, row)
        advantage = (phase.reward_R[row] - group.mean()) / (group.std() + 1e-4)
        counts = bool(phase.stopped_R[row])
        return float(advantage) * counts * loss_T.sum() / float(phase.lengths_R.sum())

    trainer = made(tmp_path, RlConfig(preset("dapo")))
    trainer.updates.objective.sampler.stop_V[:100] = True  # an untrained model ends by chance
    check_gradient(trainer, loss_of)
    stopped = trainer.updates.objective.phase.stopped_R
    assert 0 < int(stopped.sum()) < len(stopped)


def test_the_gradient_of_rejection_sampling_is_that_of_likelihood_on_what_was_right(tmp_path):
    def loss_of(phase, row, loss_T):
        right_R = phase.reward_R == 1
        return float(right_R[row]) * loss_T.sum() / float(phase.lengths_R[right_R].sum())

    check_gradient(made(tmp_path, RejectionConfig(), kind=Rejected), loss_of)


def test_a_divergence_pulls_back_to_where_the_run_began(tmp_path):
    cfg = RlConfig(preset("rloo", kl=5.0, advantage="reinforce", baseline=0.0), tokens=TokenGateConfig())
    trainer = made(tmp_path, cfg, kind=type("Flat", (Reinforce,), {"rewards": lambda self, i, t, s: [1.0] * len(t)}))
    objective, model = trainer.updates.objective, trainer.updates.model
    assert not any(p.requires_grad for p in objective.reference.parameters())
    _, phase = gradient_of(trainer)
    mask = phase.mask_RT
    torch.testing.assert_close(phase.more["reference_RT"][mask], phase.logp_RT[mask], rtol=1e-4, atol=1e-5)
    assert any(key.startswith("score_rows") for key in objective.uses)
    before = {name: p.detach().clone() for name, p in objective.reference.named_parameters()}
    stepped(trainer, 2)
    for name, p in objective.reference.named_parameters():
        assert torch.equal(before[name], p), name
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())


GATES = {
    "predicted": RlConfig(prompts=PromptGateConfig("predicted", 0.5)),
    "surprise": RlConfig(prompts=PromptGateConfig("surprise", 0.5), allocate="uncertain", n_least=2, n_most=8),
    "dealt": RlConfig(prompts=PromptGateConfig("predicted", 1.0), allocate="random", n_least=2, n_most=8),
    "random": RlConfig(prompts=PromptGateConfig("random", 0.5), tokens=TokenGateConfig("random", 0.5)),
    "greso": RlConfig(prompts=PromptGateConfig("greso", 0.5), tokens=TokenGateConfig("entropy", 0.5)),
    "filtered": RlConfig(prompts=PromptGateConfig("none", 0.5, filter_after=True), estimator=preset("grpo")),
}


@pytest.mark.parametrize("name", sorted(GATES))
def test_a_gated_run_goes_on_in_the_middle_of_a_phase_to_the_same_bits(tmp_path, name):
    more = {"cfg": GATES[name], "sample": {"batches": 2}, "windows": 8, "examples": None}

    def run(folder):
        return made(folder, **{**more, "examples": examples_of(rows=12)})

    whole, first = run(tmp_path / "whole"), run(tmp_path / "cut")
    stepped(whole, 9)
    stepped(first, 5)
    first.checkpoints.save()
    first.checkpoints.close()
    again = run(tmp_path / "cut")
    again.budget.clock.times = first.budget.clock.times  # a run's own table is in its folder
    torch.manual_seed(99)
    again.resume(tmp_path / "cut" / "checkpoint")
    assert again.updates.objective.phase.taken == 1
    stepped(again, 4)
    for (key, p), q in zip(whole.updates.model.named_parameters(), again.updates.model.parameters(), strict=True):
        assert torch.equal(p, q), key
    a, b = whole.updates.objective, again.updates.objective
    assert a.uses == b.uses
    assert a.seen == b.seen
    assert a.prompts.state_dict() == b.prompts.state_dict()
    assert whole.budget.reference_s == again.budget.reference_s


def test_the_surprise_that_prompts_are_chosen_by_is_the_models_and_on_the_clock(tmp_path):
    trainer = made(tmp_path, RlConfig(prompts=PromptGateConfig("surprise", 0.5, explore=0.0)), windows=8)
    objective, model = trainer.updates.objective, trainer.updates.model
    batch = trainer.gate.next(8)
    shown = objective._candidates(batch)
    promise, surprise = objective.prompts.predict(shown).signal(4), shown.surprise_C
    taken = objective.prepare(batch, trainer.budget.step(0.0), 0.0)
    assert len(taken.tokens) == 4
    for place, number in enumerate(batch.window):
        instance = objective.stream.row(int(number)).instances[0]
        tokens = torch.tensor([list(f"{instance.short}\n{instance.answer}\x03".encode())])
        start = len(instance.short) + 1
        loss = F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:], reduction="none")[start - 1 :].sum()
        assert surprise[place] == pytest.approx(float(loss.detach()), rel=1e-4)
    kept = np.isin(batch.window.numpy(), taken.window.numpy())
    assert promise[kept].min() >= promise[~kept].max() - 1e-9
    assert [key for key in objective.uses if key.startswith("score_rows[b=8|")]
    rows = sum(count for key, count in objective.uses.items() if key.startswith("generate[row|"))
    others = sum(objective.uses.values()) - rows  # prompts that were read, candidates that were scored
    assert rows
    assert others
    assert trainer.budget.clock.other_reference_s == pytest.approx(0.001 * others + 0.00002 * rows)


def test_a_filter_keeps_mixed_groups_and_pays_for_the_others(tmp_path):
    trainer = made(tmp_path, GATES["filtered"], windows=16)
    objective = trainer.updates.objective
    stepped(trainer, 1)
    phase = objective.phase
    reward_PN = phase.by_prompt(phase.reward_R)
    assert (reward_PN.amax(1) > reward_PN.amin(1)).all()
    assert len(phase) == 8
    assert objective.seen["groups"] - objective.seen["filtered"] >= 8
    assert objective.seen["filtered"] == objective.seen["right"] + objective.seen["wrong"] > 0
    sampled = [phase.tokens_RT1[row, : int(phase.start_R[row])].tolist() for row in range(len(phase.prompt_R))]
    for row, prompt in enumerate(phase.prompt_R):
        own = phase.batch.tokens[prompt, : int(phase.start_R[row])].tolist()
        assert sampled[row] == own  # outputs stay with their prompts


def test_outputs_follow_uncertainty_and_chance_deals_the_same_numbers(tmp_path):
    found = {}
    for name in ("uncertain", "random"):
        cfg = RlConfig(prompts=PromptGateConfig("surprise", 1.0, explore=0.0), allocate=name, n_least=2, n_most=8)
        trainer = made(tmp_path / name, cfg, windows=8)
        objective = trainer.updates.objective
        objective.prepare(trainer.gate.next(8), trainer.budget.step(0.0), 0.0)
        counts = torch.bincount(objective.phase.prompt_R)
        assert int(counts.sum()) == 32
        assert int(counts.min()) >= 2
        found[name] = counts
        if name == "uncertain":
            variance = objective.prompts.predict(objective._taken).variance()
            order = np.argsort(variance)
            assert (np.diff(counts.numpy()[order]) >= 0).all()
    assert sorted(found["uncertain"].tolist()) == sorted(found["random"].tolist())


def test_tokens_that_are_not_kept_have_no_weight(tmp_path):
    trainer = made(tmp_path, RlConfig(tokens=TokenGateConfig("entropy", 0.4)))
    objective = trainer.updates.objective
    stepped(trainer, 1)
    phase = objective.phase
    kept, live = phase.more["kept_RT"], phase.mask_RT & (phase.more["advantage_R"] != 0)[:, None]
    assert not (kept & ~phase.mask_RT).any()
    assert float(phase.entropy_RT[kept].min()) >= float(phase.entropy_RT[live & ~kept].max())


def test_equal_rewards_are_no_update_and_counted(tmp_path):
    trainer = made(tmp_path, kind=Reinforce, steps=4)  # an untrained model solves nothing
    before = {name: p.detach().clone() for name, p in trainer.updates.model.named_parameters()}
    result = trainer.run()
    assert result.empty == result.step > 0
    assert trainer.updates.objective.notes()["rl/all_wrong"] == 1.0
    for name, p in trainer.updates.model.named_parameters():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize(
    ("cfg", "sample", "says"),
    [
        (RlConfig(), {"n": 1}, "at least 2"),
        (RlConfig(allocate="uncertain", n_least=2), {}, "use predicted or surprise"),
        (RlConfig(prompts=PromptGateConfig("predicted"), allocate="uncertain", n_least=3), {}, "multiples of the first"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, cfg, sample, says):
    with pytest.raises(ReinforcementError, match=says):
        made(tmp_path, cfg, sample=sample)
