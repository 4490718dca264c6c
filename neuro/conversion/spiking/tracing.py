"""A whole snnTorch module as a description, by watching one run of it: which layers feed which.

The module is called once on an example, whatever its loop over steps looks like. Every result of a layer carries where it
came from; indexing of steps, casts, flattening, stacking over time and sums of branches keep that. What else is computed
between layers is not in the description: a layer that hears it is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hardware.text import quoted
from neuro.conversion.spiking.description import INPUT, Description, NotConvertible
from neuro.conversion.spiking.layers import Path
from neuro.conversion.spiking.snntorch_modules import NOTHING, Layers, behind_the_last, is_neuron, layer_name

Ways = tuple[Path, ...]
_SAME = {"float", "double", "to", "type", "contiguous", "detach", "clone", "requires_grad_", "dropout"}
_INDEXED = {"__getitem__", "select", "unbind", "__iter__", "chunk", "split"}
_FLAT = {"flatten", "reshape", "view"}
_SUM = {"add", "__add__", "__radd__", "__iadd__", "add_"}


def traced(module: nn.Module, example: Tensor, *, readout: bool = False) -> Description:
    """The description of a module that calls its layers in any order; see `describe`."""
    watch = _Watch()
    watch.mark(example, None)
    training = module.training
    neurons: list[Any] = [m for m in module.modules() if is_neuron(m) and hasattr(m, "reset_mem")]
    for neuron in neurons:
        neuron.reset_mem()
    try:
        module.eval()
        with torch.no_grad(), _hooks(module, watch), watch:
            module(example)
    finally:
        module.train(training)
        for neuron in neurons:
            neuron.reset_mem()
    return watch.description(readout)


@contextmanager
def _hooks(module: nn.Module, watch: _Watch) -> Iterator[None]:
    """Hooks on every layer: neurons whole, and modules without children."""
    with ExitStack() as stack:
        inside: set[str] = set()
        for name, part in module.named_modules():
            if any(name.startswith(f"{outer}.") for outer in inside):
                continue
            if is_neuron(part) or not any(True for _ in part.children()):
                inside.add(name)
                for handle in (
                    part.register_forward_pre_hook(watch.entering(name), with_kwargs=True),
                    part.register_forward_hook(watch.leaving(name), with_kwargs=True),
                ):
                    stack.callback(handle.remove)
        yield


class _Watch(TorchFunctionMode):
    """Where tensors come from; None stands for the input itself, whose shape the first layer says."""

    def __init__(self) -> None:
        super().__init__()
        self._ways: dict[int, Ways | None] = {}
        self._made_by: dict[int, str] = {}
        self._kept: list[Tensor] = []  # so that no id is used again
        self._depth = 0
        self._called: dict[str, tuple[Any, Ways]] = {}
        self._weights: set[str] = set()
        self._left: dict[str, list[Tensor]] = {}  # states of neurons after their latest call
        self._read: dict[str, tuple[int, int]] = {}  # storage and place of the input that a layer heard last
        self._calls: dict[str, int] = {}

    def mark(self, x: Tensor, ways: Ways | None) -> None:
        """Say where a tensor comes from."""
        self._ways[id(x)] = ways
        self._kept.append(x)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._depth:
            return out
        name = getattr(func, "__name__", str(func))
        if name == "__iter__":
            found = list(out)
            self._follow(name, args, found)
            return iter(found)
        if (kwargs or {}).get("alpha", 1) != 1:
            name = f"{name} with alpha"
        elif name == "dropout" and _drops(args, kwargs or {}):
            name = "dropout that is on in evaluation too"
        self._follow(name, args, out)
        return out

    def _follow(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        given = [x for x in _tensors(args) if id(x) in self._ways]
        results = _tensors(out)
        if not given or not results:
            return
        first, ways = given[0], self._ways[id(given[0])]
        kept: Ways | str | None = name
        if ways is None and name in _INDEXED and _picks(args):
            name = kept = "places picked out of the input"
        steps_first = name in ("transpose", "permute") and ways is None and _keeps_places(name, args)
        if name in _SAME or steps_first or (name in _INDEXED and self._has_steps(first)):
            kept = ways
        elif name in _FLAT:
            kept = self._flattened(first, results[0], name)
        elif name == "stack" and len(given) == len(_tensors(args)) and self._alike(given):
            kept = ways
        elif name in _SUM and len(given) == 2 and given[0].shape == given[1].shape:
            both = [self._settled(x, x.shape[1:]) for x in given]
            kept = both[0] + both[1]
        for x in results:
            if isinstance(kept, str):  # also what a layer made, where it was changed in place
                self._ways.pop(id(x), None)
                self._made_by[id(x)] = kept
                self._kept.append(x)
            else:
                self.mark(x, kept)

    def _has_steps(self, x: Tensor) -> bool:
        ways = self._ways[id(x)]
        return ways is None or x.ndim > len(ways[0].shape) + 1

    def _alike(self, tensors: list[Tensor]) -> bool:
        return len({_signature(self._ways[id(x)]) for x in tensors}) == 1

    def _flattened(self, before: Tensor, after: Tensor, name: str) -> Ways | str | None:
        if after.shape == before.shape:
            return self._ways[id(before)]
        if before.ndim in (3, 4) and after.ndim == 2 and len(after) == len(before):
            ways = self._settled(before, before.shape[1:])
            return tuple(way.then("flatten", nn.Flatten()) for way in ways)
        return name

    def _settled(self, x: Tensor, shape: torch.Size) -> Ways:
        ways = self._ways[id(x)]
        return (Path(INPUT, tuple(shape)),) if ways is None else ways

    def entering(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """The hook of a layer that is about to be called: its own arithmetic is not followed."""

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._depth += 1
            if is_neuron(module):
                self._continues(name, _states(module, _arguments(module, args, kwargs)[1:]))

        return hook

    def _continues(self, name: str, states: list[Tensor]) -> None:
        """Refuse a state that is not what the call before left, or not 0 at the first."""
        left = self._left.get(name)
        for number, now in enumerate(states):
            before = torch.zeros_like(now) if left is None else left[number] if number < len(left) else now
            if not torch.equal(now, before.expand_as(now) if before.numel() == 1 else before):
                raise NotConvertible(
                    f"{name} does not go on from the state that its step before left, or not from 0 at the first one; the"
                    " chip's neurons start from rest at a sample's first step alone. Leave its state alone between steps"
                )

    def _in_order(self, name: str, x: Tensor) -> None:
        """Refuse steps of the input that are read backwards, as far as views of one tensor tell."""
        at = (x.untyped_storage().data_ptr(), int(x.storage_offset()))
        before = self._read.setdefault(name, at)
        if before[0] == at[0] and at[1] < before[1]:
            raise NotConvertible(
                f"{name} hears the steps of its input in another order; give them in the order of the loop"
            )
        self._read[name] = at

    def leaving(self, name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        """The hook of a layer that was called."""

        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            self._depth -= 1
            x = next(iter(_arguments(module, args, kwargs)), None)
            if not isinstance(x, Tensor):
                return
            result = out[0] if isinstance(out, tuple) else out
            if is_neuron(module):
                self._calls[name] = self._calls.get(name, 0) + 1
                own = hasattr(module, "recurrent") or hasattr(module, "V")  # its spikes are a state too
                given = out[0 if own else 1 :] if isinstance(out, tuple) and not module.init_hidden else ()
                self._left[name] = [state.clone() for state in _states(module, given)]
            if id(x) not in self._ways:
                if is_neuron(module):
                    made = self._made_by.get(id(x), "something that no layer made")
                    raise NotConvertible(
                        f"{name} hears the result of {made}, which has no counterpart between spiking layers. Use layers,"
                        " sums, and flattening between neurons"
                    )
                self._made_by[id(result)] = self._made_by.get(id(x), f"{name} on what no layer made")
                self._kept.append(result)
                return
            if type(module).__name__ in NOTHING:
                self.mark(result, self._ways[id(x)])
                return
            ways = self._settled(x, x.shape[-1:] if isinstance(module, nn.Linear) else x.shape[1:])
            if is_neuron(module):
                self._neuron(name, module, ways)
                self.mark(result, (Path(name, ways[0].shape),))
                return
            if len(ways) > 1 and "Norm" in type(module).__name__:
                raise NotConvertible(f"{name} ({type(module).__name__}) follows a sum; put it into each branch")
            if self._ways[id(x)] is None:
                self._in_order(name, x)
            self._weights.add(name)
            self.mark(result, tuple(way.then(name, module, bias=not number) for number, way in enumerate(ways)))

        return hook

    def _neuron(self, name: str, module: nn.Module, ways: Ways) -> None:
        if name not in self._called:
            self._called[name] = (module, ways)
        elif _signature(self._called[name][1]) != _signature(ways):
            raise NotConvertible(
                f"{name} is called in two places, which would share one state; make neurons for each of them"
            )

    def description(self, readout: bool) -> Description:
        """What was seen."""
        if not self._called:
            raise NotConvertible("no neurons of snnTorch were called; describe() takes a network of theirs")
        if len(set(self._calls.values())) > 1:
            often = ", ".join(f"{quoted(name)} {count}" for name, count in self._calls.items())
            raise NotConvertible(
                f"layers of neurons are not called equally often ({often} times), and all of the chip's run at every step."
                " Call each of them once a step"
            )
        used = {layer for _, ways in self._called.values() for way in ways for layer in way.names}
        if lost := sorted(self._weights - used):
            raise behind_the_last(lost[0])
        feeding = {way.source for _, ways in self._called.values() for way in ways}
        layers = Layers()
        for name, (module, ways) in self._called.items():
            renamed = tuple(way if way.source == INPUT else _from(way, layer_name(way.source)) for way in ways)
            layers.add(name, module, renamed, readout=readout and name not in feeding, layer=layer_name(name))
        return layers.description()


def _from(way: Path, source: str) -> Path:
    renamed = copy(way)
    renamed.source = source
    return renamed


def _signature(ways: Ways | None) -> Any:
    return None if ways is None else tuple((way.source, way.names) for way in ways)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in _tensors(part)] if isinstance(value, tuple | list) else []


def _picks(args: tuple[Any, ...]) -> bool:
    """Whether an index picks places one by one, which may change their order."""
    index = args[1] if len(args) > 1 else None
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list) or (isinstance(part, Tensor) and part.ndim) for part in parts)


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a module is called with, in the order of its forward, also what is given by name."""
    if not kwargs:
        return args
    given = signature(module.forward).bind(*args, **kwargs)
    given.apply_defaults()
    return tuple(given.arguments.values())


def _drops(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of `torch.nn.functional.dropout`, or of `torch.dropout` (whose flag is `train`), leaves values out."""
    named = dict(zip(("input", "p", "training"), args, strict=False)) | dict(kwargs)
    return bool(named.get("training", named.get("train", True)) and named.get("p", 0.5))


def _states(module: Any, given: tuple[Any, ...]) -> list[Tensor]:
    """The states of neurons: what they keep, or what they are given and give back."""
    found = [getattr(module, key, None) for key in ("syn", "mem")] if module.init_hidden else list(given)
    return [state.detach() for state in found if isinstance(state, Tensor) and state.numel()]


def _keeps_places(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a transposition moves the first two axes only, samples and steps."""
    x, *axes = args
    if len(axes) == 1 and isinstance(axes[0], tuple | list):
        axes = list(axes[0])
    axes = [axis % x.ndim for axis in axes if isinstance(axis, int)]
    return sorted(axes) == [0, 1] if name == "transpose" else axes[2:] == list(range(2, x.ndim))
