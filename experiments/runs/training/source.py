"""What a run reads and is judged by, and what it minimises: text, or questions of tasks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from experiments.runs.training.config import TrainConfig
from sparse_update.data.corpus import load_corpus
from sparse_update.data.records import Corpus
from sparse_update.data.regimes import held_out, judging, make_stream
from sparse_update.data.tokens import ByteTokenizer, Tokenizer, tokenizer_from_record
from sparse_update.gates.deciding.again import AgainConfig
from sparse_update.loop.assembly import Text
from sparse_update.loop.checkpoint import checkpoint_of
from sparse_update.loop.saving.files import open_checkpoint
from sparse_update.loop.saving.places import whole_place
from sparse_update.objectives.choice import make_objective, task_stream
from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.objective import Given, Objective


@dataclass(frozen=True, eq=False)
class Source:
    """`bits_per_nat`: bits per byte for each nat per token, by held-out set; empty where a set is no running text.
    `counted`: tokens that each set's loss is a mean over."""

    text: Text
    objective: Callable[[Given], Objective]
    bits_per_nat: Mapping[str, float]
    counted: Mapping[str, int]

    def bits(self, name: str, loss_nats: float) -> float | None:
        """Bits per byte of a held-out loss, None where that means nothing."""
        return loss_nats * self.bits_per_nat[name] if name in self.bits_per_nat else None


def corpus_of(cfg: TrainConfig) -> Corpus:
    """The text of a run; on tasks one of no tokens, which has their tokenizer and a name."""
    if not cfg.objective.on_tasks:
        return load_corpus(cfg.data)
    tokenizer = _tokenizer(cfg)
    none, start = np.zeros(0, dtype=np.uint16), np.zeros(1, dtype=np.int64)
    told = json.dumps(asdict(cfg.task), sort_keys=True).encode()
    return Corpus(
        f"tasks {cfg.task.label}", none, start, (), none, start, (), tokenizer.vocab_size, 0, 0,
        hashlib.sha256(told).hexdigest(), tokenizer,
    )  # fmt: skip


def _tokenizer(cfg: TrainConfig) -> Tokenizer:
    """That of the model that the run starts from; else what `data.tokenizer` asks for."""
    if cfg.init:
        head = open_checkpoint(whole_place(checkpoint_of(cfg.init)))
        if "tokenizer" in head.meta:
            return tokenizer_from_record(head.meta["tokenizer"])
    return ByteTokenizer() if cfg.data.tokenizer == "bytes" else load_corpus(cfg.data).tokenizer


def source_of(cfg: TrainConfig, corpus: Corpus) -> Source:
    """Everything that `make_trainer` is told of what is read. `corpus` is that of `corpus_of`."""
    if cfg.objective.on_tasks:
        examples = Examples(cfg.task, corpus.tokenizer, cfg.model.context, cfg.seed)
        sets = {name: rows.tokens_NT1 for name, rows in examples.held_out.items()}
        text = Text(task_stream(cfg.objective, examples), sets)
        counted = {name: int(rows.weight_NT.sum()) for name, rows in examples.held_out.items()}
        return Source(text, make_objective(cfg.objective, examples), {}, counted)
    context = cfg.model.context
    judges = judging(corpus, cfg.data, context, AgainConfig().judges) if cfg.gate.unit == "auto" else None
    stream = make_stream(corpus, cfg.data, context, cfg.seed, judges.window if judges else None)
    windows = held_out(corpus, cfg.data, context, cfg.trainer.eval_tokens or None)
    bits = {name: part[:, 1:].numel() / corpus.count_bytes(part[:, 1:]) / math.log(2) for name, part in windows.items()}
    text = Text(stream, windows, corpus.known_tokens, judges.tokens if judges else None)
    counted = {name: part[:, 1:].numel() for name, part in windows.items()}
    return Source(text, make_objective(cfg.objective), bits, counted)
