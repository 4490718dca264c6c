"""The loop: a dense arm is plain training bit for bit, an interrupted run resumes exactly, the clock adds up."""

from __future__ import annotations

import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparse_update.checkpoint import load_checkpoint
from sparse_update.corpus import DataConfig, load_corpus, val_windows
from sparse_update.cost import ComponentTimes, ComponentTimesError, StepKind, identity
from sparse_update.gate import GateConfig, SequenceGate, TokenGate
from sparse_update.optimizer import OptimConfig, schedule
from sparse_update.stream import WindowStream
from sparse_update.subset import SubsetConfig
from sparse_update.trainer import Trainer, TrainerConfig, TrainingDiverged, compiling, evaluate
from sparse_update.transformer import ModelConfig, Transformer

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


def build(corpus, folder, arm="dense", steps=20, optim=None, **kw):
    gate, subset = ARMS[arm]
    kind = StepKind.of(gate, subset)
    ms = {"forward": 4.0, "backward_dx": 3.0, "backward_dw": 2.0, "optimizer": 1.0, "ngram_window": 0.0}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**MODEL))
    times = ComponentTimes({**ms, kind.key: 10.0}, {}, "explicit", "fp32", False, 4, identity(model.cfg, OptimConfig()), {})
    stream = WindowStream(corpus, 16, seed=0, garbage_fraction=0.3)
    cfg = TrainerConfig(budget_reference_s=steps * 0.010 + 1e-6, batch_windows=4, log_every_steps=1, evaluations=2, **kw)
    reports, losses = [], []
    trainer = Trainer(
        model,
        SequenceGate(gate, stream, corpus.vocab_size, seed=1),
        TokenGate(gate, seed=2),
        kind,
        optim or OptimConfig(),
        cfg,
        times,
        val_windows(corpus, 16, 512),
        folder,
        seed=0,
        meta={"config": {"arm": arm}},
        on_report=reports.append,
        on_evaluation=lambda report, loss: losses.append(loss),
    )
    return trainer, reports, losses


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
            group["lr"] = cfg.lr * schedule(step * 0.010 / trainer.cfg.budget_reference_s, cfg)
        optimizer.step()
        assert reports[step].loss_nats == pytest.approx(float(loss.detach()), abs=1e-6)
    for (name, ours), plain in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, plain), name


@pytest.mark.parametrize("arm", list(ARMS))
def test_an_interrupted_run_resumes_exactly(corpus, tmp_path, arm):
    whole, whole_reports, whole_losses = build(corpus, tmp_path / "whole", arm)
    expected = whole.run()

    first, first_reports, first_losses = build(corpus, tmp_path / "cut", arm)
    first.on_report = lambda report: (
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
    for (name, a), b in zip(second.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_timed_by_another_table_is_refused(corpus, tmp_path):
    trainer, _, _ = build(corpus, tmp_path)
    trainer.run()
    other, _, _ = build(corpus, tmp_path, "tokens")
    with pytest.raises(ValueError, match="another table of component times"):
        other.resume(tmp_path / "checkpoint")


def test_the_clock_is_components_times_uses(corpus, tmp_path):
    trainer, reports, _ = build(corpus, tmp_path, "sequence", steps=30)
    object.__setattr__(trainer.times, "ms", {**trainer.times.ms, "ngram_window": 0.5})
    result = trainer.run()
    assert result.gate_reference_s == pytest.approx(result.windows_scored * 0.5e-3)
    assert result.reference_s == pytest.approx(result.step * 0.010 + result.gate_reference_s)
    assert result.reference_s <= trainer.cfg.budget_reference_s + 16 * 0.5e-3
    assert result.step < 30  # scoring is paid for in steps
    assert result.tokens == result.step * 4 * 16
    assert reports[-1].keep_fraction == pytest.approx(0.75)


def test_a_loss_that_is_not_finite_is_skipped_counted_and_then_stops_the_run(corpus, tmp_path):
    trainer, _, _ = build(corpus, tmp_path, steps=20, stop_after_skipped=3)
    before = trainer.model.blocks[0].mlp.fc1.weight.detach().clone()
    trainer.model.head.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="3 steps in a row"):
        trainer.run()
    assert trainer.skipped == 3
    assert torch.equal(trainer.model.blocks[0].mlp.fc1.weight, before)


def test_checkpoint_holds_gate_sampler_and_generator_state(corpus, tmp_path):
    trainer, _, _ = build(corpus, tmp_path, "sequence")
    trainer.run()
    found = load_checkpoint(tmp_path / "checkpoint")
    assert found.meta["config"] == {"arm": "sequence"}
    assert found.meta["step"] == trainer.step
    assert {"stream", "generator", "table"} <= set(found.state["sequence_gate"])
    assert {"rng", "optimizer", "token_gate", "counters"} <= set(found.state)


def test_evaluation_is_the_mean_over_all_tokens_and_changes_nothing(corpus, tmp_path):
    trainer, _, _ = build(corpus, tmp_path)
    windows = val_windows(corpus, 16, 512)
    trainer.model.train()
    found = evaluate(trainer.model, windows, batch=7)
    expected = F.cross_entropy(trainer.model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    assert found == pytest.approx(float(expected.detach()), rel=1e-6)
    assert trainer.model.training


@pytest.mark.parametrize(
    "kw",
    [{"budget_reference_s": 0.0}, {"batch_windows": 0}, {"precision": "fp8"}, {"compile": "maybe"}, {"threads": -1}],
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
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_trains_like_the_plain_one(corpus, tmp_path):
    plain, reports, _ = build(corpus, tmp_path / "plain", steps=8)
    plain.run()
    compiled, compiled_reports, _ = build(corpus, tmp_path / "compiled", steps=8)
    compiled.forward = torch.compile(compiled.model)
    result = compiled.run()
    assert result.compile_s > 0
    for a, b in zip(reports, compiled_reports, strict=True):
        assert b.loss_nats == pytest.approx(a.loss_nats, abs=1e-4)
