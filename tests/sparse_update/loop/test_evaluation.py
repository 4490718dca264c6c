"""Held-out loss split by difficulty and by document: the parts against sums by hand, and the whole against their mean."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_update.loop.evaluation import by_difficulty, by_document, evaluate, surprise_of, token_losses
from sparse_update.transformer import ModelConfig, Transformer

MODEL = {"width": 16, "layers": 1, "heads": 2, "context": 16, "vocab_size": 32, "attention": "explicit"}


def test_the_parts_are_quarters_from_easy_to_hard():
    surprise = torch.tensor([[3.0, 1.0, 2.0, 0.5], [7.0, 6.0, 5.0, 4.0]])
    parts = by_difficulty(surprise * 10, surprise)
    assert [part["loss_nats"] for part in parts] == [7.5, 25.0, 45.0, 65.0]
    assert [(part["surprise_from"], part["surprise_to"]) for part in parts] == [(0.5, 1), (2, 3), (4, 5), (6, 7)]
    assert [part["tokens"] for part in parts] == [2, 2, 2, 2]


def test_documents_are_summed_by_token_and_those_without_any_are_left_out():
    loss, document = torch.tensor([[1.0, 2.0], [4.0, 6.0]]), torch.tensor([[0, 0], [0, 2]])
    found = by_document(loss, document, ("a", "b", "c"))
    assert found == {"a": {"loss_nats": pytest.approx(7 / 3), "tokens": 3}, "c": {"loss_nats": 6.0, "tokens": 1}}


def test_the_whole_is_the_mean_of_its_parts():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**MODEL))
    windows = torch.randint(0, 32, (70, 17))
    loss = token_losses(model, windows)
    assert loss.shape == (70, 16)
    parts = by_difficulty(loss, torch.rand(70, 16))
    mean = sum(part["loss_nats"] * part["tokens"] for part in parts) / loss.numel()
    assert mean == pytest.approx(evaluate(model, windows), abs=1e-6)
    assert model.training


def test_tokens_that_training_text_foretells_are_easy():
    training = torch.arange(4000) % 7
    windows = torch.stack((torch.arange(17) % 7, torch.tensor([(i * i) % 31 for i in range(17)])))
    easy, hard = surprise_of(windows, training, 32)[:, 8:].mean(1)
    assert easy < 0.05
    assert hard > math.log(32)
