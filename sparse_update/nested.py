"""Nested state (dicts, lists, tuples of tensors and plain values) <-> named tensors and a JSON outline, without pickle.

    tensors, outline = pack(optimizer.state_dict())
    unpack(outline, tensors)        # equal, types and bits included

The outline is the same nesting as JSON: a tensor is `{"$tensor": NAME}`, a tuple `{"$tuple": [...]}`, a dict whose keys
are not all text `{"$dict": [[key, value], ...]}`, a float that JSON has no number for `{"$float": "nan"}`.
Also here: the states of the random generators of Python, numpy and torch in that form.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


class StateError(TypeError):
    """A value that a checkpoint cannot hold, with its place."""


def pack(state: Any, at: str = "state") -> tuple[dict[str, torch.Tensor], Any]:
    """(tensors by name, JSON outline) of `state`. Raises `StateError` for what is no tensor, number, text or None.

    Numpy arrays come back as tensors, numpy scalars as Python numbers.
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _pack(state, at, tensors)


def unpack(outline: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The nested state that `pack` took apart. Raises `StateError` when a tensor is missing."""
    if isinstance(outline, list):
        return [unpack(item, tensors) for item in outline]
    if not isinstance(outline, dict):
        return outline
    if len(outline) == 1:
        ((tag, value),) = outline.items()
        if tag == "$tensor":
            if value not in tensors:
                raise StateError(f"the outline names the tensor {value!r}, which is not there")
            return tensors[value]
        if tag == "$tuple":
            return tuple(unpack(item, tensors) for item in value)
        if tag == "$dict":
            return {unpack(key, tensors): unpack(item, tensors) for key, item in value}
        if tag == "$float":
            return float(value)
    return {key: unpack(item, tensors) for key, item in outline.items()}


def _pack(value: Any, at: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.copy())
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, torch.Tensor):
        while at in tensors:  # {1: x, "1": y}, and keys with dots
            at += "'"
        tensors[at] = value
        return {"$tensor": at}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, tuple):
        return {"$tuple": [_pack(item, f"{at}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_pack(item, f"{at}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        pairs = [[key, _pack(item, f"{at}.{key}", tensors)] for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(pairs)
        return {"$dict": [[_pack(key, f"{at}.key", {}), item] for key, item in pairs]}
    raise StateError(f"{at} is a {type(value).__name__}: a checkpoint holds tensors, numbers, text, bool and None")


def get_rng_state() -> dict[str, Any]:
    """States of the process-wide random generators: Python's, numpy's old global one, torch's (GPUs only if in use)."""
    version, words, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    state: dict[str, Any] = {
        "python": {"version": version, "words": _bytes(np.array(words, dtype="<u4")), "gauss": gauss},
        "numpy": {
            "kind": kind,
            "keys": _bytes(np.asarray(keys, dtype="<u4")),
            "place": place,
            "has_gauss": has_gauss,
            "cached": cached,
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators back where `get_rng_state` found them; warns when there are fewer GPUs than then."""
    python, np_state = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(_words(python["words"]).tolist()), python["gauss"]))
    np.random.set_state(  # noqa: NPY002
        (np_state["kind"], _words(np_state["keys"]), np_state["place"], np_state["has_gauss"], np_state["cached"])
    )
    torch.set_rng_state(state["torch"])
    gpu_states = state.get("cuda", [])
    here = torch.cuda.device_count() if gpu_states else 0
    if len(gpu_states) > here:
        warnings.warn(
            f"the state holds random generators of {len(gpu_states)} GPUs and {here} are here: "
            "what is drawn on a GPU will not go on as it would have",
            stacklevel=2,
        )
    for index, gpu_state in enumerate(gpu_states[:here]):
        torch.cuda.set_rng_state(gpu_state, index)


def _bytes(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(words.tobytes(), dtype=np.uint8).copy())


def _words(data: torch.Tensor) -> np.ndarray:
    return np.frombuffer(data.numpy().tobytes(), dtype="<u4").astype(np.uint32)
