"""What people do to a model and its loop beside training it, under a gate: each against a gradient formed without one.

The model is a chain, so a gate that keeps the half of each sequence with the highest losses has the gradient of the mean
cross-entropy over these tokens: nothing of this package is needed to form it.
"""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_update import attach
from sparse_update.library.tracking.rows import GateError
from tests.sparse_update.library.chain import HALF, STRIPS, T, V, by_hand, data, gated, grads, make, plus, same

# copies, pickles, exports


def test_a_pickled_gated_model_is_plain_and_computes_with_its_own_weights():
    model, gate = gated()
    gate.loss(model(data()[0]), data()[1])
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [type(m) for m in loaded] == [type(m) for m in make()]
    assert all("_spikegate_layer" not in vars(m) for m in loaded)
    with torch.no_grad():
        model[1].weight.zero_()
    assert torch.equal(loaded(data()[0]), make()(data()[0]))


def test_a_copy_may_have_a_gate_of_its_own():
    model, _ = gated()
    other = copy.deepcopy(model)
    gate = attach(other, HALF)
    x, y = data()
    gate.loss(other(x), y).backward()
    same(grads(other), by_hand(x, y))
    assert not grads(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_export_and_trace_see_the_plain_computation():
    x, _ = data()
    model, _ = gated()
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x))
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_tools_that_exchange_layers_by_their_exact_class_find_them_in_a_copy():
    model, _ = gated()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert [type(m).__module__.split(".")[-1] for m in quantized] == ["sparse", "linear", "activation", "linear"]
    assert "quantized" in type(quantized[1]).__module__


def test_after_detach_classes_are_as_before_and_a_new_gate_works():
    model, gate = gated()
    gate.detach()
    assert [type(m) for m in model] == [type(m) for m in make()]
    gate = attach(model, HALF)
    x, y = data()
    gate.loss(model(x), y).backward()
    same(grads(model), by_hand(x, y))


# parameters that are computed, put in, cast, replaced


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_parametrisation_may_be_put_on_and_taken_off_under_a_gate(when):
    model = make()
    if when == "before":
        nn.utils.parametrizations.weight_norm(model[1])
    gate = attach(model, HALF)
    if when == "after":
        nn.utils.parametrizations.weight_norm(model[1])
    x, y = data()
    gate.loss(model(x), y).backward()
    by_parts = by_hand(x, y, model=(lambda m: (nn.utils.parametrizations.weight_norm(m[1]), m)[1])(make()))
    same(grads(model), by_parts)
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    model.zero_grad()
    gate.loss(model(x), y).backward()
    same(grads(model), by_hand(x, y), 1e-5)
    gate.detach()
    assert type(model[1]) is nn.Linear


def test_parameters_put_in_by_assign_are_the_gates_own():
    model, gate = gated()
    model.load_state_dict(make(5).state_dict(), assign=True)
    assert [id(p) for p in gate.parameters()] == [id(p) for p in model.parameters()]
    x, y = data()
    gate.loss(model(x), y).backward()
    same(grads(model), by_hand(x, y, seed=5))


def test_a_model_built_without_memory_is_filled_under_its_gate():
    with torch.device("meta"):
        model = make()
    gate = attach(model, HALF)
    model.to_empty(device="cpu").load_state_dict(make().state_dict())
    x, y = data()
    gate.loss(model(x), y).backward()
    same(grads(model), by_hand(x, y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_is_cast_under_its_gate(dtype):
    model, gate = gated()
    model.to(dtype)
    x, y = data()
    gate.loss(model(x), y).backward()
    same(grads(model), by_hand(x, y, model=make().to(dtype)), 1e-12 if dtype == torch.float64 else 2e-2)


def test_float64_parts_stay_float64_under_autocast():
    x, y = data()
    model, plain = make().double(), make().double()
    gate = attach(model, HALF)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        assert torch.equal(logits, plain(x))
    gate.loss(logits, y).backward()
    same(grads(model), by_hand(x, y, model=plain), 1e-12)


def test_strips_of_moved_weights_are_refused_and_copies_train_their_biases():
    model, gate = gated(config=STRIPS)
    twin = copy.deepcopy(model)
    model.double()
    with pytest.raises(GateError, match=r"1\.weight was moved or cast after attach"):
        gate.loss(model(data()[0]), data()[1])
    F.cross_entropy(twin(data()[0]).flatten(0, 1), data()[1].flatten()).backward()
    assert twin[1].bias.grad is not None


def test_frozen_layers_may_be_freed_later():
    x, y = data()
    model = make()
    model[1].requires_grad_(False)
    gate = attach(model, HALF)
    gate.loss(model(x), y).backward()
    assert model[1].weight.grad is None
    model.zero_grad()
    model[1].requires_grad_(True)
    gate.loss(model(x), y).backward()
    same(grads(model), by_hand(x, y))


def test_a_layer_that_was_exchanged_is_named_and_plain():
    model, gate = gated()
    model[3] = nn.Linear(16, V)
    x, y = data()
    gate.loss(model(x), y).backward()
    assert gate.report()["gated"] == ["1"]
    assert gate.report()["gone"] == ["3"]
    plain = make()
    plain[3] = copy.deepcopy(model[3])
    same(grads(model), by_hand(x, y, model=plain))


# forwards and backwards in other orders


def test_two_forwards_then_two_backwards():
    model, gate = gated()
    (x, y), (u, v) = data(), data(seed=2)
    outs = [model(x), model(u)]
    losses = [gate.loss(outs[0], y), gate.loss(outs[1], v)]
    for loss in losses:
        loss.backward()
    same(grads(model), plus(by_hand(x, y), by_hand(u, v)))
    assert gate.report()["rows_not_found"] == []


def test_one_backward_twice():
    model, gate = gated()
    x, y = data()
    loss = gate.loss(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    half = by_hand(x, y)
    same(grads(model), plus(half, half))


def test_two_gates_in_one_backward():
    model = nn.ModuleDict({"a": make(0), "b": make(1)})
    one, two = attach(model["a"], HALF), attach(model["b"], HALF)
    x, y = data()
    (one.loss(model["a"](x), y) + two.loss(model["b"](x), y)).backward()
    same(grads(model["a"]), by_hand(x, y))
    same(grads(model["b"]), by_hand(x, y, seed=1))


def test_an_error_in_a_backward_leaves_nothing_behind():
    model, gate = gated()
    x, y = data()
    with pytest.raises(GateError, match="two gated losses"):
        (gate.loss(model(x), y) + gate.loss(model(x), y)).backward()
    model.zero_grad()
    gate.loss(model(x), y).backward()
    same(grads(model), by_hand(x, y))


def test_an_evaluation_between_forward_and_backward():
    model, gate = gated()
    x, y = data()
    loss = gate.loss(model(x), y)
    with torch.no_grad():
        value = gate.loss(model.eval()(x), y)
    assert torch.allclose(value, F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
    loss.backward()
    same(grads(model), by_hand(x, y))


def test_inference_mode_before_training_and_a_backward_in_another_thread():
    model, gate = gated()
    x, y = data()
    with torch.inference_mode():
        model(x)
    worker = threading.Thread(target=lambda: gate.loss(model(x), y).backward())
    worker.start()
    worker.join()
    same(grads(model), by_hand(x, y))


@pytest.mark.parametrize("kind", ["anomaly", "on_cpu", "selective", "reentrant"])
def test_saved_tensors_may_be_watched_moved_or_formed_again(kind):
    from torch.utils import checkpoint as ckpt

    x, y = data()
    model, gate = gated()
    body = nn.Sequential(*model[1:3])

    def forward():
        if kind == "selective":
            policy = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
            contexts = lambda: ckpt.create_selective_checkpoint_contexts(policy)  # noqa: E731
            return model[3](ckpt.checkpoint(body, model[0](x), use_reentrant=False, context_fn=contexts))
        if kind == "reentrant":
            return model[3](ckpt.checkpoint(body, model[0](x), use_reentrant=True))
        return model(x)

    around = {"anomaly": torch.autograd.set_detect_anomaly(True), "on_cpu": torch.autograd.graph.save_on_cpu()}
    for _ in range(2):
        model.zero_grad()
        if kind in around:
            with around[kind]:
                gate.loss(forward(), y).backward()
        else:
            gate.loss(forward(), y).backward()
        same(grads(model), by_hand(x, y))
    torch.autograd.set_detect_anomaly(False)


def test_per_sample_gradients_and_functional_gradients_are_of_all_rows():
    model, _ = gated()
    x, y = data()
    own = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p, xi, yi):
        return F.cross_entropy(torch.func.functional_call(model, p, (xi[None],)).flatten(0, 1), yi)

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(own, x, y)
    plain = make()
    F.cross_entropy(plain(x).flatten(0, 1), y.flatten()).backward()
    same({n: g.mean(0) for n, g in each.items()}, grads(plain))


def test_a_gradient_of_a_gradient_is_refused_in_words():
    model, gate = gated()
    with pytest.raises(GateError, match="create_graph=True"):
        torch.autograd.grad(gate.loss(model(data()[0]), data()[1]), list(model.parameters()), create_graph=True)


def test_hooks_of_the_user_run_once():
    model, seen = make(), []
    model[1].register_forward_hook(lambda *a: seen.append("forward"))
    model[1].register_full_backward_hook(lambda *a: seen.append("backward"))
    gate = attach(model, HALF)
    for _ in range(2):
        gate.loss(model(data()[0]), data()[1]).backward()
    assert seen == ["forward", "backward"] * 2


def test_an_optimizer_inside_of_the_backward_steps_once_for_each_parameter():
    model, gate = gated()
    x, y = data()
    steps = []

    def step(p):
        steps.append(p)
        with torch.no_grad():
            p -= 0.1 * p.grad
        p.grad = None

    for p in gate.parameters():
        p.register_post_accumulate_grad_hook(step)
    gate.loss(model(x), y).backward()
    assert len(steps) == 5
    moved = {n: (p0 - p).detach() / 0.1 for (n, p), p0 in zip(model.named_parameters(), make().parameters(), strict=True)}
    same(moved, by_hand(x, y), 1e-5)


# batches of other sizes


def test_lengths_and_sizes_change():
    model, gate = gated()
    for batch, length in ((4, 6), (4, 4), (2, 6), (1, 6), (6, 6), (6, 4)):
        x, y = data(batch, length)
        model.zero_grad()
        gate.loss(model(x), y).backward()
        same(grads(model), by_hand(x, y))
    assert gate.report()["rows_not_found"] == []


def test_a_last_smaller_batch_keeps_one_sequence_and_a_first_one_is_refused():
    x, y = data()
    config = {"backward": {"unit": "sequence", "keep_fraction": 0.25, "policy": "top"}}
    model, gate = gated(config=config)
    gate.loss(model(x), y).backward()
    model.zero_grad()
    gate.loss(model(x[:2]), y[:2]).backward()
    plain = make()
    losses = F.cross_entropy(plain(x[:2]).flatten(0, 1), y[:2].flatten(), reduction="none").view(2, T)
    losses.mean(1).max().backward()
    same(grads(model), grads(plain))
    model, gate = gated(config=config)
    with pytest.raises(ValueError, match="less than one sequence"):
        gate.loss(model(x[:2]), y[:2])


def test_a_batch_without_labels_moves_nothing_and_nan_is_not_hidden():
    x, y = data()
    model, gate = gated()
    loss = gate.loss(model(x), torch.full_like(y, -100))
    loss.backward()
    assert loss.item() == 0
    assert all(not g.any() for g in grads(model).values())
    logits = torch.where((torch.arange(T) == 2)[None, :, None], torch.nan, model(x))
    assert gate.loss(logits, y).isnan()


def test_sequence_first_rows_seen_in_a_batch_of_one_are_looked_at_again():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make()

        def forward(self, x):
            rows = self.body[0](x).transpose(0, 1).flatten(0, 1)
            return self.body[3](self.body[2](self.body[1](rows))).view(*x.shape[::-1], V).transpose(0, 1)

    model = Turned()
    gate = attach(model, HALF)
    for batch in (1, 4, 4):
        x, y = data(batch)
        model.zero_grad()
        gate.loss(model(x), y).backward()
        same(grads(model.body), by_hand(x, y))
    assert [layer.layout.inner for layer in gate.found.layers] == ["batch", "batch"]
