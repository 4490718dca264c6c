"""Every signal by its name: shapes, exact resume, refusals. One canonical setting each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparse_update.data.records import Batch
from sparse_update.loop.checkpoint import save_checkpoint
from sparse_update.nested import pack, unpack
from sparse_update.signals import (
    SIGNALS,
    Signal,
    SignalContext,
    SignalError,
    make_signal,
    register_signal,
    signal_names,
    signal_options,
)
from sparse_update.transformer import ModelConfig, Transformer

V, T = 40, 16
SETTINGS = {"tiny": {"width": 8, "heads": 1}, "lagging": {"every_steps": 2}, "early_exit": {"layers": 1}}
SETTINGS |= {"ngram": {"bits": 12}, "novelty": {"bits": 12}, "fresh": {"bits": 12, "capacity": 64}}
SETTINGS |= {"duplicates": {"capacity": 64, "bits": 10}, "learning_progress": {"between": "visits"}}


@pytest.fixture
def context(tmp_path):
    torch.manual_seed(0)
    shape = {"width": 16, "layers": 2, "heads": 2, "context": T, "vocab_size": V, "attention": "explicit"}
    reference = Transformer(ModelConfig(**shape))
    save_checkpoint(tmp_path / "reference", dict(reference.state_dict()), {}, {"model": shape})
    model = Transformer(ModelConfig(**shape))
    torch.nn.init.normal_(model.head.weight)
    return SignalContext(
        V, T, model=model, seed=3, reference=str(tmp_path / "reference"), known_tokens=torch.arange(200) % V
    )


def batches(count, windows=12):
    generator = torch.Generator().manual_seed(1)
    for i in range(count):
        number = torch.arange(i % 2 * windows, (i % 2 + 1) * windows)
        tokens = torch.randint(0, V, (windows, T + 1), generator=generator)
        yield Batch(tokens, torch.zeros(windows, dtype=torch.int8), number)


def view(batch):
    generator = torch.Generator().manual_seed(int(batch.tokens.sum()))
    loss = torch.rand(len(batch.tokens), T, generator=generator)
    entries = {"entropy": loss / 2, "gradient_norm": loss * 3, "update": torch.stack((loss, loss + 1))}
    return SimpleNamespace(loss_BT=loss, signals=entries)


def use(signal, batch, step):
    """One use as a gate would; returns what came out, as a flat list of tensors."""
    if signal.needs == "tokens":
        out = [signal.score(batch)]
    elif signal.needs == "forward":
        out = [signal.read(view(batch), batch)]
    elif signal.name == "sample_norm":
        with signal.tap():
            signal.context.model(batch.tokens[:, :-1]).square().sum().backward()
        out = [signal.norms()]
    else:
        out = list(signal.take({"a": torch.full((5, 3), 1.0 + step), "b": torch.ones(2)}).values())
    signal.observe(batch, view(batch).loss_BT, step / 10)
    with torch.no_grad():  # the model moves on, so that copies of it grow old
        signal.context.model.head.weight.mul_(1.1)
    return out


@pytest.mark.parametrize("name", sorted(SIGNALS))
def test_every_signal_has_its_shape_and_resumes_bit_for_bit(name, context):
    signal = make_signal(name, context, SETTINGS.get(name))
    data = list(batches(6))
    for step in range(3):
        for score in use(signal, data[step], step):
            assert score.dtype == torch.float32
            assert not score.isnan().any()
            assert not score.requires_grad
            if signal.level != "block":
                assert score.shape == ((12, T) if score.dim() == 2 else (12,))
                assert (score.dim() == 2) == (signal.level == "token") or name == "random"
    weights = {k: v.clone() for k, v in context.model.state_dict().items()}
    tensors, outline = pack(signal.state_dict())
    tensors = {k: v.clone() for k, v in tensors.items()}
    expected = [use(signal, data[step], step) for step in range(3, 6)]
    context.model.load_state_dict(weights)
    other = make_signal(name, context, SETTINGS.get(name))
    other.load_state_dict(unpack(outline, tensors))
    for step, wanted in zip(range(3, 6), expected, strict=True):
        for a, b in zip(use(other, data[step], step), wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", signal_names("tokens"))
def test_probes_run_and_cost_grows_with_windows(name, context):
    signal = make_signal(name, context, SETTINGS.get(name))
    signal.probe(5)()
    if signal.cost_key:
        assert 0 < signal.flops(10) <= signal.flops(20)
        assert signal.cost_key.startswith(f"signal[{name}")
    else:
        assert signal.flops(10) == 0


def test_unknown_names_and_options_are_refused_with_the_list(context):
    with pytest.raises(SignalError, match=r"'surprize'.*early_exit.*ngram"):
        make_signal("surprize", context)
    with pytest.raises(SignalError, match=r"order.*orders, bits, strength"):
        make_signal("ngram", context, {"order": 3})
    assert signal_options("duplicates")[:2] == ["method", "shingle"]


@pytest.mark.parametrize("name", ["early_exit", "excess", "lagging", "sample_norm"])
def test_what_needs_the_model_says_so(name):
    with pytest.raises(SignalError, match=rf"'{name}' needs model"):
        make_signal(name, SignalContext(V, T))


def test_a_user_registers_a_signal_and_cannot_take_a_name():
    @register_signal("length_of_digits")
    class Mine(Signal):
        level = "sequence"

        def __init__(self, context, digit: int = 7):
            super().__init__(context)
            self.digit = digit

        def score(self, batch):
            return (batch.tokens == self.digit).float().sum(1)

    try:
        batch = next(batches(1))
        found = make_signal("length_of_digits", SignalContext(V, T), {"digit": 4}).per_window(batch)
        assert found.tolist() == [row.count(4) for row in batch.tokens.tolist()]
        with pytest.raises(SignalError, match="is taken by"):
            register_signal("ngram")(type("Other", (Signal,), {}))
        with pytest.raises(SignalError, match="level"):
            register_signal("odd")(type("Odd", (Signal,), {"level": "page"}))
    finally:
        SIGNALS.pop("length_of_digits", None)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiny", {"lr": 0.0}),
        ("tiny", {"train_share": 0.0}),
        ("early_exit", {"layers": 9}),
        ("stale_loss", {"by": "page"}),
        ("learning_progress", {"between": "lines"}),
        ("lagging", {"every_steps": 0}),
        ("duplicates", {"method": "guess"}),
        ("duplicates", {"shingle": 99}),
        ("duplicates", {"bins": 7, "band": 2}),
        ("novelty", {"known": False, "learnt": False}),
        ("fisher", {"decay": 1.0}),
        ("block_energy", {"block_rows": 0}),
        ("sample_norm", {"layers": "nothing"}),
    ],
)
def test_bad_options_are_refused(name, options, context):
    with pytest.raises(SignalError, match=name):
        make_signal(name, context, options)


def test_asked_at_the_wrong_moment(context):
    batch = next(batches(1))
    with pytest.raises(SignalError, match="before the forward"):
        make_signal("token_loss", context).score(batch)
    with pytest.raises(SignalError, match="out of the forward"):
        make_signal("ngram", context).read(view(batch), batch)
    with pytest.raises(SignalError, match=r"'excess_entropy' needs 'entropy'"):
        make_signal("excess_entropy", context).read(SimpleNamespace(loss_BT=torch.zeros(2, T), signals={}), batch)
    with pytest.raises(SignalError, match="document"):
        make_signal("stale_loss", context, {"by": "document"}).score(
            SimpleNamespace(tokens=batch.tokens, window=batch.window)
        )
