"""How far a step that leaves something out points from the exact gradient, layer by layer."""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
from torch import Tensor

from sparse_update.gates.gate import Gate
from sparse_update.step.backward import Stepper
from sparse_update.step.plan import PLAIN, StepPlan
from sparse_update.weights.subset import Active


def cosines(
    stepper: Stepper,
    x_BT: Tensor,
    y_BT: Tensor,
    plan: StepPlan,
    active: Active,
    gate: Gate,
    bypass_BR: Tensor | None,
    seed: int,
) -> dict[str, float]:
    """Cosine between the gradient by `plan` and the exact one of the same batch, over the active weights: by layer
    ("blocks.0", ..., "embed", "norm", "head") and over "all". A layer without a gradient in the sparse step counts 0.
    Moves no state of the gate: neither its draws nor what it has counted and learnt.
    """
    before, shown = copy.deepcopy(gate.state_dict()), gate.last_score_N
    generator = torch.Generator(device=x_BT.device).manual_seed(seed)
    sparse = stepper.step(
        x_BT,
        y_BT,
        plan,
        active,
        choose=gate.choose if plan.sequences or plan.rows else None,
        bypass_BR=bypass_BR,
        skip=gate.skip(plan),
        generator=generator,
    ).gradients
    exact = stepper.step(x_BT, y_BT, PLAIN, active).gradients
    gate.load_state_dict(before)
    gate.last_score_N = shown
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for name, strips in exact.items():
        parts = name.split(".")
        layer = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
        others = sparse.get(name, tuple(torch.zeros_like(g) for g in strips))
        for a, b in zip(others, strips, strict=True):
            a, b = a.double().flatten(), b.double().flatten()
            for key in (layer, "all"):
                for i, value in enumerate((a @ b, a @ a, b @ b)):
                    sums[key][i] += float(value)
    return {key: dot / (aa * bb) ** 0.5 if aa * bb > 0 else 0.0 for key, (dot, aa, bb) in sums.items()}
