"""Sampling against plain forwards, another implementation of top-p, published random numbers, and torch's FLOP counter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from sparse_update.data.tokens import BpeTokenizer, ByteTokenizer
from sparse_update.generation import GenerateConfig, GenerationError, Sampler, generate, stop_tokens
from sparse_update.generation.counter import philox, uniforms
from sparse_update.generation.counting import needed_flops, prompt_flops, token_flops
from sparse_update.generation.decoder import next_logits
from sparse_update.generation.drawing import draw
from sparse_update.tasks import END, PromptTooLong
from sparse_update.transformer import ModelConfig, Transformer

VOCAB = 50


def build(double=False, stirred=True, **kw):
    torch.manual_seed(0)
    shape = {"width": 32, "layers": 2, "heads": 4, "context": 64, "vocab_size": VOCAB, "attention": "explicit"}
    model = Transformer(ModelConfig(**{**shape, **kw}))
    if stirred:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.15)
    return model.double() if double else model


def prompts(count, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(1, longest + 1)) for _ in range(count)]


class TestNumbers:
    @pytest.mark.parametrize(
        ("counter", "key", "expected"),
        [
            ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
            ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
            ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
        ],
    )
    def test_known_answers_of_philox_4x32_10(self, counter, key, expected):
        """From Random123's kat_vectors, the authors' own file."""
        words = tuple(np.array([int(word, 16)], dtype=np.uint64) for word in counter.split())
        low, high = (int(word, 16) for word in key.split())
        assert " ".join(f"{int(word[0]):08x}" for word in philox(words, (low, high))) == expected

    def test_uniform_and_by_address(self):
        prompt = np.array([5, 5, 2**63 + 1], dtype=np.uint64)
        found = uniforms(7, prompt, np.array([0, 1, 0]), 4000)
        for row, (number, sample) in enumerate(zip(prompt, (0, 1, 0), strict=True)):
            alone = uniforms(7, np.array([number], dtype=np.uint64), np.array([sample]), 100)
            np.testing.assert_array_equal(alone[0], found[row, :100])
        counts = np.histogram(found, 20, (0, 1))[0]
        assert ((counts - 600) ** 2 / 600).sum() < 44  # chi-square, 19 degrees: p > 0.001
        assert abs(np.corrcoef(found)[np.triu_indices(3, 1)]).max() < 0.06
        assert not np.array_equal(uniforms(8, prompt, np.zeros(3), 4), found[:, :4])


class TestDraw:
    def test_frequencies_are_the_probabilities(self):
        logits = torch.tensor([[1.0, -2.0, 0.5, 0.0, float("-inf")]])
        uniform = torch.linspace(0, 1, 20001, dtype=torch.float64)[:-1]
        token, values = draw(logits.expand(20000, 5), uniform, 0.7, 1.0)
        expected = torch.softmax(logits[0] / 0.7, 0)
        torch.testing.assert_close(torch.bincount(token, minlength=5) / 20000, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(values[0], torch.log_softmax(logits[0], 0)[token])
        torch.testing.assert_close(values[1], expected.log()[token], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(values[2, 0], torch.distributions.Categorical(logits=logits[0, :4]).entropy())

    @pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
    def test_top_p_keeps_what_hugging_face_keeps(self, top_p):
        from transformers import TopPLogitsWarper

        logits = torch.randn(200, 40, generator=torch.Generator().manual_seed(1)) * 2
        expected = torch.softmax(TopPLogitsWarper(top_p)(None, logits), -1)
        uniform = torch.rand(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        token, values = draw(logits, uniform, 1.0, top_p)
        chosen = expected.gather(1, token[:, None])[:, 0]
        assert (chosen > 0).all()
        torch.testing.assert_close(values[1], chosen.log(), atol=1e-5, rtol=1e-5)
        reached = expected.double().cumsum(-1)
        assert (reached.gather(1, token[:, None])[:, 0] > uniform - 1e-6).all()

    def test_ends_of_the_numbers(self):
        logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]] * 2)
        token, _ = draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0, 1.0)
        assert token.tolist() == [1, 2]
        assert draw(logits, torch.zeros(2, dtype=torch.float64), 0.0, 1.0)[0].tolist() == [1, 1]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({}, {}),
        ({"activation": "relu", "tie_embeddings": True}, {"temperature": 0.7, "top_p": 0.8}),
        ({"attention": "sdpa", "rotary_base": 500.0, "layers": 3}, {"temperature": 0.0, "n": 1}),
        ({"layers": 0}, {}),
    ],
)
def test_log_probabilities_are_those_of_a_forward_over_the_row(double, model, settings):
    """To 2e-5 nats in float32, 1e-10 in float64 (kept as float32 values: 1e-6)."""
    model = build(double=double, **model)
    cfg = GenerateConfig(**{"new_tokens": 20, "n": 3, "tile_rows": 8, **settings})
    asked = prompts(7)
    found = Sampler(model, cfg, stop=[3, 7]).sample(asked)
    assert len(found) == 7 * cfg.n
    ended = 0
    for row, tokens in enumerate(found):
        prompt = asked[row // cfg.n]
        whole = torch.from_numpy(np.concatenate((prompt, tokens)))
        with torch.no_grad():
            logits = model(whole[None, :-1])[0, len(prompt) - 1 :]
        logp = torch.log_softmax(logits, -1)
        new = whole[len(prompt) :, None]
        mine = torch.from_numpy(found.logp_RN[row, : len(tokens)]).to(logp)
        tolerance = 1e-6 if double else 2e-5
        torch.testing.assert_close(mine, logp.gather(1, new)[:, 0], atol=tolerance, rtol=1e-6)
        entropy = -(logp.exp() * logp).sum(-1)
        torch.testing.assert_close(
            torch.from_numpy(found.entropy_RN[row, : len(tokens)]).to(logp), entropy, atol=tolerance, rtol=1e-6
        )
        if cfg.temperature == 0:
            assert new[:, 0].tolist() == logits.argmax(-1).tolist()
        elif cfg.temperature == 1:
            np.testing.assert_allclose(found.drawn_logp_RN[row], found.logp_RN[row], atol=1e-6)
        stops = np.isin(tokens, [3, 7])
        assert not stops[:-1].any()
        assert stops[-1] == found.stopped_R[row]
        assert found.stopped_R[row] or len(tokens) == 20
        assert not found.tokens_RN[row, len(tokens) :].any()
        ended += int(stops[-1])
    assert cfg.temperature == 0 or ended > 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.8, "top_p": 0.9, "tile_rows": 64},
        {"engine": "torch"},
        {"engine": "torch", "temperature": 0.8, "top_p": 0.9, "tile_rows": 64},
        {"fixed": True},
    ],
)
def test_an_output_is_the_same_in_any_batch(settings):
    model = build()
    cfg = GenerateConfig(**{"new_tokens": 12, "n": 4, "seed": 5, "tile_rows": 8, **settings})
    asked, ids = prompts(23), list(range(100, 123))
    sampler = Sampler(model, cfg, stop=range(4))
    whole = sampler.sample(asked, ids)

    def rows_of(found, number):
        part = slice(number * 4, number * 4 + 4)
        return [array[part].tobytes() for array in (found.tokens_RN, found.logp_RN, found.drawn_logp_RN, found.entropy_RN)]

    order = np.random.default_rng(1).permutation(23)
    shuffled = sampler.sample([asked[i] for i in order], [ids[i] for i in order])
    halves = [sampler.sample(asked[:9], ids[:9]), sampler.sample(asked[9:], ids[9:])]
    for place, number in enumerate(order):
        assert rows_of(shuffled, place) == rows_of(whole, number)
        half, at = (halves[0], number) if number < 9 else (halves[1], number - 9)
        assert rows_of(half, at) == rows_of(whole, number)
    alone = sampler.sample([asked[17]], [ids[17]])
    assert rows_of(alone, 0) == rows_of(whole, 17)
    more = Sampler(model, replace(cfg, n=6), stop=range(4)).sample(asked[:2], ids[:2])  # the first of six are the four
    assert more.tokens_RN[:4].tobytes() == whole.tokens_RN[:4].tobytes()
    other = Sampler(model, replace(cfg, seed=6), stop=range(4)).sample(asked, ids)
    assert other.tokens_RN.tobytes() != whole.tokens_RN.tobytes()


def test_without_ids_equal_prompts_have_equal_outputs_and_samples_differ():
    found = Sampler(build(), GenerateConfig(new_tokens=16, n=3)).sample([[1, 2], [3], [1, 2]])
    assert found.tokens_RN[:3].tobytes() == found.tokens_RN[6:].tobytes()
    assert len({row.tobytes() for row in found.tokens_RN[:6]}) == 6
    assert found.mask_RN.all()
    assert not found.stopped_R.any()


def test_other_tiles_give_the_same_tokens_and_nearly_the_same_numbers():
    model, asked = build(), prompts(9)
    one, two = (
        Sampler(model, GenerateConfig(new_tokens=10, n=2, tile_rows=rows, engine="torch")).sample(asked) for rows in (8, 32)
    )
    np.testing.assert_array_equal(one.tokens_RN, two.tokens_RN)
    np.testing.assert_allclose(one.logp_RN, two.logp_RN, atol=1e-5)


def test_a_step_is_one_graph_of_static_shapes():
    torch._dynamo.reset()
    counter = CompileCounter()
    model = build()
    sampler = Sampler(model, GenerateConfig(new_tokens=6, n=2, tile_rows=8, fixed=True))
    expected = sampler.sample(prompts(6, longest=20))
    sampler._step = torch.compile(next_logits, fullgraph=True, dynamic=False, backend=counter)
    found = sampler.sample(prompts(6, longest=20))
    again = sampler.sample(prompts(5, seed=3, longest=20))
    np.testing.assert_array_equal(found.tokens_RN, expected.tokens_RN)
    assert len(again) == 10
    assert counter.frame_count == 1  # one length of the cache, one graph, whatever was asked


def test_weights_are_those_of_now_and_lora_counts():
    peft = pytest.importorskip("peft")
    from sparse_update.weights.lowrank import add_lora

    assert peft
    model = build()
    sampler = Sampler(model, GenerateConfig(new_tokens=8, temperature=0.0))
    before = sampler.sample(prompts(3))
    add_lora(model, 2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name or "up" in name or "down" in name:
                p.add_(torch.randn_like(p) * 0.5)
    found = sampler.sample(prompts(3))
    assert found.tokens_RN.tobytes() != before.tokens_RN.tobytes()
    for prompt, tokens in zip(prompts(3), found, strict=True):
        with torch.no_grad():
            logits = model(torch.from_numpy(np.concatenate((prompt, tokens)))[None, :-1])[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == tokens.tolist()


def test_flops_are_what_the_counter_counts():
    model = build()
    sampler = Sampler(model, GenerateConfig(new_tokens=9, n=3, tile_rows=8, engine="torch"), stop=[1])
    asked = prompts(11)
    with FlopCounterMode(display=False) as counter:
        found = sampler.sample(asked)
    assert counter.get_total_flops() == found.flops > found.needed_flops > 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.int64))
    head = 2 * 4 * 32 * VOCAB  # of the tokens before the last, whose logits sampling leaves out
    assert counter.get_total_flops() - head == prompt_flops(model.cfg, 1, 5) == needed_flops(model.cfg, 5, [1])
    # an output of three tokens reads two, with six and seven keys
    two_more = token_flops(model.cfg, 1, 6) + token_flops(model.cfg, 1, 7)
    assert needed_flops(model.cfg, 5, [3, 1]) == prompt_flops(model.cfg, 1, 5) + two_more


class TestErrors:
    def test_settings(self):
        for settings, message in (
            ({"temperature": 0, "n": 2}, "temperature = 0 with generate.n = 2"),
            ({"temperature": -1.0}, "temperature = -1.0"),
            ({"temperature": float("nan")}, "temperature = nan"),
            ({"top_p": 0.0}, "top_p = 0.0"),
            ({"new_tokens": 0}, "new_tokens = 0"),
            ({"tile_rows": 12}, "tile_rows = 12: a power of two"),
            ({"compiled": True}, "compiled = true takes static shapes"),
            ({"engine": "rust"}, "engine = 'rust': one of auto, c, torch"),
            ({"engine": "c", "fixed": True}, "static shapes are torch's"),
        ):
            with pytest.raises(GenerationError, match=message):
                GenerateConfig(**settings)

    def test_prompts(self):
        sampler = Sampler(build(), GenerateConfig(new_tokens=30))
        with pytest.raises(PromptTooLong, match="prompt 1 has 35 tokens, and 30 new ones do not fit a context of 64"):
            sampler.sample([[1], [2] * 35])
        sampler.sample([[2] * 34])
        for asked, message in (
            ([], "no prompt"),
            ([[1], []], "prompt 1 is empty"),
            ([[1, 50]], "token 50"),
            ([[-1]], "token -1"),
        ):
            with pytest.raises(GenerationError, match=message):
                sampler.sample(asked)
        with pytest.raises(GenerationError, match="2 ids for 1 prompts"):
            sampler.sample([[1]], [1, 2])
        with pytest.raises(GenerationError, match="stop token 50"):
            Sampler(build(), GenerateConfig(), stop=[50])

    def test_a_model_that_broke(self):
        model = build()
        with torch.no_grad():
            model.head.weight[0, 0] = float("nan")
        with pytest.raises(GenerationError, match="NaN or infinite"):
            Sampler(model, GenerateConfig(new_tokens=2)).sample([[1]])

    def test_another_vocabulary_and_unknown_settings(self):
        with pytest.raises(GenerationError, match="the model has 50 tokens and the tokenizer 256"):
            generate(build(), ByteTokenizer(), ["a"])
        with pytest.raises(GenerationError, match="no setting beams"):
            generate(build(vocab_size=256), ByteTokenizer(), ["a"], beams=2)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_text_in_text_out(kind):
    tokenizer = ByteTokenizer() if kind == "bytes" else BpeTokenizer.train([b"some text " * 40], 262)
    model = build(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        model.head.weight[stop_tokens(tokenizer)[0]] += 3 * model.norm.weight.sign() * 0.2
    found = generate(model, tokenizer, ["some text", "x="], n=4, new_tokens=20, seed=1)
    assert [len(row) for row in found.texts] == [4, 4]
    assert not any(END in text for row in found.texts for text in row)
    row = found.outputs.tokens_RN[5, : found.outputs.lengths_R[5]]
    assert tokenizer.decode(row).decode(errors="replace").startswith(found[1][1])
    assert stop_tokens(ByteTokenizer(), "\n") == [10]
    assert stop_tokens(tokenizer, "") == []
    with pytest.raises(GenerationError, match="one ASCII character"):
        stop_tokens(tokenizer, "ab")
