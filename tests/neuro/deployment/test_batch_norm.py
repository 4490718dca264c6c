"""A batch norm behind a linear layer goes into that layer, where that is right."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import neuro
from neuro.analysis.preparation import FoldedNorm, prepared_copy


def trained(module):
    """In evaluation, with statistics and parameters that are not those of a new norm."""
    torch.manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d) and norm.running_var is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.2, 3.0)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return module.eval()


def folded(module):
    return [name for name, part in prepared_copy(module).named_modules() if isinstance(part, FoldedNorm)]


def test_norms_go_into_the_layers_before_them_and_the_rest_is_one_graph():
    first, second = nn.Linear(6, 16, bias=False), weight_norm(nn.Linear(16, 16))
    layers = [first, nn.BatchNorm1d(16), nn.ReLU(), second, nn.BatchNorm1d(16, affine=False), nn.ReLU(), nn.Linear(16, 3)]
    module = trained(nn.Sequential(*layers)).double()
    x = torch.randn(40, 6, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(prepared_copy(module)(x), module(x), rtol=1e-12, atol=1e-12)
        module, x = module.float(), x.float()
        wanted = module(x)
    report = neuro.analyse(module, x)
    assert report.preparation.layers == {
        "1": "Linear with BatchNorm1d behind it",
        "4": "Linear with BatchNorm1d behind it",
        "3": "parametrised Linear",
    }
    plan = neuro.convert(module, neuro.calibrate(module, [x]), report)
    assert [s.modules for s in plan.segments] == [("0", "3"), ("6",)]
    assert plan.host == ()
    deployed = neuro.deploy(module, plan)
    assert (deployed(x) - wanted).norm() < 0.02 * wanted.norm()
    assert sum(c.dense_macs for c in deployed.counts()) == 40 * (6 * 16 + 16 * 16 + 16 * 3)
    assert isinstance(module[1], nn.BatchNorm1d)  # the module itself is as it was


def test_the_report_says_what_folding_gains():
    module = trained(nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)))
    line = neuro.analyse(module, torch.randn(4, 6)).first_line()
    assert "with 1 x Linear with BatchNorm1d behind it as nn.Linear, 100.0% of the MACs" in line
    assert "with 2 host crossings per token instead of 4" in line


def test_a_norm_stays_where_its_layer_cannot_take_it_over():
    shared, tied = nn.Linear(6, 6), nn.Linear(6, 6)
    again = nn.Linear(6, 6)
    again.weight = tied.weight
    watched = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    watched[0].register_forward_hook(lambda *_: None)
    staying = [
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False)),
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.BatchNorm1d(6)),
        nn.Sequential(shared, nn.BatchNorm1d(6), shared),
        nn.Sequential(tied, nn.BatchNorm1d(6), again),
        nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 4)), nn.BatchNorm1d(2)),
        watched,
    ]
    x = torch.randn(5, 6)
    for module in staying:
        trained(module)
        assert folded(module) == []
        with torch.no_grad():
            assert torch.equal(prepared_copy(module)(x), module(x))


def test_a_norm_over_tokens_is_refused_and_not_computed_wrongly():
    module = trained(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))
    assert folded(module) == ["1"]
    with pytest.raises(ValueError, match=r"not for shape \(2, 6, 6\); flatten the rows"):
        prepared_copy(module)(torch.randn(2, 6, 6))
