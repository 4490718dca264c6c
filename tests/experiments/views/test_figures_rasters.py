"""Rasters, histograms and heat maps draw what they were given, and say what they left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.views.live import BlockUpdates, block_of, moved
from experiments.views.rasters import MOST_COLUMNS, blocks_figure, raster_figure, surprise_figure
from sparse_update.growth.blocks import cut_to, grow_to
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.subset import Active, Part, Subset, SubsetConfig


def test_every_message_is_a_dot_coloured_by_sign() -> None:
    messages_TN = torch.tensor([[1, 0, -3], [0, 0, 0], [2, 5, 0]])
    picture = raster_figure({"fc1": messages_TN, "batched": messages_TN[None].repeat(2, 1, 1)}, "a token")
    assert len(picture.axes) == 2
    up, down = picture.axes[0].collections
    assert {tuple(map(int, xy)) for xy in up.get_offsets()} == {(0, 0), (2, 0), (2, 1)}
    assert [tuple(map(int, xy)) for xy in down.get_offsets()] == [(0, 2)]
    assert "3 neurons" in picture.axes[0].get_ylabel()
    assert "44.4% active" in picture.axes[0].get_ylabel()


def test_many_neurons_are_thinned_and_it_is_said() -> None:
    picture = raster_figure({"wide": np.ones((5, 1000), dtype=int)})
    assert "1,000 neurons (64 drawn)" in picture.axes[0].get_ylabel()
    assert len(picture.axes[0].collections[0].get_offsets()) == 5 * 64
    with pytest.raises(ValueError, match="record spikes first"):
        raster_figure({})
    with pytest.raises(ValueError, match=r"population 'x': messages of shape \(3,\)"):
        raster_figure({"x": np.zeros(3)})


def test_surprise_counts_what_it_cannot_draw() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, float("nan")])
    ax = surprise_figure(scores).axes[0]
    assert sum(patch.get_height() for patch in ax.patches) == 4
    assert "n = 4, 1 not finite" in ax.get_title(loc="left")
    assert surprise_figure([float("inf")]).axes[0].patches == [] or not surprise_figure([float("inf")]).axes[0].patches


def test_the_heat_map_holds_the_shares() -> None:
    picture = blocks_figure([10, 20, 30], {"a": [0.0, 0.5, 1.0], "b": [1.0, 1.0, 1.0]})
    grid = np.asarray(picture.axes[0].collections[0].get_array()).reshape(2, 3)
    assert grid.tolist() == [[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]]
    many = blocks_figure(list(range(1, 2001)), {"a": [float(i % 2) for i in range(2000)]})
    grid = np.asarray(many.axes[0].collections[0].get_array()).ravel()
    assert len(grid) == MOST_COLUMNS
    assert grid.mean() == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="must rise"):
        blocks_figure([2, 1], {"a": [0.0, 0.0]})
    with pytest.raises(ValueError, match="2 steps, but blocks have"):
        blocks_figure([1, 2], {"a": [0.0]})


def test_blocks_are_named_and_their_shares_add_up() -> None:
    assert block_of("blocks.3.attn.q.weight") == "blocks.3.attn"
    assert block_of("blocks.0.norm1.weight") == "blocks.0.norm1"
    assert block_of("embed.weight") == "embed"
    model = Transformer(ModelConfig(vocab_size=32, width=16, layers=2, heads=2, context=16))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert set(moved(shapes, Active.everything(model)).values()) == {1.0}
    some = Active(
        {
            "blocks.0.attn.q.weight": (Part(0, 0, 8),),
            "blocks.0.attn.k.weight": (Part(1, 0, 16, "look"),),
            "blocks.1.mlp.fc1.weight": (Part(0, 0, shapes["blocks.1.mlp.fc1.weight"][0], "sign"),),
        },
        0,
    )
    found = moved(shapes, some)
    assert found["blocks.0.attn"] == pytest.approx(0.5 / 4)  # half of one of four square matrices; a look moves nothing
    assert found["blocks.1.mlp"] == pytest.approx(0.5)
    assert found["embed"] == 0.0


def test_the_map_follows_a_rotating_choice() -> None:
    model = Transformer(ModelConfig(vocab_size=32, width=16, layers=3, heads=2, context=16))
    subset = Subset(model, SubsetConfig(name="l", kind="layers", active_layers=1, policy="rotate"), 0)
    updates = BlockUpdates(model)
    seen = []
    for turn in range(3):
        updates.note(10 * (turn + 1), subset.active)
        updates.note(10 * (turn + 1), subset.active)  # an evaluation at the step of a report: once
        subset.advance(None)
    assert updates.steps == [10, 20, 30]
    for i in range(3):
        seen.append([block for block in (0, 1, 2) if updates.shares[f"blocks.{block}.attn"][i] == 1.0])
    assert sorted(seen) == [[0], [1], [2]]
    assert updates.shares["embed"] == [1.0, 1.0, 1.0]
    assert len(updates.figure().axes) == 2


def test_the_map_of_a_model_that_grows_shows_new_blocks_unmoved_before() -> None:
    model = Transformer(ModelConfig(vocab_size=32, width=16, layers=3, heads=2, context=16))
    cut_to(model, 1)
    updates = BlockUpdates(model)
    updates.note(10, Active.everything(model))
    grow_to(model, 3, "zero", 0)
    updates.note(20, Active.everything(model))
    assert updates.shares["blocks.0.mlp"] == updates.shares["embed"] == [1.0, 1.0]
    assert updates.shares["blocks.1.attn"] == updates.shares["blocks.2.mlp"] == [0.0, 1.0]
    assert len(updates.figure().axes) == 2
