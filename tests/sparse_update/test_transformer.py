"""The model against an independent float64 implementation, and its counts against closed forms."""

from __future__ import annotations

import pytest
import torch

from sparse_update.transformer import ModelConfig, Transformer, rotary_tables, rotate


def build(**kw):
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(**{"width": 16, "layers": 2, "heads": 2, "context": 12, "vocab_size": 23, **kw})
    ).double()
    with torch.no_grad():  # float64 angles, and no zero weights that would hide a wrong path
        k = model.cfg.width // model.cfg.heads
        frequency = model.cfg.rotary_base ** (-torch.arange(0, k, 2, dtype=torch.float64) / k)
        angle = torch.arange(model.cfg.context, dtype=torch.float64)[:, None] * frequency
        model.cos.copy_(angle.cos())
        model.sin.copy_(angle.sin())
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
@pytest.mark.parametrize("tie", [False, True])
def test_logits_equal_the_independent_implementation(reference, activation, attention, tie):
    model = build(activation=activation, attention=attention, tie_embeddings=tie)
    tokens = torch.randint(0, 23, (3, 12))
    torch.testing.assert_close(model(tokens), reference(model, tokens), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
@pytest.mark.parametrize("cuts", [(1,) * 12, (5, 1, 4, 2), (12,)])
def test_logits_with_a_cache_are_those_of_the_whole_text(reference, attention, cuts):
    model = build(attention=attention)
    tokens = torch.randint(0, 23, (3, 12))
    cache = model.new_cache()
    parts = []
    for part in tokens.split(cuts, dim=1):
        parts.append(model(part, cache))
        assert parts[-1].shape[:2] == part.shape
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), reference(model, tokens), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="13 tokens in a row, but the model's context is 12"):
        model(tokens[:, :1], cache)


def test_no_token_sees_the_future():
    model = build()
    tokens = torch.randint(0, 23, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 23
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert torch.all(difference[:7] == 0)
    assert torch.all(difference[7:] > 0)


def test_rotation_keeps_length_and_depends_on_distance_only():
    cos, sin = rotary_tables(20, 8, 10000.0)
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    turned_q, turned_k = (rotate(t.expand(20, 8), cos.double(), sin.double()) for t in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(20), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(turned_q[5] @ turned_k[3], turned_q[17] @ turned_k[15], rtol=1e-5, atol=1e-5)


def test_sizes_of_the_design():
    def parameters(**kw):
        with torch.device("meta"):
            return sum(p.numel() for p in Transformer(ModelConfig(**kw)).parameters())

    assert parameters(vocab_size=256) == 2 * 256 * 64 + 3 * (12 * 64**2 + 2 * 64) + 64
    gpt2 = parameters(width=768, layers=12, heads=12, context=1024, vocab_size=50257, tie_embeddings=True, attention="sdpa")
    assert gpt2 == pytest.approx(124e6, rel=0.01)  # GPT-2's smallest size, less its learned positions and biases


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("width", 20, "heads"),
        ("activation", "gelu", "relu2"),
        ("attention", "flash", "sdpa"),
        ("layers", -1, "must not be negative"),
    ],
)
def test_bad_shapes_are_refused(field, value, word):
    with pytest.raises(ValueError, match=word):
        ModelConfig(**{"vocab_size": 23, field: value})


def test_too_long_an_input_is_refused():
    with pytest.raises(ValueError, match="13 tokens in a row, but the model's context is 12"):
        build()(torch.zeros(1, 13, dtype=torch.int64))
