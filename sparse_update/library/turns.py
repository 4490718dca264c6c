"""Which weights of a user's model are updated, turn by turn, and their exchange in the user's optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_update.library.layers import Found
from sparse_update.library.linear import Layer
from sparse_update.library.methods.signs import SignDescent
from sparse_update.library.optimizers import Links, Place, inner
from sparse_update.library.processes import world_size
from sparse_update.library.strips import Strips, layer_stack, subset_names, subset_of
from sparse_update.library.tracking.rows import GateError
from sparse_update.weights.subset import Subset, SubsetConfig


class Turns:
    """The active weights of a model: all, whole layers, or strips of its gated matrices.

    Args:
        cfg: which, how many, for how long.
        model: whose parameters are frozen and freed.
        found: its gated layers.
        seed: of the choices.
        sign_scale: step of inactive strips with weights.inactive = "sign", as a share of the learning rate.

    Raises GateError where the model has no weights of the kind that is asked for.
    """

    def __init__(self, cfg: SubsetConfig, model: nn.Module, found: Found, seed: int, sign_scale: float = 1.0) -> None:
        self.cfg, self.model = cfg, model
        self.names = dict(model.named_parameters())
        self.requires_grad = {name: p.requires_grad for name, p in self.names.items()}
        """As it was before the gate."""
        self.strips = Strips(self._gated(found))
        self.subset_names = subset_names(model, set(self.strips.layers))
        self.world = 1
        """Processes that share the gradients of strips."""
        self.subset = self._choose(seed)
        self.descent = SignDescent(self.strips, sign_scale) if cfg.inactive == "sign" else None
        self.links = Links(self)
        self._name_of = {id(p): name for name, p in self.names.items()}
        owners = {name: name.rpartition(".") for name in self.names}
        self._homes = [(name, model.get_submodule(at)._parameters, leaf) for name, (at, _, leaf) in owners.items()]

    def _gated(self, found: Found) -> dict[str, list[Layer]]:
        """Weights that strips may be taken of: not tied to an embedding, not stored both ways, not the head."""
        if self.cfg.kind not in ("blocks", "block_columns"):
            return {}
        by_name: dict[str, list[Layer]] = {}
        name_of = {id(p): name for name, p in self.names.items()}
        for layer in found.layers:
            weight = layer.weight if layer.has_weight else None
            if weight is not None and id(weight) not in found.embedded and weight.requires_grad:
                by_name.setdefault(name_of[id(weight)], []).append(layer)
        head = found.head_weight(self.model)
        return {
            name: layers
            for name, layers in by_name.items()
            if len({layer.turned for layer in layers}) == 1 and layers[0].weight is not head
        }

    def _choose(self, seed: int) -> Subset | None:
        if self.cfg.kind == "all":
            return None
        if self.cfg.kind == "layers":
            layer_stack(self.model)
            if world_size() > 1:
                raise GateError(
                    "weights.kind = 'layers' with several processes: DistributedDataParallel waits for gradients of the "
                    "layers that were active when it was made. Use weights.kind = 'blocks'"
                )
        elif not self.strips.layers:
            raise GateError(
                f"weights.kind = {self.cfg.kind!r}: every matrix of this model is an embedding, tied, the head or excluded"
            )
        return subset_of(self.subset_names, self.names, set(self.strips.layers), self.cfg, seed)

    # what is updated now

    def activate(self) -> None:
        """Give the chosen weights their gradients, freeze the others."""
        if self.subset is None:
            return
        chosen = self.subset.active.parts
        for name, p in self.names.items():
            p.requires_grad_(self.requires_grad[name] and self.subset_names[name] in chosen)
            if not p.requires_grad:
                p.grad = None
        if self.cfg.kind == "layers":
            return
        for layers in self.strips.layers.values():
            layers[0].weight.requires_grad_(False)
        self.strips.activate({name: chosen.get(self.subset_names[name], ()) for name in self.strips.layers})
        self._share_gradients()

    def _share_gradients(self) -> None:
        """Between processes: strips are no parameters of the module, so DistributedDataParallel does not see them."""
        self.world = world = world_size()
        if world == 1:
            return

        def mean(leaf: Tensor) -> None:
            assert leaf.grad is not None
            dist.all_reduce(leaf.grad)
            leaf.grad /= world

        for leaf in self.strips.fresh:
            leaf.register_post_accumulate_grad_hook(mean)

    def follow(self) -> bool:
        """Take up parameters that stand in the place of others since, as `fully_shard` exchanges all of them. In a forward
        shards give place to whole weights, which are none to train. Whether there were any.

        Raises GateError where strips were taken of weights that are sharded now.
        """
        exchanged = False
        for name, home, leaf in self._homes:
            now = home.get(leaf)
            if now is self.names[name] or not isinstance(now, nn.Parameter) or _is_shard(self.names[name]):
                continue
            if self.strips.layers and _is_shard(now):
                raise GateError(
                    f"{name} was sharded after attach (DTensor), and weights.kind = {self.cfg.kind!r} needs whole weights: "
                    "leave weights.kind at 'all', or shard nothing"
                )
            if name not in self.strips.layers:  # `Strips.check` sees to those
                self._name_of.pop(id(self.names[name]), None)
                self.names[name], self._name_of[id(now)] = now, name
                exchanged = True
        return exchanged

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Active strips, under their weight's name and in its place, and the other parameters that ask for a gradient."""
        self.follow()
        for name, p in self.names.items():
            if name in self.strips.layers:
                yield from ((name, leaf) for leaf in self.strips.of(name))
            elif p.requires_grad:
                yield name, p

    def trained(self, parameters: Iterable[nn.Parameter]) -> Iterator[nn.Parameter]:
        """The given parameters, those that are cut into strips by their active strips."""
        for p in parameters:
            name = self._name_of.get(id(p), "")
            yield from self.strips.of(name) if name in self.strips.layers else [p]

    def active_of(self, name: str) -> dict[Place, nn.Parameter]:
        """What an optimizer holds of this parameter now: its strips, itself, or nothing while it rests."""
        if name in self.strips.layers:
            return {self.strips.places[leaf]: leaf for leaf in self.strips.of(name)}
        if self.subset is None or not self.requires_grad[name] or self.subset_names[name] in self.subset.active.parts:
            return {(name,): self.names[name]}
        return {}

    def place_of(self, p: Tensor) -> Place | None:
        """Where a strip, or a parameter of the model, belongs; None for any other tensor."""
        name = self._name_of.get(id(p))
        return self.strips.places.get(p) if name is None else (name,)

    def restore(self) -> None:
        """Every parameter asks for gradients as it did before the gate."""
        self.links.close()
        if self.descent is not None:
            self.descent.close()
        for name, p in self.names.items():
            if not p.requires_grad:
                p.grad = None
            p.requires_grad_(self.requires_grad.get(name, p.requires_grad))

    # between two steps

    def check(self) -> None:
        """Raise GateError where the weights were moved, or processes were joined, after the strips were taken."""
        self.follow()
        self.strips.check()
        if self.strips.leaves and self.world != world_size():
            raise GateError(
                "the process group was made after attach, so strips are not shared: call init_process_group first"
            )

    def step(self, optimizers: tuple[Any, ...], steps: int, progress: float, loss_BT: Tensor | None) -> None:
        """After the `steps`-th optimizer step: scored policies learn, and other weights become active when it is their
        turn."""
        given = [inner(o) for o in optimizers]
        if self.subset is not None:
            self._check_optimizers(given)
        if self.descent is not None and (other := next((o for o in given if not isinstance(o, Optimizer)), None)):
            raise GateError(
                f"weights.inactive = 'sign': {type(other).__name__} is no torch.optim.Optimizer, whose step would move the "
                "inactive weights along: derive it from that, or leave weights.inactive at 'frozen'"
            )
        if steps == 1:
            self._check_holds_any(given)
        self.links.know(given)
        if self.subset is None:
            return
        if self.cfg.scored:
            self._observe(self.subset, loss_BT)
        self.clear()
        if self.subset.due(steps, progress):
            self.subset.advance()
            self.activate()
            self.links.settle(given)
            self._check_optimizers(given)

    def clear(self) -> None:
        """Forget the gradients of strips, which model.zero_grad() does not know."""
        for leaf in (*self.strips.leaves.values(), *self.strips.signs.values()):
            leaf.grad = None

    def begin(self) -> None:
        """Before a backward: where the optimizer's gradients were thrown away without a step, so are those of signs."""
        if self.strips.signs and all(leaf.grad is None for leaf in self.strips.leaves.values()):
            for leaf in self.strips.signs.values():
                leaf.grad = None

    def seek(self, steps: int) -> None:
        """The weights of the turn after so many steps become active."""
        if self.subset is not None and self.subset.due(steps):
            self.subset.advance()
            self.activate()
            self.links.settle()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a `Subset`: the weights of that turn become active, in linked optimizers too."""
        if self.subset is not None:
            self.subset.load_state_dict(state)
            self.activate()
            self.links.settle()

    def _observe(self, subset: Subset, loss_BT: Tensor | None) -> None:
        # the loss is not the same in every process, and choices must be
        loss = 0.0 if self.world > 1 or loss_BT is None else float(loss_BT.mean())
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
                f"weights.policy = {self.cfg.policy!r} reads gradients and there are none at gate.step: call "
                "optimizer.zero_grad() after gate.step(optimizer), not before"
            )
        subset.observe({n: tuple(g) for n, g in gradients.items()}, loss)

    # optimizers

    def adopt(self, optimizers: Iterable[Any]) -> None:
        """Put what is active now into the optimizers, where the weights or earlier strips are; see `Links.adopt`."""
        given = [inner(o) for o in optimizers]
        self.links.adopt(given)
        if self.subset is not None:
            self._check_optimizers(given)

    def _check_holds_any(self, optimizers: list[Any]) -> None:
        there = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        trained = [id(p) for _, p in self.named_parameters()]
        if optimizers and trained and not any(p in there for p in trained):
            raise GateError(
                "gate.step(optimizer): the optimizer holds none of the parameters that the model has now, so it trains "
                "nothing; fully_shard, for one, puts others in their place. Make it of gate.parameters() after that"
            )

    def _check_optimizers(self, optimizers: Iterable[Any]) -> None:
        there = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        wanted = [(name, p) for name, p in self.named_parameters() if name in self.strips.layers or not self.strips.leaves]
        if missing := [name for name, leaf in wanted if id(leaf) not in there]:
            raise GateError(
                f"the active part of {missing[0]} (and {len(missing) - 1} more) is in no optimizer and would never be "
                "updated: make the optimizer of gate.parameters(), or call gate.adopt(optimizer) once"
            )


def _is_shard(p: Tensor) -> bool:
    return type(p).__name__ == "DTensor"
