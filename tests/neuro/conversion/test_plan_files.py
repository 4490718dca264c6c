"""A plan folder whose plan.json was changed gives a plan of the declared types or one typed error, at every place."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import neuro
from neuro.conversion.plan import Plan, PlanFileError, load_plan
from tests.neuro.graph.test_damaged_files import ODD, places


def test_every_place_of_a_plan_changed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(4, 6)
    plan = neuro.convert(module, neuro.calibrate(module, [x]), neuro.analyse(module, x))
    document = json.loads((neuro.save_plan(plan, tmp_path) / "plan.json").read_text())
    messages = []
    for *way, last in places(document):
        for odd in (*ODD, "../elsewhere"):
            changed = copy.deepcopy(document)
            inner = changed
            for key in way:
                inner = inner[key]
            inner[last] = odd
            (tmp_path / "plan.json").write_text(json.dumps(changed))
            try:
                found = load_plan(tmp_path)
            except PlanFileError as error:
                messages.append(str(error).removeprefix(str(tmp_path)))
            else:
                assert isinstance(found, Plan)
                assert type(odd) in (int, float, str, list, dict)
    assert len(messages) > 500
    assert max(map(len, messages)) < 600


def test_a_plan_without_the_prepared_layers_is_read_as_before(tmp_path: Path) -> None:
    module, x = nn.Linear(4, 4), torch.randn(3, 4)
    plan = neuro.convert(module, neuro.calibrate(module, [x]), neuro.analyse(module, x))
    path = neuro.save_plan(plan, tmp_path) / "plan.json"
    document = json.loads(path.read_text())
    del document["prepared"]
    path.write_text(json.dumps(document))
    assert load_plan(tmp_path).prepared == ()
    assert torch.equal(neuro.deploy(module, load_plan(tmp_path))(x), neuro.deploy(module, plan)(x))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("n_out", -1, "n_out is -1; at least 1 is needed"),
        ("weight_bits", 0, "weight_bits is 0; at least 1 is needed"),
        ("rows_per_token", float("inf"), "Infinity is no number of JSON"),
        ("input_scale", float("nan"), "NaN is no number of JSON"),
        ("name", {}, "segment name {} is not usable"),
    ],
)
def test_impossible_numbers_in_a_plan_are_refused(name: str, value: object, said: str, tmp_path: Path) -> None:
    module, x = nn.Linear(4, 4), torch.randn(3, 4)
    plan = neuro.convert(module, neuro.calibrate(module, [x]), neuro.analyse(module, x))
    path = neuro.save_plan(plan, tmp_path) / "plan.json"
    document = json.loads(path.read_text())
    document["segments"][0][name] = value
    path.write_text(json.dumps(document))
    with pytest.raises(PlanFileError) as caught:
        load_plan(tmp_path)
    assert said in str(caught.value)
