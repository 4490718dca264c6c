"""Time of the toy network by hand, the rate files, and what every estimate must obey."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import hardware
from hardware import Counts, DataFileError, estimate, list_rates, load_rates
from hardware.energy.profile import METHODS
from hardware.latency.estimate import core_work
from hardware.latency.rates import OPTIONAL, TERMS
from tests.hardware.toy import HEAD, A, B, toy

RATES = Path(hardware.__file__).parent / "rates"


def test_the_toy_by_hand() -> None:
    # Per step, averaged over 10 tokens of 1 step; one neuron of each layer per core.
    # a: 12 of 40 updates active -> 0.3 active and 0.7 inactive per core; 40 synops -> 1 per core
    # b: 8 of 40 -> 0.2 and 0.8; 20 synops -> 0.5 per core
    # Messages: a's 4 neurons as placed send 4 events per step; 0.5 were counted, so each core sends 4 x 1/8 = 0.5
    # and each core of b receives 0.5; each core of a receives 1 from the host.
    work = core_work([A, B], toy())
    assert dataclasses.astuple(work[0])[:5] == pytest.approx((0.3, 0.7, 1.0, 1.0, 0.5))
    assert dataclasses.astuple(work[4])[:5] == pytest.approx((0.2, 0.8, 0.5, 0.5, 0.2))  # b sends to the host: 0.2
    found = estimate([A, B, HEAD], toy(), load_rates("loihi1_sanafe"))
    ns = {name: 1e3 * time.to("us")[1] for name, time in found.terms.items()}
    assert ns["neuron"] == pytest.approx(0.3 * 39.7 + 0.7 * 6.0)  # 16.11
    assert ns["synapse"] == pytest.approx(1.0 * 3.8 + 1.0 * 16.0)  # 19.8
    assert ns["message_out"] == pytest.approx(0.5 * 5.1)
    assert ns["link"] == pytest.approx(2 * 6.5)  # 16 flows x 1/8 on one link to the south
    assert ns["barrier"] == pytest.approx(1000)  # two tiles
    assert (found.binding, found.core, found.depth) == ("barrier", None, 2)
    low, mid, high = (1e3 * us for us in found.step.to("us"))
    assert mid == pytest.approx(1000)
    # Low: the barrier's low end, 124.3548 x 0.757. High: nothing overlaps:
    # 0.3 x 49.3471 + 0.7 x 12.0571 + 5.8421 + 19.888 + 0.5 x 6.3393 + 2 x 8.0795 + 1243
    assert low == pytest.approx(94.1366, rel=1e-4)
    assert high == pytest.approx(1311.301, rel=1e-4)
    # A token: 2 steps one by one; pipelined, 10 tokens take 11 steps.
    assert found.token.to("us")[1] == pytest.approx(2)
    assert found.run(10).to("us")[1] == pytest.approx(11)
    assert found.run(10, pipelined=False).to("us")[1] == pytest.approx(20)
    assert found.tokens_per_second()[1] == pytest.approx(1e6)
    assert found.tokens_per_second(pipelined=False)[1] == pytest.approx(5e5)
    assert found.lower_bound
    assert any(label.startswith("outside the 5.8 to 137 us per step") for label in found.labels)
    assert json.loads(json.dumps(found.to_dict()))["step_us"][1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="0 tokens takes no time"):
        found.run(0)


def test_memory_reads_by_hand(tmp_path: Path) -> None:
    # A core of layer a holds one neuron with 2 inputs: each axon's one synapse fits a word, so a message is one read.
    content = yaml.safe_load((RATES / "loihi1_davies2018.yaml").read_text())
    content["name"] = "mine"
    figure = {"value": 500.0, "low": 400.0, "high": 700.0, "unit": "ns/read", "source": "ours", "method": "estimated"}
    content["rates"]["memory_read"] = figure | {"date": content["rates"]["synapse"]["date"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    found = estimate([A, B], toy(), load_rates(tmp_path / "mine.yaml"))
    # One message a step arrives at each core of layer a: 500 ns, more than the barrier's 124 ns and all else.
    assert 1e3 * found.terms["memory"].to("us")[1] == pytest.approx(500)
    assert (found.binding, found.core in range(4)) == ("memory", True)
    assert [1e3 * us for us in found.step.to("us")[:2]] == pytest.approx([400, 500])
    # Nothing overlaps: core a's neuron, synapse, message and read, then link and barrier, each at its high end.
    high_ns = 0.3 * 49.3471 + 0.7 * 12.0571 + 5.8421 + 0.5 * 6.3393 + 700 + 2 * 8.0795 + 1243
    assert 1e3 * found.step.to("us")[2] == pytest.approx(high_ns)


def test_rate_coding_takes_its_steps() -> None:
    many = [dataclasses.replace(item, time_steps=4) for item in (A, B)]
    found = estimate(many, toy(), load_rates("loihi1_davies2018"))
    assert found.token.to("us")[1] == pytest.approx(5 * found.step.to("us")[1])  # 2 layers + 4 - 1
    assert found.run(10).to("us")[1] == pytest.approx(41 * found.step.to("us")[1])
    # The same events over four times the steps: a quarter of the work per step
    assert core_work(many, toy())[0].synops == pytest.approx(0.25)


@dataclass(frozen=True)
class Counter:
    spikes: int
    synops: int
    neuron_updates: int


def test_counters_per_core_replace_the_even_share() -> None:
    counters = {0: Counter(8, 400, 10), 1: Counter(0, 0, 10)}
    work = core_work([A, B], toy(), counters)
    assert (work[0].neuron_active, work[0].neuron_inactive, work[0].synops) == pytest.approx((0.8, 0.2, 40))
    assert work[1].synops == 0
    assert work[2].synops == pytest.approx(1)
    found = estimate([A, B], toy(), load_rates("loihi1_davies2018"), core_counts=counters)
    assert (found.binding, found.core) == ("synapse", 0)
    assert not any("no counters per core" in label for label in found.labels)
    with pytest.raises(ValueError, match="core 99 was counted but is not in the placement"):
        core_work([A, B], toy(), {99: Counter(0, 0, 0)})


def test_what_cannot_be_timed_is_refused() -> None:
    rates = load_rates("loihi1_davies2018")
    with pytest.raises(ValueError, match="every layer runs on the host"):
        estimate([HEAD], toy(), rates)
    with pytest.raises(ValueError, match="rates 'loihi2_estimated' are of loihi2, the placement is on loihi1"):
        estimate([A, B], toy(), load_rates("loihi2_estimated"))
    with pytest.raises(ValueError, match="layer 'c' is counted but not in the placement"):
        estimate([dataclasses.replace(A, layer="c")], toy(), rates)


COUNT = st.integers(0, 10**9)
PLACED = toy()


@settings(max_examples=40, deadline=None)
@given(rows=st.tuples(*[COUNT] * 8), more=COUNT, name=st.sampled_from(["loihi1_davies2018", "loihi1_sanafe"]))
def test_order_and_monotonicity(rows: tuple[int, ...], more: int, name: str) -> None:
    def counts(extra: int) -> list[Counts]:
        return [
            Counts(layer, 10, synops + extra, events + extra, active + extra, quiet, 1, 0, False, 1)
            for layer, (synops, events, active, quiet) in (("a", rows[:4]), ("b", rows[4:]))
        ]

    rates = load_rates(name)
    one, two = (estimate(counts(extra), PLACED, rates) for extra in (0, more))
    low, mid, high = one.step.to("ns")
    assert 0 < low <= mid <= high
    assert max(time.to("ns")[1] for time in one.terms.values()) == pytest.approx(mid)
    assert all(b >= a * (1 - 1e-12) for a, b in zip(one.step.to("ns"), two.step.to("ns"), strict=True))


@pytest.mark.parametrize("name", list_rates())
def test_every_rate_has_source_method_and_date(name: str) -> None:
    rates = load_rates(name)
    for term, rate in rates.rates.items():
        assert rate.source, term
        assert len(rate.date) == 10
        assert rate.method in METHODS or (rate.time is None and rate.note)
    assert set(TERMS) - set(OPTIONAL) <= set(rates.rates)
    times = [rates.barrier_time(tiles).to("ns")[1] for tiles in range(1, 40)]
    assert all(b >= a - 1e-9 for a, b in pairwise(times))


def test_both_loihi1_sets_share_their_intervals_widened() -> None:
    davies, sanafe = load_rates("loihi1_davies2018"), load_rates("loihi1_sanafe")
    assert davies.rates["synapse"].time is not None
    assert sanafe.rates["synapse"].time is not None
    # 3.5 and 3.8 ns (3.1 convolutional, 4.7 sparse), and 24.3 % outward
    assert davies.rates["synapse"].time.to("ns") == pytest.approx((3.1 * 0.757, 3.5, 4.7 * 1.243))
    assert sanafe.rates["synapse"].time.to("ns") == pytest.approx((3.1 * 0.757, 3.8, 4.7 * 1.243))
    assert davies.rates["message_in"].time is None
    assert davies.barrier_time(32).to("ns")[1] == pytest.approx(465)


def test_loihi2_is_bounded_not_stated() -> None:
    rates = load_rates("loihi2_estimated")
    assert {rate.method for rate in rates.rates.values() if rate.time is not None} == {"estimated"}
    assert rates.rates["memory_read"].time is None
    for term in ("synapse", "neuron_active", "message_out"):
        time = rates.rates[term].time
        assert time is not None
        low, mid, high = time.to("ns")
        assert mid == pytest.approx((low * high) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("spot", "value", "message"),
    [
        (("rates", "synapse", "unit"), "pJ/synop", "unit 'pJ' is energy, time is needed"),
        (("rates", "synapse", "unit"), "ns/update", "unit 'ns/update' must be time per synop"),
        (("rates", "synapse", "unit"), "furlong/synop", "unknown unit 'furlong'"),
        (("rates", "synapse", "low"), 99, "interval out of order"),
        (("rates", "synapse", "source"), " ", "expected a text"),
        (("rates", "wings"), {}, "unknown key wings"),
        (("barrier", "points"), {}, "expected tiles"),
        (("barrier", "points"), {0: [1, 2, 3]}, "0 is no number of tiles"),
        (("barrier", "points"), {1: [1, 2]}, r"expected \[low, value, high\]"),
        (("schema",), 2, "schema 2 is not known"),
        (("name",), "x", "name 'x' differs"),
    ],
)
def test_a_wrong_rate_file_is_refused(tmp_path: Path, spot: tuple[str, ...], value: object, message: str) -> None:
    content = yaml.safe_load((RATES / "loihi1_sanafe.yaml").read_text())
    entry = content
    for key in spot[:-1]:
        entry = entry[key]
    entry[spot[-1]] = value
    path = tmp_path / "loihi1_sanafe.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(DataFileError, match=message):
        load_rates(path)
