"""Steps, memory and gates: closed forms of bytes, the order of the ends, and what a gate may and may not change."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.clusters.choose import fastest
from hardware.clusters.gating import GatePlan, break_even_keep, gate_communication, plan_gated, score_bytes
from hardware.clusters.layout import Layout, LayoutError
from hardware.clusters.machines import ENDS, load_machine
from hardware.clusters.memory import plan_memory
from hardware.clusters.shapes import load_shape
from hardware.clusters.step import plan_step

H100 = load_machine("h100_80gb")
SMALL, LARGE = load_shape("gpt2-124m"), load_shape("llama3-8b")
layouts = st.builds(
    lambda nodes, tensor, pipeline, mesh, recompute, micro, accumulation: Layout(
        8 * nodes * pipeline, 2048, micro, accumulation, mesh, tensor, pipeline, recompute=recompute
    ),
    st.integers(1, 1250), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 5, 16]), st.sampled_from(["ddp", "fsdp"]),
    st.sampled_from(["none", "op", "layer", "full"]), st.integers(1, 8), st.integers(1, 16),
)  # fmt: skip


def test_one_gpu_sends_nothing() -> None:
    plan = plan_step(SMALL, H100, Layout(1, 1024, 8))
    assert plan.sent_bytes == {"parameters": 0, "gradients": 0, "activations": 0}
    assert plan.communication_s == dict.fromkeys(ENDS, 0)
    assert plan.step_s == pytest.approx(plan.compute_s)


def test_bytes_of_data_parallel_meshes_by_hand() -> None:
    size = SMALL.parameters
    ddp = plan_step(SMALL, H100, Layout(8, 1024, 4, 3, "ddp")).sent_bytes
    assert ddp == pytest.approx({"parameters": 0, "gradients": 2 * 7 / 8 * 4 * size, "activations": 0})
    fsdp = plan_step(SMALL, H100, Layout(8, 1024, 4, 3, "fsdp")).sent_bytes  # both gathers and the scatter, three times
    assert fsdp["parameters"] == pytest.approx(3 * 2 * 7 / 8 * 2 * size)
    assert fsdp["gradients"] == pytest.approx(3 * 7 / 8 * 4 * size)
    hsdp = plan_step(SMALL, H100, Layout(32, 1024, 4, 1, "hsdp")).sent_bytes  # and an eighth over four copies
    assert hsdp["gradients"] == pytest.approx(7 / 8 * 4 * size + 2 * 3 / 4 * 4 * size / 8)


def test_bytes_of_tensor_parallelism_by_hand() -> None:
    # Two gathers and two scatters of (tokens, width) in bf16 forward, as many backward, in every block
    sent = plan_step(LARGE, H100, Layout(8, 8192, 1, 1, "ddp", tensor=8)).sent_bytes["activations"]
    assert sent == pytest.approx(32 * 8 * 7 / 8 * 2 * 8192 * 4096)
    again = plan_step(LARGE, H100, Layout(8, 8192, 1, 1, "ddp", tensor=8, recompute="full")).sent_bytes["activations"]
    assert again == pytest.approx(1.5 * sent)


def test_state_of_a_rank_by_hand() -> None:
    whole = plan_memory(LARGE, H100, Layout(8, 8192, 1, 1, "ddp", recompute="full"))
    assert whole.state == 16 * LARGE.parameters
    assert not whole.fits
    shared = plan_memory(LARGE, H100, Layout(8, 8192, 1, 1, "fsdp", recompute="full"))
    assert shared.state == 16 * LARGE.parameters / 8
    assert shared.fits
    # torchtitan's tables 1 and 3: 15.0 and 15.4 GiB less on 128 GPUs than on 8
    less = shared.state - plan_memory(LARGE, H100, Layout(128, 8192, 1, 1, "fsdp", recompute="full")).state
    assert less / 2**30 == pytest.approx(15.2, rel=0.1)


@settings(max_examples=60)
@given(layouts)
def test_what_holds_of_every_layout(layout: Layout) -> None:
    plan = plan_step(LARGE, H100, layout)
    low, mid, high = (plan.step_s[end] for end in ENDS)
    assert 0 < low <= mid <= high
    for end in ENDS:
        assert plan.step_s[end] >= plan.compute_s[end] * (1 - 1e-12)
        assert plan.mfu(end) < 1
    assert plan.layout.step_tokens == layout.micro_batch * layout.accumulation * 2048 * layout.data


@settings(max_examples=40)
@given(layouts, st.sampled_from(["windows", "tokens", "blocks"]), st.sampled_from(["shared", "separate", "free"]))
def test_a_gate_that_keeps_less_takes_no_more_time(layout: Layout, unit: str, scoring: str) -> None:
    if scoring != "shared":  # fewer microbatches fill a pipeline worse, and may take longer
        layout = dataclasses.replace(layout, pipeline=1)
    dense = plan_step(LARGE, H100, layout)
    found = [
        plan_gated(LARGE, H100, layout, GatePlan(unit, keep, scoring, 2048), dense)  # type: ignore[arg-type]
        for keep in (0.25, 0.5, 1.0)
    ]
    for end in ENDS:
        quarter, half, all_kept = (one.step_s[end] for one in found)
        assert quarter <= half * (1 + 1e-12) <= all_kept * (1 + 2e-12)
        assert found[0].per_kept_token[end] >= found[0].per_offered_token[end]
    if scoring == "shared" or unit == "blocks":  # keeping all is the dense step and the gate's own communication
        for end in ENDS:
            assert found[2].step_s[end] == pytest.approx(dense.step_s[end] + found[2].communication_s[end])


def test_what_a_gate_sends_by_hand() -> None:
    layout = Layout(64, 1024, 4, 2)  # 512 windows
    assert score_bytes(SMALL, layout, GatePlan("windows", window=1024)) == 4 * 512
    assert score_bytes(SMALL, layout, GatePlan("tokens", signals=2)) == 4 * 3 * 512 * 1024
    blocks = 12 * (2 * 768 * 768 + 2 * 768 * 768 + 2 * 768 * 3072) / 128**2
    assert score_bytes(SMALL, layout, GatePlan("blocks", block=128)) == pytest.approx(4 * blocks)
    _, sent = gate_communication(SMALL, H100, layout, GatePlan("windows", window=1024))
    assert sent == pytest.approx(63 / 64 * 4 * 512 + 4 * 2 * 63 / 64 * 8)


def test_a_ring_of_scores_stops_paying_where_a_tree_does_not() -> None:
    layout = Layout(4096, 1024, 4, 1, "ddp")
    ring, tree = (GatePlan("windows", window=1024, reduce=reduce) for reduce in (False, True))
    assert break_even_keep(SMALL, H100, layout, ring) is None
    assert (break_even_keep(SMALL, H100, Layout(8, 1024, 8, 1, "ddp"), ring) or 0) > 0.9
    slow, fast = (plan_gated(SMALL, H100, layout, gate) for gate in (ring, tree))
    assert slow.gate_share["mid"] > 5 * fast.gate_share["mid"]


def test_the_fastest_layout_fits_and_a_model_that_cannot_says_so() -> None:
    found = fastest(LARGE, H100, 64, 8192, 2**22)
    assert found.memory.fits
    assert found.step.layout.step_tokens == 2**22
    with pytest.raises(
        LayoutError, match=r"llama3-405b does not fit on 8 of h100_80gb in any of \d+ layouts; take more GPUs"
    ):
        fastest(load_shape("llama3-405b"), H100, 8, 8192, 2**22)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus": 12}, "12 GPUs are no whole nodes of 8"),
        ({"tensor": 3, "gpus": 24}, "tensor = 3 must divide the 8 GPUs of a node"),
        ({"tensor": 8, "gpus": 12}, "12 GPUs are no multiple of tensor x pipeline = 8 x 1"),
        ({"mesh": "zero"}, "mesh 'zero' does not exist; there is: ddp, fsdp, hsdp"),
        ({"micro_batch": 0}, "micro_batch = 0: a whole number from 1 is needed"),
        ({"pipeline": 64, "gpus": 64}, "pipeline = 64: gpt2-124m has 12 blocks"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_in_words(change: dict[str, object], message: str) -> None:
    layout = dataclasses.replace(Layout(8, 1024), **change)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match=message):
        plan_step(SMALL, H100, layout)


@pytest.mark.parametrize(("gate", "message"), [(GatePlan(keep=0), "keep = 0"), (GatePlan(scoring="x"), "scoring 'x'")])
def test_a_gate_that_cannot_be_is_refused_in_words(gate: GatePlan, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        plan_gated(SMALL, H100, Layout(8, 1024), gate)
