"""The loop: a dense arm is plain training bit for bit, an interrupted run resumes exactly, the clock adds up."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparse_update.clock.cost import ComponentTimes, ComponentTimesError, identity
from sparse_update.data.corpus import DataConfig, load_corpus, val_windows
from sparse_update.data.stream import WindowStream
from sparse_update.gates.config import GateConfig
from sparse_update.gates.controller import AutoConfig, Controller
from sparse_update.gates.deciding.auto import OBSERVE
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.checkpoint import load_checkpoint
from sparse_update.loop.evaluation import evaluate, start_from
from sparse_update.loop.recorder import Listeners
from sparse_update.loop.records import TrainerConfig, TrainingDiverged, compiling
from sparse_update.objectives.likelihood import WATCHED
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.settings import OptimConfig, schedule
from sparse_update.weights.subset import SubsetConfig

MODEL = {"width": 16, "layers": 2, "heads": 2, "context": 16, "vocab_size": 256, "attention": "explicit"}
SEQUENCE = {"unit": "sequence", "signal": "ngram", "keep_fraction": 0.75, "noise_cut": 0.125, "pool_windows": 16}
ARMS = {
    "dense": (GateConfig(), SubsetConfig()),
    "sequence": (GateConfig(**SEQUENCE, ngram_bits=12), SubsetConfig()),
    "random": (GateConfig(unit="sequence", signal="random", keep_fraction=0.75, pool_windows=16), SubsetConfig()),
    "tokens": (GateConfig(unit="token", signal="token_loss", keep_fraction=0.5), SubsetConfig()),
    "random tokens": (GateConfig(unit="token", signal="random", keep_fraction=0.5), SubsetConfig()),
    "blocks": (GateConfig(), SubsetConfig(kind="blocks", active_fraction=0.5, block_rows=4, change_every_steps=3)),
    "layers": (GateConfig(), SubsetConfig(kind="layers", active_fraction=0.5, change_every_steps=3)),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    for i in range(12):
        (folder / f"{i}.txt").write_bytes(bytes(generator.integers(97, 110, 3000).astype(np.uint8)))
    return load_corpus(DataConfig(name="files", path=str(folder)))


def table(variant="autograd", shape=MODEL, **ms):
    own = {"forward": 4.0, "backward_dx": 3.0, "backward_dw": 2.0, "optimizer": 1.0, **ms}
    model = identity(ModelConfig(**shape), OptimConfig())
    return ComponentTimes(own, {}, "explicit", "fp32", variant, False, 4, model, {})


def measured(times, steps, components):
    """Every other step costs a plain one's time, every other component nothing."""
    return times.extended({**{step.key: 10.0 for step in steps}, **dict.fromkeys(components, 0.0)}, 10.0)


def build(
    corpus, folder, arm="dense", steps=20, optim=None, times=None, held_out=None, measure=measured, shape=MODEL, **kw
):
    gate, subset = ARMS[arm] if isinstance(arm, str) else arm
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**shape))
    stream = WindowStream(corpus, 16, seed=0, garbage_fraction=0.3)
    cfg = TrainerConfig(
        **{"budget_reference_s": steps * 0.010 + 1e-6, "batch_windows": 4, "log_every_steps": 1, "evaluations": 2, **kw}
    )
    reports, losses = [], []
    trainer = make_trainer(
        model,
        Arm(gate, subset, optim or OptimConfig()),
        cfg,
        Text(stream, held_out or {"val": val_windows(corpus, 16, 512)}),
        Prices(times or table(shape=shape), measure),
        Place(folder, {"config": {"arm": str(arm)}}),
        0,
        Listeners(reports.append, lambda report, found: losses.append(found["val"])),
    )
    return trainer, reports, losses


@pytest.mark.parametrize("arm", ["dense", "sequence", "random", "tokens", "random tokens"])
def test_what_the_first_gates_chose_and_lost_is_what_they_still_do(corpus, tmp_path, arm):
    """Recorded before there was one interface for all gates: windows exactly, losses to rounding."""
    golden = json.loads((Path(__file__).parent / "golden_gates.json").read_text())[arm]
    trainer, reports, losses = build(corpus, tmp_path, arm)
    chosen, take = [], trainer.gate.next

    def next_batch(windows, progress):
        batch = take(windows, progress)
        chosen.append(batch.window.tolist())
        return batch

    trainer.gate.next = next_batch
    trainer.run()
    assert chosen[:20] == golden["windows"]
    assert [r.loss_nats for r in reports] == pytest.approx(golden["losses"], abs=2e-5)
    assert losses == pytest.approx(golden["val"], abs=2e-5)


def test_gate_dense_is_bit_equal_to_plain_training(corpus, tmp_path):
    trainer, reports, _ = build(corpus, tmp_path)
    result = trainer.run()
    assert result.finished
    assert result.step == 20

    torch.manual_seed(0)
    model = Transformer(ModelConfig(**MODEL))
    cfg = OptimConfig()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)
    stream = WindowStream(corpus, 16, seed=0, garbage_fraction=0.3)
    for step in range(20):
        tokens = stream.take(4).tokens
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * schedule(step * 0.010 / trainer.budget.cfg.budget_reference_s, cfg)
        optimizer.step()
        assert reports[step].loss_nats == pytest.approx(float(loss.detach()), abs=1e-6)
    for (name, ours), plain in zip(trainer.updates.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, plain), name


@pytest.mark.parametrize("arm", list(ARMS))
def test_an_interrupted_run_resumes_exactly(corpus, tmp_path, arm):
    whole, whole_reports, whole_losses = build(corpus, tmp_path / "whole", arm)
    expected = whole.run()

    first, first_reports, first_losses = build(corpus, tmp_path / "cut", arm)
    first.records.listeners.on_report = lambda report: (
        first_reports.append(report),
        os.kill(os.getpid(), signal.SIGINT) if report.step == 7 else None,
    )
    stopped = first.run()
    assert not stopped.finished
    assert stopped.step == 7

    second, second_reports, second_losses = build(corpus, tmp_path / "cut", arm)
    torch.manual_seed(99)
    second.resume(tmp_path / "cut" / "checkpoint")
    found = second.run()
    assert found.finished
    for name in ("step", "tokens", "flops", "reference_s", "val_loss_nats", "kept_share", "windows_offered"):
        assert getattr(found, name) == getattr(expected, name), name
    assert [r.loss_nats for r in first_reports + second_reports] == [r.loss_nats for r in whole_reports]
    assert first_losses + second_losses == whole_losses
    for (name, a), b in zip(second.updates.model.named_parameters(), whole.updates.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_version_0_1_is_read_and_goes_on_as_it_did_there(corpus, tmp_path):
    """Written by that version's trainer after 7 of 20 steps; what it went on to lose was recorded there."""
    folder = Path(__file__).parent
    golden = json.loads((folder / "golden_resumed.json").read_text())
    arm = (ARMS["random"][0], ARMS["blocks"][1])
    trainer, reports, _ = build(corpus, tmp_path, arm, shape={**MODEL, "width": 8, "layers": 1})
    trainer.resume(folder / "checkpoint_0_1")
    result = trainer.run()
    assert [r.loss_nats for r in reports] == pytest.approx(golden["losses"], abs=2e-5)
    assert result.val_loss_nats == pytest.approx(golden["val"], abs=2e-5)
    assert (result.tokens, result.flops) == (golden["tokens"], golden["flops"])


def test_a_checkpoint_timed_by_another_table_is_refused(corpus, tmp_path):
    trainer, _, _ = build(corpus, tmp_path)
    trainer.run()
    other, _, _ = build(corpus, tmp_path, times=table(forward=5.0))
    with pytest.raises(ValueError, match="another table of component times"):
        other.resume(tmp_path / "checkpoint")


def test_the_clock_is_components_times_uses(corpus, tmp_path):
    trainer, reports, _ = build(corpus, tmp_path, "sequence", steps=30, times=table(**{"signal[ngram]": 0.5}))
    result = trainer.run()
    assert result.gate_reference_s == pytest.approx(result.windows_scored * 0.5e-3)
    assert result.reference_s == pytest.approx(result.step * 0.010 + result.gate_reference_s)
    assert result.reference_s <= trainer.budget.cfg.budget_reference_s + 16 * 0.5e-3
    assert result.step < 30  # scoring is paid for in steps
    assert result.tokens == result.step * 4 * 16
    assert reports[-1].keep_fraction == pytest.approx(0.75)


def test_a_loss_that_is_not_finite_is_skipped_counted_and_then_stops_the_run(corpus, tmp_path):
    trainer, _, _ = build(corpus, tmp_path, steps=20, stop_after_skipped=3)
    before = trainer.updates.model.blocks[0].mlp.fc1.weight.detach().clone()
    trainer.updates.model.head.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="3 steps in a row"):
        trainer.run()
    assert trainer.updates.tally.skipped == 3
    assert torch.equal(trainer.updates.model.blocks[0].mlp.fc1.weight, before)


def test_a_gradient_that_is_not_finite_moves_nothing(corpus, tmp_path):
    trainer, _, _ = build(corpus, tmp_path, steps=20, stop_after_skipped=3)
    before = trainer.updates.model.head.weight.detach().clone()
    trainer.updates.model.blocks[0].mlp.fc1.weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(TrainingDiverged, match="the gradient was not finite for 3 steps"):
        trainer.run()
    assert torch.equal(trainer.updates.model.head.weight, before)


def test_the_last_good_checkpoint_outlives_a_divergence(corpus, tmp_path):
    trainer, reports, _ = build(corpus, tmp_path, steps=20, stop_after_skipped=3, checkpoint_every_s=0.0)

    def spoil(report):
        reports.append(report)
        if report.step == 5:
            trainer.updates.model.head.weight.data.fill_(float("nan"))

    trainer.records.listeners.on_report = spoil
    trainer.budget.cfg.checkpoint_every_s = 1e9
    trainer.checkpoints.save()
    with pytest.raises(TrainingDiverged):
        trainer.run()
    found = load_checkpoint(tmp_path / "checkpoint")
    assert all(bool(t.isfinite().all()) for t in found.model.values())


def test_checkpoint_holds_gate_sampler_and_generator_state(corpus, tmp_path):
    trainer, _, _ = build(corpus, tmp_path, "sequence")
    trainer.run()
    found = load_checkpoint(tmp_path / "checkpoint")
    assert found.meta["config"] == {"arm": "sequence"}
    assert found.meta["step"] == trainer.updates.tally.step
    assert {"stream", "generator", "signal", "policy", "rate", "queue"} <= set(found.state["gate"])
    assert {"rng", "generator", "optimizer", "subset", "counters"} <= set(found.state)


def test_a_step_that_was_not_timed_is_measured_or_refused(corpus, tmp_path):
    with pytest.raises(ComponentTimesError, match=r"no entry 'step\[rows=8"):
        build(corpus, tmp_path, "tokens", measure=None)
    trainer, _, _ = build(corpus, tmp_path, "tokens", times=table(), batch_windows=8)
    assert set(trainer.budget.clock.times.extensions) == {"step[rows=8|all|b=8|t=16]"}
    plain, _, _ = build(corpus, tmp_path, "dense", batch_windows=8)
    assert set(plain.budget.clock.times.extensions) == {"step[plain|all|b=8|t=16]"}
    assert plain.budget.clock.times.sha256 == table().sha256  # the clock of what was there has not moved


def test_length_warm_up_cuts_windows_and_keeps_the_tokens_of_a_step(corpus, tmp_path):
    trainer, _, _ = build(corpus, tmp_path, length_schedule="4@0.3,8@0.6")
    result = trainer.run()
    assert result.tokens == result.step * 4 * 16
    assert result.step == 20
    assert dict(trainer.budget.clock.uses) == {
        "step[plain|all|b=16|t=4]": 7, "step[plain|all|b=8|t=8]": 6, "dense": 7,
    }  # fmt: skip
    with pytest.raises(ValueError, match="does not divide the model's context 16"):
        build(corpus, tmp_path, length_schedule="5@0.5")


@pytest.mark.parametrize("text", ["32", "32@", "8@0.5,4@0.2", "8@1.5", "0@0.5"])
def test_a_length_schedule_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"trainer\.length_schedule"):
        TrainerConfig(length_schedule=text)


def test_training_starts_from_another_runs_weights(corpus, tmp_path):
    first, _, _ = build(corpus, tmp_path / "first")
    first.run()
    second, _, _ = build(corpus, tmp_path / "second")
    start_from(second.updates.model, tmp_path / "first")
    for a, b in zip(first.updates.model.parameters(), second.updates.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = Transformer(ModelConfig(**{**MODEL, "vocab_size": 300}))
    with pytest.raises(ValueError, match=r"another vocabulary"):
        start_from(other, tmp_path / "first")


def test_several_held_out_sets_are_evaluated_apart(corpus, tmp_path):
    windows = val_windows(corpus, 16, 512)
    trainer, _, losses = build(corpus, tmp_path, held_out={"val": windows, "known": windows[:5]})
    result = trainer.run()
    assert set(result.held_out) == {"val", "known"}
    assert result.val_loss_nats == result.held_out["val"] == losses[-1]
    assert result.held_out["known"] == evaluate(trainer.updates.model, windows[:5])


def test_a_prequential_loss_is_taken_before_training_and_off_the_clock(corpus, tmp_path):
    trainer, _, _ = build(corpus, tmp_path, prequential_every=16, prequential_windows=4)
    untrained = evaluate(trainer.updates.model, trainer.budget.stream.read(0, 16).tokens[torch.arange(4) * 4])
    result = trainer.run()
    assert result.prequential[0][:2] == (0, untrained)
    assert [tokens // 16 for tokens, _, _ in result.prequential] == list(range(0, 81, 16))
    plain, _, _ = build(corpus, tmp_path / "plain")
    assert plain.run().reference_s == result.reference_s


def test_a_budget_of_offered_tokens_ends_the_run(corpus, tmp_path):
    for arm in ("dense", "random"):
        trainer, _, _ = build(corpus, tmp_path / arm, arm, steps=1, budget_offered_tokens=16 * 16 * 4)
        result = trainer.run()
        assert result.windows_offered == 64
        assert result.step == (16 if arm == "dense" else 12)  # what was kept is trained on, to the last batch


def test_bytes_of_gradients_and_optimizer_are_those_of_allocated_tensors(corpus, tmp_path):
    dense, _, _ = build(corpus, tmp_path / "dense")
    result = dense.run()
    size = sum(p.numel() * 4 for p in dense.updates.model.parameters())
    assert result.gradient_bytes == size
    assert 2 * size <= result.optimizer_bytes <= 2 * size + 200
    assert result.update_bytes == result.gradient_bytes + result.optimizer_bytes
    blocks, _, _ = build(corpus, tmp_path / "blocks", "blocks")
    assert blocks.run().update_bytes < 0.9 * result.update_bytes


@pytest.mark.parametrize("arm", ["tokens", "random tokens"])
def test_the_bias_of_compacted_rows_is_logged_and_moves_nothing(corpus, tmp_path, arm):
    seen = []
    trainer, _, _ = build(corpus, tmp_path / "a", arm, measure_bias=True)
    trainer.records.listeners.on_evaluation = lambda report, losses: seen.append(report.notes)
    found = trainer.run()
    for notes in seen:
        assert {"bias/all", "bias/blocks.0", "bias/blocks.1", "bias/head", "bias/embed", "bias/norm"} <= set(notes)
        assert all(-1 <= value <= 1 + 1e-9 for key, value in notes.items() if key.startswith("bias"))
    assert seen[0]["bias/all"] < 0.999
    without, _, _ = build(corpus, tmp_path / "b", arm)
    expected = without.run()
    for name in ("step", "flops", "windows_scored", "reference_s", "val_loss_nats"):
        assert getattr(found, name) == getattr(expected, name), name
    for a, b in zip(trainer.updates.model.parameters(), without.updates.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_report_says_what_each_source_lost(corpus, tmp_path):
    trainer, reports, _ = build(corpus, tmp_path, "sequence")
    trainer.run()
    assert set(reports[-1].kept_share) >= {"clean", "random"}
    assert reports[-1].kept_share == trainer.gate.kept_share()


def test_evaluation_is_the_mean_over_all_tokens_and_changes_nothing(corpus, tmp_path):
    trainer, _, _ = build(corpus, tmp_path)
    windows = val_windows(corpus, 16, 512)
    trainer.updates.model.train()
    found = evaluate(trainer.updates.model, windows, batch=7)
    expected = F.cross_entropy(trainer.updates.model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    assert found == pytest.approx(float(expected.detach()), rel=1e-6)
    assert trainer.updates.model.training


@pytest.mark.parametrize(
    "kw",
    [
        {"budget_reference_s": 0.0},
        {"batch_windows": 0},
        {"precision": "fp8"},
        {"compile": "maybe"},
        {"threads": -1},
        {"prequential_every": 8, "prequential_windows": 9},
    ],
)
def test_bad_settings_are_refused(kw):
    with pytest.raises(ValueError, match="trainer"):
        TrainerConfig(**kw)


def test_a_table_without_compilation_does_not_time_a_compiled_step(corpus, tmp_path):
    with pytest.raises(ComponentTimesError, match=r"without torch\.compile"):
        build(corpus, tmp_path, compile="on")


def test_compilation_is_tried_only_where_it_can_pay(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert compiling(TrainerConfig(budget_reference_s=60), cpu) == "measure"
    assert compiling(TrainerConfig(budget_reference_s=5), cpu) == "off"
    assert compiling(TrainerConfig(budget_reference_s=5), gpu) == "on"
    assert compiling(TrainerConfig(compile="on"), cpu) == "on"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert compiling(TrainerConfig(budget_reference_s=60), cpu) == "off"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns about parts of its own
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # traced as for inductor, without its C++: what that computes is for step/test_kernels.py
        pytest.param(
            "inductor",
            marks=[pytest.mark.soak, pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")],
        ),
    ],
)
def test_a_compiled_step_trains_like_the_plain_one(backend, corpus, tmp_path):
    plain, reports, _ = build(corpus, tmp_path / "plain", steps=8)
    plain.run()
    compiled, compiled_reports, _ = build(corpus, tmp_path / "compiled", steps=8)
    compiled.updates.objective.forward = torch.compile(compiled.updates.model, backend=backend)
    result = compiled.run()
    assert result.compile_s > 0
    for a, b in zip(reports, compiled_reports, strict=True):
        assert b.loss_nats == pytest.approx(a.loss_nats, abs=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns about parts of its own
@pytest.mark.parametrize("variant", ["autograd", "autograd_compiled", "engine"])
def test_observed_steps_train_like_plain_ones_and_are_charged_as_they_run(corpus, tmp_path, variant):
    def timed(times, steps, components):
        return measured(times.extended({WATCHED: 10.0}, 10.0), steps, components)

    arm = (GateConfig(name="auto", unit="auto", pool_windows=8, ngram_bits=12), SubsetConfig())
    trainer, reports, _ = build(corpus, tmp_path / "auto", arm, 60, times=table(variant), measure=timed)
    trainer.updates.objective.forward = trainer.updates.model  # whatever compiles is not what is asked here
    trainer.gate.controller = Controller(AutoConfig(strata=4, quotas=(0.2, 0.3, 0.4, 0.5), sigma=1e6))
    trainer.run()
    plain, expected, _ = build(corpus, tmp_path / "plain", steps=60)
    plain.run()
    seen = trainer.gate.controller.observed
    assert seen > 10
    assert trainer.budget.clock.uses[WATCHED] == (seen if variant == "autograd_compiled" else 0)
    assert trainer.gate.uses[OBSERVE] == 4 * seen
    assert len(reports) == 60
    for ours, dense in zip(reports, expected, strict=True):
        assert ours.loss_nats == pytest.approx(dense.loss_nats, abs=1e-4)
