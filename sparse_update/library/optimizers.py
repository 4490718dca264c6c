"""A user's optimizers, in memory and in checkpoints: what is active now stands where the weights stood.

`Link` ties one optimizer to a gate. Its parameter groups are lists of names; whenever other weights become active the
lists are filled anew, so that a strip stays in its weight's group, with the group's rates, and what rests loses its
moments. `optimizer.state_dict()` then says of every entry which part of which weight it belongs to, and holds the gate's
own state; `optimizer.load_state_dict` moves the gate there and pairs moments with weights by name, not by position.

An optimizer that was made of the model's own parameters is saved with one entry for each of them, active or not, so that
another one made in the same way can load it before any gate is attached, as the Hugging Face Trainer and Lightning do.
"""

from __future__ import annotations

import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sparse_update.library.hooks import on_every_step
from sparse_update.library.tracking.rows import GateError

KEY = "gate"
"""Entry of a saved parameter group that says whose the moments are."""

Place = tuple[Any, ...]
"""(name,) of a whole parameter, (name, dim, start, stop) of a strip."""


class Weights(Protocol):
    """What a link asks of the active weights."""

    @property
    def names(self) -> Mapping[str, nn.Parameter]: ...

    def active_of(self, name: str) -> dict[Place, nn.Parameter]: ...

    def place_of(self, p: Tensor) -> Place | None: ...


class Links:
    """The optimizers of one gate.

    Args:
        weights: names, and what is active.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._links: weakref.WeakKeyDictionary[Any, Link] = weakref.WeakKeyDictionary()
        self._unhook = on_every_step(register_optimizer_step_pre_hook, self, Links._before_step)
        self.closed = False

    def _before_step(self, optimizer: Any) -> None:
        if saved_gate(optimizer) is None or not self._holds_mine(optimizer):
            return
        self.meet(saved_gate(optimizer) or {}, move=False, gradients=True)
        there = _ids(optimizer)
        self.adopt([optimizer])
        if _ids(optimizer) != there and _under_scaler():
            raise GateError(
                "scaler.step(optimizer): this optimizer was loaded and held the strips of another turn until now, "
                "so the scaler left the gradients of those that are active scaled. Call gate.adopt(optimizer) "
                "before or after optimizer.load_state_dict(...)"
            )

    def serve(
        self,
        state: Callable[[], Mapping[str, Any]],
        load: Callable[[Mapping[str, Any]], None],
        steps: Callable[[], int],
    ) -> None:
        """The gate's own `state_dict` and `load_state_dict`, and the number of its steps."""
        self.state, self.load, self.steps = state, load, steps

    def close(self) -> None:
        """Stop moving moments about: optimizers are saved as the gate left them, and loaded as torch does."""
        self._unhook()
        self.closed = True

    def _holds_mine(self, optimizer: Any) -> bool:
        return any(self.weights.place_of(p) is not None for group in optimizer.param_groups for p in group["params"])

    def adopt(self, optimizers: Iterable[Any]) -> None:
        """Put what is active into these optimizers, with the moments that belong to it.

        Raises GateError where an optimizer was loaded with the state of another turn, configuration or model.
        """
        given = list(optimizers)
        for optimizer in given:
            if optimizer not in self._links:
                self._links[optimizer] = Link(self, optimizer)
        self.settle(given)

    def know(self, optimizers: Iterable[Any]) -> None:
        """`adopt` those that were not yet."""
        if new := [optimizer for optimizer in optimizers if optimizer not in self._links]:
            self.adopt(new)

    def settle(self, preferred: Iterable[Any] = ()) -> None:
        """Fill the groups of all linked optimizers anew; weights that are in none go to one of the preferred, if any."""
        chosen = [self._links[o] for o in preferred] or list(self._links.values())
        for link in self._links.values():
            link.note()
        housed = {slot for link in chosen for group in link.slots for slot in group if isinstance(slot, str)}
        for name in self.weights.names:
            if name not in housed and self.weights.active_of(name):
                _house(name, chosen, list(self.weights.names))
        for link in self._links.values():
            link.settle()

    def meet(self, state: Mapping[str, Any], move: bool, gradients: bool = False) -> None:
        """Go to where the gate was when an optimizer's state was saved; `gradients`: of what is active now are there.
        Raises GateError where it is elsewhere and may not `move`."""
        here, there = self.steps(), int(state["steps"])
        if move or (here == 0 and not gradients):
            self.load(state)
        elif here != there:
            raise GateError(
                f"this optimizer's state was saved with the gate at step {there}, and the gate is at step {here}: moments "
                "would meet the weights of another turn. Load the gate's state of the same checkpoint, "
                "gate.load_state_dict(...), or call gate.adopt(optimizer) before its state is loaded"
            )


class Link:
    """One optimizer. `slots`: for each parameter group the names of the model's parameters, and parameters of others.
    `whole`: it was made of the model's own parameters, not of the gate's."""

    def __init__(self, links: Links, optimizer: Any) -> None:
        self.links, self.weights = links, links.weights
        self._optimizer = weakref.ref(optimizer)
        self.slots: list[list[str | nn.Parameter]] = []
        self._over = False
        states: dict[Place, Any] = {}
        if (before := _LINKS.get(optimizer)) is not None:
            states = before.give_back()
        saved = saved_gate(optimizer)
        if saved is not None:
            links.meet(saved, move=False)
        self.whole = any(
            place not in self.weights.active_of(place[0])
            for group in optimizer.param_groups
            for p in group["params"]
            if (place := self.weights.place_of(p)) is not None and len(place) == 1
        )
        if saved is not None:
            states |= self._take_loaded(optimizer)
        self.note()
        states |= self._take_present(optimizer, states)
        if hasattr(optimizer, "register_state_dict_post_hook"):
            optimizer.register_state_dict_post_hook(self.saved)
            optimizer.register_load_state_dict_pre_hook(self.loaded)
        self._given = states
        _LINKS[optimizer] = self

    @property
    def optimizer(self) -> Any:
        return self._optimizer()

    def note(self) -> None:
        """Take up what is in the groups and has no slot yet."""
        housed = {slot if isinstance(slot, str) else id(slot) for group in self.slots for slot in group}
        for number, group in enumerate(self.optimizer.param_groups):
            if number == len(self.slots):
                self.slots.append([])
            for p in group["params"]:
                place = self.weights.place_of(p)
                slot = p if place is None else place[0]
                if (key := slot if isinstance(slot, str) else id(slot)) not in housed:
                    housed.add(key)
                    self.slots[number].append(slot)

    def _take_loaded(self, optimizer: Any) -> dict[Place, Any]:
        """Moments that were loaded by position, by what they were saved for."""
        found: dict[Place, Any] = {}
        for group in optimizer.param_groups:
            record = group.pop(KEY, None)
            entries = [["", []]] * len(group["params"]) if record is None else record["entries"]
            for p, (name, parts) in zip(group["params"], entries, strict=True):
                if bool(name) != (self.weights.place_of(p) is not None):
                    raise GateError(
                        f"{name or 'a parameter outside of the model'} has its moments in this checkpoint where the "
                        "optimizer holds something else: make its parameter groups as they were made then"
                    )
                if name:
                    found |= _unpacked(name, parts, optimizer.state.pop(p, None))
        self.check(found)
        return found

    def _take_present(self, optimizer: Any, known: Mapping[Place, Any]) -> dict[Place, Any]:
        """Moments of what is in the groups; of a weight that is now cut into strips, the strips' share."""
        found: dict[Place, Any] = {}
        for p in [p for group in optimizer.param_groups for p in group["params"]]:
            place, state = self.weights.place_of(p), optimizer.state.get(p)
            if place is None or not state or place in known:
                continue
            found[place] = state
            for part in self.weights.active_of(place[0]):
                if len(place) < len(part) and part not in known and (cut := _cut(state, part, p.shape)) is not None:
                    found[part] = cut
        return found

    def check(self, states: Mapping[Place, Any]) -> None:
        """Raise GateError where moments were saved for strips that are not active."""
        for place in states:
            if place[0] not in self.weights.names:
                raise GateError(
                    f"{place[0]}: its moments are in this checkpoint, and the model has no such parameter: resume with the "
                    "model of that run"
                )
            if len(place) > 1 and place not in (active := self.weights.active_of(place[0])):
                now = ", ".join(_words(other) for other in active) or "nothing of it"
                raise GateError(
                    f"{place[0]}: this checkpoint's optimizer holds moments of {_words(place)}, and active is {now}: the "
                    "gate's state and the optimizer's are of different turns or runs; load both of one checkpoint"
                )

    def settle(self) -> None:
        """Fill the groups with what is active."""
        optimizer, states, self._given = self.optimizer, self._given, {}
        for group, slots in zip(optimizer.param_groups, self.slots, strict=True):
            filled = [p for slot in slots for p in self._active(slot).values()]
            there = {id(p) for p in filled}
            for p in group["params"]:
                if id(p) not in there:
                    optimizer.state.pop(p, None)
            group["params"] = filled
            _leave_fused(group)
            for place, p in ((place, p) for slot in slots for place, p in self._active(slot).items()):
                if states.get(place):
                    optimizer.state[p] = states[place]

    def _active(self, slot: str | nn.Parameter) -> dict[Place, nn.Parameter]:
        return self.weights.active_of(slot) if isinstance(slot, str) else {("",): slot}

    def give_back(self) -> dict[Place, Any]:
        """Undo the link: the weights themselves, without moments; the moments of what was active, by place."""
        self._over = True
        optimizer, found = self.optimizer, {}
        for group, slots in zip(optimizer.param_groups, self.slots, strict=True):
            for place, p in ((place, p) for slot in slots for place, p in self._active(slot).items()):
                if place != ("",):
                    found[place] = optimizer.state.pop(p, None)
            if self.whole:
                group["params"] = [self.weights.names[slot] if isinstance(slot, str) else slot for slot in slots]
        return found

    # checkpoints

    def saved(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Hook on `state_dict`: says whose the moments are; for a `whole` optimizer one entry for each weight."""
        if self._over:
            return state_dict
        self.note()
        number = {
            id(p): i
            for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
            for p, i in zip(group["params"], saved["params"], strict=True)
        }
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for saved, group, slots in zip(state_dict["param_groups"], optimizer.param_groups, self.slots, strict=True):
            entries: list[list[Any]] = []
            first = sum(len(g["params"]) for g in groups)
            for name, parts in self._entries(group, slots):
                found = [state_dict["state"].get(number.get(id(p))) for p in parts.values()]
                if any(found):
                    state[first + len(entries)] = _packed(found)
                entries.append([name, [list(place[1:]) for place in parts if len(place) > 1]])
            groups.append({**saved, "params": list(range(first, first + len(entries))), KEY: {"entries": entries}})
        groups[0][KEY]["state"] = dict(self.links.state())
        return {**state_dict, "state": state, "param_groups": groups}

    def _entries(
        self, group: Mapping[str, Any], slots: Iterable[str | nn.Parameter]
    ) -> Iterator[tuple[str, dict[Place, nn.Parameter]]]:
        if self.whole:
            yield from ((slot if isinstance(slot, str) else "", self._active(slot)) for slot in slots)
            return
        for p in group["params"]:
            place = self.weights.place_of(p) or ("",)
            yield place[0], {place: p}

    def loaded(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Hook on `load_state_dict`: the gate goes to where it was then, and moments are paired by name.

        Raises GateError where that cannot be, before anything is loaded into the optimizer.
        """
        if self.links.closed and not self._over:
            self.give_back()
        if self._over:
            return state_dict
        groups = state_dict["param_groups"]
        self.note()
        if len(groups) != len(self.slots):
            raise GateError(
                f"this checkpoint's optimizer has {len(groups)} parameter groups and this one has {len(self.slots)}: make "
                "them as they were made then"
            )
        if KEY in groups[0]:
            self.links.meet(groups[0][KEY]["state"], move=True)
        states: dict[Place, Any] = {}
        others: list[list[Any]] = []
        for saved, slots in zip(groups, self.slots, strict=True):
            entries = saved[KEY]["entries"] if KEY in saved else self._plain_entries(saved, slots)
            others.append([])
            for i, (name, parts) in zip(saved["params"], entries, strict=True):
                given = state_dict["state"].get(i)
                if not name:
                    others[-1].append(given)
                    continue
                states |= _unpacked(name, parts, given)
                if KEY not in saved and given:  # saved by an optimizer without a gate
                    shape = self.weights.names[name].shape
                    states |= {part: _cut(given, part, shape) for part in self.weights.active_of(name) if len(part) > 1}
        self.check(states)
        state: dict[int, Any] = {}
        laid: list[dict[str, Any]] = []
        for saved, slots, foreign in zip(groups, self.slots, others, strict=True):
            strangers = sum(not isinstance(slot, str) for slot in slots)
            if strangers != len(foreign):
                raise GateError(
                    f"this checkpoint's optimizer holds {len(foreign)} parameters outside of the gate's model in a group "
                    f"where this one has {strangers}: make the groups as they were made then"
                )
            first, rest = sum(len(g["params"]) for g in laid), iter(foreign)
            places = [place for slot in slots for place in self._active(slot)]
            found = [next(rest) if place == ("",) else states.get(place) for place in places]
            state |= {i: given for i, given in enumerate(found, first) if given}
            kept = {key: value for key, value in saved.items() if key != KEY}
            laid.append({**kept, "params": list(range(first, first + len(places)))})
        return {**state_dict, "state": state, "param_groups": laid}

    def _plain_entries(self, saved: Mapping[str, Any], slots: list[str | nn.Parameter]) -> list[tuple[str, list[Any]]]:
        if len(saved["params"]) != len(slots):
            raise GateError(
                f"this optimizer state of {len(saved['params'])} parameters was saved without a gate, and the gate's "
                f"optimizer stands for {len(slots)}: make the optimizer of model.parameters() and call "
                "gate.adopt(optimizer) after loading it"
            )
        return [(slot if isinstance(slot, str) else "", []) for slot in slots]


_LINKS: weakref.WeakKeyDictionary[Any, Link] = weakref.WeakKeyDictionary()


def saved_gate(optimizer: Any) -> Mapping[str, Any] | None:
    """The gate's state in an optimizer that was loaded and not adopted yet."""
    for group in optimizer.param_groups:
        if "state" in (record := group.get(KEY) or {}):
            return dict(record["state"])
    return None


def _ids(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _under_scaler() -> bool:
    """Whether a gradient scaler calls: it unscales what an optimizer held before the step."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "torch.amp.grad_scaler":
        frame = frame.f_back
    return frame is not None and bool(frame.f_locals["self"].is_enabled())


def inner(optimizer: Any) -> Any:
    """The optimizer inside a wrapper (accelerate's, Lightning's)."""
    return getattr(optimizer, "optimizer", optimizer)


def _house(name: str, links: Iterable[Link], order: list[str]) -> None:
    """A slot beside parameters of the same role in another layer, in the model's order."""
    role = re.sub(r"\d+", "*", name)
    for link in links:
        for slots in link.slots:
            named = [slot for slot in slots if isinstance(slot, str)]
            if any(re.sub(r"\d+", "*", other) == role for other in named):
                later = (i for i, s in enumerate(slots) if isinstance(s, str) and order.index(s) > order.index(name))
                slots.insert(next(later, len(slots)), name)
                return


def _packed(states: list[Any]) -> dict[str, Any]:
    """Moments of a weight's strips as one state, in which optimizers find what they look for in a parameter's."""
    if len(states) == 1:
        return dict(states[0])
    first = next(i for i, state in enumerate(states) if state)
    return {**states[first], "strips": [None if i == first else state or {} for i, state in enumerate(states)]}


def _unpacked(name: str, parts: list[list[int]], state: Any) -> dict[Place, Any]:
    if not state:
        return {}
    if not parts:
        return {(name,): state}
    first = {key: value for key, value in state.items() if key != "strips"}
    states = [first if one is None else one for one in state.get("strips", [None])]
    return {(name, *part): one for part, one in zip(parts, states, strict=True)}


def _cut(state: Mapping[str, Any], part: Place, shape: torch.Size) -> dict[str, Any] | None:
    """Moments of a strip out of those of its weight; None where they are not kept weight by weight (Adafactor's)."""
    _, dim, start, stop = part
    if any(isinstance(v, Tensor) and v.dim() and v.shape != shape for v in state.values()):
        return None
    return {
        k: (v.narrow(dim, start, stop - start).clone() if v.dim() else v.clone()) if isinstance(v, Tensor) else v
        for k, v in state.items()
    }


def _leave_fused(group: dict[str, Any]) -> None:
    """torch's fused AdamW takes a parameter's memory as dense: on a strip of columns it would write into its neighbours."""
    if group.get("fused") and any(not p.is_contiguous() for p in group["params"]):
        group["fused"] = False
        warnings.warn(
            "fused=True of the optimizer is switched off: torch's fused kernels cannot update strips of columns "
            "(weights.kind = 'block_columns')",
            stacklevel=2,
        )


def _words(place: Place) -> str:
    if len(place) == 1:
        return "all of it"
    _, dim, start, stop = place
    return f"{'rows' if dim == 0 else 'columns'} {start} to {stop - 1}"
