"""Which weights are active: geometry, policies on planted energies, exploration, exact resume."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from sparse_update.nested import pack, unpack
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.places import POLICIES, Grid, explored, gaps, register_subset_policy
from sparse_update.weights.subset import Active, Part, Subset, SubsetConfig, choose

NAME = "blocks.1.mlp.fc1.weight"
NAMED = sorted(Path(configs.__file__).parent.rglob("subset/*.yaml"), key=lambda path: path.stem)


def build():
    torch.manual_seed(0)
    return Transformer(ModelConfig(width=16, layers=3, heads=2, context=12, vocab_size=23))


def gradients(model, active, energy=lambda name, shape: torch.ones(shape)):
    """Gradients of the active strips whose square is `energy`."""
    shapes = {n: p.shape for n, p in model.named_parameters()}
    return {n: tuple(part.of(energy(n, shapes[n]).sqrt()) for part in parts) for n, parts in active.parts.items()}


def run(subset, model, steps, start=0, **kw):
    """Active sets step by step."""
    seen = []
    for step in range(start, start + steps):
        if subset.due(step, step / 1000):
            subset.advance()
        seen.append(subset.active)
        subset.observe(gradients(model, subset.active, **kw), 2.0 + 0.1 * (step % 3))
    return seen


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 300), st.floats(0.01, 1.0), st.integers(1, 64), st.integers(1, 6), st.randoms(use_true_random=False))
def test_strips_are_disjoint_within_bounds_and_near_the_fraction(size, fraction, block, strips, rng):
    grid = Grid.of(size, fraction, block, strips)
    places = rng.sample(range(grid.count), grid.chosen)
    spans = grid.spans(places)
    assert len(spans) == grid.chosen <= strips
    assert all(b - a == grid.length for a, b in spans)
    assert spans[0][0] >= 0
    assert spans[-1][1] <= size
    assert all(first[1] <= second[0] for first, second in pairwise(spans))
    covered = sum(b - a for a, b in spans)
    assert sum(b - a for a, b in gaps(spans, size)) == size - covered
    assert abs(covered - fraction * size) <= min(block, size) * (strips + 0.5)
    assert covered == size or fraction < 1


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 200), st.floats(0.02, 1.0), st.integers(1, 32), st.integers(1, 5))
def test_turns_reach_every_row(size, fraction, block, strips):
    grid = Grid.of(size, fraction, block, strips)
    reached = torch.zeros(size, dtype=torch.bool)
    for place in range(grid.count):
        start, stop = grid.spans([place])[0]
        reached[start:stop] = True
    assert reached.all()


@pytest.mark.parametrize("kind", ["blocks", "block_columns"])
@pytest.mark.parametrize("strips", [1, 2])
def test_rotation_covers_every_matrix(kind, strips):
    model = build()
    cfg = SubsetConfig(kind=kind, active_fraction=0.25, block_rows=2, strips=strips, embedding_strips=True)
    covered = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    for turn in range(4):
        for name, parts in choose(model, cfg, turn, 0).parts.items():
            for part in parts:
                part.of(covered[name])[:] = True
    assert all(c.all() for c in covered.values())


@pytest.mark.parametrize("policy", ["energy", "fisher", "surprise"])
def test_planted_energy_is_found_and_kept_between_explorations(policy):
    model = build()
    cfg = SubsetConfig(
        kind="blocks", active_fraction=0.125, block_rows=8, policy=policy, change_every_steps=2, explore=0.25
    )
    subset = Subset(model, cfg, 0)

    def planted(name, shape):
        energy = torch.full(shape, 0.01)
        if name == NAME:
            energy[40:48] = 4.0
        return energy

    seen = run(subset, model, 160, energy=planted)
    picks = Counter(active.parts[NAME][0].start for active in seen[32::2])
    assert picks[40] == max(picks.values())
    assert 0.7 <= picks[40] / sum(picks.values()) < 1.0  # three choices in four, the rest explores
    assert set(picks) == set(range(0, 64, 8))  # and exploration has been everywhere


def test_without_exploration_a_running_fisher_keeps_to_its_block():
    """The known trap: what is not looked at cannot improve its score."""
    model = build()
    cfg = SubsetConfig(
        kind="blocks", active_fraction=0.125, block_rows=8, policy="fisher", change_every_steps=1, explore=0.0
    )
    subset = Subset(model, cfg, 0)
    early = {"hot": 8}

    def moving(name, shape):
        energy = torch.full(shape, 0.01)
        if name == NAME:
            energy[early["hot"] : early["hot"] + 8] = 4.0
        return energy

    run(subset, model, 20, energy=moving)
    early["hot"] = 40  # the information moves on
    late = run(subset, model, 40, start=20, energy=moving)
    assert {active.parts[NAME][0].start for active in late} == {8}
    explorer = Subset(model, SubsetConfig(**{**vars(cfg), "explore": 0.5}), 0)
    early["hot"] = 8
    run(explorer, model, 20, energy=moving)
    early["hot"] = 40
    late = run(explorer, model, 60, start=20, energy=moving)
    assert sum(active.parts[NAME][0].start == 40 for active in late) > 15  # of 60 turns, half of which explore


def test_layers_are_chosen_by_energy():
    model = build()
    cfg = SubsetConfig(kind="layers", active_layers=1, policy="energy", change_every_steps=1, explore=0.25)
    subset = Subset(model, cfg, 0)
    seen = run(subset, model, 43, energy=lambda n, s: torch.full(s, 9.0 if n.startswith("blocks.2.") else 0.1))
    layers = [min(int(n.split(".")[1]) for n in a.parts if n.startswith("blocks.")) for a in seen[3:]]
    assert 0.7 <= layers.count(2) / len(layers) < 1.0
    assert set(layers) == {0, 1, 2}


def test_surprising_steps_count_for_more():
    model = build()
    cfg = SubsetConfig(kind="blocks", active_fraction=0.5, block_rows=8, policy="surprise", change_every_steps=1000)
    subset = Subset(model, cfg, 0)
    for step in range(200):
        surprising = step % 10 == 0
        level = 100.0 if surprising else 1.0
        loss = 3.0 if surprising else 2.0
        subset.observe(gradients(model, subset.active, lambda n, s, level=level: torch.full(s, level)), loss)
    place = subset.chosen[NAME][0]
    assert float(subset._score[NAME][place]) > 50  # the plain mean would be 10.9


def test_looks_are_read_and_spread_over_their_steps():
    model = build()
    cfg = SubsetConfig(
        kind="blocks", active_fraction=0.25, block_rows=8, policy="energy", change_every_steps=10, look_every_turns=2,
        look_steps=3, explore=0.0,
    )  # fmt: skip
    subset = Subset(model, cfg, 0)

    def planted(name, shape):
        energy = torch.full(shape, 0.01)
        if name == NAME:
            energy[48:64] = 4.0
        return energy

    seen = run(subset, model, 21, energy=planted)
    looking = [any(p.rule == "look" for p in a.parts[NAME]) for a in seen]
    assert [i for i, look in enumerate(looking) if look] == [17, 18, 19]
    looked = sorted((p.start, p.stop) for a in seen[17:20] for p in a.parts[NAME] if p.rule == "look")
    moved = sorted((p.start, p.stop) for p in seen[17].parts[NAME] if p.rule == "optimizer")
    assert sum(b - a for a, b in looked + moved) == 64  # together they saw it all, each row once
    assert seen[17].gradient_fraction(model) < 0.65 < 0.99
    assert seen[17].fraction(model) == seen[0].fraction(model)
    assert seen[20].parts[NAME] == (Part(0, 48, 64),)  # never active before: known from the look alone


def test_sign_rule_covers_what_the_optimizer_does_not():
    model = build()
    subset = Subset(model, SubsetConfig(kind="blocks", active_fraction=0.25, block_rows=4, inactive="sign"), 0)
    active = subset.at(1)
    assert active.gradient_fraction(model) == 1.0
    assert active.parts[NAME] == (Part(0, 0, 16, "sign"), Part(0, 16, 32), Part(0, 32, 64, "sign"))
    assert active.key == subset.at(0).key  # one product, wherever it is cut


@pytest.mark.parametrize(("kind", "name"), [("blocks", NAME), ("layers", "layers")])
def test_strips_of_which_only_signs_are_kept_are_not_observed(kind, name):
    model = build()
    cfg = SubsetConfig(kind=kind, policy="energy", active_fraction=0.25, block_rows=16, inactive="sign8")
    subset = Subset(model, cfg, 0)
    assert subset.active.gradient_fraction(model) == 1.0
    generator = torch.Generator().manual_seed(0)
    gradients = {}
    for parameter, parts in subset.active.parts.items():
        shape = subset.shapes[parameter]
        whole = torch.randn(shape, generator=generator)
        gradients[parameter] = tuple(
            part.of(whole).sign().to(torch.int8) if part.rule == "sign8" else part.of(whole) for part in parts
        )
    subset.observe(gradients, 1.0)
    score = subset.state_dict()["score"][name]
    assert (~score.isnan()).nonzero().flatten().tolist() == subset.chosen[name]


def test_key_knows_sizes_and_not_places():
    model = build()
    cfg = SubsetConfig(kind="blocks", active_fraction=0.25, block_rows=4)
    assert choose(model, cfg, 0, 0).key == choose(model, cfg, 3, 0).key
    assert hash(choose(model, cfg, 0, 0).key) != hash(Active.everything(model).key)
    layers = SubsetConfig(kind="layers", active_layers=1, train_embeddings=False)
    assert len({choose(model, layers, turn, 0).key for turn in range(3)}) == 3  # the backward reaches less far


def test_until_makes_everything_active():
    model = build()
    subset = Subset(model, SubsetConfig(kind="layers", active_layers=1, until=0.5), 0)
    assert not subset.due(10, 0.4)
    assert subset.due(11, 0.5)
    assert subset.advance().fraction(model) == 1.0
    assert not subset.due(500, 0.9)


def test_scores_from_elsewhere_are_taken():
    model = build()
    subset = Subset(model, SubsetConfig(kind="layers", active_layers=1, policy="energy", explore=0.0), 0)
    active = subset.advance({"layers": torch.tensor([0.1, 5.0, 0.2])})
    assert {n.split(".")[1] for n in active.parts if n.startswith("blocks.")} == {"1"}


@pytest.mark.parametrize("path", [p for p in NAMED if p.stem != "lora"], ids=lambda p: p.stem)  # it has no turns
def test_every_named_method_resumes_bit_equal(path):
    cfg = SubsetConfig(**{**yaml.safe_load(path.read_text()), "change_every_steps": 5})
    model = build()
    if cfg.kind != "all":
        assert Active.everything(model).fraction(model) > choose(model, cfg, 0, 0).fraction(model)
    generator = torch.Generator().manual_seed(1)
    fields_of = {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}
    straight = Subset(model, cfg, 3)
    expected = run(straight, model, 61, energy=lambda n, s: fields_of[n])
    first = Subset(model, cfg, 3)
    run(first, model, 28, energy=lambda n, s: fields_of[n])  # in the middle of a turn, past a look
    tensors, outline = pack(first.state_dict())
    second = Subset(model, cfg, 3)
    second.load_state_dict(unpack(outline, {k: v.clone() for k, v in tensors.items()}))
    assert second.active == first.active
    assert run(second, model, 33, start=28, energy=lambda n, s: fields_of[n]) == expected[28:]


def test_a_state_of_other_settings_is_refused():
    model = build()
    state = Subset(model, SubsetConfig(kind="layers", active_layers=1), 0).state_dict()
    with pytest.raises(ValueError, match="resume with the subset"):
        Subset(model, SubsetConfig(kind="blocks", active_fraction=0.5), 0).load_state_dict(state)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("wanted", [1, 3])
def test_exploration_adds_up_to_its_share(share, wanted):
    counts = [explored(turn, wanted, share) for turn in range(200)]
    assert sum(counts) == pytest.approx(200 * wanted * share, abs=1)
    assert max(counts) <= wanted


def test_a_policy_of_ones_own():
    @register_subset_policy("final_places")
    def last(question):
        return list(range(question.count - question.wanted, question.count))

    try:
        model = build()
        cfg = SubsetConfig(kind="blocks", active_fraction=0.25, block_rows=4, policy="final_places", explore=0.0)
        assert choose(model, cfg, 2, 0).parts[NAME] == (Part(0, 48, 64),)
        POLICIES["final_places"] = lambda question: [0] * (question.wanted + 1)
        with pytest.raises(ValueError, match="final_places"):
            choose(model, cfg, 0, 0)
    finally:
        del POLICIES["final_places"]


@pytest.mark.parametrize(
    "kw",
    [
        {"policy": "best"}, {"inactive": "moved"}, {"explore": 1.5}, {"strips": 0}, {"active_layers": 1},
        {"look_every_turns": 1, "look_steps": 200}, {"kind": "all", "active_fraction": 0.5},
    ],
)  # fmt: skip
def test_bad_settings_are_refused(kw):
    with pytest.raises(ValueError, match="subset"):
        SubsetConfig(**{"kind": "blocks", "active_fraction": 0.5, **kw})


@pytest.mark.parametrize("bad", [(2, 0, 4), (0, 4, 4), (0, -1, 3), (0, 0, 4, "momentum")])
def test_bad_parts_are_refused(bad):
    with pytest.raises(ValueError, match="rule"):
        Part(*bad)


def test_more_layers_than_there_are():
    with pytest.raises(ValueError, match="3 layers"):
        Subset(build(), SubsetConfig(kind="layers", active_layers=4), 0)


def test_shipped_files_name_known_fields():
    known = {f.name for f in fields(SubsetConfig)}
    for path in NAMED:
        content = yaml.safe_load(path.read_text())
        assert set(content) <= known
        assert content["name"] == path.stem
        assert path.read_text().startswith("#")
