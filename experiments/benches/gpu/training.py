"""Training on the GPU: steps of every gate kind, attention by SDPA, and a step of static shapes under a CUDA graph.

Shape letters: B batch, H head, T token, K head width, R kept row, V vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.benches import ratios
from experiments.benches.gating.steps import KINDS, Arm, How, Steps
from experiments.benches.gpu.setting import Emit, Setting, peak_flops_per_s
from hardware.meters.meter import Meter
from hardware.meters.ratios import InTurn, Probe, Until
from sparse_update.step.backward import Stepper
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import Chosen, StepPlan, View
from sparse_update.transformer import Transformer

RATES = (0.5, 0.25)
COMPILING_SHARE = 0.6
"""Of a part's seconds: no further arm is made ready after it, so that those that are get measured."""
WINDOW_S = 1.5
"""Of one arm's energy window; NVML updates every 0.1 s."""


def steps(setting: Setting, emit: Emit) -> dict[str, Any]:
    """Every gate kind beside the fastest dense step: time ratio, FLOP ratio, conversion, MFU, joules a step.

    The base is nanoGPT's step (fused AdamW, SDPA), compiled; `stepper` is our own dense step. Arms are made ready in the
    order of `KINDS`, at half of the rows first; what time does not suffice for is named in `left_out`.

    MFU is counted FLOPs of the step (`plan_flops`, two for a multiply-accumulate) over the time and the bf16 peak of the
    data sheet; None for a device that is not in the list.
    """
    begin = time.monotonic()
    cfg, batch, device = setting.model(), setting.batch, setting.where
    made = Steps(cfg, batch, device, block_rows=min(128, cfg.width // 4))
    how = How("sdpa", setting.precision, setting.compiled)
    base = f"plain gpt/{how.name}"
    dense_flops = plan_flops(cfg, batch).total
    arms = {base: Arm(made.dense(base), lambda: dense_flops)}
    arms["stepper"] = Arm(made.dense(f"stepper/{how.name}"), lambda: dense_flops)
    wanted = [f"{kind} {rate:g}" for rate in RATES for kind in KINDS]
    first_s: dict[str, float] = {}
    left_out: list[str] = []
    for name in [*arms, *wanted]:
        if time.monotonic() - begin > COMPILING_SHARE * setting.seconds:
            left_out.append(name)
            continue
        if name not in arms:
            kind, rate = name.rsplit(" ", 1)
            arms[name] = made.arm(kind, float(rate), how)
        start = time.monotonic()
        arms[name].step()
        setting.wait()
        first_s[name] = time.monotonic() - start
        emit({"first_step_s": first_s, "left_out": left_out})
    seconds_left = max(1.0, setting.seconds - (time.monotonic() - begin))
    probes = {name: _with_turn(setting, arm) for name, arm in arms.items()}
    until = Until(most_s=0.5 * seconds_left, beside=4, most_rounds=2 if setting.toy else 200, least_rounds=10)
    found = InTurn(probes, base, until).run()
    rows = {name: _row(name, arm, found, dense_flops, device) for name, arm in arms.items()}
    document = {
        "model": cfg.name, "parameters": sum(p.numel() for p in made.models["sdpa"].parameters()), "batch": batch,
        "context": cfg.context, "how": how.name, "base": base, "dense_gflop": dense_flops / 1e9,
        "peak_bf16_flops_per_s": peak_flops_per_s(_name(device)), "rows": rows, "first_step_s": first_s,
        "left_out": left_out, "rounds": found.rounds,
    }  # fmt: skip
    emit(document)
    for name, arm in arms.items():
        if time.monotonic() - begin > 0.95 * setting.seconds:
            break
        rows[name]["energy"] = _energy(setting, arm)
        emit(document)
    return document


def _with_turn(setting: Setting, arm: Arm) -> Probe:
    """Seconds of one step and its share of the choice of weights."""
    step = ratios.probe(arm.step, setting.where)
    if arm.turn is None:
        return step
    turn, turns = arm.turn, [0]

    def once() -> float:
        turns[0] += 1
        moved = ratios.probe(lambda: turn(turns[0]), setting.where)() / arm.every
        arm.step()  # allocates the new weights' state: once in `every` steps, not in each
        return moved + step()

    return once


def _row(name: str, arm: Arm, found: Any, dense_flops: int, device: torch.device) -> dict[str, Any]:
    seconds, flops = statistics.median(found.seconds[name]), arm.flops()
    peak = peak_flops_per_s(_name(device))
    row: dict[str, Any] = {
        "ms": 1000 * seconds, "gflop": flops / 1e9, "mfu": None if peak is None else flops / seconds / peak,
    }  # fmt: skip
    if name in found.ratios:
        ratio = found.ratios[name]
        row |= {"time": ratio.to_dict(), "flop_ratio": flops / dense_flops}
        row["conversion"] = ratios.converted(ratio, flops / dense_flops)
    return row


def _energy(setting: Setting, arm: Arm) -> dict[str, Any]:
    """Joules a step of the whole device over a window of many steps, by NVML; None with the reason where there is none."""
    count = 0
    with Meter(cpu=False) as meter:
        end = time.monotonic() + (0.02 if setting.toy else WINDOW_S)
        while time.monotonic() < end:
            arm.step()
            setting.wait()
            count += 1
    reading = meter.readings[0]
    per_step = None if reading.joules is None else reading.joules / count
    return {"joules_per_step": per_step, "steps": count, "window_s": reading.window_s, "reason": reading.reason}


def attention(setting: Setting, emit: Emit) -> dict[str, Any]:
    """Forward and backward of causal attention by each backend of SDPA, beside explicit products.

    `error` is the largest difference of the output to the explicit products in float32, over their largest value.
    """
    cfg = setting.model()
    shape = (setting.batch, cfg.heads, cfg.context, cfg.width // cfg.heads)
    torch.manual_seed(0)
    dtype = torch.float32 if setting.toy else torch.bfloat16
    q, k, v = (torch.randn(shape, device=setting.where).to(dtype).requires_grad_() for _ in range(3))
    qkv = (q, k, v)
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    if setting.toy:
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    calls: dict[str, Callable[[], Tensor]] = {"explicit": lambda: _explicit(*qkv)}
    calls["sdpa"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    refused: dict[str, str] = {}
    for name, backend in backends.items():
        call = _by_backend(backend, qkv)
        try:
            call()
            calls[name] = call
        except RuntimeError as error:
            refused[name] = str(error).splitlines()[0]
    exact = _explicit(q.detach().float(), k.detach().float(), v.detach().float())
    errors = {
        name: float((call().detach().float() - exact).abs().max() / exact.abs().max()) for name, call in calls.items()
    }
    probes = {name: ratios.probe(_both_ways(call, qkv), setting.where) for name, call in calls.items()}
    until = Until(most_s=0.4 * setting.seconds, most_rounds=2 if setting.toy else 200, beside=4)
    found = InTurn(probes, "explicit", until).run()
    return {
        "shape_BHTK": list(shape), "dtype": str(dtype).removeprefix("torch."), "error": errors, "refused": refused,
        "ms": {name: 1000 * found.median_s(name) for name in calls},
        "ratio_to_explicit": {name: ratio.to_dict() for name, ratio in found.ratios.items()},
    }  # fmt: skip


def _explicit(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    length = q_BHTK.shape[2]
    later = torch.ones(length, length, dtype=torch.bool, device=q_BHTK.device).triu(1)
    scores = (q_BHTK @ k_BHTK.mT) * q_BHTK.shape[3] ** -0.5
    return scores.masked_fill(later, float("-inf")).softmax(dim=3) @ v_BHTK


def _by_backend(backend: SDPBackend, qkv: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    q_BHTK, k_BHTK, v_BHTK = qkv

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)

    return call


def _both_ways(call: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    def run() -> None:
        torch.autograd.grad(call().float().sum(), inputs)

    return run


def graphs(setting: Setting, emit: Emit) -> dict[str, Any]:
    """A gated step's forward and backward captured once and replayed on other tokens: the same gradients, and the time.

    Half of the token rows, chosen by their losses inside of the graph: all shapes follow from the plan. In a dry run there
    is no graph; the step then runs on the buffers that a graph would read, and the comparison is the same.
    """
    cfg = replace(setting.model(), attention="sdpa")
    torch.manual_seed(0)
    model = Transformer(cfg).to(setting.where)
    rows = cfg.context // 2
    plan = StepPlan(rows=rows)
    stepper = Stepper(model, None if setting.toy else torch.bfloat16)

    def choose(view: View) -> Chosen:
        return Chosen(rows_SR=view.loss_BT.topk(rows, dim=1).indices.sort(dim=1).values)

    def gradients(x_BT: Tensor, y_BT: Tensor) -> dict[str, tuple[Tensor, ...]]:
        return {name: tuple(parts) for name, parts in stepper.step(x_BT, y_BT, plan, choose=choose).gradients.items()}

    batches = [torch.randint(0, cfg.vocab_size, (setting.batch, cfg.context + 1)).to(setting.where) for _ in range(3)]
    held = batches[0].clone()

    def eager() -> dict[str, tuple[Tensor, ...]]:
        return gradients(held[:, :-1], held[:, 1:])

    replay, captured, reason = _captured(setting, eager)
    worst, equal = 0.0, True
    for batch in batches[1:]:
        held.copy_(batch)
        replay()
        expected = eager()
        for name, parts in expected.items():
            for theirs, ours in zip(parts, captured[name], strict=True):
                equal = equal and bool(torch.equal(theirs, ours))
                worst = max(worst, float((theirs - ours).abs().max()))
    emit({"captured": reason is None, "reason": reason, "equal_bits": equal, "largest_difference": worst})
    probes = {"eager": ratios.probe(eager, setting.where), "replayed": ratios.probe(replay, setting.where)}
    until = Until(most_s=0.3 * setting.seconds, most_rounds=2 if setting.toy else 200)
    found = InTurn(probes, "eager", until).run()
    return {
        "captured": reason is None, "reason": reason, "equal_bits": equal, "largest_difference": worst,
        "ms": {name: 1000 * found.median_s(name) for name in probes}, "replayed": found.ratios["replayed"].to_dict(),
    }  # fmt: skip


def _captured(
    setting: Setting, call: Callable[[], dict[str, tuple[Tensor, ...]]]
) -> tuple[Callable[[], None], dict[str, tuple[Tensor, ...]], str | None]:
    """What replays the call, the tensors that a replay fills, and why there is no graph (None where there is one)."""
    held = call()
    if setting.where.type == "cuda":
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                held = call()
            return graph.replay, held, None
        except RuntimeError as error:
            reason = f"not captured: {str(error).splitlines()[0]}"
    else:
        reason = "CUDA graphs are for CUDA"

    def again() -> None:
        for name, parts in call().items():
            for kept, new in zip(held[name], parts, strict=True):
                kept.copy_(new)

    return again, held, reason


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
