"""What is counted, against torch's own counter and against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparse_update.library.attach import attach
from sparse_update.own.counting import Count, Counting, Product, flops_of
from tests.sparse_update.library.models import MODELS, data, logits_of
from tests.sparse_update.own.tasks import Mixed, Recurrent, mlp, rows

GATES = {
    "dense": None,
    "token": {"backward": {"unit": "token", "keep_fraction": 0.5}},
    "sequence": {"backward": {"unit": "sequence", "keep_fraction": 0.5}},
    "blocks": {"weights": {"kind": "blocks", "active_fraction": 0.25, "block_rows": 4}},
}


def counted(model, gate, x, y):
    """(work by part, torch's count) of a step, without its optimizer."""
    counting = Counting([*model.parameters(), *(gate.parameters() if gate else [])])
    with FlopCounterMode(display=False) as torchs:
        with counting.part("forward"):
            logits = logits_of(model, x)
        with counting.part("loss"):
            loss = gate.loss(logits, y) if gate else nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        with counting.part("backward"):
            loss.backward()
    return counting.work, torchs.get_total_flops()


@pytest.mark.parametrize("name", ["ours", "tied", "gpt2", "llama", "encoder"])
@pytest.mark.parametrize("gate", GATES)
def test_products_are_those_that_torch_counts(name, gate):
    model = MODELS[name]()
    config = GATES[gate]
    x, y = data()
    with sdpa_kernel(SDPBackend.MATH):  # torch's counter has no formula for a CPU's fused one, which is checked below
        work, expected = counted(model, None if config is None else attach(model, config), x, y)
    assert flops_of(work) == expected > 0


def test_recurrent_cells_are_counted_as_their_products():
    x = rows(8)
    work, expected = counted(Recurrent(), None, x[:, :-1], x[:, 1:])
    assert flops_of(work) == expected
    lstm, sizes = nn.LSTM(6, 10, batch_first=True), (4, 7)
    counting = Counting(lstm.parameters())
    with counting.part("forward"):
        out = lstm(torch.randn(*sizes, 6))[0].sum()
    steps = sizes[0] * sizes[1] * 2 * 4 * 10 * (6 + 10)
    assert counting.work["forward"].flops == steps
    with counting.part("backward"):
        out.backward()
    assert flops_of(counting.work) == 3 * steps


def test_fused_attention_is_two_products_and_five_in_the_backward():
    q = torch.randn(2, 3, 12, 8, requires_grad=True)
    counting = Counting([])
    with counting.part("forward"):
        out = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum()
    with counting.part("backward"):
        out.backward()
    one = 2 * 6 * 12 * 12 * 8
    assert counting.work["forward"].flops == 2 * one
    assert counting.work["backward_dx"].flops == 5 * one


def test_convolutions():
    net = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 2, 4, stride=2))
    counting = Counting(net.parameters())
    x = torch.randn(3, 4, 11, requires_grad=True)
    with FlopCounterMode(display=False) as torchs:
        with counting.part("forward"):
            y = net(x).sum()
        with counting.part("backward"):
            y.backward()
    assert flops_of(counting.work) == torchs.get_total_flops()
    assert counting.work["backward_dw"].flops == counting.work["backward_dx"].flops == counting.work["forward"].flops


def test_a_convolution_in_groups_multiplies_within_them():
    """By hand: torch's counter takes the weight's gradient for one over all channels."""
    net, x = nn.Conv1d(4, 6, 3, groups=2), torch.randn(3, 4, 11)
    counting = Counting(net.parameters())
    with counting.part("forward"):
        y = net(x).sum()
    with counting.part("backward"):
        y.backward()
    once = 2 * 3 * 9 * 6 * 2 * 3  # windows, places, outputs, inputs of a group, width
    assert counting.work["forward"].flops == counting.work["backward_dw"].flops == once
    assert counting.work["backward_dx"].flops == 0


@pytest.mark.parametrize(("fraction", "below"), [(0.5, "compact"), (0.25, "compact"), (0.5, "exact")])
def test_a_gated_layer_multiplies_kept_rows_alone(fraction, below):
    """Three gated layers: forward 2 N I O; what is left of dX and dW is the kept rows' share, to the operation."""
    model, x = mlp(), rows(8)
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": fraction, "below": below}})
    if below == "exact":
        gate.probe(x[:, :-1])
    counted(model, gate, x[:, :-1], x[:, 1:])  # the first backward is looked at twice
    work, _ = counted(model, gate, x[:, :-1], x[:, 1:])
    n = x[:, 1:].numel()
    sizes = [layer.weight.numel() for layer in model if isinstance(layer, nn.Linear)]
    assert work["forward"].flops == 2 * n * sum(sizes)
    kept = round(fraction * x[:, 1:].shape[1]) * len(x)
    assert work["backward_dw"].flops == 2 * kept * sum(sizes)
    assert work["backward_dx"].flops == 2 * kept * sum(sizes)


def test_a_resting_weight_forms_no_gradient():
    model, x = mlp(), rows(8)
    gate = attach(model, {"weights": {"kind": "blocks", "active_fraction": 0.25, "block_rows": 4}})
    work, _ = counted(model, gate, x[:, :-1], x[:, 1:])
    strips = [p for name, p in gate.named_parameters() if p.dim() == 2 and not name.startswith("0.")]
    assert work["backward_dw"].flops == 2 * x[:, 1:].numel() * sum(p.numel() for p in strips)
    assert sum(p.numel() for p in strips) < sum(m.weight.numel() for m in model if isinstance(m, nn.Linear))


def test_counting_changes_no_bit():
    x, losses = rows(8), []
    for on in (False, True):
        torch.manual_seed(3)
        model = Mixed()
        counting = Counting(model.parameters())
        if on:
            with counting.part("forward"):
                logits = model(x[:, :-1])
        else:
            logits = model(x[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        losses.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


def test_views_move_nothing_and_an_operation_in_place_moves_its_tensor_twice_at_most():
    counting, x = Counting([]), torch.ones(10, 10)
    with counting.part("forward"):
        x.view(100)[3:].detach().unsqueeze(0).t()
    assert counting.work["forward"].moved_bytes == 0
    with counting.part("optimizer"):
        x.mul_(2)
    assert counting.work["optimizer"].moved_bytes == 400
    assert counting.work["optimizer"].operations == 1


def test_a_count_is_kept_as_plain_values():
    x = rows(8)
    work, _ = counted(mlp(), None, x[:, :-1], x[:, 1:])
    for count in work.values():
        assert Count.from_json(count.to_json()) == count
    with pytest.raises(ValueError):
        Product.read("2x3")
