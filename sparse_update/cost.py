"""What every arm costs: counted FLOPs, and reference seconds from one table of measured component times.

A reference second is (times a component was used) x (its measured milliseconds): arms of one comparison share the table,
so a busy machine cannot favour one of them. FLOPs count matrix products, two per multiply-accumulate, as
`torch.utils.flop_counter` does; attention is counted dense, masked half included.

Shape letters: B batch, T token, R kept row, D width, F hidden width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_update.backward import sparse_step
from sparse_update.gate import GateConfig, TokenGate, kept_count
from sparse_update.optimizer import OptimConfig, Optimizer
from sparse_update.subset import Active, SubsetConfig, choose
from sparse_update.surprise import NgramTable
from sparse_update.transformer import ModelConfig, Transformer, token_loss

SCHEMA = 1
STEADY = 0.35
"""Interquartile range over median up to which a machine counts as idle enough to time on (0.04 to 0.3 were seen on one)."""
DENSE = ("forward", "backward_dx", "backward_dw", "optimizer")


class ComponentTimesError(RuntimeError):
    """A table of component times that does not fit the run."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of the matrix products of one step."""

    forward: int
    backward_dx: int
    backward_dw: int

    @property
    def total(self) -> int:
        return self.forward + self.backward_dx + self.backward_dw


def step_flops(cfg: ModelConfig, batch: int, rows: int | None = None, active: Active | None = None) -> Flops:
    """FLOPs of one step on (B, T) tokens with T = cfg.context.

    Args:
        rows: kept token rows per sequence in the backward (None: all T).
        active: updated weights (None: all).
    """
    width, hidden, length, vocab = cfg.width, cfg.hidden_ratio * cfg.width, cfg.context, cfg.vocab_size
    kept = length if rows is None else rows
    matrices = {"attn.q": (width, width), "attn.k": (width, width), "attn.v": (width, width), "attn.o": (width, width)}
    matrices |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    weights_per_layer = sum(o * i for o, i in matrices.values())
    attention = 2 * batch * length * length * width  # one of the two products, forward
    forward = cfg.layers * (2 * batch * length * weights_per_layer + 2 * attention) + 2 * batch * length * width * vocab

    lowest = 0 if active is None else active.lowest_block
    reached = cfg.layers - lowest
    tall, square = 2 * batch * kept * length * width, 2 * batch * kept * kept * width  # dP and dQ; dK and dV
    dx = reached * (2 * batch * kept * weights_per_layer + 2 * tall + 2 * square) + 2 * batch * kept * width * vocab
    dw = 0
    shapes = {f"blocks.{i}.{name}.weight": shape for i in range(cfg.layers) for name, shape in matrices.items()}
    shapes["head.weight"] = (vocab, width)
    for name, (rows_out, columns) in shapes.items():
        if active is None:
            span = (0, rows_out)
        else:
            owner = "embed.weight" if name == "head.weight" and cfg.tie_embeddings else name
            span = active.rows.get(owner, (0, 0))
        dw += 2 * batch * kept * columns * (span[1] - span[0])
    return Flops(forward, dx, dw)


def ngram_flops(windows: int, length: int, orders: int) -> int:
    """Floating-point operations of scoring windows of T tokens with an n-gram table: four per order, one logarithm."""
    return windows * length * (4 * orders + 1)


@dataclass(frozen=True)
class StepKind:
    """What tells the sparse steps of different arms apart, as a key of the table of component times."""

    key: str
    gate: GateConfig
    subset: SubsetConfig

    @staticmethod
    def of(gate: GateConfig, subset: SubsetConfig) -> StepKind:
        if gate.unit != "token" and subset.kind == "all":
            return StepKind("dense", gate, subset)
        rows = f"rows={gate.signal}:{gate.keep_fraction:g}:{gate.noise_cut:g}" if gate.unit == "token" else "rows=all"
        part = f"{subset.kind}:{subset.active_fraction:g}:{subset.block_rows}:{subset.train_embeddings}"
        return StepKind(f"sparse[{rows},{part}]", gate, subset)

    @property
    def dense(self) -> bool:
        return self.key == "dense"


@dataclass(frozen=True)
class ComponentTimes:
    """Median milliseconds of each component of a step, measured interleaved in one process.

    `ms["forward"]`, `"backward_dx"`, `"backward_dw"`, `"optimizer"`: the plain step at `batch` windows; `"ngram_window"`:
    scoring and learning one window; `sparse[...]`: a whole sparse step with its row choice, optimizer included.
    `attention`, `precision`, `compiled` (the plain step runs through torch.compile): the faster choice where the settings
    said "auto".
    """

    ms: Mapping[str, float]
    spread: Mapping[str, float]
    """Interquartile range of each component over its median."""
    attention: str
    precision: str
    compiled: bool
    batch: int
    model: Mapping[str, Any]
    machine: Mapping[str, Any]

    @property
    def dense_ms(self) -> float:
        return sum(self.ms[name] for name in DENSE)

    def step_s(self, kind: StepKind, windows_scored: float = 0.0) -> float:
        """Reference seconds of one step of `kind` that scored so many windows (a fraction where pools are shared)."""
        try:
            step = self.dense_ms if kind.dense else self.ms[kind.key]
            gate = windows_scored * self.ms["ngram_window"] if windows_scored else 0.0
        except KeyError as missing:
            raise ComponentTimesError(
                f"the table of component times has no entry {missing}: it was measured for {sorted(self.ms)}; measure it "
                "with the settings of this run (leave trainer.component_times empty)"
            ) from None
        return (step + gate) / 1000

    @property
    def unsteady(self) -> float | None:
        """The largest spread of the plain step's components where it exceeds `STEADY`: the machine was busy."""
        worst = max((self.spread.get(name, 0.0) for name in DENSE), default=0.0)
        return worst if worst > STEADY else None

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, sort_keys=True)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write beside and rename."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.draft")
        draft.write_text(self.to_json() + "\n")
        draft.replace(path)

    @staticmethod
    def load(path: Path) -> ComponentTimes:
        """Raises ComponentTimesError for a missing file, another schema, or a file that is no such table."""
        try:
            raw = json.loads(path.read_text())
            schema = raw.pop("schema")
            if schema != SCHEMA:
                raise ComponentTimesError(f"{path}: schema {schema}, this version reads {SCHEMA}: measure it again")
            return ComponentTimes(**raw)
        except FileNotFoundError:
            raise ComponentTimesError(f"{path}: no such table of component times") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ComponentTimesError(f"{path}: not a table of component times ({error})") from None

    def check(self, cfg: ModelConfig, batch: int, optim: OptimConfig) -> None:
        """Raise ComponentTimesError unless the table was measured for this model, batch and optimizer."""
        wanted = identity(cfg, optim)
        have = dict(self.model)
        if have != wanted or self.batch != batch:
            raise ComponentTimesError(
                f"the table of component times is for model {have} and batch {self.batch}, the run has {wanted} and batch "
                f"{batch}: measure again (leave trainer.component_times empty)"
            )


def identity(cfg: ModelConfig, optim: OptimConfig) -> dict[str, Any]:
    """What a table of component times is for: the model's shape and the optimizer's name."""
    shape = {k: v for k, v in asdict(cfg).items() if k not in ("attention", "name")}
    return {**shape, "optimizer": optim.name}


def measure_components(
    cfg: ModelConfig,
    batch: int,
    kinds: list[StepKind],
    optim: OptimConfig,
    device: torch.device,
    precision: str = "auto",
    rounds: int = 15,
    compiling: str = "off",
    progress: Callable[[str], None] = lambda text: None,
) -> ComponentTimes:
    """Measure every component that the arms `kinds` use, in turn, round after round, and keep medians.

    `compiling`: "on", "off", or "measure": torch.compile for the plain step if it works here and is faster.

    Tokens are drawn uniformly: times do not depend on them. Two warm-up rounds, compilation included, are thrown away.
    """
    attention = cfg.attention
    if attention == "auto":
        if device.type == "cuda":
            attention = "sdpa"
        else:
            progress("attention: explicit products against SDPA")
            probes = {name: _dense_probes(cfg, name, batch, optim, device, "fp32") for name in ("explicit", "sdpa")}
            total = {n: sum(_interleaved(p, 5, device)[0].values()) for n, p in probes.items()}
            attention = min(total, key=lambda name: total[name])
    if precision == "auto":
        if device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported() else "fp32"
        else:
            progress("precision: fp32 against bf16")
            total = {}
            for name in ("fp32", "bf16"):
                total[name] = sum(
                    _interleaved(_dense_probes(cfg, attention, batch, optim, device, name), 3, device)[0].values()
                )
            precision = min(total, key=lambda name: total[name])

    compiled = compiling == "on"
    if compiling == "measure":
        progress("torch.compile against eager (the first compilation takes half a minute)")
        compiled = _compiling_pays(cfg, attention, batch, optim, device, precision, progress)

    probes_all = dict(_dense_probes(cfg, attention, batch, optim, device, precision, compiled))
    if any(k.gate.signal == "ngram" for k in kinds):
        gate = next(k.gate for k in kinds if k.gate.signal == "ngram")
        probes_all["ngram_window"] = _ngram_probe(cfg, gate)
    for kind in kinds:
        if not kind.dense:
            probes_all[kind.key] = _sparse_probe(cfg, attention, batch, kind, optim, device, precision)
    progress(f"{len(probes_all)} components, {rounds} rounds")
    ms, spread = _interleaved(probes_all, rounds, device)
    # a backward measured whole and without weight gradients: the difference is the weight gradients' share
    backward = ms.pop("backward")
    ms["backward_dx"] = min(ms["backward_dx"], backward)
    ms["backward_dw"] = backward - ms["backward_dx"]
    spread["backward_dw"] = spread.pop("backward")
    if "ngram_window" in ms:
        pool = next(k.gate for k in kinds if k.gate.signal == "ngram").pool_windows
        ms["ngram_window"] /= pool
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return ComponentTimes(ms, spread, attention, precision, compiled, batch, identity(cfg, optim), machine)


def _compiling_pays(
    cfg: ModelConfig,
    attention: str,
    batch: int,
    optim: OptimConfig,
    device: torch.device,
    precision: str,
    progress: Callable[[str], None],
) -> bool:
    probes = {
        name: _dense_probes(cfg, attention, batch, optim, device, precision, name == "compiled")
        for name in ("compiled", "eager")
    }
    total = {}
    for name, probe in probes.items():
        try:
            total[name] = sum(_interleaved(probe, 5, device)[0].values())
        except torch._dynamo.exc.TorchDynamoException as error:  # no working C++ compiler, most often
            progress(f"torch.compile does not work here ({str(error).splitlines()[0]}): plain steps stay eager")
            return False
    return total["compiled"] < total["eager"]


Probe = Callable[[], dict[str, float]]
"""One use of some components: name -> seconds."""


def _interleaved(
    probes: Mapping[str, Probe], rounds: int, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    found: dict[str, list[float]] = {}
    for turn in range(rounds + 2):
        for probe in dict.fromkeys(probes.values()):
            for name, seconds in probe().items():
                if turn >= 2:
                    found.setdefault(name, []).append(1000 * seconds)
    ms = {name: statistics.median(values) for name, values in found.items()}
    spread = {}
    for name, values in found.items():
        low, _, high = statistics.quantiles(values, n=4)
        spread[name] = (high - low) / ms[name] if ms[name] else 0.0
    return ms, spread


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _setup(cfg: ModelConfig, attention: str, batch: int, device: torch.device) -> tuple[Transformer, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**{**asdict(cfg), "attention": attention})).to(device)
        tokens = torch.randint(0, cfg.vocab_size, (batch, cfg.context + 1)).to(device)
    return model, tokens[:, :-1], tokens[:, 1:]


def _dense_probes(
    cfg: ModelConfig,
    attention: str,
    batch: int,
    optim: OptimConfig,
    device: torch.device,
    precision: str,
    compiled: bool = False,
) -> dict[str, Probe]:
    model, x, y = _setup(cfg, attention, batch, device)
    optimizer = Optimizer(model, Active.everything(model), optim)
    run = torch.compile(model) if compiled else model
    cast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def whole() -> dict[str, float]:
        start = _clock(device)
        with cast:
            loss = token_loss(run(x), y).mean()
        forward = _clock(device)
        loss.backward()
        backward = _clock(device)
        optimizer.step(0.5)
        end = _clock(device)
        return {"forward": forward - start, "backward": backward - forward, "optimizer": end - backward}

    def activations_only() -> dict[str, float]:
        weights = [p for name, p in model.named_parameters() if name != "embed.weight"]
        for p in weights:
            p.requires_grad_(False)
        with cast:
            loss = token_loss(run(x), y).mean()
        start = _clock(device)
        torch.autograd.grad(loss, model.embed.weight)
        seconds = _clock(device) - start
        for p in weights:
            p.requires_grad_(True)
        return {"backward_dx": seconds}

    return {"whole": whole, "dx": activations_only}


def _sparse_probe(
    cfg: ModelConfig,
    attention: str,
    batch: int,
    kind: StepKind,
    optim: OptimConfig,
    device: torch.device,
    precision: str,
) -> Probe:
    model, x, y = _setup(cfg, attention, batch, device)
    active = choose(model, kind.subset, 0, 0)
    optimizer = Optimizer(model, active, optim)
    rows = TokenGate(kind.gate, 0).rows()
    dtype = torch.bfloat16 if precision == "bf16" else None

    def probe() -> dict[str, float]:
        start = _clock(device)
        optimizer.set_gradients(sparse_step(model, x, y, rows, active, dtype).gradients)
        optimizer.step(0.5)
        return {kind.key: _clock(device) - start}

    return probe


def _ngram_probe(cfg: ModelConfig, gate: GateConfig) -> Probe:
    table = NgramTable(cfg.vocab_size, tuple(gate.ngram_orders), gate.ngram_bits, gate.ngram_strength)
    generator = torch.Generator().manual_seed(0)

    def probe() -> dict[str, float]:
        # fresh tokens each time: a table slot seen a moment ago would lie in the cache
        tokens = torch.randint(0, cfg.vocab_size, (gate.pool_windows, cfg.context + 1), generator=generator)
        start = time.perf_counter()
        table.score_and_update(tokens).mean(-1).argsort()
        return {"ngram_window": time.perf_counter() - start}

    return probe


def kept_rows(gate: GateConfig, context: int) -> int | None:
    """Token rows per sequence in the backward, None where tokens are not gated."""
    return kept_count(context, gate.keep_fraction) if gate.unit == "token" else None
