"""A module whose mapped layers run on a simulator while the rest runs on the host.

    deployed = deploy(model, plan, backend="fixed_point")
    logits = deployed(tokens)
    deployed.counts()

Each row of a layer's input (a token) is one time step of its graph. The deployed module is a copy for evaluation: no
gradients, no training mode, and the model it was made from is not changed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hardware.energy import Counts
from neuro.conversion.plan import Plan, Segment, fingerprint
from neuro.segments import BACKENDS, PairFirst, PairLast, Runner, SegmentHealth, SingleLinear

__all__ = ["BACKENDS", "Deployed", "SegmentHealth", "deploy"]


def deploy(module: nn.Module, plan: Plan, backend: str = "fixed_point") -> Deployed:
    """A deep copy of `module` with every mapped layer replaced.

    Args:
        module: the module that `plan` was made from; its weights are compared with the plan's fingerprints. plan: from
        `neuro.conversion.graded.convert` or `load_plan`. backend: "fixed_point": the graphs on the integer simulator.
        "quantised": the same int8 weights and inputs, and the same
            hidden grid, in dense float arithmetic without events: the control that shows what the event pipeline
            itself costs.

    Raises:
        ValueError: unknown backend; a layer of the plan that the module lacks, or whose weights are not the plan's.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; known: {', '.join(BACKENDS)}")
    for segment in plan.segments:
        for name, expected in zip(segment.modules, segment.fingerprints, strict=True):
            _check_layer(module, name, expected)
    twin = copy.deepcopy(module).requires_grad_(False)
    runners = []
    for segment in plan.segments:
        layers = [_linear(twin, name) for name in segment.modules]
        runner = Runner(segment, backend, [layer.bias for layer in layers])
        runners.append(runner)
        news: list[nn.Module] = [SingleLinear(runner)] if len(layers) == 1 else [PairFirst(runner), PairLast(runner)]
        for old, new in zip(layers, news, strict=True):
            twin = _replace(twin, old, new)
    for part in twin.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0  # torch's fused kernel would read the weights of the replaced layers
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False
    return Deployed(twin.eval(), plan, backend, runners)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    try:
        layer = module.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the plan maps layer {name!r}, which {type(module).__name__} does not have") from error
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"the plan maps layer {name!r}, which is {type(layer).__name__} here, not nn.Linear")
    return layer


def _check_layer(module: nn.Module, name: str, expected: str) -> None:
    if fingerprint(_linear(module, name)) != expected:
        raise ValueError(f"layer {name!r} holds other weights than the plan was made from; convert this module again")


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` wherever `old` stands, hooks included; returns the root, which may itself be replaced."""
    new._forward_hooks.update(old._forward_hooks)
    new._forward_pre_hooks.update(old._forward_pre_hooks)
    if root is old:
        return new
    for parent in list(root.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new
    return root


@dataclass
class _HostTokens:
    tokens: int = 0


class Deployed(nn.Module):
    """What `deploy` returns; call it as the original. `module` is the copy, `plan` and `backend` say what it runs.

    `counts()` covers everything since construction or `reset_counts()`.
    """

    def __init__(self, module: nn.Module, plan: Plan, backend: str, runners: list[Runner]) -> None:
        super().__init__()
        self.module = module
        self.plan = plan
        self.backend = backend
        self._runners = runners
        self._host = _HostTokens()
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

    def counts(self) -> list[Counts]:
        """Events per layer since the last reset; operations on the host follow with `host=True`.

        With backend "quantised" there are no events, and every layer is listed with `host=True` and its dense MACs.
        """
        lines = [line for runner in self._runners for line in runner.counts()]
        host: dict[str, list[float]] = {}
        for work in self.plan.host:
            entry = host.setdefault(f"{work.layer}:{work.kind}", [0.0, 0])
            entry[0] += work.macs_per_token
            entry[1] += work.weight_bytes
        tokens = self._host.tokens
        lines += [
            Counts(
                layer=name,
                tokens=tokens,
                synops=0,
                events=0,
                neuron_updates_active=0,
                neuron_updates_inactive=0,
                dense_macs=round(macs * tokens),
                weight_bytes=int(size),
                graded=False,
                payload_bits=0,
                host=True,
            )
            for name, (macs, size) in host.items()
        ]
        return lines

    def health(self) -> tuple[SegmentHealth, ...]:
        """Clipped inputs, wraps and values beyond their word, per segment, since the last reset."""
        return tuple(runner.health() for runner in self._runners)

    def reset_counts(self) -> None:
        """Forget all counts."""
        self._host.tokens = 0
        for runner in self._runners:
            runner.reset()
