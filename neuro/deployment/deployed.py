"""A module whose mapped layers run on a simulator while the rest runs on the host.

    deployed = deploy(model, plan)
    logits = deployed(tokens)
    deployed.counts()

Each row of a layer's input (a token) is one time step of its graph (graded and sigma-delta routes) or several (rate
route). The sigma-delta route reads the rows along the second last dimension as a stream that starts from rest; token by
token, `with deployed.keep_state():` goes on from call to call. The deployed module is a copy for evaluation: no gradients,
no training mode, and the model it was made from is not changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hardware.documents import read_json
from hardware.energy.account import Counts
from hardware.text import quoted
from neuro.analysis.preparation import move_hooks, prepared_copy, replace_module
from neuro.analysis.state import Account, detached_copy
from neuro.analysis.tracing import check_ready
from neuro.conversion.convolutions.geometry import Layer
from neuro.conversion.plan import ROOT, Plan, PlanFileError, Segment, check_complete, fingerprint, load_plan, save_plan
from neuro.deployment.networks import NetworkRunner
from neuro.deployment.routes import runner_for
from neuro.deployment.runner import BACKENDS, SegmentHealth, SegmentRunner
from neuro.deployment.stand_ins import NetworkLayer, PairFirst, PairLast, SingleLinear
from neuro.simulators.fixed_point import CHIP_NOTE, MODES

__all__ = ["BACKENDS", "Deployed", "SegmentHealth", "deploy", "load_deployed", "save_deployed"]

SCHEMA = 1
RECORD = "deployed.json"


def deploy(module: nn.Module, plan: Plan, backend: str = "fixed_point", mode: str = "lava") -> Deployed:
    """A deep copy of `module` with every mapped layer replaced.

    Args:
        module: the module that `plan` was made from; its weights are compared with the plan's fingerprints. Layers that
            were converted to nn.Linear for the plan are converted again, in the copy.
        plan: of any route, from its `convert` or `load_plan`.
        backend: "fixed_point": the graphs on the integer simulator. "quantised": the same integer weights, the same
            inputs on their grid and the same hidden grid (rate route: T levels) in dense arithmetic without events: the
            control that shows what the event pipeline itself costs. Equal to the simulation, bit for bit: sigma-delta
            with thresholds up to 1; rate with soft reset and analogue input while no sum is shifted on its way out.
        mode: of the simulator: "lava", or "chip", after published emulators, where an exponent shifts every synapse and
            registers wrap. Weights then lose bits wherever a graph has a negative exponent beyond -1; `notes()` says where.

    Raises:
        LostLayer: the plan's segments and host work leave out a layer that the report counted, or count it twice.
        ValueError: unknown backend or mode, mode "chip" without the simulator; a lazy, pruned or compiled module; a layer
            of the plan that the module lacks, or whose weights are not the plan's.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {quoted(backend)} is unknown; known: {', '.join(BACKENDS)}")
    if mode not in MODES:
        raise ValueError(f"mode {quoted(mode)} is unknown; known: {', '.join(MODES)}")
    if mode != MODES[0] and backend != "fixed_point":
        raise ValueError(
            f"mode {quoted(mode)} is one of the simulator's; backend {quoted(backend)} has no events and no registers"
        )
    check_ready(module)
    check_complete(plan)
    source = prepared_copy(module, plan.prepared) if plan.prepared else module
    for segment in plan.segments:
        for name, expected in zip(segment.modules, segment.fingerprints, strict=True):
            _check_layer(source, name, segment, expected)
    twin = (source if plan.prepared else detached_copy(module)).requires_grad_(False)
    runners = []
    for segment in plan.segments:
        layers = [_layer(twin, name, segment) for name in segment.modules]
        runner = runner_for(segment, backend, [layer.bias for layer in layers], mode)
        runners.append(runner)
        news: list[nn.Module]
        if isinstance(runner, NetworkRunner):
            news = [NetworkLayer(runner, layer, name) for layer, name in zip(layers, segment.modules, strict=True)]
        else:
            kinds = [SingleLinear] if len(layers) == 1 else [PairFirst, PairLast]
            news = [kind(runner, layer) for kind, layer in zip(kinds, layers, strict=True)]  # type: ignore[arg-type]
        for old, new in zip(layers, news, strict=True):
            twin = _replace(twin, old, new)
        for norm in segment.norms.values():  # its layer's weights have taken it over
            twin = _replace(twin, twin.get_submodule(norm), nn.Identity())
        if segment.threshold_module:  # the graph's neurons do what it did
            twin = _replace(twin, twin.get_submodule(segment.threshold_module), nn.Identity())
    for part in twin.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0  # torch's fused kernel would read the weights of the replaced layers
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False
    return Deployed(twin.eval(), plan, backend, runners, mode)


def _layer(module: nn.Module, name: str, segment: Segment) -> Layer:
    try:
        layer = module.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the plan maps layer {quoted(name)}, which {type(module).__name__} does not have") from error
    if isinstance(layer, nn.Linear) or (segment.stages and isinstance(layer, nn.Conv1d | nn.Conv2d)):
        return layer
    kinds = "nn.Linear, nn.Conv1d or nn.Conv2d" if segment.stages else "nn.Linear"
    raise ValueError(f"the plan maps layer {quoted(name)}, which is {type(layer).__name__} here, not {kinds}")


def _check_layer(module: nn.Module, name: str, segment: Segment, expected: str) -> None:
    norm = None
    if name in segment.norms:
        norm = dict(module.named_modules()).get(segment.norms[name])
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            raise ValueError(f"the plan has a batch norm {quoted(segment.norms[name])}, which this module has not")
    if fingerprint(_layer(module, name, segment), norm) != expected:
        raise ValueError(f"layer {quoted(name)} holds other weights than the plan was made from; convert this module again")


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` wherever `old` stands, hooks included; returns the root, which may itself be replaced."""
    move_hooks(old, new)
    return replace_module(root, old, new)


@dataclass
class _HostTokens(Account):
    tokens: int = 0


class _Unforeseen(Account):
    """Rows of every nn.Linear, nn.Conv1d and nn.Conv2d that the report never saw run and the plan so knows nothing of: a
    branch that the example did not take, for instance. They run in float on the host and are counted as what they are.
    """

    def __init__(self, twin: nn.Module, plan: Plan) -> None:
        known = {*plan.layers, *(work.layer for work in plan.host)}
        self.rows: dict[str, int] = {}
        self.macs: dict[str, int] = {}
        self.layers = {
            name or ROOT: layer
            for name, layer in twin.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) and (name or ROOT) not in known
        }
        for name, layer in self.layers.items():
            layer.register_forward_hook(self._counting(name))

    def _counting(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, _: Any, output: Tensor) -> None:
            linear = isinstance(layer, nn.Linear)
            rows = math.prod(output.shape[:-1]) if linear else output.numel() // math.prod(output.shape[1:])
            self.rows[name] = self.rows.get(name, 0) + rows
            each = math.prod(self.layers[name].weight.shape[1:])
            self.macs[name] = self.macs.get(name, 0) + output.numel() * each

        return hook

    def counts(self) -> list[Counts]:
        """One record for each that ran."""
        found = []
        for name, rows in self.rows.items():
            layer = self.layers[name]
            size = layer.weight.numel() * layer.weight.element_size()
            kind = "linear" if isinstance(layer, nn.Linear) else "convolution"
            found.append(_on_host(f"{name}:{kind}", rows, self.macs[name], size))
        return found


def _on_host(name: str, tokens: int, macs: int, size: int) -> Counts:
    """What the host computes: multiply-accumulates and bytes of weights, no event."""
    return Counts(
        layer=name,
        tokens=tokens,
        synops=0,
        events=0,
        neuron_updates_active=0,
        neuron_updates_inactive=0,
        dense_macs=macs,
        weight_bytes=size,
        graded=False,
        payload_bits=0,
        host=True,
    )


class Deployed(nn.Module):
    """What `deploy` returns; call it as the original. `module` is the copy, `plan`, `backend` and `mode` say what it runs.

    `counts()` covers everything since construction or `reset_counts()`.
    """

    def __init__(
        self, module: nn.Module, plan: Plan, backend: str, runners: list[SegmentRunner], mode: str = "lava"
    ) -> None:
        super().__init__()
        self.module = module
        self.plan = plan
        self.backend = backend
        self.mode = mode
        self._runners = runners
        self._host = _HostTokens()
        self._unforeseen = _Unforeseen(module, plan)
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward. Raises RuntimeError when an input asks for gradients."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    "a deployed model has no gradients (its layers are integers), but an input requires them; "
                    "detach it, or train the model that was converted"
                )
        before = [runner.rows for runner in self._runners]
        with torch.no_grad():
            result = self.module(*args, **kwargs)
        self._host.tokens += max(
            (round((r.rows - b) / r.segment.rows_per_token) for r, b in zip(self._runners, before, strict=True)),
            default=0,
        )
        return result

    def train(self, mode: bool = True) -> Deployed:
        """Evaluation only: raises RuntimeError for mode=True."""
        if mode:
            raise RuntimeError("a deployed model cannot be trained; train the original, calibrate and convert it again")
        return super().train(False)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The plan's segments, in order."""
        return self.plan.segments

    @property
    def layers(self) -> tuple[Mapping[str, tuple[str, ...]], ...]:
        """Per segment: layer of `counts()` -> populations of the graph that stand for it."""
        return tuple(dict(runner.layers) for runner in self._runners)

    def counts(self) -> list[Counts]:
        """Events per layer since the last reset; operations on the host follow with `host=True`, and last those linear
        layers that ran though the report of the plan never saw them run.

        With backend "quantised" there are no events, and every layer is listed with `host=True` and its dense MACs.
        """
        lines = [line for runner in self._runners for line in runner.counts()]
        host: dict[str, list[float]] = {}
        for work in self.plan.host:
            entry = host.setdefault(f"{work.layer}:{work.kind}", [0.0, 0])
            entry[0] += work.macs_per_token
            entry[1] += work.weight_bytes
        tokens = self._host.tokens
        lines += [_on_host(name, tokens, round(macs * tokens), int(size)) for name, (macs, size) in host.items()]
        return lines + self._unforeseen.counts()

    def health(self) -> tuple[SegmentHealth, ...]:
        """Clipped inputs, wraps and values beyond their word, per segment, since the last reset."""
        return tuple(runner.health() for runner in self._runners)

    def notes(self) -> tuple[str, ...]:
        """What the simulator said about the graphs that ran: which weights lost bits, how far a mode can be trusted."""
        said = [(r.segment.name, note) for r in self._runners for note in r.notes]
        general = dict.fromkeys(note for _, note in said if note == CHIP_NOTE)
        return (*(f"{name}: {note}" for name, note in said if note not in general), *general)

    @property
    def keeps_state(self) -> bool:
        """Whether `keep_state` can go on from call to call: not with sigma-delta streams in mode "chip", nor with those of
        networks of convolutions.
        """
        streams = [segment for segment in self.segments if segment.code == "delta"]
        return not streams or (self.mode == "lava" and not any(segment.stages for segment in streams))

    @contextmanager
    def keep_state(self) -> Iterator[Deployed]:
        """Inside, streams go on from call to call, as in generation token by token; at both ends they start from rest.

        The batch keeps its size and order inside. Only the sigma-delta route has streams: elsewhere nothing changes.

        Raises RuntimeError where `keeps_state` is False.
        """
        if not self.keeps_state:
            raise RuntimeError(
                "sigma-delta streams start from rest at every call in mode 'chip', and those of networks of convolutions "
                "in every mode; give whole sequences, as generate(...) does there for every token"
            )
        self.reset_state()
        try:
            for runner in self._runners:
                runner.keep_state = True
            yield self
        finally:
            for runner in self._runners:
                runner.keep_state = False
            self.reset_state()

    def reset_state(self) -> None:
        """The next call starts every stream from rest, inside `keep_state` too."""
        for runner in self._runners:
            runner.reset_state()

    def reset_counts(self) -> None:
        """Forget all counts."""
        self._host.tokens = 0
        self._unforeseen.rows.clear()
        self._unforeseen.macs.clear()
        for runner in self._runners:
            runner.reset()


def _host_hashes(module: nn.Module) -> dict[str, str]:
    """SHA-256 of every parameter and buffer that stays on the host."""
    found = {}
    for name, tensor in module.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        found[name] = digest.hexdigest()
    return found


def save_deployed(deployed: Deployed, folder: str | os.PathLike[str]) -> Path:
    """Write a deployed model beside its checkpoint: the plan (`save_plan`) and `deployed.json`, last and atomically.

    The folder holds the integers of every mapped layer, the backend, and hashes of what stays on the host; the host's own
    weights are the module's business, so `load_deployed` needs the module. Counts and streams are not kept.

    Raises FileExistsError when the folder already holds a plan.
    """
    folder = save_plan(deployed.plan, folder)
    document = {"schema": SCHEMA, "backend": deployed.backend, "mode": deployed.mode, "host": _host_hashes(deployed.module)}
    temporary = folder / f".{RECORD}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")
    os.replace(temporary, folder / RECORD)
    return folder


def load_deployed(folder: str | os.PathLike[str], module: nn.Module) -> Deployed:
    """A deployed model from a folder of `save_deployed` and the module it was made from, which is not changed.

    Raises:
        PlanFileError: a folder that is missing, damaged or of another schema.
        ValueError: a mapped layer, or a parameter or buffer on the host, is not the one that was saved; it is named.
    """
    path = Path(folder) / RECORD
    try:
        document: Any = read_json(path, PlanFileError)
    except FileNotFoundError as error:
        raise PlanFileError(f"{folder} holds no {RECORD}; save_deployed(deployed, folder) writes one") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else None
        raise PlanFileError(f"{path} has schema {quoted(found)}, this version reads {SCHEMA}; deploy and save again")
    try:
        backend, mode, wanted = document["backend"], document.get("mode", "lava"), dict(document["host"])
    except (KeyError, TypeError, ValueError) as error:
        raise PlanFileError(f"{path} is damaged: {quoted(error)}") from error
    deployed = deploy(module, load_plan(folder), backend, mode)
    held = _host_hashes(deployed.module)
    for name in sorted(wanted.keys() | held.keys()):
        if wanted.get(name) != held.get(name):
            what = (
                "is missing in this module"
                if name not in held
                else "is not in the saved one"
                if name not in wanted
                else ("has other values than the saved one")
            )
            raise ValueError(f"host tensor {quoted(name)} {what}; load the checkpoint that was deployed")
    return deployed
