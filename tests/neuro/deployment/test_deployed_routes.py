"""Every route deployed on ordinary modules: nothing half-converted, saved and loaded, hooks and tied weights kept."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import neuro
from neuro.conversion.plan import PlanFileError
from sparse_update.transformer import ModelConfig, Transformer

CONFIGS = {
    "graded": neuro.GradedConfig(),
    "sigma_delta": neuro.SigmaDeltaConfig(2, 3),
    "rate": neuro.RateConfig(64),
    "rate, hard": neuro.RateConfig(16, reset="hard"),
    "rate, analogue": neuro.RateConfig(64, input_code="analogue", per_channel=True),
}


def sequential() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(9)
    layers = [nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).eval(), torch.randn(4, 25, 12)


def encoder() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(10)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return neuro.split_attention(nn.TransformerEncoder(layer, 2).eval()), torch.randn(3, 7, 16)


def language_model(**changes: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(11)
    config = {"width": 16, "layers": 2, "heads": 2, "context": 8, "vocab_size": 32, "activation": "relu", **changes}
    model = Transformer(ModelConfig(**config))  # type: ignore[arg-type]
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.2)
    return model.eval(), torch.randint(0, 32, (3, 8))


def plan_of(module: nn.Module, x: Tensor, route: str) -> neuro.Plan:
    return neuro.convert(module, neuro.calibrate(module, [x]), neuro.analyse(module, x), CONFIGS[route])


def identical(a: neuro.Plan, b: neuro.Plan) -> bool:
    def bare(plan: neuro.Plan) -> neuro.Plan:
        return dataclasses.replace(
            plan,
            segments=tuple(dataclasses.replace(s, graph=None) for s in plan.segments),  # type: ignore[arg-type]
        )

    from neuro.graph import identical as same_graph

    graphs = zip(a.segments, b.segments, strict=True)
    return bare(a) == bare(b) and all(same_graph(one.graph, two.graph) for one, two in graphs)


@pytest.mark.parametrize("route", CONFIGS)
@pytest.mark.parametrize("build", [sequential, encoder, language_model])
def test_every_route_runs_ordinary_modules(build, route: str, tmp_path: Path) -> None:
    module, x = build()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    plan = plan_of(module, x, route)
    assert plan.route == route.partition(",")[0]
    deployed = neuro.deploy(module, plan)
    out, wanted = deployed(x), module(x).detach()
    error = float((out - wanted).square().mean() / wanted.square().mean())
    assert error < (0.5 if "hard" in route else 0.05), error
    twin = neuro.deploy(module, plan, "quantised")(x)
    assert float((twin - wanted).square().mean() / wanted.square().mean()) < 0.05
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    counts = deployed.counts()
    assert {c.layer for c in counts if not c.host} >= set(plan.modules)
    assert sum(c.synops for c in counts) > 0
    assert plan.table()

    folder = neuro.save_deployed(deployed, tmp_path / "saved")
    assert not list(folder.glob("*.pkl")) + list(folder.glob("*.pt"))
    back = neuro.load_deployed(folder, module)
    assert identical(back.plan, plan)
    assert (back.backend, torch.equal(back(x), out)) == ("fixed_point", True)
    assert back.counts() == counts


def test_a_saved_model_fits_only_its_module(tmp_path: Path) -> None:
    module, tokens = language_model()
    neuro.save_deployed(neuro.deploy(module, plan_of(module, tokens, "sigma_delta"), "quantised"), tmp_path / "saved")
    assert neuro.load_deployed(tmp_path / "saved", module).backend == "quantised"
    host, mapped = copy.deepcopy(module), copy.deepcopy(module)
    with torch.no_grad():
        host.blocks[1].norm1.weight[3] += 1e-3  # type: ignore[union-attr, index]
        mapped.blocks[0].mlp.fc1.weight[0, 0] += 1e-3  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match=r"host tensor 'blocks\.1\.norm1\.weight' has other values than the saved one"):
        neuro.load_deployed(tmp_path / "saved", host)
    with pytest.raises(ValueError, match=r"layer 'blocks\.0\.mlp\.fc1' holds other weights"):
        neuro.load_deployed(tmp_path / "saved", mapped)
    with pytest.raises(FileExistsError, match="already holds a plan"):
        neuro.save_deployed(neuro.deploy(module, plan_of(module, tokens, "graded")), tmp_path / "saved")
    record = tmp_path / "saved" / "deployed.json"
    for text, message in (
        (json.dumps({**json.loads(record.read_text()), "schema": 9}), "schema 9, this version reads 1"),
        ('{"schema": 1}', "damaged: KeyError"),
        ("{", "not readable as JSON"),
    ):
        record.write_text(text)
        with pytest.raises(PlanFileError, match=message):
            neuro.load_deployed(tmp_path / "saved", module)
    record.unlink()
    with pytest.raises(PlanFileError, match=r"holds no deployed\.json; save_deployed"):
        neuro.load_deployed(tmp_path / "saved", module)


def test_a_plan_file_of_before_the_routes_still_loads(tmp_path: Path) -> None:
    module, x = sequential()
    ranges, report = neuro.calibrate(module, [x]), neuro.analyse(module, x)
    plan = neuro.convert(module, ranges, report, neuro.GradedConfig(scales="tensor"))  # there was nothing else then
    folder = neuro.save_plan(plan, tmp_path / "plan")
    document = json.loads((folder / "plan.json").read_text())
    for segment in document["segments"]:
        for later in ("code", "time_steps", "channel_scales", "weight_bits", "input_threshold", "hidden_threshold",
                      "sequence_dim", "reset", "input_code", "threshold_module"):  # fmt: skip
            segment.pop(later)
    (folder / "plan.json").write_text(json.dumps(document))
    old = neuro.load_plan(folder)
    assert [s.code for s in old.segments] == ["graded", "graded"]
    assert torch.equal(neuro.deploy(module, old)(x), neuro.deploy(module, plan)(x))


@pytest.mark.parametrize("route", CONFIGS)
def test_nothing_is_half_converted(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = sequential()
    module.train()
    ranges, report = neuro.calibrate(module, [x]), neuro.analyse(module, x)
    parts, before = dict(module.named_modules()), copy.deepcopy(module.state_dict())

    def untouched() -> bool:
        same = all(torch.equal(before[k], v) for k, v in module.state_dict().items())
        return same and dict(module.named_modules()) == parts and module.training and module[0].weight.requires_grad

    plan = neuro.convert(module, ranges, report, CONFIGS[route])
    half = dataclasses.replace(ranges, layers={k: v for k, v in ranges.layers.items() if k != "5"})
    with pytest.raises(ValueError, match="the calibration holds nothing for layer '5'"):
        neuro.convert(module, half, report, CONFIGS[route])
    assert untouched()
    strange = dataclasses.replace(plan.segments[-1], code="burst")
    with pytest.raises(ValueError, match="segment '5' has code 'burst'; known: graded, delta, rate"):
        neuro.deploy(module, dataclasses.replace(plan, segments=(*plan.segments[:-1], strange)))
    assert untouched()
    with torch.no_grad():
        module[5].weight[0, 0] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(ValueError, match="layer '5' has NaN or infinite weights"):
        neuro.convert(module, ranges, report, CONFIGS[route])


@pytest.mark.parametrize("route", CONFIGS)
def test_hooks_of_replaced_layers_and_tied_weights_are_kept(route: str) -> None:
    module, tokens = language_model(tie_embeddings=True)
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name in ("head", "blocks.0.mlp.fc1", "blocks.1.mlp.fc2"):
        layer = module.get_submodule(name)
        layer.register_forward_hook(lambda _m, _a, out, name=name: seen.append((name, tuple(out.shape))))
        layer.register_forward_pre_hook(lambda _m, args, name=name: seen.append((f"{name} in", tuple(args[0].shape))))
    plan = plan_of(module, tokens, route)
    assert any("tied weights" in note for note in plan.notes)
    deployed = neuro.deploy(module, plan)
    seen.clear()
    deployed(tokens)
    assert seen == [
        ("blocks.0.mlp.fc1 in", (3, 8, 16)),
        ("blocks.0.mlp.fc1", (3, 8, 64)),
        ("blocks.1.mlp.fc2 in", (3, 8, 64)),
        ("blocks.1.mlp.fc2", (3, 8, 16)),
        ("head in", (3, 8, 16)),
        ("head", (3, 8, 32)),
    ]
    assert deployed.module.embed.weight is not module.embed.weight  # type: ignore[union-attr]
    assert torch.equal(deployed.module.embed.weight, module.embed.weight)  # type: ignore[union-attr]
    assert module.head.weight is module.embed.weight  # type: ignore[union-attr]


def test_keeping_state_leaves_other_routes_alone() -> None:
    module, tokens = language_model()
    for route in ("graded", "rate"):
        deployed = neuro.deploy(module, plan_of(module, tokens, route))
        wanted = deployed(tokens)
        with deployed.keep_state() as same:
            assert same is deployed
            assert torch.equal(deployed(tokens), wanted)
            assert torch.equal(deployed(tokens[:1]), wanted[:1])
