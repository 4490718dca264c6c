"""A checkpoint's settings never make a model that is larger than its tensors, and what does not fit is one typed error."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_update.loop.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from sparse_update.loop.stored_model import stored_model, stored_shape
from sparse_update.transformer import ModelConfig, Transformer

CFG = ModelConfig(width=16, layers=2, heads=2, context=8, vocab_size=11)


def kept(folder: Path, **changed: Any) -> Path:
    torch.manual_seed(0)
    meta = {"model": {**asdict(CFG), **changed}}
    return save_checkpoint(folder / "kept", Transformer(CFG).state_dict(), {}, meta)


@pytest.mark.parametrize("tied", [False, True])
def test_what_was_saved_comes_back(tmp_path, tied):
    torch.manual_seed(1)
    cfg = ModelConfig(**{**asdict(CFG), "tie_embeddings": tied})
    model = Transformer(cfg)
    found = stored_model(load_checkpoint(save_checkpoint(tmp_path / "x", model.state_dict(), {}, {"model": asdict(cfg)})))
    tokens = torch.arange(8)[None]
    assert found.cfg == cfg
    assert torch.equal(found(tokens), model(tokens))


SIZES = {"width": 2**30, "layers": 10**9, "vocab_size": 10**12, "hidden_ratio": 10**9, "context": 10**12}


@pytest.mark.parametrize(("name", "value"), SIZES.items())
def test_settings_larger_than_the_tensors_are_refused_before_anything_is_built(tmp_path, monkeypatch, name, value):
    place = kept(tmp_path, **{name: value})
    monkeypatch.setattr(Transformer, "__init__", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(CheckpointError, match=name if name in ("layers", "context") else "settings"):
        stored_model(load_checkpoint(place))


@pytest.mark.parametrize(
    ("name", "value"),
    [("width", "16"), ("layers", True), ("heads", 3), ("surprise", 1), ("rotary_base", None)],
)
def test_settings_of_another_kind_are_refused_by_name(tmp_path, name, value):
    with pytest.raises(CheckpointError, match=name):
        stored_shape(load_checkpoint(kept(tmp_path, **{name: value})))


def test_tensors_that_are_missing_too_many_or_named_otherwise_are_refused(tmp_path):
    whole = Transformer(CFG).state_dict()
    fewer = {name: value for name, value in whole.items() if name != "blocks.1.attn.q.weight"}
    for number, held in enumerate((fewer, {**whole, "more": torch.zeros(1)}, {f"trunk.{n}": v for n, v in whole.items()})):
        place = save_checkpoint(tmp_path / str(number), held, {}, {"model": asdict(CFG)})
        with pytest.raises(CheckpointError, match="does not hold the model"):
            stored_model(load_checkpoint(place))
    trunk = stored_model(load_checkpoint(tmp_path / "2"), prefix="trunk.")
    assert torch.equal(trunk.embed.weight, whole["embed.weight"])
    with pytest.raises(CheckpointError, match="does not say which model"):
        stored_shape(load_checkpoint(save_checkpoint(tmp_path / "none", whole, {}, {})))
