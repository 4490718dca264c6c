"""Blocks of any model grow in place: what it computes, whose state stays, what the optimizer then holds."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_update import attach
from sparse_update.growth.modules import GrowthError, grow_blocks
from tests.sparse_update.library.models import T, V, gpt2, llama, ours


def step(model, optimizer, seed=0):
    tokens = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(seed))
    out = model(tokens[:, :-1])
    logits = getattr(out, "logits", out)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def logits(model):
    tokens = torch.randint(0, V, (2, T - 1), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model.eval()(tokens)
    return getattr(out, "logits", out)


OUTPUTS = {
    "ours": ("attn.o.weight", "mlp.fc2.weight"),
    "llama": ("o_proj.weight", "down_proj.weight"),
    "gpt2": ("c_proj.weight", "c_proj.bias"),
}
MODELS = {"ours": ours, "llama": llama, "gpt2": gpt2}


@pytest.mark.parametrize("name", list(MODELS))
def test_outputs_at_zero_keep_the_function_and_every_new_weight_trains(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step(model, optimizer)
    before, state = logits(model), copy.deepcopy(optimizer.state_dict())
    new = grow_blocks(model, 5, outputs=OUTPUTS[name], optimizer=optimizer)
    assert torch.equal(logits(model), before)
    model.train()
    parameters = dict(model.named_parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in parameters.values()}
    assert len(optimizer.state) == len(state["state"])  # moments of the old ones, none of the new
    kept = {key: parameters[key].detach().clone() for key in new}
    for seed in range(2):  # what feeds an output at zero has a gradient once that has moved
        step(model, optimizer, seed)
    assert [key for key in new if torch.equal(parameters[key].detach(), kept[key]) and "k_proj.bias" not in key] == []


def test_a_grown_llama_is_the_llama_of_that_depth():
    """Copies of two blocks, against a model that transformers makes with four; generation by the cache included."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hub (transformers)")
    torch.manual_seed(0)
    model = llama()
    grow_blocks(model, 4)
    config = copy.deepcopy(model.config)
    assert config.num_hidden_layers == 4
    other = transformers.LlamaForCausalLM(config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(other))
    prompt = torch.arange(4)[None]
    kw = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(prompt, **kw), other.generate(prompt, **kw))
    assert not torch.equal(logits(model), logits(llama()))


def test_the_optimizers_state_loads_into_that_of_the_grown_model():
    torch.manual_seed(0)
    model = ours()

    def optimizer_of(module):
        decayed = [p for p in module.parameters() if p.dim() > 1]
        rest = [p for p in module.parameters() if p.dim() == 1]
        return torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=1e-2)

    first = optimizer_of(model)
    step(model, first)
    grow_blocks(model, 4, optimizer=first)
    step(model, first, 1)
    resumed = copy.deepcopy(model)
    second = optimizer_of(resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # which torch would share
    assert [len(group["params"]) for group in first.param_groups] == [len(group["params"]) for group in second.param_groups]
    for seed in (2, 3):
        assert step(model, first, seed) == step(resumed, second, seed)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_frozen_weights_stay_frozen_and_made_blocks_are_taken():
    from sparse_update.transformer import Block

    torch.manual_seed(0)
    model = ours()
    for block in model.blocks:
        block.attn.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    made = []

    def make(number):
        made.append(number)
        return Block(model.cfg)

    new = grow_blocks(model, 4, blocks="blocks", make=make, optimizer=optimizer)
    assert made == [2, 3]
    assert not any(".attn." in name for name in new)
    assert not any(p.requires_grad for block in model.blocks for p in block.attn.parameters())
    step(model, optimizer)


def test_a_gate_is_taken_off_before_and_put_on_after():
    torch.manual_seed(0)
    model = ours()
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5}})
    with pytest.raises(GrowthError, match=r"gate.detach\(\), grow, and attach again"):
        grow_blocks(model, 4)
    gate.detach()
    grow_blocks(model, 4)
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5}})
    assert sum(name.startswith("blocks.3.") for name in gate.report()["gated"]) == 6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layers": 2}, "has 2 blocks already"),
        ({"blocks": "layers"}, "no nn.ModuleList of that name; the model has blocks"),
        ({"outputs": ("wo.weight",)}, "no parameter of a block ends with"),
        ({"make": lambda number: nn.Linear(2, 2)}, r"make\(2\): its parameters differ from those of block 0"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)}, "lacks parameters of the old blocks"),
    ],
)
def test_what_cannot_grow_is_refused_and_left_as_it_was(given, said):
    model = ours()
    with pytest.raises(GrowthError, match=said):
        grow_blocks(model, **{"layers": 4, **given})
    assert len(model.blocks) == 2


def test_a_model_without_blocks_is_refused():
    with pytest.raises(GrowthError, match=r"has no nn\.ModuleList with a block in it"):
        grow_blocks(nn.Linear(2, 2), 3)
