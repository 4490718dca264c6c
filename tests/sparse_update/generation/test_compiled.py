"""The sampler's loops in C against plain torch, against themselves token by token, and without a compiler."""

from __future__ import annotations

import ctypes
from collections import Counter

import numpy as np
import pytest
import torch

from hardware import building
from sparse_update.generation import GenerateConfig, GenerationError, Sampler
from sparse_update.generation.compiled import engine, library
from sparse_update.generation.uses import ROW_STEP, by_rows, read_key, row_key
from sparse_update.transformer import ModelConfig, Transformer

COMPILER = next((name for name in building.COMPILERS if building.shutil.which(name)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
VOCAB = 50


def build(**kw):
    torch.manual_seed(0)
    shape = {"width": 32, "layers": 2, "heads": 4, "context": 160, "vocab_size": VOCAB}
    model = Transformer(ModelConfig(**{**shape, **kw}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model


def prompts(count, longest=120, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(1, longest + 1)) for _ in range(count)]


@needs_compiler
@pytest.mark.parametrize(
    "shape",
    [
        {},  # heads of 8: half a vector
        {"width": 64, "heads": 4, "vocab_size": 256},
        {"width": 96, "heads": 3, "hidden_ratio": 3, "tie_embeddings": True},
        {"width": 24, "heads": 2, "hidden_ratio": 1, "activation": "relu"},  # neither width nor hidden width whole vectors
        {"width": 20, "heads": 1, "layers": 1},
    ],
)
@pytest.mark.parametrize("settings", [{"n": 5}, {"n": 3, "temperature": 0.6, "top_p": 0.7}, {"temperature": 0.0}])
def test_the_same_outputs_as_torch(shape, settings):
    model, asked = build(**shape), prompts(15)
    ours, plain = (
        Sampler(model, GenerateConfig(new_tokens=20, engine=name, **settings), stop=[3, 9]).sample(asked)
        for name in ("c", "torch")
    )
    np.testing.assert_array_equal(ours.lengths_R, plain.lengths_R)
    np.testing.assert_array_equal(ours.tokens_RN, plain.tokens_RN)
    np.testing.assert_array_equal(ours.stopped_R, plain.stopped_R)
    for name in ("logp_RN", "drawn_logp_RN", "entropy_RN"):
        np.testing.assert_allclose(getattr(ours, name), getattr(plain, name), atol=2e-5, err_msg=name)
    assert ours.needed_flops == plain.needed_flops == ours.flops < plain.flops


@needs_compiler
def test_a_prompt_read_at_once_gives_the_bits_of_one_token_after_the_other():
    """The likeliest tokens after a prompt, and the same text with some of them moved into the prompt."""
    model, (prompt,) = build(width=48, heads=3), prompts(1, seed=3)
    whole = Sampler(model, GenerateConfig(new_tokens=30, temperature=0.0)).sample([prompt])
    for moved in (1, 7, 22):
        longer = np.concatenate((prompt, whole.tokens_RN[0, :moved]))
        rest = Sampler(model, GenerateConfig(new_tokens=30 - moved, temperature=0.0)).sample([longer])
        assert rest.tokens_RN[0].tobytes() == whole.tokens_RN[0, moved:].tobytes()
        assert rest.logp_RN[0].tobytes() == whole.logp_RN[0, moved:].tobytes()
        assert rest.entropy_RN[0].tobytes() == whole.entropy_RN[0, moved:].tobytes()


@needs_compiler
def test_threads_and_tiles_change_nothing():
    model, asked = build(), prompts(9)
    whole = Sampler(model, GenerateConfig(new_tokens=12, n=7), stop=range(5)).sample(asked)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        shared = Sampler(model, GenerateConfig(new_tokens=12, n=7, tile_rows=8), stop=range(5)).sample(asked)
    finally:
        torch.set_num_threads(before)
    for name in ("tokens_RN", "lengths_R", "logp_RN", "drawn_logp_RN", "entropy_RN", "stopped_R"):
        assert getattr(whole, name).tobytes() == getattr(shared, name).tobytes()


@needs_compiler
def test_frequencies_are_the_probabilities():
    model = build(width=16, heads=1)
    found = Sampler(model, GenerateConfig(new_tokens=1, n=20000, temperature=1.3)).sample([[5, 6, 7]])
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([[5, 6, 7]]))[0, -1] / 1.3, 0).numpy()
    counts = np.bincount(found.tokens_RN[:, 0], minlength=VOCAB)
    often = expected * 20000 >= 5
    chi = ((counts - 20000 * expected) ** 2 / (20000 * expected))[often].sum()
    assert chi < 90  # 49 degrees of freedom at most: p > 0.0003


def test_without_a_compiler_torch_gives_the_same_tokens_on_the_same_clock(monkeypatch):
    model, asked = build(), prompts(4)
    cfg = GenerateConfig(new_tokens=9, n=3)
    first = Sampler(model, cfg, stop=[1])
    expected = first.sample(asked)
    library.library.cache_clear()
    try:
        monkeypatch.setenv("PATH", "")
        second = Sampler(model, cfg, stop=[1])
        with pytest.warns(UserWarning, match=r"^no C compiler is installed .*; so sampling runs in plain torch"):
            found = second.sample(asked)
        np.testing.assert_array_equal(found.tokens_RN, expected.tokens_RN)
        assert second.uses == first.uses
        with pytest.raises(GenerationError, match=r"engine = c cannot sample .* no C compiler"):
            Sampler(model, GenerateConfig(engine="c"))
    finally:
        library.library.cache_clear()


def test_what_the_loops_cannot_take():
    for model in (build().double(), build(layers=0), build().bfloat16()):
        assert engine.why_not(model) is not None
        with pytest.raises(GenerationError, match="engine = c cannot sample"):
            Sampler(model, GenerateConfig(engine="c"))
        assert len(Sampler(model, GenerateConfig(new_tokens=2)).sample([[1, 2]])) == 1


def test_uses_are_counted_as_one_by_one():
    asked, made = [3, 40, 31], [[1, 2, 40], [5, 1, 1], [64, 2, 3]]
    expected = Counter(map(read_key, asked))
    for prompt, lengths in zip(asked, made, strict=True):
        for length in lengths:
            expected.update(row_key(prompt + token) for token in range(1, length))
    assert by_rows(asked, made) == expected
    assert row_key(ROW_STEP) != row_key(ROW_STEP + 1) == row_key(2 * ROW_STEP)


@needs_compiler
def test_exponentials_are_right_to_three_ulp(tmp_path):
    body = "for (i64 i = 0; i < n; i += 16) store(x + i, exp16(load(x + i)));"
    source = f'#include "decoder.h"\nvoid each(float *x, i64 n) {{ {body} }}'
    (tmp_path / "each.c").write_text(source)
    made = tmp_path / "each.so"
    flags = [*building.FLAGS, f"-I{library.SOURCES.sources}", str(tmp_path / "each.c"), "-o", str(made)]
    building.subprocess.run([COMPILER, *flags], check=True, timeout=120)
    x = np.concatenate((np.linspace(-86.9, 0, 160000), np.linspace(0, 80, 16000))).astype(np.float32)
    found = x.copy()
    ctypes.CDLL(str(made)).each(ctypes.c_void_p(found.ctypes.data), ctypes.c_int64(len(x)))
    expected = np.exp(x.astype(np.float64))
    assert np.abs(found / expected - 1).max() < 3 * 2**-23
    ends = np.array([-np.inf, -88, -1e30, 0] * 4, dtype=np.float32)
    ctypes.CDLL(str(made)).each(ctypes.c_void_p(ends.ctypes.data), ctypes.c_int64(16))
    assert ends.tolist() == [0, 0, 0, 1] * 4
