"""Measures component times: every probe in turn, round after round, medians; tokens drawn uniformly, since times do not
depend on them. The first two rounds, compilation included, are thrown away."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from sparse_update.clock.component import Component
from sparse_update.clock.cost import DENSE_KEY, ComponentTimes, Step, identity, tagged_optimizer
from sparse_update.gates.policies import band
from sparse_update.growth.superposition import bag_loss, bags_of
from sparse_update.growth.vocabulary import NOTHING, partial_logits, partial_loss
from sparse_update.step.backward import Stepper
from sparse_update.step.plan import Chosen, StepPlan, View
from sparse_update.transformer import ModelConfig, Transformer, token_loss
from sparse_update.weights.lowrank import add_lora, decompose, rank_of
from sparse_update.weights.optimizer import Optimizer
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import Active

Probe = Callable[[], dict[str, float]]
"""One use of some components: name -> seconds."""
Say = Callable[[str], None]
WARM_UP = 2
"""Rounds that are thrown away."""
CALIBRATION = "calibration"


@dataclass(frozen=True)
class Setting:
    """How steps are taken while they are timed."""

    cfg: ModelConfig
    optim: OptimConfig
    device: torch.device
    attention: str
    precision: str
    compiled: bool = False
    variant: str = "autograd"

    @property
    def dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None


def interleaved(
    probes: Sequence[Probe], rounds: int, device: torch.device, warm_up: int = WARM_UP
) -> tuple[dict[str, float], dict[str, float]]:
    """(median milliseconds, interquartile range over median) of every name that the probes report."""
    found: dict[str, list[float]] = {}
    for turn in range(rounds + warm_up):
        for probe in probes:
            for name, seconds in probe().items():
                if turn >= warm_up:
                    found.setdefault(name, []).append(1000 * seconds)
    ms = {name: statistics.median(values) for name, values in found.items()}
    spread = {}
    for name, values in found.items():
        low, _, high = statistics.quantiles(values, n=4)
        spread[name] = (high - low) / ms[name] if ms[name] else 0.0
    return ms, spread


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(
    cfg: ModelConfig,
    optim: OptimConfig,
    device: torch.device,
    batch: int,
    precision: str = "auto",
    compiling: str = "off",
    rounds: int = 15,
    progress: Say = lambda text: None,
) -> ComponentTimes:
    """The plain step's components in the fastest way to take it; steps of other kinds are added by `extend`.

    `compiling`: "on", "off", or "measure": torch.compile if it works here and is faster.
    """
    attention, precision = _attention(cfg, optim, device, batch, progress), precision
    if precision == "auto":
        precision = _precision(cfg, optim, device, batch, attention, progress)
    setting = Setting(cfg, optim, device, attention, precision)
    variants = {"off": ("autograd", "engine"), "on": ("autograd_compiled", "engine_compiled")}
    names = variants.get(compiling, ("autograd", "engine", "autograd_compiled", "engine_compiled"))
    progress(f"the plain step: {', '.join(names)}")
    totals = _totals(setting, batch, names, progress)
    variant = min(totals, key=lambda name: totals[name])
    compiled = compiling == "on" or (
        "engine_compiled" in totals and totals["engine_compiled"] < totals.get("engine", float("inf"))
    )
    progress(f"plain steps by {variant}; {rounds} rounds")
    chosen = Setting(cfg, optim, device, attention, precision, compiled, variant)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    steps_ms: list[float] = []
    wall, processor = time.perf_counter(), time.thread_time()
    ms, spread = interleaved([*_split_probes(chosen, batch), _calibration(chosen, batch, steps_ms)], rounds, device)
    ms.pop(CALIBRATION), spread.pop(CALIBRATION)
    share = (time.thread_time() - processor) / (time.perf_counter() - wall)
    steps_ms = steps_ms[WARM_UP:]
    backward = ms.pop("backward")  # whole, and without weight gradients: the difference is their share
    ms["backward_dx"] = min(ms["backward_dx"], backward)
    ms["backward_dw"] = backward - ms["backward_dx"]
    spread["backward_dw"] = spread.pop("backward")
    if "whole" in ms:  # taken by the engine, in one piece: split as autograd's
        whole, parts = ms.pop("whole"), sum(ms.values())
        ms = {name: value * whole / parts for name, value in ms.items()}
        spread.pop("whole")
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": rounds,
        "load_average": round(load, 2),
        "processors": os.cpu_count() or 1,
        "best_over_median": round(min(steps_ms) / statistics.median(steps_ms), 3),
        "on_processor": round(min(1.0, share), 3),
    }
    return ComponentTimes(ms, spread, attention, precision, variant, compiled, batch, identity(cfg, optim), machine)


def extend(
    times: ComponentTimes,
    cfg: ModelConfig,
    optim: OptimConfig,
    device: torch.device,
    steps: Sequence[Step],
    components: Mapping[str, Component],
    rounds: int = 9,
    progress: Say = lambda text: None,
) -> ComponentTimes:
    """`times` with the entries that it lacks, measured in turn with the plain step and scaled by its ratio to the
    table's."""
    missing = list({step.key: step for step in steps if not times.has(times.key(step))}.values())
    lacking = {key: component for key, component in components.items() if not times.has(key)}
    if not missing and not lacking:
        return times
    progress(f"component times of {', '.join([step.key for step in missing] + list(lacking))}")
    setting = Setting(cfg, optim, device, times.attention, times.precision, times.compiled, times.variant)
    plain = Step(StepPlan(), None, times.batch, cfg.context)
    table = replace(setting, optim=tagged_optimizer(times.model["optimizer"]))
    probes = [step_probe(table, plain, DENSE_KEY)]
    probes += [step_probe(setting, step, step.key) for step in missing]
    probes += [_component_probe(key, component, device) for key, component in lacking.items()]
    ms, _ = interleaved(probes, rounds, device)
    dense = ms.pop(DENSE_KEY)
    return times.extended(ms, dense)


def _partial(setting: Setting, step: Step, key: str) -> Probe:
    """Times one step that predicts a part of the vocabulary."""
    model, x_BT, y_BT = _setup(setting, step.batch, step.length)
    optimizer, device = Optimizer(model, Active.everything(model), setting.optim), setting.device
    predicted_K = torch.arange(step.plan.vocabulary, device=device)
    compiled = setting.compiled or setting.variant == "autograd_compiled"
    run = torch.compile(partial_logits, dynamic=False) if compiled else partial_logits
    places_BT = y_BT.where(y_BT < step.plan.vocabulary, torch.tensor(NOTHING, device=device))

    def use() -> dict[str, float]:
        start = clock(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=setting.precision == "bf16"):
            loss = partial_loss(run(model, x_BT, predicted_K), places_BT, 1.0).mean()
        loss.backward()
        optimizer.step(0.5)
        return {key: clock(device) - start + _decomposition(optimizer, device)}

    return use


def step_probe(setting: Setting, step: Step, key: str) -> Probe:
    """Times one whole step, its choice of rows and its optimizer included."""
    setting = replace(setting, cfg=step.of(setting.cfg))
    bag, predicted = step.plan.bag, step.plan.vocabulary
    model, x_BT, y_BT = _setup(setting, step.batch, step.length * bag)
    active = step.active or Active.everything(model)
    rank = rank_of(active)
    if rank:
        add_lora(model, rank)
    optimizer = Optimizer(model, active, setting.optim)
    device = setting.device
    if predicted:
        return _partial(setting, step, key)
    if rank or bag > 1 or (step.plain and setting.variant.startswith("autograd")):
        run = torch.compile(model) if setting.compiled or setting.variant == "autograd_compiled" else model

        def plain() -> dict[str, float]:
            start = clock(device)
            x, y = (x_BT, y_BT) if bag == 1 else bags_of(x_BT, y_BT, bag)
            with torch.autocast(device.type, torch.bfloat16, enabled=setting.precision == "bf16"):
                loss = (token_loss if bag == 1 else bag_loss)(run(x), y).mean()
            loss.backward()
            optimizer.step(0.5)
            return {key: clock(device) - start + _decomposition(optimizer, device)}

        return plain
    compiled = setting.variant.endswith("compiled") if step.plain else setting.compiled
    stepper = Stepper(model, setting.dtype, compiled)
    generator = torch.Generator(device=device).manual_seed(0)
    plan = step.plan
    places = None
    if plan.bypass:
        draw = torch.rand(step.batch, step.length, generator=torch.Generator().manual_seed(0))
        places = band(draw, plan.bypass / step.length, 0.0).index.to(device)
    subblocks = [(layer, name) for layer in range(setting.cfg.layers) for name in ("attn", "mlp")]
    turn = [0]

    def choose(view: View) -> Chosen:
        if plan.sequences:
            return Chosen(sequences_S=band(view.loss_BT.mean(-1), plan.sequences / step.batch, 0.0).index)
        if plan.rows:
            return Chosen(rows_SR=band(view.loss_BT, plan.rows / step.length, 0.0).index)
        return Chosen()

    def probe() -> dict[str, float]:
        count = round(plan.skip_rate * len(subblocks))
        skip = frozenset(subblocks[(turn[0] + 3 * i) % len(subblocks)] for i in range(count))
        turn[0] += 1
        start = clock(device)
        found = stepper.step(x_BT, y_BT, plan, active, choose=choose, bypass_BR=places, skip=skip, generator=generator)
        optimizer.set_gradients(found.gradients)
        optimizer.step(0.5)
        return {key: clock(device) - start + _decomposition(optimizer, device)}

    return probe


def _decomposition(optimizer: Optimizer, device: torch.device) -> float:
    """Seconds that one step owes to GaLore's decompositions, which are rare; 0 for others."""
    if optimizer.cfg.name != "galore":
        return 0.0
    start = clock(device)
    for part in optimizer.parts:
        decompose(part)
    return (clock(device) - start) / optimizer.cfg.galore_every_steps


def _component_probe(key: str, component: Component, device: torch.device) -> Probe:
    use = component.make()

    def probe() -> dict[str, float]:
        start = clock(device)
        use()
        return {key: (clock(device) - start) / component.uses}

    return probe


def _setup(setting: Setting, batch: int, length: int) -> tuple[Transformer, Tensor, Tensor]:
    cfg = setting.cfg
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**{**asdict(cfg), "attention": setting.attention})).to(setting.device)
        tokens = torch.randint(0, cfg.vocab_size, (batch, length + 1)).to(setting.device)
    return model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _calibration(setting: Setting, batch: int, steps_ms: list[float]) -> Probe:
    """The whole plain step once more; its milliseconds are kept one by one, since their best over their median tells
    load."""
    probe = step_probe(setting, Step(StepPlan(), None, batch, setting.cfg.context), CALIBRATION)

    def kept() -> dict[str, float]:
        found = probe()
        steps_ms.append(1000 * found[CALIBRATION])
        return found

    return kept


def _split_probes(setting: Setting, batch: int) -> list[Probe]:
    """The plain step by autograd, part by part; and whole, where the engine takes it."""
    model, x_BT, y_BT = _setup(setting, batch, setting.cfg.context)
    optimizer = Optimizer(model, Active.everything(model), setting.optim)
    run = torch.compile(model) if setting.variant == "autograd_compiled" else model
    device = setting.device
    cast = torch.autocast(device.type, torch.bfloat16, enabled=setting.precision == "bf16")

    def whole() -> dict[str, float]:
        start = clock(device)
        with cast:
            loss = token_loss(run(x_BT), y_BT).mean()
        forward = clock(device)
        loss.backward()
        backward = clock(device)
        optimizer.step(0.5)
        end = clock(device)
        return {"forward": forward - start, "backward": backward - forward, "optimizer": end - backward}

    def activations_only() -> dict[str, float]:
        weights = [p for name, p in model.named_parameters() if name != "embed.weight"]
        for p in weights:
            p.requires_grad_(False)
        with cast:
            loss = token_loss(run(x_BT), y_BT).mean()
        start = clock(device)
        torch.autograd.grad(loss, model.embed.weight)
        seconds = clock(device) - start
        for p in weights:
            p.requires_grad_(True)
        return {"backward_dx": seconds}

    probes = [whole, activations_only]
    if setting.variant.startswith("engine"):
        probes.append(step_probe(setting, Step(StepPlan(), None, batch, setting.cfg.context), "whole"))
    return probes


def _totals(setting: Setting, batch: int, variants: Sequence[str], progress: Say) -> dict[str, float]:
    """Milliseconds of a plain step by each variant that works here."""
    plain = Step(StepPlan(), None, batch, setting.cfg.context)
    probes: list[Probe] = []
    for name in variants:
        probe = step_probe(Setting(**{**vars(setting), "variant": name}), plain, name)
        try:
            probe()
        except torch._dynamo.exc.TorchDynamoException as error:  # no working C++ compiler, most often
            progress(f"torch.compile does not work here ({str(error).splitlines()[0]})")
            continue
        probes.append(probe)
    if not probes:
        return _totals(setting, batch, ("autograd", "engine"), progress)
    return interleaved(probes, 7, setting.device)[0]


def _attention(cfg: ModelConfig, optim: OptimConfig, device: torch.device, batch: int, progress: Say) -> str:
    if cfg.attention != "auto":
        return cfg.attention
    if device.type == "cuda":
        return "sdpa"
    progress("attention: explicit products against SDPA")
    plain = Step(StepPlan(), None, batch, cfg.context)
    probes = [step_probe(Setting(cfg, optim, device, name, "fp32"), plain, name) for name in ("explicit", "sdpa")]
    total = interleaved(probes, 5, device)[0]
    return min(total, key=lambda name: total[name])


def _precision(
    cfg: ModelConfig, optim: OptimConfig, device: torch.device, batch: int, attention: str, progress: Say
) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    progress("precision: fp32 against bf16")
    plain = Step(StepPlan(), None, batch, cfg.context)
    probes = [step_probe(Setting(cfg, optim, device, attention, name), plain, name) for name in ("fp32", "bf16")]
    total = interleaved(probes, 3, device)[0]
    return min(total, key=lambda name: total[name])
