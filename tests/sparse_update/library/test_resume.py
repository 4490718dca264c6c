"""Stopped and resumed loops against uninterrupted ones, bit by bit; a plain loop and accelerate's."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from sparse_update.library.attach import attach
from sparse_update.library.linear import GateError
from tests.sparse_update.library.loops import (
    COLUMNS,
    CONFIGS,
    LAYERS,
    OPTIMIZERS,
    ROWS,
    STRIPS,
    Loop,
    flat,
    groups,
    small,
    through_a_file,
)


@pytest.mark.parametrize(
    ("kind", "config"), list(zip(["AdamW", "momentum"] * 3, CONFIGS.values(), strict=True)), ids=CONFIGS
)
def test_a_resumed_loop_goes_on_bit_by_bit(kind, config):
    whole = Loop(config, "model", kind).make().run(slice(0, 3))
    state = whole.saved()
    end = flat(whole.run(slice(3, 7)).model)
    # in any order, and from the optimizer's state alone
    for order in (("gate", "optimizer"), ("optimizer", "gate"), ("optimizer",)):
        again = Loop(config, "model", kind).make().load(state, "model", *order, "schedule")
        assert again.gate.steps == 3
        assert torch.equal(flat(again.run(slice(3, 7)).model), end)
    # an optimizer that was loaded before there was a gate, as trainers do
    model = small()
    optimizer = OPTIMIZERS[kind](groups(model.named_parameters()))
    optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    again = Loop(config, "model", kind)
    again.model.load_state_dict(state["model"])
    params = dict(zip(model.parameters(), again.model.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [params[p] for p in group["params"]]
    optimizer.state = type(optimizer.state)(dict, {params[p]: s for p, s in optimizer.state.items()})
    again.optimizer = optimizer
    again.gate.adopt(optimizer)
    again.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    again.load(state, "schedule")
    assert torch.equal(flat(again.run(slice(3, 7)).model), end)


@pytest.mark.parametrize(
    ("kind", "config"), list(zip(["Adafactor", "AdamW"] * 3, CONFIGS.values(), strict=True)), ids=CONFIGS
)
def test_an_optimizer_of_the_gates_parameters_resumes_too(kind, config):
    whole = Loop(config, "gate", kind).make().run(slice(0, 3))
    state = whole.saved()
    end = flat(whole.run(slice(3, 7)).model)
    again = Loop(config, "gate", kind).load(state, "model", "gate").make().load(state, "optimizer", "schedule")
    assert torch.equal(flat(again.run(slice(3, 7)).model), end)


def test_moments_meet_their_weights_by_name_where_parameters_come_in_another_order():
    config = CONFIGS["two scored rows, random tokens"]
    state = Loop(config, "gate").make().run(slice(0, 3)).saved()
    again = Loop(config, "gate").load(state, "model", "gate")
    named = list(again.gate.named_parameters())[::-1]
    again.optimizer = OPTIMIZERS["AdamW"](groups(named))
    again.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(again.optimizer, 10)
    again.load(state, "optimizer", "schedule").clip = 0
    other = Loop(config, "gate").load(state, "model", "gate").make().load(state, "optimizer", "schedule")
    other.clip = 0  # the norm's last bits depend on the order of its sum
    assert torch.equal(flat(again.run(slice(3, 7)).model), flat(other.run(slice(3, 7)).model))


@pytest.mark.parametrize("weights", [STRIPS, COLUMNS, LAYERS | {"active_layers": 2}], ids=lambda w: w["kind"])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_with_everything_active_it_is_plain_training_bit_by_bit(weights, clip):
    everything = {**weights, "active_fraction": 1.0}
    plain = Loop(None, clip=clip).make().run(slice(0, 5))
    for made in ("model", "gate"):
        gated = Loop({"weights": everything}, made, clip=clip).make().run(slice(0, 5))
        assert gated.gate.turns.subset.turn == 2  # moments of what stays active stay
        assert torch.equal(flat(gated.model), flat(plain.model))
        assert not clip or torch.equal(gated.norm, plain.norm)


def test_states_of_the_gates_and_of_the_models_parameters_stand_for_each_other():
    config = CONFIGS["two scored rows, random tokens"]
    for made, other in (("gate", "model"), ("model", "gate")):
        whole = Loop(config, made).make().run(slice(0, 3))
        state = whole.saved()
        again = Loop(config, other).make()
        again.gate.adopt(again.optimizer)
        again.load(state, "model", "optimizer", "schedule")
        assert torch.equal(flat(again.run(slice(3, 6)).model), flat(whole.run(slice(3, 6)).model))


def test_two_optimizers_share_a_gate():
    def run(steps, state=None):
        loop = Loop({"weights": LAYERS | {"policy": "random"}})
        named = dict(loop.model.named_parameters())
        lower = [p for n, p in named.items() if not n.startswith("blocks.1.")]
        upper = [p for n, p in named.items() if n.startswith("blocks.1.")]
        two = torch.optim.AdamW(lower, lr=1e-2), torch.optim.SGD(upper, lr=0.1, momentum=0.9)
        loop.gate.adopt(*two)
        if state is not None:
            state = copy.deepcopy(state)
            loop.model.load_state_dict(state[0])
            for optimizer, loaded in zip(two, state[1:], strict=True):
                optimizer.load_state_dict(loaded)
        for x in ROWS[steps]:
            loop.gate.loss(loop.model(x[:, :-1]), x[:, 1:]).backward()
            for optimizer in two:
                optimizer.step()
            loop.gate.step(*two)
            loop.model.zero_grad()
        inside = {id(p) for group in two[1].param_groups for p in group["params"]}
        assert inside <= {id(p) for p in upper}
        return flat(loop.model), through_a_file([loop.model.state_dict(), *(o.state_dict() for o in two)])

    whole, _ = run(slice(0, 8))
    _, state = run(slice(0, 5))
    assert torch.equal(run(slice(5, 8), state)[0], whole)


def test_strips_keep_rates_and_places_of_their_weights():
    loop = Loop({"weights": STRIPS | {"strips": 2}}).make()
    loop.run(slice(0, 3))
    again = Loop({"weights": STRIPS | {"strips": 2}}).make().load(loop.saved(), "optimizer")
    for made in (loop, again):
        matrices, rest = made.optimizer.param_groups
        names = [made.gate.turns.place_of(p)[0] for p in matrices["params"]]
        every = [n for n, p in made.model.named_parameters() if p.dim() > 1]
        assert list(dict.fromkeys(names)) == every
        assert names.count("blocks.0.attn.q.weight") == 2
        assert (matrices["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
        assert rest["lr"] == pytest.approx(2 * matrices["lr"])
        assert rest["lr"] < 2e-2


def test_frozen_weights_stay_frozen_through_a_resume():
    def frozen(state=None):
        loop = Loop({"weights": LAYERS})
        loop.gate.detach()
        loop.model.blocks[1].requires_grad_(False)
        loop.gate = attach(loop.model, {"weights": LAYERS})
        return loop.make() if state is None else loop.make().load(state, "model", "optimizer")

    start = copy.deepcopy(small().blocks[1].state_dict())
    loop = frozen().run(slice(0, 3))
    again = frozen(loop.saved()).run(slice(3, 7))
    assert all(torch.equal(v, start[n]) for n, v in again.model.blocks[1].state_dict().items())
    assert not any(p.requires_grad for p in again.model.blocks[1].parameters())
    again.gate.detach()
    assert not any(p.requires_grad for p in again.model.blocks[1].parameters())


def test_parameters_of_others_keep_their_moments():
    def run(state=None):
        loop = Loop({"weights": STRIPS})
        loop.extra = nn.Parameter(torch.ones(3))
        loop.optimizer = torch.optim.AdamW([*loop.gate.parameters(), loop.extra], lr=1e-2)
        loop.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(loop.optimizer, 10)
        loop.gate.adopt(loop.optimizer)
        if state is not None:
            loop.load(state, "model", "optimizer", "schedule")
            loop.extra.data.copy_(state["extra"])
        for step in range(3) if state is None else range(3, 6):
            loop.extra.grad = torch.arange(3.0) * (step - 2)
            loop.run(slice(step, step + 1))
        return loop

    first = run()
    state = through_a_file(first.saved() | {"extra": first.extra.detach()})
    whole = first
    for step in range(3, 6):
        whole.extra.grad = torch.arange(3.0) * (step - 2)
        whole.run(slice(step, step + 1))
    again = run(state)
    assert torch.equal(again.extra, whole.extra)
    assert torch.equal(flat(again.model), flat(whole.model))


def test_fused_kernels_do_not_write_beside_strips_of_columns():
    loop = Loop({"weights": COLUMNS | {"change_every_steps": 9}})
    before = loop.model.state_dict()["blocks.0.mlp.fc1.weight"].clone()
    loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=1e-2, fused=True)
    with pytest.warns(UserWarning, match="fused"):
        loop.gate.adopt(loop.optimizer)
    loop.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(loop.optimizer, 10)
    loop.run(slice(0, 2))
    moved = (loop.model.state_dict()["blocks.0.mlp.fc1.weight"] != before).any(0)
    assert moved.tolist() == [True] * 8 + [False] * 8


def test_a_checkpoint_of_plain_training_gives_strips_their_share_of_the_moments():
    plain = Loop(None).make().run(slice(0, 3))
    state = {"model": plain.model.state_dict(), "optimizer": through_a_file(plain.optimizer.state_dict())}
    moments = {n: plain.optimizer.state[p]["exp_avg"] for n, p in plain.model.named_parameters()}
    late = Loop({"weights": STRIPS | {"strips": 2}})
    optimizer = torch.optim.AdamW(groups(late.model.named_parameters()), lr=1e-2)
    optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    late.gate.adopt(optimizer)
    early = Loop({"weights": STRIPS | {"strips": 2}}).make()
    early.load(state, "optimizer")
    for gate, made in ((late.gate, optimizer), (early.gate, early.optimizer)):
        for name in moments:
            for place, p in gate.turns.active_of(name).items():
                part = moments[name] if len(place) == 1 else moments[name].narrow(place[1], place[2], place[3] - place[2])
                assert torch.equal(made.state[p]["exp_avg"], part)
    everything = Loop({"weights": STRIPS | {"active_fraction": 1.0}}).make().load(state, "model", "optimizer")
    end = flat(everything.run(slice(3, 5)).model)
    again = Loop(None).make().load(state, "model", "optimizer")
    assert torch.equal(flat(again.run(slice(3, 5)).model), end)


def test_a_new_gate_takes_over_the_optimizer_of_a_detached_one():
    loop = Loop({"weights": STRIPS}).make().run(slice(0, 3))
    state = loop.gate.state_dict()
    kept = {
        place: copy.deepcopy(loop.optimizer.state[p])
        for n in loop.gate.turns.names
        for place, p in loop.gate.turns.active_of(n).items()
    }
    loop.gate.detach()
    loop.gate = attach(loop.model, {"weights": STRIPS})
    loop.gate.load_state_dict(state)
    loop.gate.adopt(loop.optimizer)
    for n in loop.gate.turns.names:
        for place, p in loop.gate.turns.active_of(n).items():
            assert torch.equal(loop.optimizer.state[p]["exp_avg"], kept[place]["exp_avg"])
    loop.run(slice(3, 5))


# refusals


def test_settings_that_differ_are_named():
    state = Loop({"weights": STRIPS | {"strips": 2}}).make().run(slice(0, 3)).saved()
    other = Loop({"weights": STRIPS}).make()
    before = flat(other.model)
    for name in ("gate", "optimizer"):
        with pytest.raises(GateError, match=r"weights\.strips was 2 when this state was saved and is 1"):
            other.load(state, name)
    assert torch.equal(flat(other.model), before)
    assert other.gate.steps == 0
    with pytest.raises(GateError, match=r"weights\.kind was 'blocks' .* and is 'layers'"):
        Loop({"weights": LAYERS}).make().load(state, "optimizer")
    # loaded as torch does, before the gate could see it: refused before a step is made
    model = small()
    optimizer = torch.optim.AdamW(groups(model.named_parameters()), lr=1e-2)
    optimizer.load_state_dict(state["optimizer"])
    gate = attach(model, {"weights": STRIPS | {"strips": 2}, "seed": 3})
    with pytest.raises(GateError, match="seed was 0 when this state was saved and is 3"):
        gate.adopt(optimizer)


def test_an_optimizers_state_of_another_turn_is_refused_before_a_step_is_made():
    loop = Loop({"weights": STRIPS}, "gate").make().run(slice(0, 3))
    early = loop.saved()
    late = loop.run(slice(3, 5)).saved()
    mixed = Loop({"weights": STRIPS}, "gate").load(late, "model", "gate").make().load(early, "optimizer")
    before = flat(mixed.model)
    with pytest.raises(GateError, match="saved with the gate at step 3, and the gate is at step 5"):
        mixed.run(slice(0, 1))
    assert torch.equal(flat(mixed.model), before)
    forgotten = Loop({"weights": STRIPS}, "gate").load(late, "model").make().load(late, "optimizer")
    with pytest.raises(GateError, match="at step 5, and the gate is at step 0"):
        forgotten.run(slice(0, 1))
    assert torch.equal(flat(forgotten.model), before)
    # adopted in time, the gate goes where the optimizer's state was
    fresh = Loop({"weights": STRIPS}, "gate").load(late, "model").make().load(late, "optimizer", "schedule")
    fresh.gate.adopt(fresh.optimizer)
    assert torch.equal(flat(fresh.run(slice(5, 7)).model), flat(loop.run(slice(5, 7)).model))


def test_other_groups_models_and_optimizers_are_refused_in_words():
    loop = Loop({"weights": STRIPS}).make().run(slice(0, 1))
    state = loop.saved()
    one = Loop({"weights": STRIPS})
    one.optimizer = torch.optim.AdamW(one.model.parameters())
    one.gate.adopt(one.optimizer)
    with pytest.raises(GateError, match="has 2 parameter groups and this one has 1"):
        one.optimizer.load_state_dict(state["optimizer"])
    plain = torch.optim.AdamW([nn.Parameter(torch.zeros(2)) for _ in range(3)])
    with pytest.raises(GateError, match="of 3 parameters was saved without a gate"):
        one.optimizer.load_state_dict(plain.state_dict())
    state["optimizer"]["param_groups"][0]["gate"]["entries"][0][0] = "gone.weight"
    with pytest.raises(GateError, match=r"gone\.weight: its moments are in this checkpoint"):
        loop.optimizer.load_state_dict(state["optimizer"])


# accelerate


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate", reason="needs the extra hub (accelerate)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield accelerate.Accelerator


def accelerated(made, config, folder=None, save=None, accumulate=2, clip=0.5):
    acc = made(cpu=True, gradient_accumulation_steps=accumulate)
    model = small()
    optimizer = torch.optim.AdamW(groups(model.named_parameters()), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.9**k)
    model, optimizer, schedule = acc.prepare(model, optimizer, schedule)
    gate = attach(acc.unwrap_model(model), config or {})
    if config:
        gate.adopt(optimizer)
        acc.register_for_checkpointing(gate)
    if folder:
        acc.load_state(folder)
    for number in range(gate.steps * accumulate, 5 * accumulate):
        x = ROWS[number]
        with acc.accumulate(model):
            acc.backward(gate.loss(model(x[:, :-1]), x[:, 1:]))
            if acc.sync_gradients:
                acc.clip_grad_norm_(gate.parameters(), clip)
            optimizer.step()
            gate.step(optimizer)
            schedule.step()
            optimizer.zero_grad()
        if save and number == 3 * accumulate - 1:
            acc.save_state(save)
    assert gate.steps == 5
    return flat(model)


@pytest.mark.parametrize("name", ["two random columns, sequences", "scored layers", "all weights, random tokens"])
def test_accelerate_resumes_with_accumulation(name, accelerator, tmp_path):
    whole = accelerated(accelerator, CONFIGS[name], save=str(tmp_path))
    assert torch.equal(accelerated(accelerator, CONFIGS[name], str(tmp_path)), whole)


def test_accelerate_clips_strips_as_plain_training(accelerator):
    plain = accelerated(accelerator, None, clip=0.05)
    assert torch.equal(accelerated(accelerator, {"weights": STRIPS | {"active_fraction": 1.0}}, clip=0.05), plain)


def test_a_step_left_out_for_an_overflow_is_none_of_the_gate(accelerator):
    accelerate = pytest.importorskip("accelerate")
    accelerator(cpu=True)
    loop = Loop({"weights": STRIPS | {"policy": "energy"}}).make()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(loop.optimizer, scaler=scaler)
    start = flat(loop.model)
    for overflow in (True, False):
        x = ROWS[0]
        scaler.scale(loop.gate.loss(loop.model(x[:, :-1]), x[:, 1:])).backward()
        if overflow:
            loop.gate.parameters()[0].grad[0] = float("inf")
        optimizer.step()
        loop.gate.step(optimizer)
        loop.model.zero_grad()  # strips are no parameters of the model: the gate clears theirs
        assert all(p.grad is None for p in loop.gate.parameters())
        assert loop.gate.steps == (not overflow)
        assert torch.equal(flat(loop.model), start) == overflow
