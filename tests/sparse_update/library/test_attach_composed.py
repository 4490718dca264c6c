"""The gate with accumulation, checkpointing, autocast, torch.compile, two processes, loaders, and rules of one's own."""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_update.gates.policies import register_policy, uniform
from sparse_update.library.attach import attach
from sparse_update.library.tracking.rows import GateError
from sparse_update.signals import Signal, SignalError, register_signal
from sparse_update.weights.subset import register_subset_policy
from tests.sparse_update.library.models import B, T, V, data, gradients, loader, ours, same, token_losses


def test_accumulated_gradients_add_up():
    torch.manual_seed(3)
    model = ours().double()
    x, y = data()
    cfg = {"backward": {"unit": "token", "keep_fraction": 0.5}, "weights": {"kind": "blocks", "active_fraction": 0.5}}
    gate = attach(model, cfg)

    def one(part):
        gate.loss(model(x[part]), y[part]).backward()
        found = {n: p.grad.clone() for n, p in gate.named_parameters()}
        for p in gate.parameters():
            p.grad = None
        return found

    halves = one(slice(0, 2)), one(slice(2, 4))
    losses = [gate.loss(model(x[:2]), y[:2]), gate.loss(model(x[2:]), y[2:])]
    for loss in losses:
        loss.backward()
    same({n: p.grad for n, p in gate.named_parameters()}, {n: halves[0][n] + halves[1][n] for n in halves[0]})
    with pytest.raises(GateError, match="two gated losses"):
        (gate.loss(model(x[:2]), y[:2]) + gate.loss(model(x[2:]), y[2:])).backward()
    one(slice(0, 2))  # and it goes on


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    torch.manual_seed(3)
    body = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(3)).double()
    head, x, y = nn.Linear(16, V).double(), torch.randn(B, T, 16, dtype=torch.float64, requires_grad=True), data()[1]
    model = nn.ModuleList([body, head])
    cfg = {"backward": {"unit": "token", "keep_fraction": 0.5}, "weights": {"kind": "blocks", "active_fraction": 0.5}}
    gate = attach(model, {**cfg, "vocab_size": V})

    def run(saving):
        h = x
        for block in body:
            h = checkpoint(block, h, use_reentrant=reentrant) if saving else block(h)
        gate.loss(head(h), y).backward()
        found = {n: p.grad.clone() for n, p in gate.named_parameters()}
        for p in gate.parameters():
            p.grad = None
        return found

    same(run(True), run(False), rtol=1e-10, atol=1e-13)


def test_autocast_matches_torchs_own():
    torch.manual_seed(3)
    model = ours()
    x, y = data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(x)
        loss = F.cross_entropy(plain.float().flatten(0, 1), y.flatten())
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    gate = attach(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
        loss = gate.loss(found, y)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, plain)
    loss.backward()
    same(gradients(model), expected, rtol=0.05, atol=2e-3)


@pytest.mark.slow
def test_compiled_steps_follow_new_rows_and_strips_without_compiling_again():
    torch.manual_seed(3)
    model = ours()
    x, y = data()
    cfg = {
        "backward": {"unit": "token", "keep_fraction": 0.5},
        "weights": {"kind": "blocks", "active_fraction": 0.25, "block_rows": 4, "change_every_steps": 1},
    }
    gate = attach(model, cfg)
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.5)
    torch._dynamo.reset()
    gate.probe(x)
    with warnings.catch_warnings(), torch._dynamo.config.patch(error_on_recompile=True):
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(4):
            gate.loss(compiled(x), y).backward()
            found = {n: p.grad.clone() for n, p in gate.named_parameters()}
            optimizer.zero_grad()
            gate.loss(model(x), y).backward()
            same(found, {n: p.grad for n, p in gate.named_parameters()}, rtol=1e-4, atol=1e-6)
            optimizer.step()
            gate.step(optimizer)
            optimizer.zero_grad()
    torch._dynamo.reset()


def _replica(rank, folder, queue):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(3)
    model = ours().double()
    weights = {"kind": "blocks", "active_fraction": 0.5, "block_rows": 4, "change_every_steps": 2}
    gate = attach(model, {"weights": weights, "backward": {"unit": "sequence", "keep_fraction": 0.5}})
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    x, y = data()
    mine = slice(2 * rank, 2 * rank + 2)
    for _ in range(5):
        gate.loss(parallel(x[mine]), y[mine]).backward()
        optimizer.step()
        optimizer.zero_grad()
        gate.step(optimizer)
    queue.put((rank, {n: p.detach().numpy() for n, p in model.named_parameters()}))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a fork of a test worker would wait at its exit for threads that only its parent has


def test_two_processes_equal_one_that_sees_both_batches(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_replica, args=(rank, tmp_path, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    torch.manual_seed(3)
    model = ours().double()
    weights = {"kind": "blocks", "active_fraction": 0.5, "block_rows": 4, "change_every_steps": 2}
    gate = attach(model, {"weights": weights, "backward": {"unit": "sequence", "keep_fraction": 0.5}})
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    x, y = data()
    for _ in range(5):
        for half in (slice(0, 2), slice(2, 4)):
            (gate.loss(model(x[half]), y[half]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        gate.step(optimizer)
    for name, p in model.named_parameters():
        for rank in range(2):
            torch.testing.assert_close(torch.from_numpy(found[rank][name]), p.detach(), rtol=1e-9, atol=1e-12)


# sequences before the forward


def test_filter_gives_fixed_batches_of_the_surprising():
    gate = attach(ours(), {"before": {"signal": "ngram", "keep_fraction": 0.5, "pool": 16}})
    batches = list(gate.filter(loader()))
    assert [len(b["input_ids"]) for b in batches] == [8] * 4
    numbers = torch.cat([b["number"] for b in batches])
    rows = torch.cat([b["input_ids"] for b in loader()])
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), rows[numbers])  # entries stay together
    assert len(numbers.unique()) == 32
    assert (numbers[8:] % 2 == 1).float().mean() > 0.9  # after the first pool repeats are known
    assert (gate.report()["kept"], gate.report()["offered"]) == (32, 64)


def test_filter_takes_tensors_and_tuples_and_goes_on_after_a_resume():
    cfg = {"before": {"signal": "ngram", "keep_fraction": 0.5, "pool": 24, "replay": 0.25}, "seed": 5}
    whole = [b.clone() for b in attach(ours(), cfg).filter(b["input_ids"] for b in loader(128))]
    assert all(isinstance(b, torch.Tensor) for b in whole)
    gate = attach(ours(), cfg)
    source = (b["input_ids"] for b in loader(128))
    stream = gate.filter(source)
    first = [next(stream) for _ in range(3)]
    state = copy.deepcopy(gate.state_dict())
    again = attach(ours(), cfg)
    again.load_state_dict(state)
    rest = list(again.filter(source))
    assert all(torch.equal(a, b) for a, b in zip(whole, [*first, *rest], strict=True))
    pairs = attach(ours(), cfg).filter((b["input_ids"][:, :-1], b["number"]) for b in loader(128))
    assert all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs)


def test_a_loop_in_ten_lines_learns_and_resumes():
    def run(steps, state=None):
        torch.manual_seed(0)
        model = ours()
        gate = attach(model, cfg)
        if state is not None:
            model.load_state_dict(state[0])
            gate.load_state_dict(state[1])
        optimizer = torch.optim.SGD(gate.parameters(), lr=0.3)
        losses = []
        for _ in range(steps):
            x, y = data()
            loss = gate.loss(model(x), y)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            gate.step(optimizer)
        return losses, (copy.deepcopy(model.state_dict()), copy.deepcopy(gate.state_dict()))

    cfg = {
        "backward": {"unit": "token", "keep_fraction": 0.5, "policy": "uniform"},
        "weights": {"kind": "blocks", "active_fraction": 0.5, "block_rows": 4, "policy": "random", "change_every_steps": 3},
    }
    whole, end = run(10)
    first, middle = run(4)
    second, resumed = run(6, middle)
    assert first + second == whole
    assert all(torch.equal(end[0][n], resumed[0][n]) for n in end[0])
    assert whole[-1] < whole[0]


# of the user's own


@register_signal("late")
class Late(Signal):
    needs = "forward"

    def __init__(self, context, slope=1.0):
        super().__init__(context)
        self.slope = slope

    def read(self, view, batch):
        return torch.arange(view.loss_BT.shape[1]).expand_as(view.loss_BT) * self.slope


@register_signal("peeks")
class Peeks(Signal):
    needs = "forward"

    def read(self, view, batch):
        return batch.tokens[:, :-1].float()


@register_policy("half_again")
def half_again(score, keep_fraction, generator, progress):
    return uniform(tuple(score.shape), keep_fraction / 2, generator)


@register_subset_policy("last_places")
def last_places(question):
    return list(range(question.count - question.wanted, question.count))


def test_own_signal_and_rule_by_name():
    torch.manual_seed(3)
    model = ours().double()
    x, y = data()
    back = {"unit": "token", "keep_fraction": 0.25, "signal": "late", "signal_options": {"slope": 2.0}}
    cfg = {"backward": back, "weights": {"kind": "blocks", "active_fraction": 0.25, "policy": "last_places"}}
    gate = attach(model, cfg)
    assert gate.turns.strips.layers["blocks.1.mlp.fc1.weight"][0].strips[0].start == 48
    torch.testing.assert_close(gate.loss(model(x), y), token_losses(model, x, y)[:, -3:].mean())
    gate.detach()
    gate = attach(model, {"backward": {**back, "signal": "peeks", "signal_options": {}}})
    expected = token_losses(model, x, y).gather(1, x.topk(3, dim=1).indices).mean()
    with pytest.raises(SignalError, match="tokens=inputs"):
        gate.loss(model(x), y)
    if x.topk(4, dim=1).values[:, 2:].diff(dim=1).ne(0).all():  # no tie at the edge
        torch.testing.assert_close(gate.loss(model(x), y, tokens=x), expected)
