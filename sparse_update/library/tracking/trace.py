"""One forward of a model, watched: every row of every gated layer gets the name of the token of the loss that it is.

The watch begins when the outermost module is called and ends when it returns. Inside, each operation hands the labels of
its inputs on to its outputs (`rules`), and each gated layer notes the labels of its input. Compiled regions run eagerly in
the meantime. At the loss the labels of its own rows are read, and what the layers noted becomes a rule for each (`layout`).

Shape letters: B sequences, T tokens of each in the loss, N = B T.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_update.library.tracking.flops import Count
from sparse_update.library.tracking.labels import DATA, NONE, Streams, settled, uniform
from sparse_update.library.tracking.layout import Layout, find_layout
from sparse_update.library.tracking.mixing import Mixing
from sparse_update.library.tracking.mode import Mode
from sparse_update.library.tracking.rules import Label
from sparse_update.library.tracking.tail import elementwise_source, nodes_below, source_rows

FORWARDS_KEPT = 16
"""Forwards without a loss after which the watch begins anew."""
UNKNOWN = "its rows could not be followed through the operations before it, or those mix tokens"
OTHERS = "its rows are none of the loss's tokens"
MOVED = "which token each of its rows is depends on the inputs, as where tokens are sorted or sent to experts"
PARTS = "the loss's tokens are among its rows in an order that no rule describes, or only some of them"
SEVERAL = "it is called several times, with rows in different orders"
FULLGRAPH = (
    "one forward is watched before the first gated loss: with fullgraph=True call gate.probe(inputs) before compiling"
)


class _Hook:
    """A hook of the watch. Copies and pickles of the module have one in its place that does nothing and needs no gate."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, *given: Any) -> Any:
        return self.call(*given)

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")


class Trace:
    """Watches the forward that comes before the next loss.

    Args:
        whole: rows are followed as whole sequences, through everything that mixes their tokens; else token by token.
    """

    def __init__(self, whole: bool) -> None:
        self.whole = whole
        self.handles: dict[nn.Module, list[Any]] = {}
        self.depth = 0
        self.forwards = 0
        self._clear()

    def _clear(self) -> None:
        self.streams = [Streams(True), Streams(True)] if self.whole else [Streams()]
        self.labels: list[WeakTensorKeyDictionary] = [WeakTensorKeyDictionary() for _ in self.streams]
        self.fixed = WeakTensorKeyDictionary()
        """tensors that are the same for all inputs of this shape: buffers, and what is made of these and numbers alone"""
        self.count = Count()
        self.notes: dict[Any, list[tuple[int, list[Label]]]] = {}
        """by layer: number of the forward, and what it saw, for each call"""
        self.outputs: list[Tensor] = []
        self.mixing = Mixing()
        self.source: Tensor | None = None
        """what the loss's rows come from, an output of the watched forward"""
        self.called: set[int] = set()
        self.ahead = False
        self.leading = False
        """a forward ahead of one with compiled regions is running"""
        self.following: nn.Module | None = None
        """what runs after a forward ahead of it"""
        self.replaced: dict[Any, set[int]] = {}
        """node of a compiled call -> numbers of the nodes of the forward ahead that it stands for"""
        self.latest: list[Tensor] = []
        """outputs of the outermost call that ended last"""
        self.forwards = 0
        """number of the forward that is watched or was last, from 1; one may consist of several outermost calls"""

    # where it begins and ends

    @property
    def armed(self) -> bool:
        return bool(self.handles)

    @property
    def watching(self) -> bool:
        return self.depth > 0

    def arm(self, modules: Iterable[nn.Module]) -> None:
        """Watch the next forward through any of these modules."""
        if self.armed:
            return
        self._clear()
        for module in modules:
            self.handles[module] = [
                module.register_forward_pre_hook(_Hook(self._before), prepend=True, with_kwargs=True),
                module.register_forward_hook(_Hook(self._after), with_kwargs=True, always_call=True),
            ]

    def disarm(self) -> None:
        self._leave_alone(list(self.handles))
        self._clear()

    def _leave_alone(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            for handle in self.handles.pop(module, ()):
                handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            if not torch.compiler.is_exporting():
                self._ahead(module, args, kwargs)
        elif self.following is None:
            if not (self.depth or self.leading) and torch.is_grad_enabled() and _has_regions(module):
                self._lead(module, args, kwargs)
            else:
                self._enter(module, args, kwargs)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            if not torch.compiler.is_exporting():
                self._claim(output)
        elif self.following is None:
            self._leave(output)
        elif self.following is module:
            self.following = None
            if output is not None:  # else it raised
                self._claim(output)

    @torch.compiler.disable(reason=FULLGRAPH)
    def _ahead(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Inside of a compiled call: an eager forward ahead of it is watched, so that the compiled one needs no hook."""
        if self.depth or self.ahead or not torch.is_grad_enabled():
            return
        with undisturbed(module):
            module(*args, **kwargs)
        before, last = self.handles.pop(module)
        before.remove()
        self._leave_alone(list(self.handles))
        self.handles, self.ahead = {module: [last]}, True

    def _lead(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Regions of the module are compiled: an eager forward ahead is watched, so that they run compiled at once. What a
        checkpoint computes again in the backward would else not be what it computed in the forward."""
        if torch._C._are_functorch_transforms_active():
            return
        self.leading = True
        try:
            with undisturbed(module):
                module(*args, **kwargs)
        finally:
            self.leading = False
        self._leave_alone(part for part in module.modules() if part is not module)
        self.following = module

    @torch.compiler.disable(reason=FULLGRAPH)
    def _claim(self, output: Any) -> None:
        """The compiled call's outputs are those of the forward ahead of it."""
        own = [t for t in _tensors(output) if t.requires_grad and t.dim() > 1]
        for old, new in zip(self.latest, own, strict=True):
            for labels in self.labels:
                if (label := labels.get(old)) is not None:
                    labels[new] = label
            self.mixing.same(old, new)
            self.replaced[new.grad_fn] = nodes_below(old, self.replaced)
        self.outputs = self.outputs[: len(self.outputs) - len(own)] + own

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.depth == 0:
            if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
                return
            if id(module) in self.called:  # another forward, whose loss may come before or after
                self.called = set()
            if not self.called:
                if self.forwards == FORWARDS_KEPT:
                    self._clear()
                self.forwards += 1
                for streams in self.streams:
                    streams.begin()
            self.called.add(id(module))
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
            self.fixed.update(dict.fromkeys(module.buffers(), True))
            self._name_inputs((args, kwargs))
            self._mode = Mode(self)
            self._mode.__enter__()
        self.depth += 1

    def _leave(self, output: Any) -> None:
        if self.depth == 0:
            return
        self.depth -= 1
        if self.depth == 0:
            self._mode.__exit__(None, None, None)
            self._stance.__exit__(None, None, None)
            self.latest = [t for t in _tensors(output) if t.requires_grad and t.dim() > 1]
            self.outputs += self.latest

    def _name_inputs(self, given: Any) -> None:
        for tensor in _tensors(given):
            if self._comes_from_before(tensor):
                continue
            if self.whole:
                for dim, (labels, streams) in enumerate(zip(self.labels, self.streams, strict=True)):
                    size = tensor.shape[dim] if tensor.dim() > dim else 0
                    if size and streams.fits(size) and tensor not in labels:
                        shape = [-1 if d == dim else 1 for d in range(tensor.dim())]
                        labels[tensor] = streams.fresh([size], tensor.device).view(shape).expand(tensor.shape)
            elif tensor.is_floating_point() and tensor.dim() > 1 and tensor not in self.labels[0]:
                self.labels[0][tensor] = (
                    self.streams[0].fresh(tensor.shape[:-1], tensor.device)[..., None].expand(tensor.shape)
                )

    def _comes_from_before(self, tensor: Tensor) -> bool:
        """Whether `tensor` was made, element by element, from what an earlier call gave; its rows are those then."""
        if any(tensor in labels for labels in self.labels):
            return False
        output = elementwise_source(tensor, self.outputs)
        if output is None:
            return False
        for labels in self.labels:
            if (label := labels.get(output)) is not None:
                labels[tensor] = label
        self.mixing.same(output, tensor)
        return True

    # what the layers see

    @torch.compiler.disable
    def note(self, layer: Any, x: Tensor) -> None:
        """A gated layer was called with `x` (*lead, width)."""
        with _disable_current_modes():
            labels = [by_tensor.get(x) for by_tensor in self.labels]
            rows = [None if label is None else uniform(label, [-1])[..., 0] for label in labels]
            self.mixing.enters(layer, x)
        self.count.enters(layer, x)
        self.notes.setdefault(layer, []).append((self.forwards, rows))

    @torch.compiler.disable
    def made(self, layer: Any, y: Tensor) -> None:
        """A gated layer gave `y` (*lead, width)."""
        self.mixing.leaves(layer, y)
        self.count.leaves(layer, y)

    # what the loss makes of it

    def layouts(self, result: Tensor, batch: int, length: int, has_columns: bool) -> Mapping[Any, Layout | str] | None:
        """The layout of every layer that was called, or in words why its rows cannot be told.

        Args:
            result: logits (B, T, V), or losses (B, T) where it has no columns, of what was watched.

        Returns: None where the result does not come from what was watched.
        """
        for at, (streams, labels) in enumerate(zip(self.streams, self.labels, strict=True)):
            own = self._result_label(result, labels, batch * length, has_columns)
            if own is None:
                continue
            if self.whole:
                rows_of, known = _sequences(own, batch, length, streams), torch.ones_like(own[:batch], dtype=torch.bool)
            else:
                rows_of, known = streams.rows_of(own), own >= 0
            if rows_of is not None and bool((rows_of >= 0).any()):
                which = _forwards_of(own, streams)
                seen = {
                    layer: [rows[at] for number, rows in notes if number in which] for layer, notes in self.notes.items()
                }
                self.count.close(which, nodes_below(result, self.replaced))
                return {layer: self._layout(rows, rows_of, batch, length, known) for layer, rows in seen.items() if rows}
        return None

    def clean(self, followed: Iterable[Any]) -> set[Any]:
        """Layers of `followed` whose dropped rows get no gradient from the loss that `layouts` was asked about."""
        return set() if self.source is None else self.mixing.clean(self.source, followed)

    def _layout(self, seen: list[Label], rows_of: Tensor, batch: int, length: int, known: Tensor) -> Layout | str:
        found: set[Layout] = set()
        for label in seen:
            if label is None:
                return UNKNOWN
            rows = rows_of[settled(label).clamp(min=0).long()].masked_fill(label < 0, NONE)
            if bool((label >= DATA).any()):
                return MOVED
            if bool((rows < 0).all()):
                return OTHERS
            layout = find_layout(rows, batch, length, known, self.whole)
            if layout is None:
                return PARTS
            found.add(layout)
        return found.pop() if len(found) == 1 else SEVERAL

    def _result_label(self, result: Tensor, labels: WeakTensorKeyDictionary, rows: int, has_columns: bool) -> Tensor | None:
        """Labels of the loss's rows (N,)."""
        label = labels.get(result)
        if label is not None and has_columns:
            self.source = result
            return uniform(label, [-1]).reshape(-1)
        for output in self.outputs:
            label = labels.get(output)
            if label is None:
                continue
            reached = source_rows(result, output, rows)
            if reached is not None and bool((reached >= 0).any()):
                own = torch.full((rows,), NONE, dtype=torch.int32, device=result.device)
                flat = uniform(label, [-1]).reshape(-1)
                self.source = output
                own[reached[reached >= 0]] = flat[reached >= 0]
                return own
        return None


def _has_regions(module: nn.Module) -> bool:
    return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in module.modules())


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Random state and buffers of `module` are after it as they were before."""
    buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
        yield
    with torch.no_grad():
        for name, b in module.named_buffers():
            if name in buffers and not torch.equal(b, buffers[name]):
                b.copy_(buffers[name])


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, Mapping):
        given = list(given.values())
    elif hasattr(given, "__dataclass_fields__"):
        given = [getattr(given, name) for name in given.__dataclass_fields__]
    return [t for part in given for t in _tensors(part)] if isinstance(given, (tuple, list)) else []


def _forwards_of(own: Tensor, streams: Streams) -> set[int]:
    """Numbers, from 1, of the forwards that the labels of the loss's rows come from."""
    marks = torch.tensor(streams.marks, device=own.device)
    known = settled(own[own >= 0]).unique().to(marks.dtype)
    return set(torch.bucketize(known, marks, right=True).tolist())


def _sequences(own: Tensor, batch: int, length: int, streams: Streams) -> Tensor | None:
    """Sequences of every label, where the known rows of each of the loss's sequences have one label and no two the same."""
    rows_BT = own.view(batch, length)
    high = rows_BT.amax(1)
    low = rows_BT.where(rows_BT >= 0, high[:, None]).amin(1)
    if bool((high < 0).any()) or bool((low != high).any()) or len(torch.unique(high)) < batch or bool((high >= DATA).any()):
        return None
    rows = torch.full((streams.count,), NONE, dtype=torch.int64, device=own.device)
    rows[high.long()] = torch.arange(batch, device=own.device)
    return streams.linked(rows)
