"""`spikegate bench generation`: the exported weights are the same model, and the document's arithmetic."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from experiments import bench
from experiments.benches.generating import command
from experiments.benches.generating.peer import exported, theirs
from sparse_update.generation import GenerateConfig, Sampler
from sparse_update.transformer import ModelConfig, Transformer
from tests.experiments.console import document as printed

pytest.importorskip("transformers")


def build(**kw):
    torch.manual_seed(0)
    shape = {"width": 32, "layers": 2, "heads": 4, "context": 64, "vocab_size": 40}
    model = Transformer(ModelConfig(**{**shape, **kw}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("peer", "settings"),
    [
        ("arcee", {}),
        ("arcee", {"activation": "relu", "tie_embeddings": True, "rotary_base": 300.0}),
        ("llama", {}),
        ("llama", {"tie_embeddings": True, "norm_eps": 1e-3}),
    ],
)
def test_logits_and_likeliest_tokens_of_the_exported_weights(peer, settings):
    model = build(**settings).double()
    other = exported(model, peer)
    tokens = torch.randint(0, 40, (3, 30))
    with torch.no_grad():
        ours, found = model(tokens), other(input_ids=tokens).logits
    torch.testing.assert_close(found, ours, atol=1e-5, rtol=1e-5)  # their angles are float32
    prompts = [np.array([1, 2, 3]), np.arange(9)]
    mine = Sampler(model, GenerateConfig(new_tokens=12, temperature=0.0), stop=[5]).sample(prompts)
    for one, two in zip(theirs(other, prompts, 1, 12, 0.0, [5]), mine, strict=True):
        np.testing.assert_array_equal(one, two)


def test_what_a_llama_cannot_be():
    with pytest.raises(ValueError, match="gated MLP is ours with relu2 only"):
        exported(build(activation="relu"), "llama")
    with pytest.raises(ValueError, match="one of arcee, llama"):
        exported(build(), "gpt2")


def test_the_document(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(command.CASES, "stopping", command.Case(prompts=2, n=2, new_tokens=3, stops=20))
    words = ["generation", "--sizes", "tiny", "--cases", "stopping", "--rounds", "7", "--interval", "1e9", "--clock", "cpu"]
    assert bench.main([*words, "--device", "cpu", "--out", str(tmp_path / "found.json")]) == 0
    found = printed(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "found.json").read_text())
    cell = found["cells"]["tiny/stopping"]
    assert cell["speed"]["low"] <= cell["speed"]["median"] <= cell["speed"]["high"]
    assert found["targets"][0]["met"] == (cell["speed"]["median"] >= 2)
    assert found["logits_differ_by"]["tiny"] < 1e-3
    assert bench.main(["generation", "--sizes", "huge"]) == 2
    assert "known are tiny, mid, small" in capsys.readouterr().err
