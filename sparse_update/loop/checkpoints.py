"""When a run is saved, and what of each part: all that its next step depends on, so that it resumes to the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sparse_update.gates.gate import Gate
from sparse_update.loop.checkpoint import (
    Checkpoint,
    CheckpointError,
    Snapshot,
    load_checkpoint,
    plain_meta,
    snapshot,
)
from sparse_update.loop.records import TrainerConfig
from sparse_update.loop.saving.files import open_checkpoint
from sparse_update.loop.saving.keeper import Keeper
from sparse_update.loop.saving.parts import Parts, SaidByAll, on_all, parts, write_parts
from sparse_update.loop.saving.places import whole_place
from sparse_update.loop.updates import Updates
from sparse_update.nested import pack
from sparse_update.parallel.mesh import Mesh
from sparse_update.weights.lowrank import apart, merged, restore


class Checkpoints:
    """The checkpoint in `folder/checkpoint`. Weights that LoRA adapts are saved merged, as a plain model, with the factors
    beside them.

    Args:
        folder: of the run.
        meta: put into every checkpoint (config, tokenizer, ...).
        cfg: how often to save, and what to keep.
        updates, gate: the parts whose state is kept.
        adapted: whether the model holds LoRA's factors.
        mesh: its first process writes. All of them have the same gate and generators, so that any number resumes from it.
        written: files of the run's folder that its listeners write, and their bytes so far; a checkpoint holds them, so
            that a run which goes on from it can cut what came later.
    """

    def __init__(
        self,
        folder: Path,
        meta: Mapping[str, Any],
        cfg: TrainerConfig,
        updates: Updates,
        gate: Gate,
        adapted: bool,
        mesh: Mesh,
        written: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self.target, self.meta, self.cfg = folder / "checkpoint", dict(meta), cfg
        self.updates, self.gate, self.adapted, self.mesh = updates, gate, adapted, mesh
        self.written = written
        write = {"write": self._write_parts} if mesh.splits_weights else {}
        self.keeper = Keeper(
            folder, cfg.checkpoint_every_s, cfg.keep_checkpoints, cfg.checkpoint_beside, lambda: self._records, **write
        )
        self._records: dict[str, int] = {}
        self._said: SaidByAll | None = None

    def start_watch(self) -> None:
        """Wall seconds until the next checkpoint count from now."""
        self.keeper.start_watch()

    def after_step(self) -> None:
        """Save where it is due; a state whose last step was skipped is not worth it."""
        due, best = self.mesh.any(self.mesh.first and self.keeper.due()), self._best()
        if (due or best) and not self.updates.tally.skipped_in_a_row:
            if self.mesh.splits_weights:  # each takes what it holds, and nobody waits for another
                self.keeper.save(self._parts, newest=due, best=best)
                return
            if self.mesh.first:
                self.keeper.save(self._taken, newest=due, best=best)
            self.mesh.wait()

    def _best(self) -> bool:
        """Whether the last evaluation, if it is a new one, is the best of the run, where that one is kept."""
        tally = self.updates.tally
        if not self.cfg.keep_best or tally.evaluations == tally.judged:
            return False
        tally.judged = tally.evaluations
        found = tally.held_out["val"] < tally.best_nats
        tally.best_nats = min(tally.best_nats, tally.held_out["val"])
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights that the next step depends on; parts, as DTensors, where a process holds parts."""
        updates = self.updates
        return {
            "optimizer": updates.optimizer.state_dict(self.mesh.splits_weights),
            "gate": self.gate.state_dict(),
            "subset": updates.subset.state_dict(),
            "counters": updates.tally.state_dict(updates.clock.uses),
            "rng": torch.get_rng_state(),
            **({"rng_cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_initialized() else {}),
            "shown": self.gate.last_score_N,
            **updates.objective.state_dict(),
            **({"growth": updates.growth.state_dict()} if updates.growth.grows else {}),
            **({"adapted": apart(updates.model)} if self.adapted else {}),
        }

    def save(self) -> Path:
        """Write the checkpoint, atomically, and return when it is there. Raises CheckpointError where it cannot be."""
        best = self._best()
        if self.mesh.splits_weights:
            self.keeper.save_now(self._parts, best=best)
        elif self.mesh.first:
            self.keeper.save_now(self._taken, best=best)
        self.mesh.wait()
        return self.target

    def close(self) -> None:
        """Return when what is being written is written."""
        self.keeper.close()

    def _parts(self, copied: bool) -> Parts:
        if self._said is None:  # the processes make it together
            self._said = self.mesh.beside()
        state, outline = pack(self.state_dict())
        held = {"model": self.mesh.pieces(self._weights()), "state": self.mesh.pieces(state)}
        return parts(held, outline, plain_meta(self._meta(), outline) if self.mesh.first else {}, copied=copied)

    def _write_parts(self, target: Path, moment: Parts, keep: int) -> None:
        assert self._said is not None
        write_parts(target, moment, keep, self.mesh.rank, self._said)

    def _taken(self, copied: bool) -> Snapshot:
        return snapshot(self._weights(), self.state_dict(), self._meta(), copied=copied)

    def _weights(self) -> dict[str, torch.Tensor]:
        model = self.updates.model
        return merged(model) if self.adapted else dict(model.state_dict())

    def _meta(self) -> dict[str, Any]:
        updates = self.updates
        try:
            self._records = dict(self.written())
        except OSError as error:
            raise CheckpointError(f"{self.target}: {error}") from error
        meta = {
            **self.meta,
            "step": updates.tally.step,
            "component_times_sha256": updates.clock.times.sha256,
            "records": self._records,
        }
        if updates.growth.grows and "model" in meta:
            meta["model"] = {**meta["model"], "layers": updates.model.cfg.layers}
        return meta

    def _opened(self, folder: Path) -> Checkpoint:
        """The checkpoint; where processes hold parts, each verifies a share of its files and reads what it holds."""
        if not self.mesh.splits_weights:
            return load_checkpoint(folder)

        def checked() -> dict[str, Any]:
            head = open_checkpoint(whole_place(folder))
            for name in sorted(head.files)[self.mesh.rank :: self.mesh.size]:
                head.check(name)
            return {}

        on_all(self.mesh.said_by_all, checked)
        return load_checkpoint(folder, lazily=True, checked=False)

    def resume(self, checkpoint: Path | Checkpoint) -> None:
        """Take up a checkpoint's exact state.

        Raises:
            ValueError: where the checkpoint was timed with another table of component times.
            CheckpointError: from reading it.
        """
        updates = self.updates
        found = checkpoint if isinstance(checkpoint, Checkpoint) else self._opened(checkpoint)
        if found.meta.get("component_times_sha256") != updates.clock.times.sha256:
            raise ValueError(
                "the checkpoint was written under another table of component times: its clock would jump. Resume with the "
                "component_times.json of the run's own folder"
            )
        state = found.state
        updates.growth.load_state_dict(state.get("growth", {}), updates.model, updates.subset)
        if self.adapted:
            restore(updates.model, found.model, state.get("adapted", {}), self.mesh.load)
        else:
            self.mesh.load(updates.model, found.model)
        updates.subset.load_state_dict(state["subset"])
        updates.optimizer.activate(updates.subset.active)
        updates.optimizer.load_state_dict(state["optimizer"])
        self.gate.load_state_dict(state["gate"])
        self.gate.last_score_N = state.get("shown")  # nothing depends on it but what the next evaluation draws
        updates.tally.load_state_dict(state["counters"])
        updates.clock.uses = Counter({str(k): int(v) for k, v in state["counters"]["uses"].items()})
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available():
            for index, drawn in enumerate(state.get("rng_cuda", [])[: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(drawn, index)
        updates.objective.load_state_dict(state)
