"""What a training run says of itself: a line per report, and the record that becomes `result.json`."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from experiments.comparison.accounts import measured_energy
from experiments.runs.training.config import TrainConfig
from experiments.runs.training.source import Source
from hardware.meters.meter import Reading
from sparse_update.data.records import Corpus
from sparse_update.data.regimes import held_out_starts
from sparse_update.data.shards.reading import ShardedTokens
from sparse_update.data.stream import document_at
from sparse_update.loop.evaluation import by_difficulty, by_document, surprise_of, token_losses
from sparse_update.loop.records import RunResult, StepReport
from sparse_update.transformer import Transformer
from sparse_update.weights.lowrank import FACTOR


def scalars(report: StepReport, cfg: TrainConfig) -> dict[str, float | int | None]:
    """A line of `metrics.jsonl`."""
    return {
        "tokens": report.tokens,
        "reference_s": report.reference_s,
        "wall_s": report.wall_s,
        "loss_nats": None if math.isnan(report.loss_nats) and not report.skipped else report.loss_nats,
        "lr": report.learning_rate_factor * cfg.optim.lr,
        "keep_fraction": report.keep_fraction,
        "flops": report.flops,
        "tokens_per_s": report.tokens / max(report.wall_s, 1e-9),
        "train/gradient_norm": report.gradient_norm,
        "gate/active_weight_fraction": report.active_fraction,
        "health/skipped_steps": report.skipped,
        **({"health/empty_steps": report.empty} if cfg.objective.on_tasks else {}),
        **{f"source/{name}": share for name, share in report.kept_share.items()},
        **report.notes,
    }


def document(
    cfg: TrainConfig,
    corpus: Corpus,
    model: Transformer,
    result: RunResult,
    readings: Sequence[Reading],
    device: torch.device,
    source: Source,
    goes_on: bool,
) -> dict[str, Any]:
    """What `result.json` holds of a run, apart from the split of its held-out loss. `goes_on`: it went on from a
    checkpoint, so that meters saw only a part of it."""
    peak, kind = peak_bytes(device)
    return {
        "status": "finished" if result.finished else "interrupted",
        **({} if result.finished else {"interrupted_by": result.interrupted_by}),
        "folder": str(cfg.folder),
        "stream": cfg.stream_name,
        "arm": cfg.arm_name,
        "seed": cfg.seed,
        "loss_nats": result.val_loss_nats,
        "bits_per_byte": source.bits("val", result.val_loss_nats),
        "objective": cfg.objective.label,
        "task": dict(result.scores),
        "held_out": {
            name: {"loss_nats": loss, "bits_per_byte": source.bits(name, loss), "tokens": source.counted[name]}
            for name, loss in result.held_out.items()
        },
        "prequential": _prequential(result),
        "gate_decisions": [dict(decision) for decision in result.gate_decisions],
        "budget_reference_s": None if cfg.trainer.budget_offered_tokens else cfg.trainer.budget_reference_s,
        "budget_offered_tokens": cfg.trainer.budget_offered_tokens or None,
        "tokens": result.tokens,
        "steps": result.step,
        "windows_offered": result.windows_offered,
        "flops": result.flops,
        "reference_s": result.reference_s,
        "gate_reference_s": result.gate_reference_s,
        "wall_s": result.wall_s,
        "compile_s": result.compile_s,
        "peak_bytes": peak,
        "peak_bytes_kind": kind,
        "optimizer_bytes": result.optimizer_bytes,
        "gradient_bytes": result.gradient_bytes,
        "update_bytes": result.update_bytes,
        **measured_energy(readings, goes_on),
        "keep_fraction": result.keep_fraction,
        "source_keep": result.kept_share,
        "skipped_steps": result.skipped,
        "empty_steps": result.empty,
        "params": sum(p.numel() for name, p in model.named_parameters() if FACTOR not in name),  # of the merged model
        "val_tokens": source.counted["val"],
        "corpus": corpus.name,
    }


def split(cfg: TrainConfig, corpus: Corpus, model: Transformer, windows_NT1: torch.Tensor) -> dict[str, Any]:
    """Loss of the set that the run is judged by, from easy to hard tokens and by document; off the clock."""
    loss_NT = token_losses(model, windows_NT1)
    tokens = corpus.train_tokens
    read = tokens.sample() if isinstance(tokens, ShardedTokens) else tokens  # of text on disk a part stands for all
    surprise_NT = surprise_of(windows_NT1, torch.from_numpy(read.astype(np.int64)), cfg.model.vocab_size)
    starts = held_out_starts(corpus, cfg.data, cfg.model.context, cfg.trainer.eval_tokens or None)["val"]
    places = starts[:, None] + 1 + np.arange(loss_NT.shape[1])
    document_NT = torch.from_numpy(document_at(corpus.val_offsets, places))
    return {
        "difficulty": by_difficulty(loss_NT, surprise_NT),
        "documents": by_document(loss_NT, document_NT, corpus.val_names),
    }


def _prequential(result: RunResult) -> dict[str, Any] | None:
    """Losses before training on what came next, measured off the clock; None where the run took none."""
    if not result.prequential:
        return None
    mean = sum(loss for _, loss, _ in result.prequential) / len(result.prequential)
    return {"loss_nats": mean, "on_the_clock": False, "points": [list(point) for point in result.prequential]}


def peak_bytes(device: torch.device) -> tuple[int, str]:
    """Largest memory so far and what was counted: the process on a CPU, torch's allocations on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "CUDA memory allocated"
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale, "resident set of the process"
