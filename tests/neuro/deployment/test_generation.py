"""Text token by token: with a cache as without, float as deployed, ours as Hugging Face's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuro
from neuro.deployment.generation import generate
from sparse_update.transformer import ModelConfig, Transformer

CONTEXT, VOCABULARY = 12, 23
CONFIGS = {
    "graded": neuro.GradedConfig(),
    "sigma_delta": neuro.SigmaDeltaConfig(3, 3),
    "rate": neuro.RateConfig(16, input_code="analogue"),
}


def ours(dtype: torch.dtype = torch.float64, **changes: Any) -> Transformer:
    """Random weights, in float64 so that rounding on the host never moves a value to another integer."""
    torch.manual_seed(3)
    sizes = {"width": 16, "layers": 2, "heads": 2, "context": CONTEXT, "vocab_size": VOCABULARY, "activation": "relu"}
    model = Transformer(ModelConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model.to(dtype).eval()


def prompt(batch: int = 2, length: int = 4) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def deployed(model: nn.Module, route: str, x: Tensor) -> neuro.Deployed:
    report = neuro.analyse(model, x, route=route)
    return neuro.deploy(model, neuro.convert(model, neuro.calibrate(model, [x]), report, CONFIGS[route]))


def by_hand(model: nn.Module, text: Tensor, tokens: int) -> Tensor:
    with torch.no_grad():
        for _ in range(tokens):
            text = torch.cat((text, model(text)[:, -1:].argmax(-1)), dim=1)
    return text


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
@pytest.mark.parametrize("cache", [True, False])
def test_the_likeliest_token_one_by_one(attention: str, cache: bool) -> None:
    model = ours(attention=attention)
    told: list[Tensor] = []
    found = generate(model, prompt(), 8, cache=cache, on_token=told.append)
    assert torch.equal(found, by_hand(model, prompt(), 8))
    assert torch.equal(torch.stack(told, dim=1), found[:, 4:])
    assert torch.equal(generate(model, prompt()[0], 8, cache=cache), found[0])


@pytest.mark.parametrize("route", CONFIGS)
def test_a_deployed_model_writes_the_same_with_and_without_a_cache(route: str) -> None:
    model = ours()
    chip = deployed(model, route, torch.randint(0, VOCABULARY, (4, CONTEXT)))
    whole = by_hand(chip, prompt(), 8)
    chip.reset_counts()
    with_cache = generate(chip, prompt(), 8)
    head = next(c for c in chip.counts() if c.layer == "head")
    assert head.tokens == 2 * (4 + 7)  # every token was read once
    chip.reset_counts()
    without = generate(chip, prompt(), 8, cache=False)
    assert torch.equal(with_cache, without)
    assert torch.equal(with_cache, whole)
    head = next(c for c in chip.counts() if c.layer == "head")
    assert head.tokens == 2 * sum(range(4, 12))
    assert chip.plan.route == route
    # past the context: the last half goes on as a new text, with its own streams
    assert torch.equal(generate(chip, prompt(), 30), generate(chip, prompt(), 30, cache=False))


def test_streams_go_on_from_token_to_token() -> None:
    """Without the state of its streams a sigma-delta model would read every token as the first of a text."""
    model = ours()
    chip = deployed(model, "sigma_delta", torch.randint(0, VOCABULARY, (4, CONTEXT)))
    tokens = prompt(1, CONTEXT)
    whole = chip(tokens)
    sent = sum(c.synops for c in chip.counts())
    chip.reset_counts()
    with chip.keep_state():
        cache = chip.module.new_cache()  # type: ignore[operator]
        steps = torch.cat([chip(part, cache) for part in tokens.split(1, dim=1)], dim=1)
    torch.testing.assert_close(steps, whole, rtol=1e-9, atol=1e-9)
    assert sum(c.synops for c in chip.counts()) == sent
    cache = chip.module.new_cache()  # type: ignore[operator]
    forgetful = torch.cat([chip(part, cache) for part in tokens.split(1, dim=1)], dim=1)
    assert not torch.allclose(forgetful, whole, rtol=1e-3, atol=1e-3)


def test_a_text_longer_than_the_context_goes_on_with_its_half() -> None:
    model = ours()
    found = generate(model, prompt(1), 20)
    text = by_hand(model, prompt(1), CONTEXT - 4 + 1)  # fills the context and one more
    text = torch.cat((text[:, :-6], by_hand(model, text[:, -6:], CONTEXT - 6 + 1)), dim=1)
    assert torch.equal(found[:, : text.shape[1]], text)
    assert torch.equal(generate(model, prompt(1), 20, context=CONTEXT), found)
    long = prompt(1, 40)
    assert torch.equal(generate(model, long, 3)[:, -3:], by_hand(model, long[:, -6:], 3)[:, -3:])


def test_draws_follow_the_seed_and_the_temperature() -> None:
    model = ours()
    texts = [generate(model, prompt(1), 30, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    cold = generate(model, prompt(1), 30, temperature=1e-4)
    assert torch.equal(cold, generate(model, prompt(1), 30))
    many = prompt(1).expand(4000, 4)
    drawn = generate(model, many, 1, temperature=1.5)[:, -1]
    with torch.no_grad():
        chance = torch.softmax(model(prompt(1))[0, -1] / 1.5, dim=-1)
    share = torch.bincount(drawn, minlength=VOCABULARY) / 4000
    assert float((share - chance).abs().max()) < 5 * 0.5 / 4000**0.5


def test_a_module_without_a_cache_and_one_without_a_context() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY))
    found = generate(plain, prompt(), 5)
    assert torch.equal(found, by_hand(plain, prompt(), 5))
    assert plain.training  # as it was


def test_bad_prompts_and_models() -> None:
    model = ours()
    for text, tokens, more, message in (
        (prompt().float(), 1, {}, r"torch.float32 \(2, 4\); int64"),
        (prompt()[:, :0], 1, {}, r"\(2, 0\); int64 \(B, T\) or \(T,\), not empty"),
        (prompt(), 0, {}, "tokens is 0"),
        (prompt(), 1, {"temperature": -1.0}, "temperature is -1"),
        (prompt(), 1, {"context": 1}, "context is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, text, tokens, **more)
    with pytest.raises(ValueError, match=r"the model gave \(2, 4\), not logits"):
        generate(nn.Flatten(), prompt(), 1)
    model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        generate(model, prompt(), 1)


transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.double().eval()


def test_a_hugging_face_model_writes_what_its_own_generate_writes(gpt2: nn.Module) -> None:
    theirs = gpt2.generate(prompt(), max_new_tokens=8, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    assert torch.equal(generate(gpt2, prompt(), 8), theirs)
    assert torch.equal(generate(gpt2, prompt(), 8, cache=False), theirs)
    assert generate(gpt2, prompt(), 30).shape == (2, 34)  # past its positions


@pytest.mark.parametrize("route", CONFIGS)
def test_a_deployed_hugging_face_model_with_its_cache(gpt2: nn.Module, route: str) -> None:
    example = {"input_ids": torch.randint(0, VOCABULARY, (4, CONTEXT)), "use_cache": False}
    ready = neuro.prepare(gpt2, example)
    report = neuro.analyse(ready, example, route=route)
    chip = neuro.deploy(ready, neuro.convert(ready, neuro.calibrate(ready, [example]), report, CONFIGS[route]))
    with_cache = generate(chip, prompt(), 8)
    head = next(c for c in chip.counts() if c.layer == "lm_head")
    assert head.tokens == 2 * (4 + 7)
    assert torch.equal(with_cache, generate(chip, prompt(), 8, cache=False))
    assert torch.equal(generate(chip, prompt(), 30), generate(chip, prompt(), 30, cache=False))
