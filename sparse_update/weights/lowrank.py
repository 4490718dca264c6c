"""Low-rank controls from their own libraries, imported only when used: GaLore (galore-torch), LoRA (peft), extra `peers`.

GaLore (Zhao et al. 2024, arXiv 2403.03507): AdamW on the gradient's projection to `rank` of its singular directions, taken
anew every so many steps. The gradient itself is whole, so only moments shrink. galore-torch 1.0 asks for bitsandbytes
(43 MB) for its 8-bit variant alone, and its `__init__` imports it; only its AdamW is used here, which does without.

LoRA (Hu et al. 2021, arXiv 2106.09685): frozen matrices, each with a trained product of two thin ones beside it. It changes
the module, so it runs through autograd and not through the sparse step. As an arm of a run it is `subset.kind = lora`: the
merged weights are saved as the model, so that whatever reads a checkpoint needs to know nothing of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import Active, SubsetConfig

MATRICES = ("q", "k", "v", "o", "fc1", "fc2")
"""Names of the matrices of a block that LoRA adapts."""


class PeersError(ImportError):
    """A library of the extra `peers` is not installed; the message says how to get it."""


def galore_adamw(params: Iterable[Tensor], cfg: OptimConfig) -> torch.optim.Optimizer:
    """galore-torch's AdamW over matrices, its projections part of `state_dict`. Raises PeersError where it is missing."""
    library = _galore_module("adamw")
    projector = _galore_module("galore_projector").GaLoreProjector
    rule = {
        "rank": cfg.galore_rank,
        "update_proj_gap": cfg.galore_every_steps,
        "scale": cfg.galore_scale,
        "proj_type": "std",
    }

    class GaLore(library.AdamW):  # type: ignore[name-defined]
        """The library's optimizer; a projector is stored as its one tensor, of its own memory: the library keeps the whole
        SVD behind it, with strides that a checkpoint would not give back (another rounding of products)."""

        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for state in self.state.values():
                basis = state["projector"].ortho_matrix
                if not basis.is_contiguous() or basis.untyped_storage().nbytes() > basis.nbytes:
                    state["projector"].ortho_matrix = basis.clone(memory_format=torch.contiguous_format)
            return loss

        def state_dict(self) -> dict[str, Any]:
            found = super().state_dict()
            found["state"] = {number: _stored(state) for number, state in found["state"].items()}
            return found

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            for state in self.state.values():
                if "ortho_matrix" in state:
                    state["projector"] = projector(
                        rule["rank"], update_proj_gap=rule["update_proj_gap"], scale=rule["scale"], proj_type="std"
                    )
                    state["projector"].ortho_matrix = state.pop("ortho_matrix")

    return GaLore(
        [{"params": list(params), **rule}],
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        weight_decay=cfg.weight_decay,
        no_deprecation_warning=True,
    )


def decompose(optimizer: torch.optim.Optimizer) -> None:
    """What GaLore does every `galore_every_steps` steps, its result thrown away: one SVD for each matrix."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            found = optimizer.state[p].get("projector")
            if found is not None:
                found.get_orthogonal_matrix(p.detach(), group["rank"], type="right" if p.shape[0] >= p.shape[1] else "left")


def _stored(state: dict[str, Any]) -> dict[str, Any]:
    if "projector" not in state:
        return state
    plain = {key: value for key, value in state.items() if key != "projector"}
    return {**plain, "ortho_matrix": state["projector"].ortho_matrix}


def _galore_module(name: str) -> Any:
    """A module of galore_torch, its package's own `__init__` left out."""
    full = f"galore_torch.{name}"
    if full in sys.modules:
        return sys.modules[full]
    spec = importlib.util.find_spec("galore_torch")
    if spec is None or spec.submodule_search_locations is None:
        raise PeersError(
            "optim.name = galore needs galore-torch: pip install transformers && pip install --no-deps galore-torch==1.0"
        )
    before = sys.modules.get("galore_torch")
    package = types.ModuleType("galore_torch")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["galore_torch"] = package
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as missing:
        raise PeersError(f"galore-torch needs {missing.name}: pip install {missing.name}") from missing
    finally:
        if before is None:
            del sys.modules["galore_torch"]
        else:
            sys.modules["galore_torch"] = before


def add_lora(model: nn.Module, rank: int, scale: float = 2.0, targets: Iterable[str] = MATRICES) -> nn.Module:
    """Freeze a model and put LoRA factors beside its matrices, in place; what is then trainable are the factors.

    Args:
        rank: width of the factors.
        scale: alpha / rank, the factor on their product.
        targets: last names of the Linear modules.

    Draws from torch's global generator. Raises PeersError without peft, ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank = {rank}: must be at least 1")
    try:
        peft = importlib.import_module("peft")
    except ModuleNotFoundError as missing:
        raise PeersError(f"LoRA needs peft ({missing.name} is missing): pip install 'spikegate[peers]'") from missing
    config = peft.LoraConfig(r=rank, lora_alpha=scale * rank, lora_dropout=0.0, bias="none", target_modules=list(targets))
    model.requires_grad_(False)
    return peft.inject_adapter_in_model(config, model)


def adapt(model: nn.Module, subset: SubsetConfig, seed: int) -> None:
    """Put LoRA factors into a run's model, in place, drawn from `seed` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed + 4)
        add_lora(model, subset.rank, subset.rank_scale)


FACTOR = ".lora_"
"""What the names of LoRA's factors contain, and no others."""
ADAPTER = "default"
"""peft's name of its one adapter."""


def rank_of(active: Active | None) -> int:
    """Rank of the LoRA factors among active weights, 0 where there are none."""
    parts = {} if active is None else active.parts
    return next((found[0].stop for name, found in parts.items() if ".lora_A." in name), 0)


def merged(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the plain model that an adapted one stands for: names without adapters, their products added."""
    found = {}
    for name, tensor in model.state_dict().items():
        owner, layer, field = name.rpartition(".base_layer.")
        if layer:
            product = cast(Any, model.get_submodule(owner)).get_delta_weight(ADAPTER)
            if hasattr(tensor, "placements"):  # this process has a part of each, cut alike
                product = product.redistribute(tensor.device_mesh, tensor.placements)
            found[f"{owner}.{field}"] = tensor + product.to(tensor.dtype)
        elif FACTOR not in name:
            found[name] = tensor
    return found


def apart(model: nn.Module) -> dict[str, Tensor]:
    """What `merged` mixes: the frozen matrices and their factors, by their names in the adapted model."""
    return {name: t for name, t in model.state_dict().items() if FACTOR in name or ".base_layer." in name}


def restore(
    model: nn.Module,
    plain: Mapping[str, Any],
    parts: Mapping[str, Any],
    load: Callable[[nn.Module, dict[str, Any]], Any] = lambda model, weights: model.load_state_dict(weights),
) -> None:
    """Load what `merged` and `apart` gave into an adapted model, to the same bits. ValueError for another model's.

    `load`: takes up a whole state dict.
    """
    own = apart(model)
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in parts.items()}:
        raise ValueError(
            f"the checkpoint's LoRA factors ({len(parts)} tensors) are not this run's ({len(own)}): resume with the "
            "subset.rank and the model of that run"
        )
    mixed = {name.replace(".base_layer.", ".") for name in parts}
    load(model, {**{name: t for name, t in plain.items() if name not in mixed}, **parts})
