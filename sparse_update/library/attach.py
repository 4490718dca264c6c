"""The gate for any module: `gate = attach(model, config)` inside a training loop of one's own, `gate.detach()` to undo it.

    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5}})
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-3)
    for x, y in gate.filter(loader):
        gate.loss(model(x), y).backward()
        optimizer.step()
        gate.step(optimizer)
        optimizer.zero_grad()

Every nn.Linear, transformers Conv1D and self-attending nn.MultiheadAttention gets a class derived from its own, whose
forward reads the module's parameters at every call; names, state_dict and outputs stay, and copies are plain. Attention,
embeddings, norms and whatever else the model holds run as they are. The first forward is watched, to learn which row of
each layer is which token of the loss; layers where that cannot be told are computed in full, and `report` names them.

Shape letters: B batch, T token, V vocabulary.
"""

from __future__ import annotations

import copy
import fnmatch
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.library.layers import Found, find, restore
from sparse_update.library.methods.scoring import GIVEN, Losses, reference_model
from sparse_update.library.methods.vcas import Vcas
from sparse_update.library.pool import Pool
from sparse_update.library.processes import world_size
from sparse_update.library.rowloss import RowLoss
from sparse_update.library.settings import AttachConfig
from sparse_update.library.strips import layer_stack
from sparse_update.library.tracking.rows import GateError, Rows
from sparse_update.library.tracking.trace import undisturbed
from sparse_update.library.turns import Turns

LOSSES_WITHOUT_STEP = 512
"""So many losses without `Gate.step` mean that it was forgotten."""


Reference = nn.Module | str | Path


def attach(
    model: nn.Module,
    config: AttachConfig | Mapping[str, Any] | None = None,
    *,
    reference: Reference | None = None,
    **settings: Any,
) -> Gate:
    """Put a gate on `model`, which keeps its class, its parameters' names and its outputs.

    Args:
        config: settings, or nested dicts of them; "method" takes those of a published method, which the others change.
        reference: for losses in excess of another model's: a module with the outputs of `model` (no part of the gate's
            state), the folder of a checkpoint of our trainer, or "given" where you give its losses.
        settings: more of `config`'s top level, such as method="lisa" or seed=3.

    Raises:
        GateError: nothing to gate in the model, a gate on it already, a wrapper (DistributedDataParallel, compiled) given
            in place of the module inside, weights that are sharded, or a method without what it needs of you.
        ValueError: settings out of range, or unknown ones.
    """
    if config is None or isinstance(config, Mapping):
        config = AttachConfig.from_dict({**(config or {}), **settings})
    elif settings:
        raise ValueError(f"attach(..., {next(iter(settings))}=...): put it into the AttachConfig that is given too")
    return Gate(model, config, reference)


class Gate:
    """What `attach` returns. See `AttachConfig` for the settings and the file's head for a loop.

    `pool` chooses sequences before the forward, `row_loss` rows of the backward, `turns` the weights that are updated.
    """

    def __init__(self, model: nn.Module, cfg: AttachConfig, reference: Reference | None = None) -> None:
        _refuse_wrappers(model, cfg.weights.kind)
        _check_needs(cfg, reference)
        self.model, self.cfg = model, cfg
        self.rows = Rows()
        self.found: Found | None = find(model, self.rows, lambda name: any(fnmatch.fnmatch(name, e) for e in cfg.exclude))
        _ATTACHED.add(model)
        self.steps = self.losses = 0
        self._losses_at_step = 0
        try:
            vocab = cfg.vocab_size or next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 0)
            other = reference_model(reference, model, vocab)
            self.pool = Pool(cfg.before, model, vocab, cfg.seed, other)
            self.row_loss = RowLoss(cfg.backward, self.found, self.rows, model, vocab, cfg.seed + 1, other)
            self.row_loss.vcas = self._vcas(model, cfg, self.found)
            self.turns = Turns(cfg.weights, model, self.found, cfg.seed, cfg.sign_scale)
            self.turns.activate()
        except BaseException:
            self.detach()
            raise
        self.turns.links.serve(self._state, self.load_state_dict, lambda: self.steps)
        self.row_loss.start()

    def _vcas(self, model: nn.Module, cfg: AttachConfig, found: Found) -> Vcas | None:
        if cfg.gradient.unit == "none":
            return None
        if world_size() > 1:
            raise GateError("method 'vcas' tests the variance of one process's batches: it cannot run in several")
        return Vcas(cfg.gradient, layer_stack(model), found.layers, self.rows, cfg.seed + 2)

    # weights

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is updated now: active strips (under their weight's name) and the other parameters that ask for a
        gradient."""
        if self.turns.follow():
            self.row_loss.watch_again()  # whose hooks come before those of what exchanged them
        return self.turns.named_parameters()

    def parameters(self) -> list[nn.Parameter]:
        """For the optimizer, in place of `model.parameters()`, and in its order."""
        return [p for _, p in self.named_parameters()]

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` of all that is trained; the norm before, (). The model's own parameters alone
        would leave the strips out."""
        return nn.utils.clip_grad_norm_(self.parameters(), max_norm, norm_type)

    def active_fraction(self) -> float:
        """Share of the model's parameters that is updated now."""
        return sum(p.numel() for p in self.parameters()) / sum(p.numel() for p in self.turns.names.values())

    def adopt(self, *optimizers: Any) -> None:
        """Put active strips into optimizers that were made from `model.parameters()`, in the place of their weights.

        From here on, and from the first `step(optimizer)`, their state_dict says whose the moments are and holds the gate's
        state; load_state_dict takes the gate there. A state that was loaded before is taken over. An optimizer with
        torch's fused kernels loses them where strips are columns, which those would write beside.

        Raises GateError for a state of another configuration, model or turn.
        """
        self._alive()
        self.turns.adopt(optimizers)

    # sequences before the forward

    def filter(self, batches: Iterable[Any], windows: int = 0, losses: Losses | None = None) -> Iterator[Any]:
        """Batches of chosen sequences, of the size that comes in (or `windows`). `losses`: (model, batch) -> (B, T), how a
        model's losses are taken where signals ask for a forward. See `Pool.filter`."""
        return self.pool.filter(batches, windows, losses)

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
        reference_losses: Tensor | None = None,
        others: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy over the kept rows, whose backward leaves the others out.

        Args:
            logits: (B, T, V) with `labels`; or per-token losses (B, T) of your own, with their graph, without `labels`.
                (B, V), or losses (B,), where the loss has one row for a sample: unit "sequence" takes them as B sequences
                of one token, unit "token" as one sequence of B tokens.
            labels: int64 (B, T) or (B,), -100 for none.
            shift: labels are the inputs, as with transformers: row t predicts labels[:, t + 1].
            tokens: inputs (B, T), for signals that look at them.
            normaliser: divides the summed loss in place of the number of kept tokens.
            reference_losses: (B, T), of a reference, for the signal "excess"; without them its forward is run.
            others: another loss of the same forward, (), such as a router's or an auxiliary one: it is added, and its
                gradient is formed for all rows, in a backward of its own inside of this one.

        Returns: the loss, (), nats where it is a cross-entropy.

        Raises:
            GateError: the gate was detached; 512 losses without `step` where weights take turns; signal "excess" without
                a reference's losses or what its forward needs; `others` with several processes. In the backward: another
                loss runs along, or two gated ones; create_graph=True.
            ValueError: shapes other than these, or a setting that needs logits or tokens given losses alone.

        Sequences that a policy of `filter` gave weights count with them; a step learns which batch it is by its labels.
        Without gradient, or with backward.unit = "none", the plain mean over all tokens.
        """
        self._alive()
        self.turns.follow()
        self.turns.strips.check()
        if torch.is_grad_enabled():
            self.turns.begin()
        self.losses += 1
        if self.losses - self._losses_at_step == LOSSES_WITHOUT_STEP and self.cfg.weights.kind != "all":
            raise GateError(
                f"{LOSSES_WITHOUT_STEP} losses without gate.step(optimizer): call it after each optimizer.step()"
            )
        given = None
        if torch.is_grad_enabled() and self.pool.listens:
            given = self.pool.of(labels, shift, len(logits))
        weight_B = None if given is None else given.weight_B
        loss = self.row_loss(logits, labels, shift, tokens, normaliser, others, self._leaves, weight_B, reference_losses)
        if given is not None and self.row_loss.last_BT is not None:
            self.pool.trained(given, self.row_loss.last_BT, labels, shift)
        return loss

    def probe(self, *args: Any, **kwargs: Any) -> list[str]:
        """Run the model once, eagerly, to learn which row of each layer is which token, and with backward.below = "exact"
        where rows are dropped exactly; the names of these layers. Random state and buffers are as before afterwards.

        Without it the first forward is watched in the same way, which `torch.compile(fullgraph=True)` does not allow.
        """
        self._alive()
        self.row_loss.watch_again()
        with torch.enable_grad(), undisturbed(self.model):
            output = self.model(*args, **kwargs)
            output = getattr(output, "logits", output)
            if not isinstance(output, Tensor) or output.dim() not in (2, 3):
                raise GateError("gate.probe: the model's output is no tensor (B, T, V) and has no `logits` of that form")
            self.row_loss.look(output, self._leaves)
        return self.exact_layers()

    def exact_layers(self) -> list[str]:
        """Names of the layers found to drop rows exactly."""
        return [] if self.found is None else [layer.name for layer in self.found.layers if layer.exact]

    def _leaves(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    # after the step

    def step(self, *optimizers: Any, progress: float | None = None) -> None:
        """After each optimizer step: signals and policies learn, and when it is their turn other weights become active.

        Gradients of strips are cleared here, so `model.zero_grad()` does as well as the optimizer's.

        Scored policies (energy, fisher, surprise) read the gradients here: call `optimizer.zero_grad()` afterwards.
        `progress`: share of the training that is done, for settings that end before it does; None counts steps of
        `total_steps`.

        A step that accelerate's optimizer skipped, as gradients overflowed or still accumulate, is no step of the gate.
        torch's own GradScaler does not tell: leave this call out where `scaler.update()` lowered `get_scale()`.
        """
        self._alive()
        if any(not getattr(getattr(o, "gradient_state", None), "sync_gradients", True) for o in optimizers):
            return  # accelerate accumulates
        if any(getattr(o, "step_was_skipped", False) for o in optimizers):
            self.rows.disarm()
            self.turns.clear()
            return
        if not optimizers and self.turns.subset is not None:
            raise GateError("gate.step(optimizer): weights change their turn, so give the optimizer(s) that hold them")
        self.rows.disarm()
        self._losses_at_step = self.losses
        self.turns.check()
        self.steps += 1
        self.row_loss.steps = self.steps
        if progress is None:
            progress = self.steps / self.cfg.total_steps if self.cfg.total_steps else 0.0
        self.pool.observe(progress)
        self.turns.step(optimizers, self.steps, progress, self.row_loss.last_BT)

    def seek(self, steps: int) -> None:
        """Go to where a gate without learnt scores is after so many steps: the weights of that turn become active."""
        self._alive()
        self.steps = self.row_loss.steps = steps
        self.turns.seek(steps)

    def detach(self) -> nn.Module:
        """Take the gate off: the plain model again, with what it has learnt. The optimizer of its strips is of no more
        use."""
        if self.found is not None:
            restore(self.found)
            self.found = None
            if hasattr(self, "row_loss"):
                self.row_loss.stop()
                if self.row_loss.vcas is not None:
                    self.row_loss.vcas.close()
            if hasattr(self, "turns"):
                self.turns.restore()
            _ATTACHED.discard(self.model)
        return self.model

    def _alive(self) -> None:
        if self.found is None:
            raise GateError("this gate was detached: call attach(model, config) again")

    # what was gated, state

    def report(self) -> dict[str, Any]:
        """What the gate reaches: gated layers, modules left as they are, layers whose token rows could not be followed and,
        in `why`, what hid them; `gone`: layers that were gated and are no longer in the model.

        `reach`: of the FLOPs of a plain forward and backward, the share in products whose cost falls with the rows that
        are kept, by the formulas of torch's counter for the forward that was watched and the backward of its loss; None
        before the first loss, where no rows are dropped, and with reentrant checkpoints.
        """
        self._alive()
        assert self.found is not None
        present = {id(module) for module in self.model.modules()}
        return {
            "gated": [layer.name for layer in self.found.layers if id(layer.module) in present],
            "gone": [layer.name for layer in self.found.layers if id(layer.module) not in present],
            "left": self.found.left,
            "tied": self.found.tied,
            "rows_not_found": [layer.name for layer in self.found.layers if layer.dense_calls],
            "why": {layer.name: layer.why_dense for layer in self.found.layers if layer.dense_calls and layer.why_dense},
            "reach": self.row_loss.reach(),
            "active_fraction": self.active_fraction(),
            "kept": self.pool.kept,
            "offered": self.pool.offered,
            "rates": {} if self.row_loss.vcas is None else self.row_loss.vcas.report(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything the next choices depend on, and the settings it holds for; nested dict of tensors and plain values."""
        return self._state() | {"pool": copy.deepcopy(self.pool.state_dict())}

    def _state(self) -> dict[str, Any]:
        """The same without waiting sequences: what goes into an optimizer's checkpoint."""
        subset = {} if self.turns.subset is None else self.turns.subset.state_dict()
        state = {"steps": self.steps, "subset": subset, "rows": self.row_loss.state_dict()}
        return copy.deepcopy(state) | {"config": self.cfg.plain()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The weights of that turn become active, also in optimizers that the gate knows.

        Raises GateError for the state of another configuration, ValueError for that of another model.
        """
        self._alive()
        saved, here = state.get("config", {}), self.cfg.plain()
        if differing := [key for key in here if key in saved and saved[key] != here[key]]:
            raise GateError(
                "; ".join(
                    f"{key} was {saved[key]!r:.60} when this state was saved and is {here[key]!r:.60}"
                    for key in differing[:3]
                )
                + ": resume with the settings of that run, or begin anew without its gate and optimizer state"
            )
        self.steps = self.row_loss.steps = int(state["steps"])
        self.turns.load_state_dict(state["subset"])
        if "pool" in state:  # an optimizer's checkpoint leaves it out
            self.pool.load_state_dict(state["pool"])
        self.row_loss.load_state_dict(state["rows"])


_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _check_needs(cfg: AttachConfig, reference: Reference | None) -> None:
    """Raise GateError for what a method needs and only the user has."""
    of = f"method {cfg.method!r}" if cfg.method else "signal 'excess'"
    after, before = cfg.backward.signal == "excess" and cfg.backward.unit != "none", cfg.before.signal == "excess"
    if after and reference is None:
        raise GateError(
            f"{of} counts losses from those of a reference model: attach(model, ..., reference=MODULE), a trained module "
            f"with the same outputs, or reference={GIVEN!r} and gate.loss(..., reference_losses=...)"
        )
    if before and not cfg.before.reference and (reference is None or reference == GIVEN):
        raise GateError(
            f"{of} counts losses from those of a reference model: attach(model, ..., reference=MODULE), a trained module "
            "with the same outputs, or before.reference, the key of each sequence's reference losses in a batch"
        )
    if reference is not None and not after and not before:
        raise GateError(
            "reference: nothing in these settings asks for it; method='rho1' and 'rho_loss', or signal 'excess', do"
        )
    if cfg.method == "infobatch" and not cfg.before.index:
        raise GateError(
            "method 'infobatch' remembers each sequence's last loss by its number: batches must be mappings, and "
            "before={'index': KEY} the key of the numbers in them (or their place in a tuple, such as '2')"
        )
    if cfg.before.anneal_fraction and not cfg.total_steps:
        raise GateError(
            f"before.anneal_fraction = {cfg.before.anneal_fraction}: how long is the training? Give total_steps=N, its "
            "optimizer steps, or before.anneal_fraction = 0 for none"
        )


def _refuse_wrappers(model: nn.Module, weights: str) -> None:
    kind = type(model).__name__
    if kind in ("DistributedDataParallel", "OptimizedModule", "FullyShardedDataParallel", "DataParallel"):
        raise GateError(f"attach({kind}(...)): attach to the module first and wrap it afterwards")
    if weights != "all" and any(type(p).__name__ == "DTensor" for p in model.parameters()):
        raise GateError(
            f"attach: this model's weights are sharded (DTensor), and weights.kind = {weights!r} needs whole ones: leave "
            "it 'all', or shard nothing"
        )
    if model in _ATTACHED:
        raise GateError("there is a gate on this model already: call its detach() first")
