"""What a step does, counted: the work that a shipped table of component times puts a price on.

Nothing here is measured and nothing depends on the machine: every number follows from the model's shape, the step and the
optimizer. Matrix products are counted in FLOPs (`step/flops.py`). Where a FLOP is no measure (softmax, norms, gathers, the
optimizer), what is counted is the elements that are read and written.

Shape letters: V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from sparse_update.clock.cost import Step
from sparse_update.step.flops import Count, matrix_shapes, plan_flops
from sparse_update.step.plan import PLAIN, StepPlan
from sparse_update.transformer import ModelConfig
from sparse_update.weights.lowrank import rank_of
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import SIGNS, Active

COUNTS = {
    "forward": (
        "forward_flops",  # matrix products
        "forward_scores",  # attention weights: heads x queries x keys
        "forward_elements",  # tokens x layers x width: norms, rotary positions, activations
        "forward_logits",  # tokens x vocabulary: the softmax of the head
        "forward_gathered",  # elements that a bypass gathers and puts back
        "forward_gathers",  # blocks that do so, whatever their size
        "wanted_logits",  # tokens x vocabulary of signals that the plan wants out of the forward
        "wanted_elements",  # tokens x layers x width of the signal "update"
        "step",  # 1: what every step costs
        "layers",  # blocks of the forward: what every block costs, whatever its size
    ),
    "backward_dx": (
        "dx_flops",
        "backward_scores",
        "backward_elements",
        "backward_logits",
        "backward_gathered",  # elements gathered for kept sequences and rows
        "backward_gathers",
        "backward_layers",
    ),
    "backward_dw": ("dw_flops",),
    "optimizer": (
        "adamw_elements",  # updated weights by AdamW
        "muon_elements",
        "muon_tensors",
        "muon_flops",  # five Newton-Schulz iterations
        "sign_elements",
        "galore_elements",
        "galore_flops",  # the decompositions, spread over the steps between two of them
        "mask_tensors",  # matrices whose update may be taken back, once more for each scalar product
        "mask_elements",
        "mask_products",  # elements of the scalar products that a mask takes of gradients and momenta
        "tensors",  # strips and parameters that are updated
    ),
}
"""The four components of a step, and what is counted for each."""
ALL = tuple(name for names in COUNTS.values() for name in names)
NEWTON_SCHULZ = 5
"""Iterations of torch.optim.Muon, its default."""
Strips = tuple[str, tuple[int, int], bool]
"""Parameter, shape of an updated strip of it, whether it moves by its sign alone."""


def work_of(cfg: ModelConfig, step: Step, optim: OptimConfig) -> dict[str, float]:
    """Counts of one whole step by the names in `COUNTS`, those that are 0 left out."""
    cfg = step.of(cfg)
    plan, batch, length, d = step.plan, step.batch, step.length, cfg.width
    flops = plan_flops(cfg, batch, plan, step.active, length)
    count = Count(cfg, batch, plan, None if rank_of(step.active) else step.active, length, None)
    found = dict.fromkeys(ALL, 0.0)
    found |= {"forward_flops": flops.forward, "dx_flops": flops.backward_dx, "dw_flops": flops.backward_dw}
    found |= {"step": 1, "layers": cfg.layers, "forward_logits": batch * length * count.vocabulary}
    found["backward_logits"] = count.head_rows() * count.vocabulary
    if plan.vocabulary:  # rows of the head are gathered, and their gradient is put into one of the whole head
        found["forward_gathered"] += plan.vocabulary * d
        found["backward_gathered"] += (cfg.vocab_size + plan.vocabulary) * d
    for layer in range(cfg.layers):
        passed = layer in count.middle
        queries = plan.bypass if passed else length
        keys = length if passed and plan.bypass_keys else queries
        found["forward_scores"] += batch * cfg.heads * queries * keys
        found["forward_elements"] += batch * queries * d
        if passed:
            found["forward_gathered"] += batch * (queries + length) * d
            found["forward_gathers"] += 1
    for at in count.backward_layers():
        found["backward_scores"] += at.attention * at.sequences * cfg.heads * at.queries * at.keys
        found["backward_elements"] += (at.attention + at.mlp) / 2 * at.sequences * at.queries * d
        found["backward_layers"] += (at.attention + at.mlp) / 2
        if at.sequences < batch or at.queries < length or plan.dw_rows < 1:
            found["backward_gathered"] += at.sequences * at.queries * d
            found["backward_gathers"] += 1
    found["wanted_logits"] = len(plan.want & {"entropy", "gradient_norm"}) * found["forward_logits"]
    found["wanted_elements"] = ("update" in plan.want) * found["forward_elements"]
    for name, shape, sign in updated(cfg, step.active):
        for kind, value in _update(name, shape, sign, optim):
            found[kind] += value
    return {name: float(value) for name, value in found.items() if value}


def scoring_work(cfg: ModelConfig, windows: int) -> dict[str, float]:
    """Counts of a forward of so many windows that only scores: no backward, no optimizer."""
    whole = work_of(cfg, Step(PLAIN, None, windows, cfg.context), OptimConfig())
    return {name: value for name, value in whole.items() if name in COUNTS["forward"]}


def updated(cfg: ModelConfig, active: Active | None) -> Iterator[Strips]:
    """Every strip that the optimizer moves; with `active` None every parameter of the model."""
    shapes = shapes_of(cfg)
    if active is None:
        for name, shape in shapes.items():
            yield name, shape, False
        return
    if rank := rank_of(active):
        for layer in range(cfg.layers):
            for name, (outputs, inputs) in matrix_shapes(cfg).items():
                yield f"blocks.{layer}.{name}.down", (rank, inputs), False
                yield f"blocks.{layer}.{name}.up", (outputs, rank), False
        return
    for name, parts in active.parts.items():
        for part in parts:
            size = part.stop - part.start
            shape = shapes[name]
            if part.rule != "look":
                yield name, (size, shape[1]) if part.dim == 0 else (shape[0], size), part.rule in SIGNS


def _update(name: str, shape: tuple[int, int], sign: bool, optim: OptimConfig) -> Iterator[tuple[str, float]]:
    """What one strip's update counts for."""
    size = shape[0] * shape[1]
    yield "tensors", 1
    small, large = sorted(shape)
    inner = name.startswith("blocks.") and ".norm" not in name
    if inner and not sign and optim.mask.kind != "none":
        products = {"agreement": 3, "surprise": 1}.get(optim.mask.kind, 0)
        yield "mask_tensors", 1 + products
        yield "mask_elements", size
        yield "mask_products", products * size
    if sign or optim.name == "sign":
        yield "sign_elements", size
    elif inner and optim.name == "muon":
        yield "muon_elements", size
        yield "muon_tensors", 1
        yield "muon_flops", NEWTON_SCHULZ * (4 * small * small * large + 2 * small**3)
    elif inner and optim.name == "galore":
        yield "galore_elements", size
        yield "galore_flops", small * small * large / optim.galore_every_steps
    else:
        yield "adamw_elements", size


def kinds(cfg: ModelConfig, step: Step) -> tuple[str, ...]:
    """What kinds of leaving out a step combines; () for a plain one. A shipped table holds a factor for each."""
    plan, found = step.plan, []
    for f in fields(StepPlan):
        value = getattr(plan, f.name)
        if f.name in ("bypass_first", "bypass_stop", "bypass_keys", "rows_exact") or value == f.default:
            continue
        if f.name == "want":
            if value:
                found.append("want")
        else:
            suffix = {"rows": plan.rows_exact and "_exact", "bypass": plan.bypass_keys and "_keys"}.get(f.name)
            found.append(f"{f.name}{suffix or ''}")
    return (*found, *_weight_kinds(step.of(cfg), step.active))


def _weight_kinds(cfg: ModelConfig, active: Active | None) -> tuple[str, ...]:
    if active is None:
        return ()
    if rank_of(active):
        return ("lora",)
    parts = [(name, part) for name, found in active.parts.items() for part in found]
    if any(part.rule in SIGNS for _, part in parts):
        return ("signs",)
    shapes = shapes_of(cfg)
    cut = [part for name, part in parts if part.stop - part.start < shapes[name][part.dim]]
    if cut:
        return ("columns",) if any(part.dim == 1 for part in cut) else ("strips",)
    return ("layers",) if any(name not in active.parts for name in shapes) else ()


def shapes_of(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of every parameter by name; a gain has one column."""
    shapes = {"embed.weight": (cfg.vocab_size, cfg.width), "norm.weight": (cfg.width, 1)}
    if not cfg.tie_embeddings:
        shapes["head.weight"] = (cfg.vocab_size, cfg.width)
    for layer in range(cfg.layers):
        shapes |= {f"blocks.{layer}.{name}.weight": shape for name, shape in matrix_shapes(cfg).items()}
        shapes |= {f"blocks.{layer}.norm{i}.weight": (cfg.width, 1) for i in (1, 2)}
    return shapes
