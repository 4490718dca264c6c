"""What stands beside a gated loss: other losses of its backward, pickles of the model, embeddings, parts in float64."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_update.library.attach import attach
from sparse_update.library.linear import Layer
from sparse_update.library.tracking.rows import GateError
from tests.sparse_update.library.models import B, T, V, data, gradients, ours, same

TOKENS = {"backward": {"unit": "token", "keep_fraction": 0.5}}


class Routed(nn.Module):
    """A router whose logits have losses of their own: balance, and the size of their normaliser (z-loss)."""

    def __init__(self):
        super().__init__()
        self.embed, self.router, self.head = nn.Embedding(V, 16), nn.Linear(16, 3), nn.Linear(16, V)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        h = self.embed(x)
        scores = self.router(h)
        share = scores.softmax(-1)
        mixed = sum(share[..., i : i + 1] * expert(h) for i, expert in enumerate(self.experts))
        aux = 3 * share.flatten(0, 1).mean(0).square().sum() + 0.1 * scores.logsumexp(-1).square().mean()
        return self.head(h + mixed), aux


def test_a_routers_loss_in_the_same_backward_is_refused_by_the_layers_name():
    torch.manual_seed(0)
    model, (x, y) = Routed().double(), data()
    gate = attach(model, TOKENS)
    logits, aux = model(x)
    with pytest.raises(GateError, match=r"^router: another loss runs in the backward of gate\.loss.*others=other_loss"):
        (gate.loss(logits, y) + aux).backward()


def test_a_loss_given_as_others_has_its_whole_gradient():
    torch.manual_seed(0)
    model, (x, y) = Routed().double(), data()
    twin = copy.deepcopy(model)
    gate, other = attach(model, TOKENS), attach(twin, TOKENS)
    for _ in range(2):
        logits, aux = model(x)
        gate.loss(logits, y, others=aux).backward()
        logits, aux = twin(x)
        other.loss(logits, y).backward(retain_graph=True)
        gated = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in twin.named_parameters()}
        twin.zero_grad()
        other.detach()
        aux.backward()  # of all rows: the plain model's own
        expected = {n: gated[n] + (0 if p.grad is None else p.grad) for n, p in twin.named_parameters()}
        same(gradients(model), expected, rtol=1e-9, atol=1e-13)
        assert float(twin.router.weight.grad.abs().max()) > 0
        model.zero_grad()
        twin.zero_grad()
        other = attach(twin, TOKENS)


def test_one_layer_called_twice_is_not_taken_for_another_loss():
    torch.manual_seed(0)
    layer, head, embed = nn.Linear(16, 16).double(), nn.Linear(16, V).double(), nn.Embedding(V, 16).double()
    model = nn.Sequential(embed, layer, nn.Tanh(), layer, nn.Tanh(), layer, head)
    gate = attach(model, TOKENS)
    gate.loss(model(data()[0]), data()[1]).backward()
    assert gate.report()["rows_not_found"] == []


def test_a_gated_model_is_saved_as_the_plain_one():
    torch.manual_seed(0)
    model = ours()
    x, _ = data()
    plain = model(x).detach()
    attach(model, TOKENS | {"weights": {"kind": "blocks", "active_fraction": 0.5}})
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)  # written here, a line above
    assert [type(m) for m in loaded.modules()] == [type(m) for m in ours().modules()]
    assert not any(isinstance(v, Layer) for m in loaded.modules() for v in vars(m).values())
    assert torch.equal(loaded(x), plain)
    with torch.no_grad():
        loaded.head.weight.zero_()
    assert bool(model.head.weight.detach().any())  # its own weights
    assert b"sparse_update.library" not in file.getvalue()
    attach(loaded, TOKENS).loss(loaded(x), x).backward()
    twin = copy.deepcopy(model)  # and so is a copy
    assert torch.equal(twin(x), plain)


def test_a_sparse_embedding_is_left_and_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, 16, sparse=True), nn.Linear(16, 16), nn.Linear(16, V))
    gate = attach(model, TOKENS)
    x, y = data()
    gate.loss(model(x), y).backward()
    assert gate.report()["left"] == ["0"]
    assert model[0].weight.grad.is_sparse
    assert gate.report()["rows_not_found"] == []


class Precise(nn.Module):
    """A part in float64 in the middle of a float32 model."""

    def __init__(self):
        super().__init__()
        self.embed, self.wide, self.head = nn.Embedding(V, 16), nn.Linear(16, 16).double(), nn.Linear(16, V)

    def forward(self, x):
        self.seen = self.wide(self.embed(x).double())
        return self.head(self.seen.float())


def test_parts_in_float64_are_not_cast_by_autocast():
    torch.manual_seed(0)
    model, (x, y) = Precise(), data()
    plain = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain(x)
    gate = attach(model, TOKENS)
    for _ in range(2):  # watched, and not watched any more
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = gate.loss(model(x), y)
        loss.backward()
        assert model.seen.dtype == plain.seen.dtype == torch.float64
        assert torch.equal(model.seen, plain.seen)
        assert model.wide.weight.grad.dtype == torch.float64
    assert gate.report()["rows_not_found"] == []


def test_a_flat_loss_is_followed_on_batches_of_other_sizes():
    """Logits (B T, V) count all tokens in one sequence; the layers count them in B."""
    torch.manual_seed(0)
    model = ours().double()
    gate = attach(model, TOKENS)
    for batch, length in ((1, T), (B, T), (B, T), (2, 8)):
        x = torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(batch))
        gate.loss(model(x).reshape(-1, V), x.flatten()).backward()
    missed = [layer.dense_calls for layer in gate.found.layers]
    x = torch.randint(0, V, (3, 6), generator=torch.Generator().manual_seed(9))
    model.zero_grad()
    losses = F.cross_entropy(model(x).reshape(-1, V), x.flatten(), reduction="none")
    keep = torch.zeros(18, dtype=torch.bool).scatter_(0, losses.topk(9).indices, True).view(3, 6)
    gate.loss(model(x).reshape(-1, V), x.flatten()).backward()
    assert [layer.dense_calls for layer in gate.found.layers] == missed
    reference = copy.deepcopy(model)
    reference.zero_grad()
    for module in reference.modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda m, a, out: torch.where(keep[..., None], out, out.detach()))
    (F.cross_entropy(reference(x).reshape(-1, V), x.flatten(), reduction="none")[keep.flatten()]).mean().backward()
    same(gradients(model), gradients(reference), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_losses_after_several_forwards_of_other_sizes(unit):
    """Two forwards, then their losses, the first one with fewer sequences: as each one by itself."""
    torch.manual_seed(0)
    model = ours().double()
    cfg = {"backward": {"unit": unit, "keep_fraction": 0.5, "policy": "top"}}
    parts = [torch.randint(0, V, (batch, T), generator=torch.Generator().manual_seed(batch)) for batch in (2, 4)]
    alone = []
    for x in parts:
        gate = attach(model, cfg)
        gate.loss(model(x), x).backward()
        alone.append(gradients(model))
        assert gate.report()["rows_not_found"] == []
        model.zero_grad()
        gate.detach()
    for order in ((0, 1), (1, 0)):
        gate = attach(model, cfg)
        logits = [model(x) for x in parts]
        for at in order:
            gate.loss(logits[at], parts[at]).backward()
            same(gradients(model), alone[at], rtol=1e-9, atol=1e-13)
            model.zero_grad()
        assert gate.report()["rows_not_found"] == []
        assert 0.5 < gate.report()["reach"] < 2 / 3
        gate.detach()


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of itself
def test_the_reach_of_a_compiled_model_is_that_of_the_plain_one():
    """The compiled call stands for the forward ahead of it, and branches that no gradient comes back from are left out."""

    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.unread = ours(), nn.Linear(V, V)

        def forward(self, x):
            logits = self.body(x)
            return logits, self.unread(logits).detach()

    x, y = data()
    reached = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Aside()
        gate = attach(model, TOKENS)
        run = torch.compile(model, backend="eager") if compiled else model
        for _ in range(2):
            gate.loss(run(x)[0], y).backward()
        reached.append(gate.report()["reach"])
        gate.detach()
    alone = ours()
    gate = attach(alone, TOKENS)
    gate.loss(alone(x), y).backward()
    forward = 2 * B * T * V * V  # of the layer that is not read: its forward is all that it costs
    share = gate.report()["reach"]
    products = share * gate.row_loss.step_flops
    assert reached[0] == reached[1] == pytest.approx(products / (gate.row_loss.step_flops + forward))
