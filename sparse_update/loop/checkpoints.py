"""When a run is saved, and what of each part: all that its next step depends on, so that it resumes to the same bits."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparse_update.gates.gate import Gate
from sparse_update.loop.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sparse_update.loop.records import TrainerConfig
from sparse_update.loop.updates import Updates
from sparse_update.parallel.mesh import Mesh
from sparse_update.weights.lowrank import apart, merged, restore


class Checkpoints:
    """The checkpoint in `folder/checkpoint`. Weights that LoRA adapts are saved merged, as a plain model, with the factors
    beside them.

    Args:
        folder: of the run.
        meta: put into every checkpoint (config, tokenizer, ...).
        cfg: how often to save.
        updates, gate: the parts whose state is kept.
        adapted: whether the model holds LoRA's factors.
        mesh: its first process writes. All of them have the same gate and generators, so that any number resumes from it.
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
    ) -> None:
        self.target, self.meta, self.cfg = folder / "checkpoint", dict(meta), cfg
        self.updates, self.gate, self.adapted, self.mesh = updates, gate, adapted, mesh
        self._saved = 0.0

    def start_watch(self) -> None:
        """Wall seconds until the next checkpoint count from now."""
        self._saved = time.perf_counter()

    def after_step(self) -> None:
        """Save where it is due; a state whose last step was skipped is not worth it."""
        due = time.perf_counter() - self._saved > self.cfg.checkpoint_every_s
        if self.mesh.any(due) and not self.updates.tally.skipped_in_a_row:
            self.save()
            self.start_watch()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights that the next step depends on."""
        updates = self.updates
        return {
            "optimizer": updates.optimizer.state_dict(),
            "gate": self.gate.state_dict(),
            "subset": updates.subset.state_dict(),
            "counters": updates.tally.state_dict(updates.clock.uses),
            "rng": torch.get_rng_state(),
            **updates.objective.state_dict(),
            **({"growth": updates.growth.state_dict()} if updates.growth.grows else {}),
            **({"adapted": apart(updates.model)} if self.adapted else {}),
        }

    def save(self) -> Path:
        """Write the checkpoint, atomically."""
        if self.mesh.first:
            updates = self.updates
            times = {"component_times_sha256": updates.clock.times.sha256}
            weights = merged(updates.model) if self.adapted else dict(updates.model.state_dict())
            meta = {**self.meta, "step": updates.tally.step, **times}
            if updates.growth.grows and "model" in meta:
                meta["model"] = {**meta["model"], "layers": updates.model.cfg.layers}
            save_checkpoint(self.target, weights, self.state_dict(), meta)
        self.mesh.wait()
        return self.target

    def resume(self, checkpoint: Path | Checkpoint) -> None:
        """Take up a checkpoint's exact state.

        Raises:
            ValueError: where the checkpoint was timed with another table of component times.
            CheckpointError: from reading it.
        """
        updates = self.updates
        found = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
        if found.meta.get("component_times_sha256") != updates.clock.times.sha256:
            raise ValueError(
                "the checkpoint was written under another table of component times: its clock would jump. Resume with the "
                "component_times.json of the run's own folder"
            )
        state = found.state
        updates.growth.load_state_dict(state.get("growth", {}), updates.model, updates.subset)
        if self.adapted:
            restore(updates.model, found.model, state.get("adapted", {}))
        else:
            updates.model.load_state_dict(found.model)
        updates.subset.load_state_dict(state["subset"])
        updates.optimizer.activate(updates.subset.active)
        updates.optimizer.load_state_dict(state["optimizer"])
        self.gate.load_state_dict(state["gate"])
        updates.tally.load_state_dict(state["counters"])
        updates.clock.uses = Counter({str(k): int(v) for k, v in state["counters"]["uses"].items()})
        torch.set_rng_state(state["rng"])
        updates.objective.load_state_dict(state)
