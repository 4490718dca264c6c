"""What the gate refuses on any module, and what it says."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from sparse_update.library.attach import attach
from sparse_update.library.settings import AttachConfig
from sparse_update.library.tracking.rows import GateError
from sparse_update.signals import SignalError
from tests.sparse_update.library.models import B, T, V, data, loader, ours, token_losses


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beckward": {}}, "beckward is no setting.*before, backward"),
        ({"backward": {"rate": 1}}, r"backward\.rate is no setting"),
        ({"backward": {"unit": "token", "keep_fraction": 0.0}}, r"backward\.keep_fraction = 0\.0"),
        ({"backward": {"unit": "token", "keep_fraction": "half"}}, "must be of type float"),
        ({"backward": {"keep_fraction": 0.5}}, "needs backward.unit"),
        ({"backward": {"unit": "row"}}, "one of none, sequence, token"),
        ({"backward": {"unit": "sequence", "below": "exact"}}, "exact"),
        ({"backward": {"unit": "token", "policy": "cdf"}}, "fixed shape"),
        ({"backward": {"unit": "token", "policy": "nope"}}, "is not known: one of"),
        ({"backward": {"unit": "token", "signal": "ngram"}}, r"before\.signal"),
        ({"backward": {"unit": "token", "signal": "nope"}}, "no signal 'nope'"),
        ({"before": {"signal": "excess_entropy"}}, r"needs entropy.*backward\.signal"),
        ({"before": {"signal": "stale_loss"}}, r"before\.index"),
        ({"before": {"signal": "ngram", "pool": 2, "keep_fraction": 0.1}}, "at least one of them kept"),
        ({"before": {"signal": "ngram", "policy": "soft", "replay": 0.5}}, r"leave before\.replay at 0"),
        ({"before": {"signal": "ngram", "policy": "importance"}}, "some sequences twice"),
        ({"weights": {"kind": "rows"}}, r"subset\.kind"),
        ({"weights": {"kind": "blocks", "policy": "energetic"}}, r"subset\.policy"),
        ({"weights": {"active_fraction": 0.5}}, r"needs subset\.kind"),
        ({"weights": {"kind": "blocks", "inactive": "sign8"}}, "own optimizer only"),
        ({"weights": {"kind": "layers", "inactive": "sign"}}, "take kind 'blocks'"),
        ({"weights": {"kind": "blocks", "inactive": "sign", "policy": "energy"}}, "policy 'random' or 'rotate'"),
        ({"sign_scale": 0.0}, "sign_scale"),
        ({"weights": {"kind": "blocks", "embedding_strips": True}}, "stay whole"),
        ({"weights": {"kind": "blocks", "active_fraction": 2.0}}, r"\(0, 1\]"),
        ({"exclude": "head"}, "a list of module names"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, message):
    model = ours()
    with pytest.raises(ValueError, match=message):
        attach(model, config)
    attach(model).detach()  # nothing was left on it


def test_models_that_cannot_be_gated_are_refused():
    with pytest.raises(GateError, match=r"no nn\.Linear"):
        attach(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(GateError, match="all excluded"):
        attach(nn.Sequential(nn.Linear(4, 4)), {"exclude": ["*"]})
    with pytest.raises(GateError, match="ModuleList"):
        attach(nn.Sequential(nn.Linear(4, 4)), {"weights": {"kind": "layers"}})
    model = ours()
    gate = attach(model)
    with pytest.raises(GateError, match="a gate on this model already"):
        attach(model)
    gate.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on first use
        compiled = torch.compile(model)
    with pytest.raises(GateError, match="attach to the module first"):
        attach(compiled)
    model.head.forward = model.head.forward
    with pytest.raises(GateError, match="head: its forward was exchanged already"):
        attach(model)


def test_batches_that_do_not_fit_are_refused():
    model = ours()
    x, y = data()
    gate = attach(model, {"backward": {"unit": "sequence", "keep_fraction": 0.25}})
    with pytest.raises(ValueError, match="less than one sequence"):
        gate.loss(model(x[:2]), y[:2])
    with pytest.raises(ValueError, match="are not"):
        gate.loss(model(x), y[:, 1:])
    gate.detach()
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5, "signal": "update"}})
    with pytest.raises(SignalError, match="do not show"):
        gate.loss(model(x), y)
    gate.detach()
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5, "signal": "excess_entropy"}})
    with pytest.raises(SignalError, match="needs logits"):
        gate.loss(token_losses(model, x, y))
    gate.loss(model(x), y).backward()
    gate.detach()
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5, "policy": "half_again"}})
    with pytest.raises(ValueError, match="'half_again' gave rows"):
        gate.loss(model(x), y)
    gate.detach()
    gate = attach(model, {"before": {"signal": "ngram", "pool": 32, "keep_fraction": 0.5}})
    with pytest.raises(ValueError, match="ended after 16 sequences"):
        list(gate.filter(loader(16)))
    with pytest.raises(ValueError, match="pad them to one length"):
        list(attach(ours(), gate.cfg).filter([x, x[:, 1:]]))
    with pytest.raises(ValueError, match="one form is needed"):
        list(gate.filter([x]))
    with pytest.raises(ValueError, match="whole numbers"):
        list(gate.filter([torch.rand(4, 4)]))
    gate.detach()


def test_a_model_that_was_moved_under_the_gate_is_noticed():
    model = ours()
    gate = attach(model, {"weights": {"kind": "blocks", "active_fraction": 0.5}})
    model.double()
    x, y = data()
    with pytest.raises(GateError, match="before attach"):
        gate.loss(model(x), y)


def test_cross_attention_is_left_whole_or_refused():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.att = nn.MultiheadAttention(16, 2, batch_first=True)
            self.head = nn.Linear(16, V)

        def forward(self, x, z):
            return self.head(self.att(x, z, z, need_weights=False)[0])

    torch.manual_seed(0)
    model = Cross()
    x, z, y = torch.randn(B, T, 16), torch.randn(B, T, 16), data()[1]
    gate = attach(model, {"backward": {"unit": "sequence", "keep_fraction": 0.5}})
    gate.loss(model(x, z), y).backward()
    assert gate.report()["rows_not_found"] == ["att.in_proj"]
    gate.detach()
    gate = attach(model, {"weights": {"kind": "blocks", "active_fraction": 0.5}})
    with pytest.raises(GateError, match=r"exclude = \['att'\]"):
        model(x, z)


def test_the_config_is_a_dataclass_too():
    assert AttachConfig.from_dict({"weights": {"kind": "blocks"}, "exclude": ["a.*"]}).exclude == ("a.*",)
