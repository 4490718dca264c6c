"""Every neuron kind against a reference in Python's own integers, in both modes; both scans against each other."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from neuro.graph import GraphError, Population, Projection, SpikingGraph
from neuro.simulators import scan
from neuro.simulators.activity import RECORD_ALL, compare
from neuro.simulators.compiled.library import library
from neuro.simulators.fixed_point import FixedPointOverflow, simulate

LIF = {"du": 700, "dv": 90, "vth": 60, "bias_mant": 11, "bias_exp": 3}


def wrapped(value: int, bits: int) -> int:
    half = 1 << (bits - 1)
    return (value + half) % (1 << bits) - half


def toward_zero(value: int) -> int:
    return (abs(value) >> 12) * (1 if value >= 0 else -1)


def one(kind: str, params: dict[str, Any], exponent: int = 0, size: int = 3, bits: int = 24) -> SpikingGraph:
    """Each neuron hears its own line, with weight 2."""
    return SpikingGraph(
        (Population("x", "input", size), Population("y", kind, size, params)),
        (Projection("w", "x", "y", "a_in", 2 * np.eye(size, dtype=np.int64), exponent, num_message_bits=bits),),
        ("y",),
    )


def reference_lif(kind: str, p: dict[str, int], sums: list[int], mode: str) -> list[tuple[int, int, int]]:
    """(u, v, message) of each step for one neuron that receives `sums`."""
    u = v = rest = 0
    rows = []
    for t, total in enumerate(sums, start=1):
        if p.get("reset_interval") and t % p["reset_interval"] == p.get("reset_offset", 0) % p["reset_interval"]:
            u = v = rest = 0
        a = wrapped(total, 16) if mode == "chip" else total
        u = toward_zero(u * (4095 - p["du"])) + (a << 6)
        drive = p["bias_mant"] << p["bias_exp"]
        if mode == "chip":
            u = wrapped(u, 24)
            v = toward_zero(v * (4096 - p["dv"])) + wrapped(u + drive, 24)
        else:
            u += -(2**24) if u > 2**23 else 2**24 if u <= -(2**23) else 0
            v = toward_zero(v * (4096 - p["dv"])) + u + drive
        if rest > 0 and kind == "lif_refractory":
            v = 0
        late, soft = p.get("reset_delay"), kind == "lif_soft" or p.get("reset") == 1
        if late and rest:
            v = v - (p["vth"] << 6) if soft else 0
        v = max(1 - 2**23, min(2**23 - 1, v))
        high, low = (p["vth_hi"], p["vth_lo"]) if kind == "ternary_lif" else (p["vth"], -(2**20))
        fire = int(v > high << 6) - int(v < low << 6)
        if fire and not late and p.get("reset") != 2:
            v = v - (p["vth"] << 6) if soft else 0
        rest = fire if late else max((p.get("refractory", 0) if fire else rest) - 1, 0)
        rows.append((u, v, fire))
    return rows


EACH = {"du": [700, 4095, 900], "dv": [90, 0, 4095], "vth": [60, 3, 900]}
KINDS = {
    "lif": LIF,
    "ternary_lif": {k: v for k, v in LIF.items() if k != "vth"} | {"vth_hi": 60, "vth_lo": -40},
    "lif_reset": LIF | {"reset_interval": 4, "reset_offset": 6},
    "lif_refractory": LIF | {"refractory": 4},
    "lif_soft": LIF,
    "lif_soft, restarting": LIF | {"reset_interval": 7, "reset_offset": 3},
    "lif_general, zero": LIF | EACH | {"reset": 0},
    "lif_general, zero a step later": LIF | EACH | {"reset": 0, "reset_delay": 1},
    "lif_general, subtract": LIF | EACH | {"reset": 1},
    "lif_general, subtract a step later": LIF | EACH | {"reset": 1, "reset_delay": 1, "reset_interval": 6},
    "lif_general, none": LIF | EACH | {"reset": 2},
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["lava", "chip"])
@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("largest", [60, 50_000, 5_000_000])
def test_lif_kinds_equal_the_reference(case: str, mode: str, fused: bool, largest: int) -> None:
    kind, params = case.partition(",")[0], KINDS[case]
    if kind == "lif_refractory" and mode == "lava":
        with pytest.raises(GraphError, match=r"Lava 0\.10 has no fixed-point model of lif_refractory.*use mode 'chip'"):
            simulate(one(kind, params), {"x": np.zeros((1, 1, 3), dtype=int)}, mode=mode)
        return
    rng = np.random.default_rng(1)
    x = rng.integers(-largest, largest, (2, 40, 3)) * (rng.random((2, 40, 3)) < 0.7)
    found = simulate(one(kind, params), {"x": x}, mode=mode, record=RECORD_ALL, fused=fused)
    fired = 0
    for sample in range(2):
        for neuron in range(3):
            own = {key: value[neuron] if isinstance(value, list) else value for key, value in params.items()}
            rows = reference_lif(kind, own, [0, *(2 * x[sample, :-1, neuron]).tolist()], mode)
            for index, got in enumerate((found.states["y"]["u"], found.states["y"]["v"], found.spikes["y"])):
                assert got[sample, :, neuron].tolist() == [row[index] for row in rows]
            fired += sum(abs(row[2]) for row in rows)
    assert fired > 10
    assert found.populations["y"].updates_active == fired
    if largest > 60:
        assert found.populations["y"].wide_a > 0
    assert (found.mode, found.ran_on) == (mode, f"simulated (ours, {mode})")


@pytest.mark.parametrize("seed", range(6))
def test_both_scans_give_the_same_bits_and_counts(seed: int, networks: Any) -> None:
    if library() is None:
        pytest.skip("no C compiler here")
    graph = networks.network(seed, ["lif", "ternary_lif", "lif_reset"])
    inputs = networks.messages(graph, seed, 3, 25)
    for mode in ("lava", "chip"):
        plain = simulate(graph, inputs, mode=mode, record=RECORD_ALL, fused=False)
        fused = simulate(graph, inputs, mode=mode, record=RECORD_ALL, fused=True)
        assert compare(plain, fused).equal
        assert (plain.populations, plain.projections) == (fused.populations, fused.projections)


def random_scan(rng: np.random.Generator, flags: int, neurons: int) -> scan.Scan:
    bias = torch.from_numpy(rng.integers(-2000, 4000, neurons).astype(np.int32))
    low = -int(rng.integers(1, 9000)) << 6 if flags & scan.TERNARY else -(2**31)
    keep_u, keep_v, rest = (int(rng.choice(values)) for values in ([0, 2500, 4095], [1, 3000, 4096], [1, 2, 6]))
    return scan.Scan(
        flags, keep_u, keep_v, int(rng.integers(0, 9000)) << 6, low, rest if flags & scan.REFRACTORY else 0, bias
    )


def assert_chunks_equal_plain(seed: int, chip: bool, traced: bool, neurons: int = 50) -> None:
    """One random population of each kind, sums from silence to all of int32, with and without steps left over."""
    rng = np.random.default_rng(seed)
    kinds = (0, scan.TERNARY, scan.REFRACTORY) if chip else (0, scan.TERNARY)
    sent = 0
    for flags, steps, bits in itertools.product(kinds, (2 * scan.CHUNK, 4 * scan.CHUNK - 1), (9, 17, 32)):
        made = random_scan(rng, flags | (scan.CHIP if chip else 0), neurons)
        sums = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (steps, neurons)) * (rng.random((steps, neurons)) < 0.6)
        a = torch.from_numpy(sums.astype(np.int32))
        reset = torch.from_numpy(rng.random(steps) < 0.2) if rng.integers(2) else None
        state = [torch.from_numpy(rng.integers(1 - 2**23, 2**23, neurons).astype(np.int32)) for _ in range(2)]
        found: list[tuple[Any, ...]] = []
        for in_chunks in (False, True):
            now = scan.State(state[0].clone(), state[1].clone(), torch.zeros(neurons, dtype=torch.int32))
            messages, fired = torch.empty(a.shape, dtype=torch.int8), torch.zeros(neurons, dtype=torch.int32)
            trace = scan.Trace() if traced else None
            chunked = dataclasses.replace(made, in_chunks=in_chunks)
            numbers = scan.plain(chunked, a, messages, now, reset, fired, trace)
            rows = [torch.stack(part) for part in vars(trace).values()] if trace else []
            found.append((numbers, [messages, fired, now.u, now.v, now.rest, *rows]))
        assert found[0][0] == found[1][0]
        assert all(torch.equal(*pair) for pair in zip(found[0][1], found[1][1], strict=True))
        sent += found[0][0][3]
    assert sent > 100
    assert not scan._without


@pytest.fixture
def programs(monkeypatch: Any, backend: str) -> Any:
    """The kind of each block that went through torch.compile, in short chunks, which compile sooner."""
    calls, original, compiler = [], scan.chunk_program.__wrapped__, torch.compile

    @cache
    def made(*kind: bool) -> Any:
        return original(*kind)

    def program(*kind: bool) -> Any:
        calls.append(kind)
        return made(*kind)

    monkeypatch.setattr(torch, "compile", lambda *args, **settings: compiler(*args, backend=backend, **settings))
    monkeypatch.setattr(scan, "CHUNK", 2)
    monkeypatch.setattr(scan, "chunk_program", program)
    return calls


@pytest.mark.parametrize(
    ("chip", "traced", "backend"),
    [
        (False, True, "eager"),
        (True, False, "eager"),
        pytest.param(False, True, "inductor", marks=pytest.mark.soak),
        pytest.param(True, False, "inductor", marks=pytest.mark.slow),
    ],
)
def test_chunks_by_torch_compile_give_the_same_bits(
    chip: bool, traced: bool, networks: Any, programs: Any, backend: str
) -> None:
    for seed in range(4):
        assert_chunks_equal_plain(seed, chip, traced)
    before = len(programs)
    assert before > 0
    mode, keep = "chip" if chip else "lava", RECORD_ALL if traced else ("spikes",)
    kinds = ["lif", "ternary_lif", "lif_reset", "delta", "sigma_delta", *(["lif_refractory"] if chip else [])]
    for seed in range(6):
        graph = networks.network(seed, kinds)
        inputs = networks.messages(graph, seed, 3, 25)
        plain = simulate(graph, inputs, mode=mode, record=keep, fused=False)
        chunked = simulate(graph, inputs, mode=mode, record=keep, fused="torch")
        assert compare(plain, chunked).equal
        assert (plain.populations, plain.projections) == (chunked.populations, chunked.projections)
    assert set(programs) == {(chip, traced)}
    assert len(programs) > before


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "traced"), [pytest.param(False, False, marks=pytest.mark.soak), (True, True)])
def test_whole_chunks_in_several_widths(chip: bool, traced: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(scan, "WIDTHS", (16, 48))
    for neurons in (16, 37, 48, 101):  # all of one call, part of one, and several
        assert_chunks_equal_plain(neurons, chip, traced, neurons)


def test_where_torch_compile_fails_the_plain_scan_takes_over_with_one_warning(monkeypatch: Any) -> None:
    def program(*kind: bool) -> Any:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(scan, "chunk_program", program)
    monkeypatch.setattr(scan, "_without", set())
    graph, inputs = one("lif", LIF), {"x": np.full((1, 30, 3), 90)}
    plain = simulate(graph, inputs, record=RECORD_ALL, fused=False)
    with pytest.warns(UserWarning, match="torch.compile failed on cpu, so scans there run in plain torch: no compiler$"):
        first = simulate(graph, inputs, record=RECORD_ALL, fused="torch")
    assert compare(plain, first).equal
    assert compare(plain, simulate(graph, inputs, record=RECORD_ALL, fused="torch")).equal  # and no second warning
    with pytest.raises(ValueError, match="fused 'triton' does not exist"):
        simulate(graph, inputs, fused="triton")  # type: ignore[arg-type]


@pytest.mark.parametrize("cum_error", [0, 1])
@pytest.mark.parametrize("corrected", [0, 1])
@pytest.mark.parametrize("kind", ["delta", "sigma_delta"])
def test_delta_kinds_equal_the_reference(kind: str, corrected: int, cum_error: int) -> None:
    params = {"vth": 9, "spike_exp": 1, "state_exp": 2, "cum_error": cum_error, "corrected": corrected}
    params |= {"bias": 5, "relu": 1} if kind == "sigma_delta" else {}
    if corrected and cum_error:
        with pytest.raises(GraphError, match="the corrected model has no cum_error"):
            one(kind, params)
        return
    x = np.random.default_rng(0).integers(-20, 21, (1, 30, 3))
    found = simulate(one(kind, params), {"x": x}, record=RECORD_ALL)
    for neuron in range(3):
        sigma = act = residue = error = 0
        for t, a in enumerate([0, *(2 * x[0, :-1, neuron]).tolist()]):
            if kind == "sigma_delta":
                sigma += a
                value = max(sigma + (5 << 3), 0)
            else:
                value = a << 3
            change = value - act + residue
            error = error + change if cum_error else 0
            out = change if abs(error if cum_error else change) >= 9 << 3 else 0
            error = 0 if out else error
            sent = out >> 2
            act, residue = (act + (sent << 2), 0) if corrected else (value, change - out)
            assert int(found.spikes["y"][0, t, neuron]) == sent
            for name, expected in (("act", act), ("residue", residue), ("error", error)):
                assert int(found.states["y"][name][0, t, neuron]) == expected
    assert found.models["y"] == f"{kind} ({'corrected' if corrected else 'residue'})"
    assert any("not in Lava 0.10" in note for note in found.notes) == bool(corrected)
    assert found.populations["y"].updates_active > 4


def test_sigma_wraps_at_24_bits_on_the_chip_and_at_32_in_lava() -> None:
    graph, x = one("sigma", {}), {"x": np.full((1, 400, 3), 2**22)}
    for mode, bits in (("lava", 32), ("chip", 24)):
        found = simulate(graph, x, mode=mode)
        sums = [wrapped(2**23 * t if mode == "lava" else wrapped(2**23, 24) * t, bits) for t in range(400)]
        assert found.spikes["y"][0, :, 0].tolist() == sums
        assert found.populations["y"].wide_v > 0
        with pytest.raises(
            FixedPointOverflow, match=r"'y', step 1, sample 0, neuron 0: .* is 8388608, outside the 24 bits"
        ):
            simulate(graph, x, mode=mode, strict=True)


def test_norm_multiplies_with_the_step_before_and_squares() -> None:
    eye = 2 * np.eye(2, dtype=np.int64)
    graph = SpikingGraph(
        (
            Population("x", "input", 2),
            Population("n", "norm", 2, {"vth": 30}),
            Population("sq", "graded", 2, {"vth": 0}),
        ),
        (
            Projection("a", "x", "n", "a_in1", eye, num_message_bits=16),
            Projection("b", "x", "n", "a_in2", eye, -1, num_message_bits=16),
            Projection("c", "n", "sq", "a_in", eye, -1, num_message_bits=24, source_port="s2_out"),
        ),
        ("n", "sq"),
    )
    x = np.array([[[3, -4], [5, 1], [7, 90], [0, 0], [0, 0]]])
    found = simulate(graph, {"x": x}, record=RECORD_ALL)
    assert found.spikes["n"][0, :, 0].tolist() == [0, 0, 0, 70, 0]  # 2*3*5 = 30 is not above 30; 2*5*7; 2*7*0
    assert found.spikes["n"][0, :, 1].tolist() == [0, 0, 0, 180, 0]
    assert found.states["n"]["spikes2"][0, :, 1].tolist() == [0, 64, 4, 32400, 0]
    assert found.spikes["sq"][0, :, 1].tolist() == [0, 0, 64, 4, 32400]


def test_chip_mode_refuses_in_strict_what_it_wraps() -> None:
    graph = one("lif", LIF | {"vth": 131071})
    x = {"x": np.full((1, 3, 3), 20_000)}
    with pytest.raises(FixedPointOverflow, match=r"step 1, .*the sum of its synapses is 40000, outside the 16 bits"):
        simulate(graph, x, mode="chip", strict=True)
    found = simulate(graph, x, mode="chip", record=("u",))
    assert found.states["y"]["u"][0, 1, 0] == (40_000 - 65_536) * 64
    assert found.populations["y"].wide_a == 6
    simulate(graph, x, mode="lava", strict=True)  # Lava passes it on, and 24 bits hold it
