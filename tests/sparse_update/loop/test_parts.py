"""Another objective and another mesh are parts that the loop is given: nothing of the loop is replaced here."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparse_update.clock.cost import ComponentTimes, identity
from sparse_update.data.corpus import DataConfig, load_corpus, val_windows
from sparse_update.data.stream import WindowStream
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.interrupt import Interruption
from sparse_update.loop.recorder import Listeners
from sparse_update.loop.records import TrainerConfig
from sparse_update.objectives.objective import Objective, by_autograd
from sparse_update.parallel.mesh import Mesh
from sparse_update.parallel.single import ALONE
from sparse_update.step.flops import plan_flops
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.settings import OptimConfig, schedule
from sparse_update.weights.subset import SubsetConfig

MODEL = {"width": 16, "layers": 2, "heads": 2, "context": 16, "vocab_size": 256, "attention": "explicit"}
STEPS = 8
BLOCKS = SubsetConfig(kind="blocks", active_fraction=0.5, block_rows=4, change_every_steps=3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    for i in range(12):
        (folder / f"{i}.txt").write_bytes(bytes(generator.integers(97, 110, 1000).astype(np.uint8)))
    return load_corpus(DataConfig(name="files", path=str(folder)))


def priced(times, steps, components):
    return times.extended({**{step.key: 10.0 for step in steps}, **dict.fromkeys(components, 0.0)}, 10.0)


def build(corpus, folder, subset=None, windows=4, stream=None, **parts):
    """A trainer whose every step costs 10 reference milliseconds; and what it reports."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**MODEL))
    ms = {"forward": 4.0, "backward_dx": 3.0, "backward_dw": 2.0, "optimizer": 1.0}
    table = ComponentTimes(ms, {}, "explicit", "fp32", "autograd", False, windows, identity(model.cfg, OptimConfig()), {})
    cfg = TrainerConfig(
        budget_reference_s=STEPS * 0.010 + 1e-6,
        batch_windows=windows,
        log_every_steps=1,
        evaluations=2,
        checkpoint_every_s=0,
    )
    reports: list = []
    trainer = make_trainer(
        model,
        Arm(subset=subset or SubsetConfig()),
        cfg,
        Text(stream or WindowStream(corpus, 16, seed=0), {"val": val_windows(corpus, 16, 256)}),
        Prices(table, priced),
        Place(folder),
        0,
        Listeners(reports.append),
        **parts,
    )
    return trainer, reports


class Smoothed(Objective):
    """Cross-entropy with smoothed labels, judged by the share of tokens that it does not guess; counts its steps."""

    def __init__(self, given):
        self.model, self.steps = given.model, 0

    def gradients(self, batch, step):
        self.steps += 1
        logits = self.model(batch.tokens[:, :-1])
        loss_B_T = F.cross_entropy(
            logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), label_smoothing=0.1, reduction="none"
        )
        loss_B_T.mean().backward()
        return by_autograd(loss_B_T.view(len(batch.tokens), -1))

    @torch.no_grad()
    def held_out(self, windows_NT1):
        return float((self.model(windows_NT1[:, :-1]).argmax(-1) != windows_NT1[:, 1:]).double().mean())

    def flops(self, step):
        return plan_flops(self.model.cfg, step.batch, step.plan, step.active, step.length).total

    def notes(self):
        return {"smoothed/steps": float(self.steps)}

    def state_dict(self):
        return {"smoothed": {"steps": self.steps}}

    def load_state_dict(self, state):
        self.steps = state["smoothed"]["steps"]


def test_a_new_objective_is_a_part_and_trains_like_its_own_plain_loop(corpus, tmp_path):
    trainer, reports = build(corpus, tmp_path, objective=Smoothed)
    notes = []
    trainer.records.listeners.on_evaluation = lambda report, losses: notes.append((report.notes, losses["val"]))
    result = trainer.run()
    assert result.finished
    assert result.step == STEPS

    torch.manual_seed(0)
    model, cfg = Transformer(ModelConfig(**MODEL)), OptimConfig()
    matrices, vectors = ([p for p in model.parameters() if (p.dim() == 2) == flat] for flat in (True, False))
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)
    stream = WindowStream(corpus, 16, seed=0)
    for step in range(STEPS):
        tokens = stream.take(4).tokens
        logits = model(tokens[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=0.1, reduction="none").mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * schedule(step * 0.010 / trainer.budget.cfg.budget_reference_s, cfg)
        optimizer.step()
        assert reports[step].loss_nats == pytest.approx(float(loss.detach()), abs=1e-6)
    for (name, ours), plain in zip(trainer.updates.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, plain), name
    windows = trainer.records.held_out["val"]
    missed = (model(windows[:, :-1]).argmax(-1) != windows[:, 1:]).double().mean()
    assert result.val_loss_nats == notes[-1][1] == float(missed)
    assert notes[-1][0]["smoothed/steps"] == STEPS


def test_the_state_of_an_objective_is_in_the_checkpoint(corpus, tmp_path):
    trainer, _ = build(corpus, tmp_path, objective=Smoothed)
    trainer.run()
    again, _ = build(corpus, tmp_path, objective=Smoothed)
    again.resume(tmp_path / "checkpoint")
    assert again.updates.objective.steps == STEPS

    class Forgetful(Smoothed):
        load_state_dict = Objective.load_state_dict

    third, _ = build(corpus, tmp_path, objective=Forgetful)
    with pytest.raises(NotImplementedError, match="keeps smoothed"):
        third.resume(tmp_path / "checkpoint")


class Pair(Mesh):
    """One of two ranks, threads of this process: a value is laid into a slot, and both are read when both are there.
    What each rank was asked is recorded."""

    size = 2

    def __init__(self, rank, slots, barrier):
        self.rank, self.slots, self.barrier = rank, slots, barrier
        self.calls: list[tuple[str, int]] = []

    def _both(self, name, value, size=1):
        self.calls.append((name, size))
        self.slots[self.rank] = value
        self.barrier.wait()
        both = tuple(self.slots)
        self.barrier.wait()
        return both

    def average_(self, gradients):
        mine = list(gradients)
        pairs = zip(*self._both("average", [g.clone() for g in mine], len(mine)), strict=True)
        for gradient, (a, b) in zip(mine, pairs, strict=True):
            gradient.copy_((a + b) / 2)

    def gather(self, part):
        return torch.cat(self._both("gather", part.clone()))

    def sum(self, value):
        return sum(self._both("sum", value))

    def largest(self, value):
        return max(self._both("largest", value))

    def wait(self):
        self._both("wait", None)


def two_ranks(corpus, folder, subset=None):
    barrier, slots = threading.Barrier(2, timeout=60), [None, None]
    built = [build(corpus, folder / f"rank{rank}", subset, windows=8, mesh=Pair(rank, slots, barrier)) for rank in (0, 1)]
    results: list = [None, None]

    def run(rank):
        try:
            results[rank] = built[rank][0].run()
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    def go():
        threads = [threading.Thread(target=run, args=(rank,), name=f"rank{rank}") for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for found in results:
            if isinstance(found, BaseException):
                raise found
        return results

    return [trainer for trainer, _ in built], [reports for _, reports in built], go


@pytest.mark.parametrize("subset", [SubsetConfig(), BLOCKS], ids=["autograd", "sparse step"])
def test_two_ranks_train_as_one_process_does_on_both_batches(corpus, tmp_path, subset):
    ranks, reports, go = two_ranks(corpus, tmp_path, subset)
    results = go()
    whole, expected = build(corpus, tmp_path / "whole", subset, windows=8)
    result = whole.run()
    assert [r.step for r in results] == [result.step, result.step] == [STEPS, STEPS]
    assert results[0].tokens == results[1].tokens == result.tokens
    assert results[0].flops == result.flops
    for (name, a), b, c in zip(
        ranks[0].updates.model.named_parameters(), ranks[1].updates.model.parameters(), whole.updates.model.parameters(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b), name
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(reports[0], expected, strict=True):
        assert ours.loss_nats == pytest.approx(theirs.loss_nats, abs=1e-5)
    assert reports[1] == []  # the first rank tells, and writes
    assert (tmp_path / "rank0" / "checkpoint" / "meta.json").is_file()
    assert not (tmp_path / "rank1").exists()
    first, second = (trainer.mesh.calls for trainer in ranks)
    assert first == second  # nobody waits for what another was not asked
    assert sum(name == "average" for name, _ in first) == STEPS
    assert all(size > 0 for _, size in first)


def test_what_one_rank_sees_all_act_on(corpus, tmp_path, monkeypatch):
    ranks, _, go = two_ranks(corpus, tmp_path)
    seen = []

    def spoil(gradient):
        seen.append(1)
        return gradient * float("nan") if len(seen) == 3 else gradient

    ranks[1].updates.model.head.weight.register_hook(spoil)

    class Asked(Interruption):
        asked = property(
            lambda self: threading.current_thread().name == "rank1" and ranks[1].updates.tally.step >= 5,
            lambda self, value: None,
        )

    monkeypatch.setattr("sparse_update.loop.trainer.Interruption", Asked)
    results = go()
    assert [(r.step, r.skipped, r.finished) for r in results] == [(5, 1, False)] * 2
    for a, b in zip(ranks[0].updates.model.parameters(), ranks[1].updates.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_several_processes_cannot_do_is_refused(corpus, tmp_path):
    pair = Pair(0, [None, None], threading.Barrier(1))
    signs = SubsetConfig(kind="blocks", active_fraction=0.5, block_rows=4, inactive="sign8")
    with pytest.raises(ValueError, match="signs have no mean"):
        build(corpus, tmp_path, signs, mesh=pair)


def test_reductions_of_one_process_are_identities():
    gradient = torch.tensor([1.0, float("nan")])
    ALONE.average_(iter([gradient]))
    assert gradient[0] == 1
    assert ALONE.first
    assert (ALONE.sum(3), ALONE.largest(-0.1), ALONE.mean(0.1)) == (3, -0.1, 0.1)
    assert [ALONE.any(True), ALONE.any(False), ALONE.all(True), ALONE.all(False)] == [True, False, True, False]
    ALONE.wait()
