"""The gate for any module: `gate = attach(model, config)` inside a training loop of one's own, `gate.detach()` to undo it.

    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5}})
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-3)
    for x, y in gate.filter(loader):
        gate.loss(model(x), y).backward()
        optimizer.step()
        gate.step(optimizer)
        optimizer.zero_grad()

Every nn.Linear, nn.Embedding, transformers Conv1D and self-attending nn.MultiheadAttention gets a forward of its own;
class, state_dict and outputs stay. Attention, norms and whatever else the model holds run as they are.

Shape letters: B batch, T token, V vocabulary, N = B T, K kept rows.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_update.library.layers import Found, find, restore
from sparse_update.library.linear import Arm, GateError, KeptLoss, Rows
from sparse_update.library.pool import Pool, PoolConfig
from sparse_update.library.rowchoice import BackwardConfig, RowChoice
from sparse_update.library.strips import Strips, layer_stack, subset_names, subset_of
from sparse_update.weights.subset import Subset, SubsetConfig


@dataclass
class AttachConfig:
    """All of a gate: sequences before the forward, rows of the backward, weights. `from_dict` takes nested plain dicts."""

    before: PoolConfig = field(default_factory=PoolConfig)
    backward: BackwardConfig = field(default_factory=BackwardConfig)
    weights: SubsetConfig = field(default_factory=SubsetConfig)
    """kinds all, blocks and block_columns (strips of every gated matrix but embeddings, tied weights and the head), layers;
    every policy of `SubsetConfig`, and those given to `register_subset_policy`"""
    exclude: tuple[str, ...] = ()
    """Names of modules that stay as they are; shell patterns, such as "encoder.*"."""
    batch_first: bool = True
    """Activations are (B, T, ...); matters only where B equals T and shapes do not tell."""
    vocab_size: int = 0
    """For signals; 0 takes that of the model's first embedding."""
    seed: int = 0

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> AttachConfig:
        """From nested dicts, as read from YAML. Raises ValueError for an unknown key, with the known ones."""
        return _from_dict(cls, given, "")


def _from_dict(cls: Any, given: Any, at: str) -> Any:
    if not isinstance(given, Mapping):
        raise ValueError(f"{at or 'the gate config'} = {given!r}: must be a mapping of names to values")
    known = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{at}{unknown[0]} is no setting of the gate; {at or 'the top level'} has {', '.join(known)}")
    values: dict[str, Any] = {}
    for key, value in given.items():
        make = known[key].default_factory
        if isinstance(make, type) and dataclasses.is_dataclass(make) and not dataclasses.is_dataclass(value):
            value = _from_dict(make, value, f"{at}{key}.")
        elif key == "exclude":
            if isinstance(value, str):
                raise ValueError(f"exclude = {value!r}: a list of module names, such as [{value!r}]")
            value = tuple(value)
        else:
            _check_type(f"{at}{key}", value, known[key])
        values[key] = value
    return cls(**values)


def _check_type(name: str, value: Any, f: dataclasses.Field[Any]) -> None:
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
    kind = kinds.get(str(f.type))
    if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and f.type != "bool")):
        raise ValueError(f"{name} = {value!r}: must be of type {f.type}")


def attach(model: nn.Module, config: AttachConfig | Mapping[str, Any] | None = None) -> Gate:
    """Put a gate on `model`, which keeps its class, its parameters' names and its outputs.

    Raises:
        GateError: nothing to gate in the model, a gate on it already, a wrapper (DistributedDataParallel, compiled) given
            in place of the module inside, or weights that are sharded.
        ValueError: settings out of range.
    """
    if config is None or isinstance(config, Mapping):
        config = AttachConfig.from_dict(config or {})
    return Gate(model, config)


def plain_loss(
    logits: Tensor, labels: Tensor | None, shift: bool = False, normaliser: Tensor | float | None = None
) -> Tensor:
    """Mean cross-entropy over all tokens with a label, or of per-token losses (B, T) without `labels`; see `Gate.loss`."""
    if labels is None:
        return logits.mean() if normaliser is None else logits.sum() / normaliser
    if shift:
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / ((labels != -100).sum().clamp(min=1) if normaliser is None else normaliser)


class Gate:
    """What `attach` returns. See `AttachConfig` for the settings and the file's head for a loop."""

    def __init__(self, model: nn.Module, cfg: AttachConfig) -> None:
        _refuse_wrappers(model)
        self.model, self.cfg = model, cfg
        self.rows = Rows(cfg.batch_first)
        self.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.names = dict(model.named_parameters())
        self.found: Found | None = find(model, self.rows, lambda name: any(fnmatch.fnmatch(name, e) for e in cfg.exclude))
        _ATTACHED.add(model)
        self.steps = self.losses = 0
        self.view_loss_BT: Tensor | None = None
        self._losses_at_step = 0
        self._world = 1
        try:
            vocab = cfg.vocab_size or next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 0)
            self.pool = Pool(cfg.before, model, vocab, cfg.seed)
            self.choice = RowChoice(cfg.backward, model, vocab, cfg.seed + 1)
            self.strips = Strips(self._gated_weights())
            self.subset_names = subset_names(model, set(self.strips.layers))
            self.subset = self._make_subset()
            self._activate()
        except BaseException:
            self.detach()
            raise
        if cfg.backward.unit != "none":
            self.rows.embeddings = cfg.backward.below == "compact"
            for layer in self.found.layers:
                layer.compact = cfg.backward.below == "compact"

    # weights

    def _gated_weights(self) -> dict[str, list[Any]]:
        """Weights that strips may be taken of: not tied to an embedding, not stored both ways, not the head."""
        assert self.found is not None
        if self.cfg.weights.kind not in ("blocks", "block_columns"):
            return {}
        by_name: dict[str, list[Any]] = {}
        name_of = {id(p): name for name, p in self.names.items()}
        for layer in self.found.layers:
            if id(layer.weight) in name_of and id(layer.weight) not in self.found.embedded and layer.weight.requires_grad:
                by_name.setdefault(name_of[id(layer.weight)], []).append(layer)
        head = self.found.head_weight(self.model)
        return {
            name: layers
            for name, layers in by_name.items()
            if len({layer.turned for layer in layers}) == 1 and layers[0].weight is not head
        }

    def _activate(self) -> None:
        """Give the chosen weights their gradients, freeze the others."""
        weights = self.cfg.weights
        if self.subset is None:
            return
        chosen = self.subset.active.parts
        for name, p in self.names.items():
            p.requires_grad_(self.requires_grad[name] and self.subset_names[name] in chosen)
            if not p.requires_grad:
                p.grad = None
        if weights.kind == "layers":
            return
        for layers in self.strips.layers.values():
            layers[0].weight.requires_grad_(False)
        self.strips.activate({name: chosen.get(self.subset_names[name], ()) for name in self.strips.layers})
        self._share_gradients()

    def _make_subset(self) -> Subset | None:
        weights = self.cfg.weights
        if weights.kind == "all":
            return None
        if weights.kind == "layers":
            layer_stack(self.model)
            if _world_size() > 1:
                raise GateError(
                    "weights.kind = 'layers' with several processes: DistributedDataParallel waits for gradients of "
                    "the layers "
                    "that were active when it was made. Use weights.kind = 'blocks'"
                )
        elif not self.strips.layers:
            raise GateError(
                f"weights.kind = {weights.kind!r}: every matrix of this model is an embedding, tied, the head or excluded"
            )
        return subset_of(self.subset_names, self.names, set(self.strips.layers), weights, self.cfg.seed)

    def _share_gradients(self) -> None:
        """Between processes: strips are no parameters of the module, so DistributedDataParallel does not see them."""
        self._world = _world_size()
        if self._world == 1:
            return
        world = self._world

        def mean(leaf: Tensor) -> None:
            assert leaf.grad is not None
            dist.all_reduce(leaf.grad)
            leaf.grad /= world

        for leaf in self.strips.leaves.values():
            leaf.register_post_accumulate_grad_hook(mean)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is updated now: active strips (under their weight's name) and the other parameters that ask for a "
        "gradient."""
        yield from ((name, leaf) for (name, _), leaf in self.strips.leaves.items())
        yield from ((name, p) for name, p in self.names.items() if p.requires_grad)

    def parameters(self) -> list[nn.Parameter]:
        """For the optimizer, in place of `model.parameters()`."""
        return [p for _, p in self.named_parameters()]

    def active_fraction(self) -> float:
        """Share of the model's parameters that is updated now."""
        return sum(p.numel() for p in self.parameters()) / sum(p.numel() for p in self.names.values())

    # sequences before the forward

    def filter(self, batches: Iterable[Any], windows: int = 0) -> Iterator[Any]:
        """Batches of chosen sequences, of the size that comes in (or `windows`). See `Pool.filter`."""
        return self.pool.filter(batches, windows)

    # the loss, and rows of the backward

    @torch.compiler.disable
    def loss(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        *,
        shift: bool = False,
        tokens: Tensor | None = None,
        normaliser: Tensor | float | None = None,
    ) -> Tensor:
        """Mean cross-entropy over the kept rows, whose backward leaves the others out.

        Args:
            logits: (B, T, V) with `labels`; or per-token losses (B, T) of your own, with their graph, without `labels`.
            labels: int64 (B, T), -100 for none.
            shift: labels are the inputs, as with transformers: row t predicts labels[:, t + 1].
            tokens: inputs (B, T), for signals that look at them.
            normaliser: divides the summed loss in place of the number of kept tokens.

        Without gradient, or with backward.unit = "none", the plain mean over all tokens.
        """
        self._alive()
        self.strips.check()
        self.losses += 1
        if self.losses - self._losses_at_step == 512 and self.cfg.weights.kind != "all":
            raise GateError("512 losses without gate.step(optimizer): call it after each optimizer.step()")
        if labels is None and logits.dim() != 2:
            raise ValueError(
                f"gate.loss(losses): per-token losses are (B, T), these are {tuple(logits.shape)}; for logits give labels"
            )
        if labels is not None and (logits.dim() != 3 or labels.shape != logits.shape[:2]):
            raise ValueError(
                f"gate.loss: logits {tuple(logits.shape)} and labels {tuple(labels.shape)} are not (B, T, V) and (B, T)"
            )
        if labels is not None and shift:
            tokens = labels if tokens is None else tokens
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        loss_BT = self._losses(logits, labels)
        self.view_loss_BT = loss_BT
        valid_BT = torch.ones_like(loss_BT, dtype=torch.bool) if labels is None else labels != -100
        if self.cfg.backward.unit == "none" or not torch.is_grad_enabled():
            return plain_loss(logits, labels, False, normaliser)
        kept = self.choice.choose(loss_BT, valid_BT, logits if labels is not None else None, labels, tokens, self.found)
        count = kept.normaliser if normaliser is None else torch.as_tensor(normaliser, device=logits.device) * kept.share
        if self.cfg.backward.below == "exact" and any(layer.exact is None for layer in self.found.layers):  # type: ignore[union-attr]
            self._probe(logits, loss_BT.shape)  # type: ignore[arg-type]
        if labels is None:
            loss = (logits.reshape(-1).index_select(0, kept.flat_K) * kept.weight_K).sum() / count
        else:
            loss = KeptLoss.apply(logits, labels.flatten(), kept.flat_K, kept.weight_K, count)
        return Arm.apply(loss, self.rows, kept.flat_K, tuple(loss_BT.shape))

    @staticmethod
    def _losses(logits: Tensor, labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            if labels is None:
                return logits.detach()
            wide = logits if logits.dtype == torch.float64 else logits.float()
            flat = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
            return flat.view(labels.shape)

    def _probe(self, output: Tensor, shape: tuple[int, int]) -> None:
        """Find the layers where dropped rows have an exactly zero gradient: NaN is put into the gradient of one token of
        the output, and what it does not reach in the other rows is independent of it."""
        assert self.found is not None
        batch, length = shape
        taint = torch.zeros_like(output)
        taint[0, -1] = float("nan")
        others = torch.cat([torch.arange(length - 1), torch.arange(length, batch * length)]).to(output.device)
        self.rows.flat_K, self.rows.shape, self.rows.probing = others, (batch, length), True
        leaves = [p for p in self.parameters() if p.requires_grad]
        try:
            torch.autograd.grad(output, leaves, taint, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise GateError(
                f"backward.below = 'exact' looks at one backward first, which failed here ({error}); with torch.compile "
                "call "
                "gate.probe(inputs) before compiling"
            ) from error
        finally:
            self.rows.flat_K, self.rows.probing = None, False
        for layer in self.found.layers:
            layer.exact = bool(layer.exact)
            layer.compact = layer.exact

    def probe(self, *args: Any, **kwargs: Any) -> list[str]:
        """Run the model once to find the layers where rows are dropped exactly (backward.below = "exact"); their names."""
        self._alive()
        with torch.enable_grad():
            output = self.model(*args, **kwargs)
        output = getattr(output, "logits", output)
        if not isinstance(output, Tensor) or output.dim() != 3:
            raise GateError("gate.probe: the model's output is no tensor (B, T, V) and has no `logits` of that form")
        self._probe(output, (output.shape[0], output.shape[1]))
        return self.exact_layers()

    def exact_layers(self) -> list[str]:
        """Names of the layers found to drop rows exactly."""
        return [] if self.found is None else [layer.name for layer in self.found.layers if layer.exact]

    # after the step

    def adopt(self, *optimizers: Any) -> None:
        """Put active strips into optimizers that were made from `model.parameters()`, in the place of their weights."""
        self._alive()
        self._exchange(optimizers, {})

    def _exchange(self, optimizers: tuple[Any, ...], old: Mapping[tuple[str, int], nn.Parameter]) -> None:
        inner = [getattr(o, "optimizer", o) for o in optimizers]
        if self.cfg.weights.kind == "layers":
            for number, optimizer in enumerate(inner):
                self.strips.note_groups(number, optimizer, self.names.items())
                there = set()
                for group in optimizer.param_groups:
                    # A frozen parameter leaves, with its moments; what is not the model's own stays.
                    frozen = {id(p) for n, p in self.names.items() if not p.requires_grad and self.requires_grad[n]}
                    for p in [p for p in group["params"] if id(p) in frozen]:
                        optimizer.state.pop(p, None)
                    group["params"] = [p for p in group["params"] if id(p) not in frozen]
                    there |= {id(p) for p in group["params"]}
                self.strips.place(
                    number, optimizer, [(n, p) for n, p in self.names.items() if p.requires_grad and id(p) not in there]
                )
            self._check_optimizers(inner)
            return
        self.strips.adopt(inner, {name: self.names[name] for name in self.strips.layers}, old)
        self._check_optimizers(inner)

    def _check_optimizers(self, optimizers: Iterable[Any]) -> None:
        there = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        wanted = list(self.named_parameters())
        if self.strips.leaves:
            wanted = wanted[: len(self.strips.leaves)]
        if missing := [name for name, leaf in wanted if id(leaf) not in there]:
            raise GateError(
                f"the active part of {missing[0]} (and {len(missing) - 1} more) is in no optimizer and would never be "
                "updated: "
                "make the optimizer of gate.parameters(), or call gate.adopt(optimizer) once"
            )

    def step(self, *optimizers: Any, progress: float = 0.0) -> None:
        """After each optimizer step: signals and policies learn, and when it is their turn other weights become active.

        Gradients of strips are cleared here, so `model.zero_grad()` does as well as the optimizer's.

        Scored policies (energy, fisher, surprise) read the gradients here: call `optimizer.zero_grad()` afterwards.
        `progress`: share of the training that is done, for settings that end before it does.
        """
        self._alive()
        if not optimizers and self.subset is not None:
            raise GateError("gate.step(optimizer): weights change their turn, so give the optimizer(s) that hold them")
        self.rows.disarm()
        self.strips.check()
        self._losses_at_step = self.losses
        if self.strips.leaves and self._world != _world_size():
            raise GateError(
                "the process group was made after attach, so strips are not shared: call init_process_group first"
            )
        if self.view_loss_BT is not None:
            self.pool.observe(self.view_loss_BT)
        self.steps += 1
        if self.subset is None:
            return
        self._check_optimizers([getattr(o, "optimizer", o) for o in optimizers])
        if self.cfg.weights.scored:
            self._observe()
        for leaf in self.strips.leaves.values():
            leaf.grad = None  # model.zero_grad() does not know them
        if self.subset.due(self.steps, progress):
            old = dict(self.strips.leaves)
            self.subset.advance()
            self._activate()
            self._exchange(optimizers, old)

    def _observe(self) -> None:
        assert self.subset is not None
        if self._world > 1 or self.view_loss_BT is None:
            loss = 0.0  # not the same in every process, and choices must be
        else:
            loss = float(self.view_loss_BT.mean())
        gradients: dict[str, Any] = {}
        for (name, _), leaf in self.strips.leaves.items():
            if leaf.grad is not None:
                gradients.setdefault(self.subset_names[name], []).append(leaf.grad)
        if not self.strips.leaves:
            gradients = {
                self.subset_names[n]: (p.grad,) for n, p in self.names.items() if p.requires_grad and p.grad is not None
            }
        if not gradients:
            raise GateError(
                f"weights.policy = {self.cfg.weights.policy!r} reads gradients and there are none at gate.step: call "
                "optimizer.zero_grad() after gate.step(optimizer), not before"
            )
        self.subset.observe({n: tuple(g) for n, g in gradients.items()}, loss)

    def seek(self, steps: int) -> None:
        """Go to where a gate without learnt scores is after so many steps: the weights of that turn become active."""
        self._alive()
        self.steps = steps
        if self.subset is not None and self.subset.due(steps):
            self.subset.advance()
            self._activate()

    def detach(self) -> nn.Module:
        """Take the gate off: the plain model again, with what it has learnt. The optimizer of its strips is of no "
        "more use."""
        if self.found is not None:
            restore(self.found)
            self.found = None
            for name, p in self.names.items():
                if not p.requires_grad:
                    p.grad = None
                p.requires_grad_(self.requires_grad[name])
            _ATTACHED.discard(self.model)
        return self.model

    def _alive(self) -> None:
        if self.found is None:
            raise GateError("this gate was detached: call attach(model, config) again")

    # what was gated, state

    def report(self) -> dict[str, Any]:
        """What the gate reaches: gated layers, modules left as they are, layers whose layout hid their token rows."""
        self._alive()
        assert self.found is not None
        return {
            "gated": [layer.name for layer in self.found.layers],
            "left": self.found.left,
            "tied": self.found.tied,
            "rows_not_found": [layer.name for layer in self.found.layers if layer.dense_calls],
            "active_fraction": self.active_fraction(),
            "kept": self.pool.kept,
            "offered": self.pool.offered,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything the next choices depend on; nested dict of tensors and plain values."""
        subset = {} if self.subset is None else self.subset.state_dict()
        rows = self.choice.state_dict()
        return {"steps": self.steps, "subset": subset, "pool": self.pool.state_dict(), "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Before the optimizer is made: the strips of that turn become active."""
        self._alive()
        self.steps = int(state["steps"])
        if self.subset is not None:
            self.subset.load_state_dict(state["subset"])
        self.pool.load_state_dict(state["pool"])
        self.choice.load_state_dict(state["rows"])
        self._activate()


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _refuse_wrappers(model: nn.Module) -> None:
    kind = type(model).__name__
    if kind in ("DistributedDataParallel", "OptimizedModule", "FullyShardedDataParallel", "DataParallel"):
        raise GateError(f"attach({kind}(...)): attach to the module first and wrap it afterwards")
    if any(type(p).__name__ == "DTensor" for p in model.parameters()):
        raise GateError("attach: this model's weights are sharded (DTensor), strips and rows of shards are not supported")
    if model in _ATTACHED:
        raise GateError("there is a gate on this model already: call its detach() first")
