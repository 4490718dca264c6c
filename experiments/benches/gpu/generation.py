"""Text token by token on the GPU: the float model, and the same model deployed on the simulated chip."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

import neuro
from experiments.benches import ratios
from experiments.benches.gpu.setting import Emit, Setting
from hardware.meters.ratios import InTurn, Until
from sparse_update.transformer import Transformer

PROMPT, NEW = 64, 128
"""Tokens of a prompt and of its continuation."""
BATCHES = (1, 16)


def measure(setting: Setting, emit: Emit) -> dict[str, Any]:
    """Tokens a second by batch, with keys and values kept; greedy. Deployed: graded int8 layers, every event counted.

    `same_tokens` is the share of the deployed model's tokens that the CPU gives too: its integers are the same, but what
    runs on the host is float.
    """
    cfg = replace(setting.model(), attention="sdpa")
    torch.manual_seed(0)
    model = Transformer(cfg).eval()
    text = torch.randint(0, cfg.vocab_size, (max(BATCHES), cfg.context))
    plan = neuro.convert(model, neuro.calibrate(model, [text[:2]]), neuro.analyse(model, text[:1], chip="loihi2"))
    deployed = neuro.deploy(model, plan)
    prompt, new = (8, 4) if setting.toy else (PROMPT, NEW)
    expected = neuro.generate(deployed, text[:1, :prompt], min(new, 16))
    model, deployed = model.to(setting.where), deployed.to(setting.where)
    there = text.to(setting.where)
    ours = neuro.generate(deployed, there[:1, :prompt], min(new, 16)).cpu()
    found: dict[str, Any] = {"same_tokens": float((ours == expected)[:, prompt:].float().mean()), "batches": {}}
    emit(found)
    for batch in (1, 2) if setting.toy else BATCHES:
        calls = {
            "float": partial(neuro.generate, model, there[:batch, :prompt], new),
            "deployed": partial(neuro.generate, deployed, there[:batch, :prompt], new),
        }
        probes = {name: ratios.probe(call, setting.where) for name, call in calls.items()}
        until = Until(most_s=0.3 * setting.seconds, most_rounds=2 if setting.toy else 100, warm_up=1)
        timed = InTurn(probes, "float", until).run()
        found["batches"][str(batch)] = {
            "tokens_per_s": {name: batch * new / timed.median_s(name) for name in calls},
            "deployed_time_over_float": timed.ratios["deployed"].to_dict(),
        }
        emit(found)
    return found
