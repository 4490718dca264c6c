"""The loop: plain training is what anybody would write, a resumed run is the uninterrupted one, errors are for people."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_update.clock.cost import ComponentTimesError
from sparse_update.loop.checkpoint import CheckpointError, load_checkpoint
from sparse_update.loop.records import TrainingDiverged
from sparse_update.own.arms import DENSE, OwnArm, arms_of, gated
from sparse_update.own.loop import OwnTrainer, OwnTrainerConfig, judge
from sparse_update.own.prices import Prices, shipped_prices
from sparse_update.own.task import TaskError, UserTask
from tests.sparse_update.own.tasks import Mixed, T, V, mlp, rows, task

CPU = torch.device("cpu")
GATES = {
    "token": {"backward": {"unit": "token", "keep_fraction": 0.5}},
    "sequence": {"backward": {"unit": "sequence", "keep_fraction": 0.5, "signal": "random", "policy": "uniform"}},
    "pool": {"before": {"signal": "ngram", "keep_fraction": 0.75, "pool": 32, "signal_options": {"bits": 10}}},
    "blocks": {
        "weights": {"kind": "blocks", "active_fraction": 0.25, "block_rows": 4, "change_every_steps": 3, "policy": "random"}
    },
    "both": {
        "backward": {"unit": "token", "keep_fraction": 0.5, "signal": "random"},
        "weights": {"kind": "block_columns", "active_fraction": 0.5, "block_rows": 4, "change_every_steps": 2},
    },
}


def per_step(steps: int) -> tuple[Prices, float]:
    """A table on which every step costs a second, whatever it does; and the budget of so many."""
    zero = dict.fromkeys(("forward_flops", "dx_flops", "dw_flops", "moved_bytes", "hard_elements", "operations"), 0.0)
    return Prices("modelled", "a second each", {**zero, "step": 1e12}, dict.fromkeys(GATES, 1.0)), float(steps)


def trainer(arm, folder, steps=12, small=None, seed=0, **more):
    table, budget = per_step(steps)
    options = {key: more.pop(key) for key in ("tell", "resumed") if key in more}
    cfg = OwnTrainerConfig(budget_reference_s=budget, evaluations=3, **more)
    return OwnTrainer(small or task(), arm, seed, table, cfg, folder, {}, **options)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_plain_training_is_the_loop_written_by_hand(tmp_path, optimizer):
    """Bit for bit, dropout and moments included."""
    batches = list(rows(96).split(8))
    make = {"adamw": lambda p: torch.optim.AdamW(p, lr=3e-3), "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)}
    small = task(train=batches, optimizer=make[optimizer])
    run = trainer(OwnArm(DENSE), tmp_path, small=small)
    assert run.run()

    torch.manual_seed(0)
    model = Mixed()
    by_hand = make[optimizer](list(model.parameters()))
    for batch in batches:
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        by_hand.zero_grad()
        loss.backward()
        by_hand.step()
    assert run.tally.step == len(batches)
    for (name, ours), theirs in zip(run.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    model.eval()
    with torch.no_grad():
        held = rows(16, 1)
        expected = F.cross_entropy(model(held[:, :-1]).flatten(0, 1), held[:, 1:].flatten())
    assert run.tally.held_out == pytest.approx(float(expected), rel=1e-6)


class Killed(BaseException):
    """Stands for a process that dies: nothing after it runs."""


@pytest.mark.parametrize(
    ("name", "at"), [("token", 1), ("sequence", 2), ("pool", 5), *((name, 8) for name in ("dense", *GATES))]
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, name, at):
    arm = OwnArm(DENSE) if name == "dense" else gated(name, GATES[name])
    whole = trainer(arm, tmp_path / "whole", log_every_steps=1)
    assert whole.run()

    def die(run, evaluated):
        if run.tally.step == at and not evaluated:
            run.save()
        if run.tally.step == at + 2:  # what was done since the checkpoint is lost
            raise Killed

    with pytest.raises(Killed):
        trainer(arm, tmp_path / "part", log_every_steps=1, tell=die).run()
    torch.manual_seed(99)  # the process that goes on has generators of its own
    on = trainer(arm, tmp_path / "part", resumed=load_checkpoint(tmp_path / "part" / "checkpoint"), log_every_steps=1)
    assert on.tally.step == at
    assert on.run()
    assert on.tally.step == whole.tally.step
    for (key, ours), theirs in zip(on.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    assert on.tally.held_out == whole.tally.held_out
    assert on.clock.reference_s == whole.clock.reference_s
    assert on.clock.flops == whole.clock.flops
    assert on.keep_fraction == whole.keep_fraction


def test_every_arm_meets_the_same_batches(tmp_path):
    seen = {}
    for arm in arms_of({"mine": GATES["token"]}):
        got = seen.setdefault(arm.name, [])

        def loss(model, batch, got=got):
            got.append(batch.clone())
            return model(batch[:, :-1]), batch[:, 1:]

        trainer(arm, tmp_path / arm.name, small=task(loss=loss)).run()
    dense, random, mine = (torch.stack([b for b in seen[name] if len(b) == 8][-12:]) for name in seen)
    assert torch.equal(dense, random)
    assert torch.equal(dense, mine)
    assert len(dense.flatten(0, 1).unique(dim=0)) > 40  # shuffled anew in the second pass, not one batch over and over


def test_a_loader_with_a_generator_of_its_own_starts_anew_for_every_arm():
    own = torch.utils.data.DataLoader(rows(), batch_size=8, shuffle=True, generator=torch.Generator())
    small = task(train=own)
    first = [next(small.batches("train", 3)) for _ in range(2)]
    assert torch.equal(*first)
    assert not torch.equal(first[0], next(small.batches("train", 4)))


def classifier(parts):
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    return UserTask(
        **{"model": lambda: net, "train": [(x, x[:, :3].argmax(1))], "held_out": [(x, x[:, :3].argmax(1))]} | parts
    )


def test_samples_without_tokens(tmp_path):
    """(B, V) logits, and losses of one's own: rows are samples then."""
    arm = gated("half", {"backward": {"unit": "sequence", "keep_fraction": 0.5}})
    first = trainer(arm, tmp_path / "a", small=classifier({}), steps=30)
    first.run()
    assert first.tally.held_out < math.log(3)
    assert first.tally.tokens == 30 * 32

    def squared(model, batch):
        return ((model(batch[0]) - batch[0][:, :3]) ** 2).mean(1)

    second = trainer(arm, tmp_path / "b", small=classifier({"loss": squared}), steps=30)
    before = judge(second.task, second.model, 0, CPU)[0]
    second.run()
    assert second.tally.held_out < before


def test_mappings_as_transformers_takes_them():
    transformers = pytest.importorskip("transformers", reason="needs the extra hub (transformers)")
    cfg = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=V,
        max_position_embeddings=T + 1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    tokens = rows(8)
    mask = torch.ones_like(tokens)
    mask[:, -3:] = 0
    small = task(lambda: transformers.LlamaForCausalLM(cfg), held_out=[{"input_ids": tokens, "attention_mask": mask}])
    model = small.make_model(0, CPU)
    found, count = judge(small, model, 0, CPU)
    with torch.no_grad():
        labels = tokens.masked_fill(mask == 0, -100)
        expected = model.eval()(input_ids=tokens, attention_mask=mask, labels=labels).loss
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert count == int((labels[:, 1:] != -100).sum())


def test_the_schedule_and_the_rate(tmp_path):
    small = task(mlp, schedule=lambda share: 1 - share, optimizer=lambda p: torch.optim.SGD([
        {"params": p[:1]}, {"params": p[1:], "lr": 0.5}], lr=0.25))  # fmt: skip
    run = trainer(OwnArm(DENSE), tmp_path, small=small, learning_rate=0.1, steps=4)
    seen = []
    run.tell = lambda t, evaluated: seen.append([group["lr"] for group in t.optimizer.param_groups])
    run.cfg.log_every_steps = 1
    run.run()
    assert seen[0] == pytest.approx([0.1, 0.2])
    assert [pair[0] for pair in seen[:1]] > [pair[0] for pair in seen[-1:]]


def test_a_loss_that_is_no_number_moves_nothing_and_ends_the_run(tmp_path):
    def broken(model, batch):
        return model(batch[:, :-1]) * float("nan"), batch[:, 1:]

    run = trainer(OwnArm(DENSE), tmp_path, small=task(mlp, loss=broken), stop_after_skipped=3)
    before = [p.clone() for p in run.model.parameters()]
    with pytest.raises(TrainingDiverged, match=r"arm dense, seed 0: .* 3 steps in a row .*lower the learning rate"):
        run.run()
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def mean_loss(model, batch):
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"train": []}, "train gave no batch"),
        ({"train": lambda: iter([])}, "train gave no batch"),
        ({"train": [rows(8).float()]}, r"a batch is float32 \(8, 13\): tokens are whole numbers"),
        ({"train": [{"pixels": rows(8)}]}, "a batch has pixels: labels or input_ids"),
        ({"train": ["text"]}, "a batch is str text"),
        ({"train": [rows(8) + V]}, r"index out of range|a label is"),
        ({"held_out": [rows(8)[:, :1]]}, "held_out has no token with a label"),
        ({"held_out": []}, "held_out gave no batch"),
        ({"loss": mean_loss}, "no mean over the batch"),
        ({"loss": lambda model, batch: (model(batch[:, :-1]), batch)}, r"labels int64 \(8, 13\)"),
        ({"loss": lambda model, batch: (model(batch[:, :-1]).detach(), batch[:, 1:])}, "the loss has no graph"),
        ({"loss": lambda model, batch: (model(batch[:, :-1]), batch[:, 1:] + V)}, r"a label is \d+ and the model has 19"),
        ({"model": lambda: "net"}, "the model's function made str net"),
        ({"model": lambda: nn.Sequential(nn.ReLU())}, "no parameter that asks for a gradient"),
        ({"optimizer": lambda p: None}, "the optimizer's function made NoneType"),
        ({"optimizer": lambda p: torch.optim.SGD(mlp().parameters())}, "none of the parameters it was given"),
    ],
)
def test_parts_that_cannot_be_used(tmp_path, parts, says):
    with pytest.raises((TaskError, IndexError), match=says):
        trainer(OwnArm(DENSE), tmp_path, small=task(**{"model": mlp} | parts), steps=2).run()


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"model": 3}, "model is int 3"),
        ({"train": 3}, "train is int 3"),
        ({"train": iter([])}, "can be read once only"),
        ({"optimizer": torch.optim.SGD([torch.ones(1, requires_grad=True)])}, "a function from parameters"),
        ({"loss": 3}, "loss is int 3: a function is needed"),
    ],
)
def test_a_task_that_is_none(parts, says):
    with pytest.raises(TaskError, match=says):
        UserTask(**{"model": mlp, "train": [], "held_out": []} | parts)


def test_a_loader_that_cannot_be_read_again(tmp_path):
    once = iter(rows(16).split(8))
    with pytest.raises(TaskError, match="ended after its first pass"):
        trainer(OwnArm(DENSE), tmp_path, small=task(mlp, train=lambda: once)).run()


def test_a_budget_below_one_step(tmp_path):
    run = OwnTrainer(task(mlp), OwnArm(DENSE), 0, shipped_prices(), OwnTrainerConfig(budget_reference_s=0.0), tmp_path, {})
    run.clock.work["like"] = {}
    with pytest.raises(ComponentTimesError, match="buys not one step"):
        run.run()


def test_a_checkpoint_of_another_model_or_table_is_refused(tmp_path):
    trainer(OwnArm(DENSE), tmp_path, steps=2).run()
    saved = load_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="of another model"):
        trainer(OwnArm(DENSE), tmp_path, small=task(mlp), resumed=saved)
    with pytest.raises(CheckpointError, match="another table of prices"):
        OwnTrainer(task(), OwnArm(DENSE), 0, shipped_prices(), OwnTrainerConfig(), tmp_path, {}, resumed=saved)


def test_gates_that_leave_nothing_out_and_names_of_controls():
    with pytest.raises(ValueError, match="leaves nothing out"):
        gated("mine", {})
    with pytest.raises(ValueError, match="an arm is called random_rows"):
        arms_of({"random_rows": GATES["token"]})
    two = {"a": GATES["token"], "b": {"backward": {"unit": "token", "keep_fraction": 0.5, "signal": "excess_entropy"}}}
    assert [arm.name for arm in arms_of(two)] == ["dense", "random", "a", "b"]  # one control serves both


@pytest.mark.parametrize("method", ["rho_loss", "selective_backprop"])
def test_published_methods_score_with_the_tasks_own_losses_and_pay_for_it(tmp_path, method):
    arm = gated(method, {"method": method, "before": {"pool": 16}})
    small = task(mlp, reference=mlp() if method == "rho_loss" else None)
    run = OwnTrainer(small, arm, 0, shipped_prices(), OwnTrainerConfig(budget_reference_s=0.1), tmp_path, {})
    assert run.run()
    forward = next(iter(run.clock.work.values()))["forward"].flops / 8  # of one sequence
    models = 2 if method == "rho_loss" else 1
    assert run.clock.filter_flops / run.gate.pool.offered == pytest.approx(models * forward)
    assert 0 < run.clock.filter_s < run.clock.reference_s <= 0.11  # a pool may come with the last step
