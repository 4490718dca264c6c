"""The collection: the gate's gradient on each model is that of the plain model with dropped rows cut off by hand.

What is tested each time is a part; `-m soak` runs every model with both kernels, batches of one sequence, as many sequences
as tokens, padding, and logits that the user cut, cast, flattened, or made losses of.
"""

from __future__ import annotations

import itertools

import pytest

from tests.sparse_update.library.zoo.check import HOWS, check
from tests.sparse_update.library.zoo.hard import HARD
from tests.sparse_update.library.zoo.hf import HF
from tests.sparse_update.library.zoo.plain import PLAIN

pytestmark = [
    pytest.mark.filterwarnings("ignore:the gate could not follow"),  # models of which nothing can be
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # losses without gradient, recomputed
]
ALL = {**HF, **PLAIN, **HARD}
OFTEN = ("gpt2", "mixtral", "albert", "vit", "lstm", "gru", "conv_norm", *HARD)
APART = ("recomputed", "reentrant", "mamba", "mamba2", "wav2vec2")
"""models where torch counts otherwise: what is computed again; no backward for a router that gives an argmax alone; the
backward of convolutions in groups as if there were one group"""


def cases(names):
    return [(name, unit) for name in names for unit in ALL[name].units]


def checked(name, attention, unit, batch, length, how="plain"):
    if name in HF:
        pytest.importorskip("transformers", reason="needs the extra hub (transformers)")
    entry = ALL[name]
    found = check(entry, attention, unit, batch, length, how)
    counted = attention != "sdpa" and name not in APART and not (unit == "token" and entry.rows)
    if how == "plain" and counted:
        # half the rows are kept: the share is twice what torch's counter misses
        assert found.report["reach"] == pytest.approx(2 * found.saved, rel=0.01)
    return found


@pytest.mark.parametrize(("name", "unit"), cases(OFTEN))
def test_gradients_are_those_of_the_cut_model(name, unit):
    checked(name, ALL[name].attentions[0], unit, 4, 12)


@pytest.mark.parametrize("how", HOWS[1:])
def test_what_a_user_does_to_the_logits_is_followed(how):
    checked("gpt2", "sdpa", "token", 4, 12, how)


@pytest.mark.parametrize(
    ("name", "batch", "length"), [("gpt2", 8, 8), ("gpt2", 1, 12), ("tables", 1, 12), ("flipped", 8, 8)]
)
def test_one_sequence_and_as_many_sequences_as_tokens(name, batch, length):
    checked(name, ALL[name].attentions[0], "token", batch, length)


def _long():
    for name, entry in ALL.items():
        for attention, unit in itertools.product(entry.attentions, entry.units):
            hows = HOWS if name not in HARD and attention == entry.attentions[-1] else HOWS[:1]
            yield from ((name, attention, unit, 4, 12, how) for how in hows if _fits(entry, unit, how))
            yield name, attention, unit, 8, 8, "plain"
            yield name, attention, unit, 1 if unit == "token" else 2, 12, "plain"


def _fits(entry, unit, how):
    if how == "padded":
        return entry.padded is not None
    one_answer = entry.units == ("sequence",) and how == "sliced"
    return not one_answer and not (how == "reshaped" and unit == "sequence")


@pytest.mark.soak
@pytest.mark.parametrize(("name", "attention", "unit", "batch", "length", "how"), list(_long()))
def test_every_model_in_every_way(name, attention, unit, batch, length, how):
    checked(name, attention, unit, batch, length, how)
