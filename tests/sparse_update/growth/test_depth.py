"""Depth expansion: a run that grows resumes to the bit, trains like a loop by hand, and pays for the blocks that it has."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from sparse_update.clock.cost import ComponentTimesError
from sparse_update.clock.shipped import shipped_table
from sparse_update.data.corpus import DataConfig, load_corpus, val_windows
from sparse_update.data.stream import WindowStream
from sparse_update.gates.config import GateConfig
from sparse_update.growth.blocks import cut_to, grow_to
from sparse_update.growth.settings import GrowthConfig, check_growth
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.checkpoint import load_checkpoint
from sparse_update.loop.recorder import Listeners
from sparse_update.loop.records import TrainerConfig
from sparse_update.transformer import ModelConfig, Transformer, token_loss
from sparse_update.weights.masking import MaskConfig
from sparse_update.weights.settings import OptimConfig, schedule
from sparse_update.weights.subset import SubsetConfig

SHAPE = {"width": 16, "layers": 3, "heads": 2, "context": 16, "vocab_size": 256, "attention": "explicit"}
CPU = torch.device("cpu")
DEPTH = GrowthConfig("depth", "depth", start_layers=1, until=0.5)
SEQUENCE = {"unit": "sequence", "signal": "ngram", "keep_fraction": 0.75, "pool_windows": 16, "ngram_bits": 12}
ARMS = {
    "dense": {},
    "muon": {"optim": OptimConfig(name="muon", schedule="wsd")},
    "windows": {"gate": GateConfig(**SEQUENCE)},
    "tokens": {"gate": GateConfig(unit="token", signal="token_loss", keep_fraction=0.5)},
    "blocks": {"subset": SubsetConfig(kind="blocks", active_fraction=0.5, block_rows=4, change_every_steps=3)},
    "layers": {"subset": SubsetConfig(kind="layers", active_fraction=0.5, policy="random", change_every_steps=3)},
    "none at first": {"growth": GrowthConfig("depth", "depth", start_layers=0, until=0.5)},
    "copied": {"growth": GrowthConfig("depth", "depth", start_layers=2, until=0.3, new_blocks="copied")},
    "random": {"growth": GrowthConfig("depth", "depth", start_layers=2, until=0.3, new_blocks="random")},
    "lengths": {"trainer": {"length_schedule": "4@0.3,8@0.7"}},
    "bags": {"trainer": {"bags": "2@0.7"}},
    "masks": {"optim": OptimConfig(name="muon", mask=MaskConfig(kind="agreement"))},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    for i in range(12):
        (folder / f"{i}.txt").write_bytes(bytes(generator.integers(97, 110, 3000).astype(np.uint8)))
    return load_corpus(DataConfig(name="files", path=str(folder)))


def build(corpus, folder, steps=16.0, growth=DEPTH, gate=None, subset=None, optim=None, trainer=None, times=None):
    """A trainer with a budget of so many steps of the whole model, what it reports, and the depth of each step."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE))
    optim = optim or OptimConfig()
    table = shipped_table()
    times = times or table.times(model.cfg, optim, 4, CPU, "fp32", False)
    cfg = TrainerConfig(
        budget_reference_s=steps * times.dense_ms / 1000, batch_windows=4, log_every_steps=1, evaluations=2,
        **(trainer or {}),
    )  # fmt: skip
    reports = []
    trainer_ = make_trainer(
        model,
        Arm(gate or GateConfig(), subset or SubsetConfig(), optim, growth),
        cfg,
        Text(WindowStream(corpus, 16, seed=0), {"val": val_windows(corpus, 16, 512)}),
        Prices(times, lambda found, todo, parts: table.extended(found, ModelConfig(**SHAPE), optim, todo, parts)),
        Place(folder, {"model": {"layers": 3}}),
        0,
        Listeners(reports.append),
    )
    return trainer_, reports


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Arm -> what an uninterrupted run of it reported, its result and its weights; each run once."""
    found = {}

    def run(arm):
        if arm not in found:
            trainer, reports = build(corpus, tmp_path_factory.mktemp("whole"), **ARMS[arm])
            found[arm] = reports, trainer.run(), trainer.updates.model.state_dict()
        return found[arm]

    return run


def expansion(reports):
    """Number of the step after which the model has grown."""
    return next(r.step for r in reports if r.notes["growth/layers"] == 3)


@pytest.mark.parametrize("late", [-1, 0, 1], ids=["before", "at", "after"])
@pytest.mark.parametrize("arm", list(ARMS))
def test_an_interrupted_run_resumes_exactly(corpus, tmp_path, whole, arm, late):
    """The step at which it is interrupted is the last of the small model, the same after it has grown, or the first of the
    grown one. A report is made after growing, so its depth says of the checkpoint whether it has grown."""
    reports, expected, weights = whole(arm)
    cut = expansion(reports) + late
    first, first_reports = build(corpus, tmp_path, **ARMS[arm])
    first.records.listeners.on_report = lambda report: (
        first_reports.append(report),
        os.kill(os.getpid(), signal.SIGINT) if report.step == cut else None,
    )
    assert first.run().step == cut
    kept = load_checkpoint(tmp_path / "checkpoint")
    start = (ARMS[arm].get("growth") or DEPTH).start_layers
    assert kept.meta["model"]["layers"] == len(first.updates.model.blocks) == (start if late < 0 else 3)

    second, second_reports = build(corpus, tmp_path, **ARMS[arm], times=first.budget.clock.times)  # kept in a run's folder
    torch.manual_seed(99)
    second.resume(tmp_path / "checkpoint")
    found = second.run()
    for name in ("step", "tokens", "flops", "reference_s", "val_loss_nats", "windows_offered"):
        assert getattr(found, name) == getattr(expected, name), name
    assert [r.loss_nats for r in first_reports + second_reports] == [r.loss_nats for r in reports]
    for name, tensor in second.updates.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_a_grown_run_is_a_loop_by_hand(corpus, tmp_path):
    """Plain autograd and torch's AdamW: one block, then two more, whose moments begin at zero."""
    trainer, reports = build(corpus, tmp_path)
    clock, spent, budget = trainer.budget.clock, 0.0, trainer.budget.cfg.budget_reference_s
    small, large = (clock.seconds(clock.step(trainer.gate.plan(0.0, 4, 16), 4, 16, depth)) for depth in (1, 3))
    trainer.run()

    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE))
    cut_to(model, 1)
    cfg = OptimConfig()

    def groups(named):
        named = list(named)
        matrices, vectors = ([p for _, p in named if (p.dim() == 2) == flat] for flat in (True, False))
        return [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]

    optimizer = torch.optim.AdamW(groups(model.named_parameters()), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))
    stream = WindowStream(corpus, 16, seed=0)
    for report in reports:
        if spent / budget >= DEPTH.until and len(model.blocks) == 1:
            grow_to(model, 3, "zero", 0)
            for group in groups(model.blocks[1:].named_parameters()):
                optimizer.add_param_group(group)
        tokens = stream.take(4).tokens
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * schedule(spent / budget, cfg)
        optimizer.step()
        spent += small if len(model.blocks) == 1 else large
        assert report.loss_nats == pytest.approx(float(loss.detach()), abs=1e-5)
        assert report.reference_s == pytest.approx(spent, rel=1e-9)
    assert len(model.blocks) == 3
    assert small < 0.6 * large


def test_each_phase_is_counted_and_priced_as_the_model_that_runs(corpus, tmp_path):
    trainer, reports = build(corpus, tmp_path)
    result = trainer.run()
    shallow = expansion(reports)
    counted, seconds = {}, {}
    for depth in (1, 3):
        model = Transformer(ModelConfig(**{**SHAPE, "layers": depth}))
        tokens = torch.randint(0, 256, (4, 17))
        with FlopCounterMode(display=False) as counter:
            token_loss(model(tokens[:, :-1]), tokens[:, 1:]).mean().backward()
        counted[depth] = counter.get_total_flops()
        seconds[depth] = shipped_table().times(model.cfg, OptimConfig(), 4, CPU, "fp32", False).dense_ms / 1000
    assert 0 < shallow < result.step
    for total, each in ((result.flops, counted), (result.reference_s, seconds)):
        assert total == pytest.approx(shallow * each[1] + (result.step - shallow) * each[3], rel=1e-9)
    assert reports[shallow - 1].reference_s >= 0.5 * trainer.budget.cfg.budget_reference_s
    assert reports[shallow - 2].reference_s < 0.5 * trainer.budget.cfg.budget_reference_s


def test_moments_of_old_blocks_stay_and_new_ones_have_none(corpus, tmp_path):
    trainer, _ = build(corpus, tmp_path)
    updates = trainer.updates
    gate, budget = trainer.gate, trainer.budget
    for _ in range(3):
        updates.take(gate.next(4), budget.step(0.1), 0.1)
    state = {name: {k: v.clone() for k, v in m.items()} for name, m in updates.optimizer._moments().items()}
    updates.turn(0.6)
    after = updates.optimizer._moments()
    assert set(after) == set(state)
    assert all(torch.equal(after[name][key], value) for name, found in state.items() for key, value in found.items())
    assert set(updates.optimizer.leaves) - set(after) == {
        f"blocks.{i}.{name}" for i in (1, 2) for name, _ in updates.model.blocks[0].named_parameters()
    }


@pytest.mark.parametrize(
    ("new_blocks", "same"), [("zero", True), ("copied_zero", True), ("random", False), ("copied", False)]
)
def test_outputs_at_zero_leave_the_function_as_it_was(new_blocks, same):
    torch.manual_seed(1)
    model = Transformer(ModelConfig(**{**SHAPE, "layers": 2}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tokens = torch.randint(0, 256, (2, 16))
    before, old = model(tokens), [p.clone() for p in model.blocks.parameters()]
    state = torch.get_rng_state()
    grow_to(model, 5, new_blocks, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(tokens), before) == same
    assert all(torch.equal(a, b) for a, b in zip(old, model.blocks[:2].parameters(), strict=True))
    assert model.cfg.layers == len(model.blocks) == 5
    if new_blocks == "copied":
        for number in (2, 3, 4):
            for a, b in zip(model.blocks[number].parameters(), model.blocks[number % 2].parameters(), strict=True):
                assert torch.equal(a, b)
                assert a.data_ptr() != b.data_ptr()


def test_what_is_drawn_follows_from_seed_and_number():
    def drawn(seed):
        model = Transformer(ModelConfig(**{**SHAPE, "width": 64, "layers": 1}))
        grow_to(model, 3, "random", seed)
        blocks = model.blocks[1:]
        return [block.mlp.fc1.weight.detach() for block in blocks] + [block.mlp.fc2.weight.detach() for block in blocks]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
    assert float(first[0].std()) == pytest.approx(64**-0.5, rel=0.05)
    assert float(first[2].std()) == pytest.approx(256**-0.5 * 6**-0.5, rel=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns about parts of its own
def test_a_compiled_run_compiles_once_a_depth_and_trains_like_the_plain_one(corpus, tmp_path):
    plain, reports = build(corpus, tmp_path / "plain", steps=8)
    plain.run()
    compiled, compiled_reports = build(corpus, tmp_path / "compiled", steps=8)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled.updates.objective.forward = torch.compile(compiled.updates.model, backend=graphs)
    result = compiled.run()
    assert graphs.frame_count == 2
    assert result.compile_s > 0
    for a, b in zip(reports, compiled_reports, strict=True):
        assert b.loss_nats == pytest.approx(a.loss_nats, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "width"}, "growth.kind = 'width': one of none, depth"),
        ({"until": 1.0}, r"growth.until = 1.0: must lie in \(0, 1\)"),
        ({"start_layers": -1}, "growth.start_layers = -1: must not be negative"),
        ({"new_blocks": "mine"}, "growth.new_blocks = 'mine': one of zero, random, copied, copied_zero"),
        ({"new_blocks": "copied", "start_layers": 0}, "there is no block to copy"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        GrowthConfig(**settings)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"growth": GrowthConfig(kind="depth", start_layers=3)}, "the model has 3 blocks in the end"),
        ({"gate": GateConfig(unit="bypass", signal="random", keep_fraction=0.5)}, "gate.unit = 'bypass'"),
        (
            {
                "gate": GateConfig(
                    unit="sequence", signal="ngram", keep_fraction=0.5, replay="forgotten", replay_fraction=0.5
                )
            },
            "gate.replay = forgotten",
        ),
        ({"gate": GateConfig(unit="sequence", signal="early_exit", keep_fraction=0.5)}, "gate.signal = 'early_exit'"),
        ({"gate": GateConfig(unit="sequence", signal="token_loss", keep_fraction=0.5)}, "priced by their number"),
        ({"subset": SubsetConfig(kind="lora")}, "subset.kind = lora"),
        ({"subset": SubsetConfig(kind="blocks", active_fraction=0.5, policy="energy")}, "subset.policy = 'energy'"),
        (
            {
                "growth": GrowthConfig(kind="depth", start_layers=0),
                "subset": SubsetConfig(kind="layers", active_fraction=0.5),
            },
            "there is no block to choose weights from",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(given, said):
    full = {"growth": GrowthConfig(kind="depth"), "gate": GateConfig(), "subset": SubsetConfig(), **given}
    with pytest.raises(ValueError, match=said):
        check_growth(full["growth"], 3, full["gate"], full["subset"])


def test_a_checkpoint_of_other_growth_is_refused(corpus, tmp_path):
    trainer, _ = build(corpus, tmp_path, steps=4)
    trainer.run()
    plain, _ = build(corpus, tmp_path, growth=GrowthConfig())
    with pytest.raises(ValueError, match=r"this run has growth\.kind = none"):
        plain.resume(tmp_path / "checkpoint")
    other, _ = build(corpus, tmp_path, growth=GrowthConfig(kind="depth", start_layers=2))
    with pytest.raises(ValueError, match="grows from 1 to 3 blocks, this run's grows from 2 to 3"):
        other.resume(tmp_path / "checkpoint")


def test_a_budget_below_one_step_is_refused(corpus, tmp_path):
    trainer, _ = build(corpus, tmp_path, steps=0.2)
    with pytest.raises(ComponentTimesError, match="buys not one step"):
        trainer.run()
