"""Blocks that keep their input alone: the same run to the bit, less memory, the work counted and priced."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_update.clock.component import SCORING_FORWARD
from sparse_update.step.flops import plan_flops
from sparse_update.transformer import ModelConfig, Transformer, token_loss
from tests.sparse_update.parallel import job
from tests.sparse_update.parallel.test_ddp import GATES, text  # noqa: F401

SHAPE = ModelConfig(width=32, layers=4, heads=2, context=32, vocab_size=64, attention="explicit")


def step(recompute: bool):
    """Of a forward and backward: gradients, bytes that autograd keeps, FLOPs as torch counts them."""
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    for block in model.blocks:  # they start at zero, and would pass nothing on
        torch.nn.init.normal_(block.attn.o.weight, std=0.1)
        torch.nn.init.normal_(block.mlp.fc2.weight, std=0.1)
    model.recompute = recompute
    tokens = torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(1))
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = token_loss(model(tokens[:, :-1]), tokens[:, 1:]).mean()
        held = sum(kept.values())
        loss.backward()
    return float(loss.detach()), [p.grad for p in model.parameters()], held, counter.get_total_flops()


def test_same_bits_less_memory_and_the_work_that_torch_counts():
    loss, gradients, kept_bytes, flops = step(False)
    again, same, fewer_bytes, more_flops = step(True)
    assert again == loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    assert fewer_bytes < 0.35 * kept_bytes
    counted = plan_flops(SHAPE, 8)
    assert (flops, more_flops) == (counted.total, counted.total + counted.recomputed)


@pytest.mark.parametrize("name", ["dense", "band", "own loss"])
def test_a_run_is_the_same_to_the_bit_and_counts_the_second_forward(text, tmp_path, name):  # noqa: F811
    found = [job.trained(text, tmp_path / str(on), gate=GATES[name], double=False, recompute=on) for on in (False, True)]
    plain, less = found
    assert less["losses"] == plain["losses"]
    assert all((less["weights"][name] == weight).all() for name, weight in plain["weights"].items())
    again = plan_flops(ModelConfig(**job.MODEL), 8).recomputed
    assert less["flops"] - plain["flops"] == again * plain["step"]


def test_the_second_forward_is_paid_for(text, tmp_path, monkeypatch):  # noqa: F811
    def priced(times, steps, components):
        return times.extended({**{step.key: 10.0 for step in steps}, **dict.fromkeys(components, 0.5)}, 10.0)

    monkeypatch.setattr(job, "priced", priced)
    made, _ = job.trainer(text, tmp_path, steps=14, recompute=True)
    result = made.run()
    assert result.step == 10  # of 10 ms and 8 windows of 0.5 ms each, in 140 ms
    assert made.budget.clock.uses[SCORING_FORWARD] == 80
    assert made.budget.reference_s == pytest.approx(0.140)
    assert result.gate_reference_s == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gate": GATES["rows"]}, "gate.unit = token"),
        ({"gate": GATES["importance"]}, "gate.policy = importance"),
        ({"subset": {"kind": "blocks", "active_fraction": 0.5}}, "trainer.accumulate"),
        ({"variant": "engine"}, "trainer.component_times=shipped"),
    ],
)
def test_steps_that_keep_their_activations_refuse_it(text, tmp_path, settings, said):  # noqa: F811
    with pytest.raises(ValueError, match=r"trainer\.recompute with") as error:
        job.trainer(text, tmp_path, recompute=True, **settings)
    assert said in str(error.value)
