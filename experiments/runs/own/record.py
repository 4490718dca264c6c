"""What a run on a model of one's own says of itself: a line per report, and the record that becomes `result.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.comparison.accounts import measured_energy
from experiments.runs.training.record import peak_bytes
from hardware.meters.meter import Reading
from sparse_update.own.loop import OwnTrainer

if TYPE_CHECKING:
    from experiments.runs.own.run import OwnRun

NOT_COUNTED = "not counted are Python, the loader, copies between devices, evaluations and checkpoints"


def scalars(trainer: OwnTrainer) -> dict[str, float | int | None]:
    """A line of `metrics.jsonl`."""
    tally, clock = trainer.tally, trainer.clock
    losses = tally.losses
    return {
        "tokens": tally.tokens,
        "reference_s": clock.reference_s,
        "wall_s": tally.wall_s,
        "loss_nats": math.fsum(losses) / len(losses) if losses else None,
        "lr": float(trainer.optimizer.param_groups[0]["lr"]),
        "keep_fraction": trainer.keep_fraction,
        "flops": clock.flops,
        "tokens_per_s": tally.tokens / max(tally.wall_s, 1e-9),
        "gate/active_weight_fraction": 1.0 if trainer.gate is None else trainer.gate.active_fraction(),
        "health/skipped_steps": tally.skipped,
    }


def document(
    cfg: OwnRun, trainer: OwnTrainer, finished: bool, readings: Sequence[Reading], goes_on: bool
) -> dict[str, Any]:
    """What `result.json` holds of a run. `goes_on`: it went on from a checkpoint, so that meters saw only a part of it."""
    tally, clock, gate = trainer.tally, trainer.clock, trainer.gate
    peak, kind = peak_bytes(trainer.device)
    per_token = trainer.task.bytes_per_token
    bits = tally.held_out / math.log(2) / per_token if per_token else None
    steps = max(1, tally.step)
    return {
        "status": "finished" if finished else "interrupted",
        "folder": str(cfg.folder),
        "stream": cfg.stream,
        "arm": cfg.arm,
        "seed": cfg.seed,
        "loss_nats": tally.held_out,
        "bits_per_byte": bits,
        "held_out": {"val": {"loss_nats": tally.held_out, "bits_per_byte": bits, "tokens": tally.held_out_tokens}},
        "budget_reference_s": cfg.trainer.budget_reference_s,
        "budget_offered_tokens": None,
        "tokens": tally.tokens,
        "steps": tally.step,
        "windows_offered": 0 if gate is None else gate.pool.offered,
        "flops": clock.flops,
        "reference_s": clock.reference_s,
        "gate_reference_s": clock.gate_s,
        "wall_s": tally.wall_s,
        "compile_s": 0.0,
        "peak_bytes": peak,
        "peak_bytes_kind": f"{kind}, other runs of this process included",
        **measured_energy(readings, goes_on),
        "keep_fraction": trainer.keep_fraction,
        "skipped_steps": tally.skipped,
        "learning_rate": trainer.rates[0],
        "params": sum(p.numel() for p in trainer.model.parameters()),
        "val_tokens": tally.held_out_tokens,
        "corpus": cfg.stream,
        "gated": {} if gate is None else _gated(gate.report()),
        "clock": {
            "component_times": clock.prices.words,
            "component_times_sha256": clock.prices.sha256,
            "source": clock.prices.source,
            "by_part": clock.by_part(),
            "counted_ms_per_step": 1000 * clock.reference_s / steps,
            "wall_ms_per_step": 1000 * tally.plain_wall_s / tally.plain_steps if tally.plain_steps else None,
            "not_counted": NOT_COUNTED,
        },
        "notes": [f"reference seconds are {clock.prices.words}; {NOT_COUNTED}", *clock.notes],
    }


def _gated(report: dict[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("gated", "left", "rows_not_found", "active_fraction") if key in report}
