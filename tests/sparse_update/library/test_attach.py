"""The gate on any module, against torch's autograd on the plain model, torch's FLOP counter, and counted bytes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sparse_update.gates.policies import register_policy, uniform
from sparse_update.library.attach import AttachConfig, attach
from sparse_update.library.linear import GateError
from sparse_update.signals import Signal, SignalError, register_signal
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.subset import register_subset_policy

B, T, V = 4, 12, 41
CHOICES = [("blocks", "rotate", 1), ("block_columns", "rotate", 1), ("blocks", "random", 2), ("blocks", "energy", 1)]


class Encoder(nn.Module):
    """torch's own Transformer, both layouts."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(V, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, V)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=self.head.weight.dtype)
        h = self.embed(x)
        h = h if self.batch_first else h.transpose(0, 1)
        h = self.body(h, mask=mask, is_causal=True)
        return self.head(h if self.batch_first else h.transpose(0, 1))


def ours(tie=False):
    model = Transformer(
        ModelConfig(width=16, layers=2, heads=2, context=T, vocab_size=V, attention="explicit", tie_embeddings=tie)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def gpt2(attention="eager"):
    transformers = pytest.importorskip("transformers", reason="needs the extra hub (transformers)")
    cfg = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=V, n_positions=T, bos_token_id=0, eos_token_id=0
    )
    cfg.attn_pdrop = cfg.embd_pdrop = cfg.resid_pdrop = 0.0
    cfg._attn_implementation = attention
    return transformers.GPT2LMHeadModel(cfg)


def llama():
    transformers = pytest.importorskip("transformers", reason="needs the extra hub (transformers)")
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=V,
            max_position_embeddings=T,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    )


MODELS = {
    "ours": ours,
    "tied": lambda: ours(tie=True),
    "gpt2": gpt2,
    "llama": llama,
    "encoder": Encoder,
    "encoder_TB": lambda: Encoder(False),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(3)
    return MODELS[request.param]().double().train()


def data():
    tokens = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1], tokens[:, 1:]


def logits_of(model, x):
    out = model(x)
    return getattr(out, "logits", out)


def token_losses(model, x, y):
    return F.cross_entropy(logits_of(model, x).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found, expected, **how):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda m, n=name: f"{n}: {m}", **how)


def cut(model, keep_BT):
    """Hooks on a plain model: the output of every product and embedding is a constant at rows that are not kept."""

    def hook(module, args, out):
        lead = out.shape[:-1]
        if lead[:2] == (B, T):
            keep = keep_BT
        elif lead[:2] == (T, B):
            keep = keep_BT.t()
        elif lead == (B * T,):
            keep = keep_BT.flatten()
        else:
            return out
        return torch.where(keep[..., None], out, out.detach())

    kinds = ("Linear", "Embedding", "Conv1D")
    for module in model.modules():
        if type(module).__name__ in kinds:
            module.register_forward_hook(hook)


def top_rows(loss_BT, kept):
    keep = torch.zeros(loss_BT.shape, dtype=torch.bool)
    return keep.scatter_(1, loss_BT.detach().topk(kept, dim=1).indices, True)


# everything kept, and detached again


def test_all_kept_equals_autograd_and_detach_restores(model):
    x, y = data()
    plain = logits_of(model, x).detach().clone()
    token_losses(model, x, y).mean().backward()
    expected = gradients(model)
    model.zero_grad()
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    gate = attach(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(logits_of(model, x).detach(), plain, rtol=0, atol=0)
    gate.loss(logits_of(model, x), y).backward()
    same(gradients(model), expected, rtol=1e-10, atol=1e-13)
    model.zero_grad()
    gate.loss(token_losses(model, x, y)).backward()
    same(gradients(model), expected, rtol=1e-10, atol=1e-13)
    assert gate.detach() is model
    assert [type(m) for m in model.modules()] == kinds
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(logits_of(model, x), plain)
    with pytest.raises(GateError, match="detached"):
        gate.loss(logits_of(model, x), y)


def test_updates_stay_after_detach():
    torch.manual_seed(0)
    model = ours()
    flags = {n: n != "blocks.0.mlp.fc1.weight" for n, _ in model.named_parameters()}
    model.blocks[0].mlp.fc1.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    x, y = data()
    gate = attach(model, {"weights": {"kind": "blocks", "active_fraction": 0.5, "block_rows": 4}})
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    gate.loss(model(x), y).backward()
    optimizer.step()
    gate.detach()
    after = model.state_dict()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    changed = (after["blocks.1.mlp.fc1.weight"] != before["blocks.1.mlp.fc1.weight"]).any(1)
    assert changed.tolist() == [True] * 32 + [False] * 32
    assert torch.equal(after["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])


# token rows


def test_kept_rows_equal_autograd_with_the_others_detached(model):
    if isinstance(model, Encoder):
        pytest.skip("torch's attention calls no Linear module that a hook could cut; see the test of the encoder below")
    x, y = data()
    keep = top_rows(token_losses(model, x, y), 6)
    reference = copy.deepcopy(model)
    cut(reference, keep)
    (token_losses(reference, x, y) * keep).sum().div(B * 6).backward()
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5}})
    gate.loss(logits_of(model, x), y).backward()
    same(gradients(model), gradients(reference), rtol=1e-9, atol=1e-13)
    # rows of one backward do not reach into the next
    model.zero_grad()
    reference = copy.deepcopy(gate.detach())
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5}})
    gate.loss(logits_of(model, x), y).backward()
    model.zero_grad()
    token_losses(model, x, y).mean().backward()
    token_losses(reference, x, y).mean().backward()
    same(gradients(model), gradients(reference), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_encoder_drops_rows_of_its_joint_projection(batch_first):
    torch.manual_seed(3)
    model = Encoder(batch_first).double()
    x, y = data()
    keep = top_rows(token_losses(model, x, y), 6)
    reference = copy.deepcopy(model)
    cut(reference, keep)

    def project(q, k, v, w, b=None):
        out = plain_projection(q, k, v, w, b)
        return [torch.where(keep.t()[..., None], part, part.detach()).contiguous() for part in out]

    plain_projection = F._in_projection_packed
    plain_linear = F.linear

    def linear(y_, w, b=None):
        out = plain_linear(y_, w, b)
        if out.shape[0] == B * T and w.shape == (16, 16):  # the output projection, on (T B, D)
            return torch.where(keep.t().flatten()[..., None], out, out.detach())
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "_in_projection_packed", project)
        patch.setattr(F, "linear", linear)
        (token_losses(reference, x, y) * keep).sum().div(B * 6).backward()
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5}})
    gate.loss(model(x), y).backward()
    same(gradients(model), gradients(reference), rtol=1e-9, atol=1e-13)


def test_exact_rows_equal_the_masked_loss(model):
    x, y = data()
    losses = token_losses(model, x, y)
    keep = top_rows(losses, 6)
    (losses * keep).sum().div(B * 6).backward()
    expected = gradients(model)
    model.zero_grad()
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5, "below": "exact"}})
    for _ in range(2):
        model.zero_grad()
        gate.loss(logits_of(model, x), y).backward()
        same(gradients(model), expected, rtol=1e-9, atol=1e-13)
    assert any("head" in name for name in gate.exact_layers())
    assert not any(
        name.split(".")[-1] in ("k", "v", "k_proj", "v_proj", "c_attn", "in_proj") for name in gate.exact_layers()
    )


def test_exact_layers_are_found_through_zero_weights():
    """Residual outputs that start at zero hide dependence from values, not from the probe."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(width=16, layers=3, heads=2, context=T, vocab_size=V))
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5, "below": "exact"}})
    assert gate.probe(data()[0]) == ["blocks.2.attn.q", "blocks.2.attn.o", "blocks.2.mlp.fc1", "blocks.2.mlp.fc2", "head"]
    assert all(p.grad is None for p in model.parameters())


def test_whole_sequences_equal_the_plain_loss_on_them(model):
    x, y = data()
    with torch.no_grad():
        chosen = token_losses(model, x, y).mean(1).topk(2).indices
    token_losses(model, x[chosen], y[chosen]).mean().backward()
    expected = gradients(model)
    model.zero_grad()
    gate = attach(model, {"backward": {"unit": "sequence", "keep_fraction": 0.5}})
    gate.loss(logits_of(model, x), y).backward()
    same(gradients(model), expected, rtol=1e-9, atol=1e-13)


def test_labels_of_transformers_are_shifted_and_ignored_ones_are_chosen_last():
    torch.manual_seed(3)
    model = ours().double()
    x, _ = data()
    labels = x.clone()
    labels[0, 3:] = -100
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5}})
    with torch.no_grad():
        plain = F.cross_entropy(model(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(gate.loss(model(x), labels, shift=True), plain)
    losses = F.cross_entropy(model(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(B, T - 1)
    kept = [losses[0, :2], *(row.topk(6).values for row in losses[1:])]
    torch.testing.assert_close(gate.loss(model(x), labels, shift=True), torch.cat(kept).mean())


# FLOPs and bytes


def flops(model, gate, x, y):
    with FlopCounterMode(display=False) as counter:
        gate.loss(logits_of(model, x), y).backward()
    model.zero_grad()
    return counter.get_total_flops(), counter.get_flop_counts()["Global"]


def linear_flops(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits_of(model, x)
    found = counter.get_flop_counts()["Global"]
    return sum(n for op, n in found.items() if str(op) in ("aten.mm", "aten.addmm"))


def test_counted_flops_fall_with_the_rows(model):
    x, y = data()
    forward = linear_flops(model, x)
    gate = attach(model)
    dense, _ = flops(model, gate, x, y)
    gate.detach()
    for unit in ("token", "sequence"):
        gate = attach(model, {"backward": {"unit": unit, "keep_fraction": 0.25}})
        gated, _ = flops(model, gate, x, y)
        # both products of every layer shrink to a quarter of their rows, attention's stay
        assert dense - gated == 2 * forward * 3 // 4
        assert gate.report()["rows_not_found"] == []
        gate.detach()


def test_strips_save_flops_gradient_and_optimizer_bytes(model):
    x, y = data()

    def spent(gate):
        optimizer = torch.optim.AdamW(gate.parameters())
        total, _ = flops_kept(gate)
        held = {id(p.grad): p.grad.nbytes for p in [*model.parameters(), *gate.parameters()] if p.grad is not None}
        optimizer.step()
        state = [v.nbytes for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]
        return total, sum(held.values()), sum(state)

    def flops_kept(gate):
        with FlopCounterMode(display=False) as counter:
            gate.loss(logits_of(model, x), y).backward()
        return counter.get_total_flops(), None

    dense = spent(gate := attach(model))
    gate.detach()
    model.zero_grad()
    gate = attach(model, {"weights": {"kind": "blocks", "active_fraction": 0.25, "block_rows": 4}})
    strips = gate.strips.leaves
    inactive = sum(gate.names[n].numel() - leaf.numel() for (n, _), leaf in strips.items())
    sparse = spent(gate)
    assert len(strips) >= 4
    assert dense[0] - sparse[0] == 2 * B * T * inactive
    assert dense[1] - sparse[1] == 8 * inactive
    assert dense[2] - sparse[2] == 2 * 8 * inactive


@pytest.mark.parametrize(("kind", "policy", "strips"), CHOICES)
def test_strip_gradients_are_slices_of_the_dense_ones(model, kind, policy, strips):
    x, y = data()
    token_losses(model, x, y).mean().backward()
    expected = gradients(model)
    model.zero_grad()
    cfg = {
        "kind": kind,
        "active_fraction": 0.5,
        "block_rows": 4,
        "policy": policy,
        "strips": strips,
        "change_every_steps": 1,
    }
    gate = attach(model, {"weights": cfg})
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.0)
    reached = {name: torch.zeros(gate.names[name].shape, dtype=torch.bool) for name in gate.strips.layers}
    for _ in range(4):
        gate.loss(logits_of(model, x), y).backward()
        for (name, number), leaf in gate.strips.leaves.items():
            strip = gate.strips.layers[name][0].strips[number]
            where = (slice(None),) * strip.dim + (slice(strip.start, strip.start + strip.size),)
            torch.testing.assert_close(leaf.grad, expected[name][where], rtol=1e-9, atol=1e-13)
            assert gate.names[name].grad is None
            reached[name][where] = True
        for name, p in gate.names.items():
            if name not in gate.strips.layers:
                torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-13)
        optimizer.step()
        gate.step(optimizer)
        optimizer.zero_grad()
        for p in gate.names.values():
            p.grad = None
    if policy == "rotate":
        assert all(mask.all() for mask in reached.values())


def test_scored_policies_follow_the_gradient_and_need_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, 16, bias=False), nn.Linear(16, V, bias=False))
    with torch.no_grad():
        model[2].weight[:, 4:] *= 1e-3  # outputs 0 to 3 of the middle layer carry nearly all of the gradient
    x, y = data()
    weights = {"kind": "blocks", "active_fraction": 0.25, "block_rows": 4, "policy": "energy", "change_every_steps": 1}
    gate = attach(model, {"weights": {**weights, "explore": 0.0}})
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.0)
    starts = []
    for _ in range(8):
        starts.append(gate.strips.layers["1.weight"][0].strips[0].start)
        gate.loss(model(x), y).backward()
        optimizer.step()
        gate.step(optimizer)
        optimizer.zero_grad()
    assert set(starts[:4]) == {0, 4, 8, 12}  # each once, then the best
    assert starts[4:] == [0] * 4
    with pytest.raises(GateError, match="zero_grad"):
        gate.step(optimizer)


def test_strip_gradients_do_not_pile_up_where_a_loop_clears_the_model_alone():
    torch.manual_seed(0)
    model = ours().double()
    x, y = data()
    gate = attach(model, {"weights": {"kind": "blocks", "active_fraction": 0.5, "change_every_steps": 100}})
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.0)
    seen = []
    for _ in range(3):
        gate.loss(model(x), y).backward()
        seen.append({n: p.grad.clone() for n, p in gate.named_parameters()})
        optimizer.step()
        gate.step(optimizer)
        model.zero_grad()
    same(seen[1], seen[0])
    same(seen[2], seen[0])


def test_column_strips_keep_less_activation():
    layer = nn.Sequential(nn.Embedding(V, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, V, bias=False))
    x, _ = data()

    def saved(kind):
        cfg = {"kind": kind, "active_fraction": 0.25, "block_rows": 16}
        gate = attach(layer, {"weights": cfg})
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.__setitem__(t.data_ptr(), t.nbytes) or t, lambda t: t
        ):
            layer[1](layer[0](x))
        gate.detach()
        return sum(sizes.values())

    assert saved("blocks") - saved("block_columns") == B * T * 48 * 4


def test_frozen_layers_leave_the_optimizer_and_others_enter(model):
    x, y = data()
    token_losses(model, x, y).mean().backward()
    expected = gradients(model)
    model.zero_grad()
    cfg = {"kind": "layers", "active_fraction": 0.5, "change_every_steps": 1, "train_embeddings": False}
    gate = attach(model, {"weights": cfg})
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.0)
    seen = []
    for _ in range(2):
        gate.loss(logits_of(model, x), y).backward()
        now = gradients(model)
        seen.append(set(now))
        same(now, {n: expected[n] for n in now}, rtol=1e-9, atol=1e-13)
        assert {id(p) for p in gate.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
        optimizer.step()
        optimizer.zero_grad()
        gate.step(optimizer)
        assert not optimizer.state
    assert seen[0]
    assert not seen[0] & seen[1]


def test_any_optimizer_trains_and_strips_keep_their_group():
    x, y = data()
    rates = {"AdamW": 1e-2, "SGD": 0.1, "RMSprop": 1e-3, "Adagrad": 1e-2, "NAdam": 1e-2}
    for name, rate in rates.items():
        make = getattr(torch.optim, name)
        torch.manual_seed(0)
        model = ours()
        gate = attach(
            model, {"weights": {"kind": "blocks", "active_fraction": 0.5, "block_rows": 4, "change_every_steps": 2}}
        )
        optimizer = make(model.parameters(), lr=rate)
        optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop()], "lr": rate / 2})
        last = next(n for n, p in model.named_parameters() if p is optimizer.param_groups[1]["params"][0])
        with pytest.raises(GateError, match="is in no optimizer"):
            gate.step(optimizer)
        gate.adopt(optimizer)
        first = gate.loss(model(x), y).item()
        for _ in range(8):
            gate.loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            gate.step(optimizer)
        there = [id(p) for g in optimizer.param_groups for p in g["params"]]
        assert len(there) == len(set(there)) == len(list(model.parameters()))
        assert optimizer.param_groups[1]["params"] == [gate.strips.leaves.get((last, 0), gate.names[last])]
        assert gate.loss(model(x), y).item() < first - 0.02, name


# what it composes with


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


def loader(n=64, size=8):
    generator = torch.Generator().manual_seed(0)
    known = torch.arange(T + 1).repeat(n // 2, 1) % V
    noise = torch.randint(0, V, (n - n // 2, T + 1), generator=generator)
    rows = torch.stack([known, noise], 1).flatten(0, 1)
    for start in range(0, n, size):
        part = rows[start : start + size]
        yield {"input_ids": part, "number": torch.arange(start, start + len(part))}


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
    assert gate.strips.layers["blocks.1.mlp.fc1.weight"][0].strips[0].start == 48
    torch.testing.assert_close(gate.loss(model(x), y), token_losses(model, x, y)[:, -3:].mean())
    gate.detach()
    gate = attach(model, {"backward": {**back, "signal": "peeks", "signal_options": {}}})
    expected = token_losses(model, x, y).gather(1, x.topk(3, dim=1).indices).mean()
    with pytest.raises(SignalError, match="tokens=inputs"):
        gate.loss(model(x), y)
    if x.topk(4, dim=1).values[:, 2:].diff(dim=1).ne(0).all():  # no tie at the edge
        torch.testing.assert_close(gate.loss(model(x), y, tokens=x), expected)


# errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beckward": {}}, "beckward is no setting.*before, backward"),
        ({"backward": {"rate": 1}}, r"backward\.rate is no setting"),
        ({"backward": {"unit": "token", "keep_fraction": 0.0}}, r"backward\.keep_fraction = 0\.0"),
        ({"backward": {"unit": "token", "keep_fraction": "half"}}, "must be of type float"),
        ({"backward": {"keep_fraction": 0.5}}, "needs backward.unit"),
        ({"backward": {"unit": "row"}}, "one of none, sequence, token"),
        ({"backward": {"unit": "sequence", "below": "exact"}}, "exact"),
        ({"backward": {"unit": "token", "policy": "cdf"}}, "fixed shape"),
        ({"backward": {"unit": "token", "policy": "nope"}}, "is not known: one of"),
        ({"backward": {"unit": "token", "signal": "ngram"}}, r"before\.signal"),
        ({"backward": {"unit": "token", "signal": "nope"}}, "no signal 'nope'"),
        ({"before": {"signal": "token_loss"}}, r"needs a forward"),
        ({"before": {"signal": "stale_loss"}}, r"before\.index"),
        ({"before": {"signal": "ngram", "pool": 2, "keep_fraction": 0.1}}, "at least one of them kept"),
        ({"before": {"signal": "ngram", "policy": "soft"}}, "fixed size"),
        ({"weights": {"kind": "rows"}}, r"subset\.kind"),
        ({"weights": {"kind": "blocks", "policy": "energetic"}}, r"subset\.policy"),
        ({"weights": {"active_fraction": 0.5}}, r"needs subset\.kind"),
        ({"weights": {"kind": "blocks", "inactive": "sign"}}, "own optimizer only"),
        ({"weights": {"kind": "blocks", "embedding_strips": True}}, "stay whole"),
        ({"weights": {"kind": "blocks", "active_fraction": 2.0}}, r"\(0, 1\]"),
        ({"exclude": "head"}, "a list of module names"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, message):
    model = ours()
    with pytest.raises(ValueError, match=message):
        attach(model, config)
    attach(model).detach()  # nothing was left on it


def test_models_that_cannot_be_gated_are_refused():
    with pytest.raises(GateError, match=r"no nn\.Linear"):
        attach(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(GateError, match="all excluded"):
        attach(nn.Sequential(nn.Linear(4, 4)), {"exclude": ["*"]})
    with pytest.raises(GateError, match="ModuleList"):
        attach(nn.Sequential(nn.Linear(4, 4)), {"weights": {"kind": "layers"}})
    model = ours()
    gate = attach(model)
    with pytest.raises(GateError, match="a gate on this model already"):
        attach(model)
    gate.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on first use
        compiled = torch.compile(model)
    with pytest.raises(GateError, match="attach to the module first"):
        attach(compiled)
    model.head.forward = model.head.forward
    with pytest.raises(GateError, match="head: its forward was exchanged already"):
        attach(model)


def test_batches_that_do_not_fit_are_refused():
    model = ours()
    x, y = data()
    gate = attach(model, {"backward": {"unit": "sequence", "keep_fraction": 0.25}})
    with pytest.raises(ValueError, match="less than one sequence"):
        gate.loss(model(x[:2]), y[:2])
    with pytest.raises(ValueError, match="are not"):
        gate.loss(model(x), y[:, 1:])
    gate.detach()
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5, "signal": "update"}})
    with pytest.raises(SignalError, match="do not show"):
        gate.loss(model(x), y)
    gate.detach()
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5, "signal": "excess_entropy"}})
    with pytest.raises(SignalError, match="needs logits"):
        gate.loss(token_losses(model, x, y))
    gate.loss(model(x), y).backward()
    gate.detach()
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5, "policy": "half_again"}})
    with pytest.raises(ValueError, match="'half_again' gave rows"):
        gate.loss(model(x), y)
    gate.detach()
    gate = attach(model, {"before": {"signal": "ngram", "pool": 32, "keep_fraction": 0.5}})
    with pytest.raises(ValueError, match="ended after 16 sequences"):
        list(gate.filter(loader(16)))
    with pytest.raises(ValueError, match="pad them to one length"):
        list(attach(ours(), gate.cfg).filter([x, x[:, 1:]]))
    with pytest.raises(ValueError, match="one form is needed"):
        list(gate.filter([x]))
    with pytest.raises(ValueError, match="whole numbers"):
        list(gate.filter([torch.rand(4, 4)]))
    gate.detach()


def test_a_model_that_was_moved_under_the_gate_is_noticed():
    model = ours()
    gate = attach(model, {"weights": {"kind": "blocks", "active_fraction": 0.5}})
    model.double()
    x, y = data()
    with pytest.raises(GateError, match="before attach"):
        gate.loss(model(x), y)


def test_cross_attention_is_left_whole_or_refused():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.att = nn.MultiheadAttention(16, 2, batch_first=True)
            self.head = nn.Linear(16, V)

        def forward(self, x, z):
            return self.head(self.att(x, z, z, need_weights=False)[0])

    torch.manual_seed(0)
    model = Cross()
    x, z, y = torch.randn(B, T, 16), torch.randn(B, T, 16), data()[1]
    gate = attach(model, {"backward": {"unit": "sequence", "keep_fraction": 0.5}})
    gate.loss(model(x, z), y).backward()
    assert gate.report()["rows_not_found"] == ["att.in_proj"]
    gate.detach()
    gate = attach(model, {"weights": {"kind": "blocks", "active_fraction": 0.5}})
    with pytest.raises(GateError, match=r"exclude = \['att'\]"):
        model(x, z)


def test_the_config_is_a_dataclass_too():
    assert AttachConfig.from_dict({"weights": {"kind": "blocks"}, "exclude": ["a.*"]}).exclude == ("a.*",)
