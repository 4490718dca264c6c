"""`spikegate study dropped`: what a gate by an n-gram table leaves out of a stream, by kind, with samples.

No model is trained: the gate `surprise` scores windows by a table that learns along with what is offered, so the choice can
be made again without one. It is the choice that a run with the same seed, gate and text makes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs.output import add_json_argument, entry, finish
from sparse_update.data.corpus import DataConfig, load_corpus
from sparse_update.data.hashing import key, uniform
from sparse_update.data.records import Batch, Corpus, CorpusError
from sparse_update.data.regimes import make_stream
from sparse_update.gates.choice import make_gate
from sparse_update.gates.config import GateConfig
from sparse_update.gates.gate import GateContext

SIDES = ("kept", "too surprising", "too familiar")


@dataclass(frozen=True)
class Choices:
    """One entry for each offered window, in order: numbers of window, document and source, score in nats per token, and the
    index into `SIDES`."""

    window: np.ndarray
    document: np.ndarray
    source: np.ndarray
    score: np.ndarray
    side: np.ndarray


def choices(corpus: Corpus, data: DataConfig, gate_cfg: GateConfig, context: int, windows: int, seed: int) -> Choices:
    """The gate's choice over the first `windows` windows of the stream, pool by pool, without the first pool: the table
    knows nothing then, and all its windows have one score.

    A dropped window counts as too surprising where its score is above the middle of what its pool keeps, else as too
    familiar. Raises CorpusError for too little text, ValueError for a gate that needs a model.
    """
    if gate_cfg.unit != "sequence" or gate_cfg.signal != "ngram":
        raise ValueError(f"gate of {gate_cfg.unit} by {gate_cfg.signal}: only whole windows by ngram need no model")
    stream = make_stream(corpus, data, context, seed)
    gate = make_gate(gate_cfg, stream, GateContext(corpus.vocab_size, context, seed))
    pools: list[Batch] = []
    gate.on_offered = pools.append
    parts: list[tuple[np.ndarray, ...]] = []
    while sum(len(pool.tokens) for pool in pools) < windows or not parts:
        before = len(pools)
        while len(pools) == before:
            taken = gate.next(1, 0.5).window.numpy()
            kept_now = [taken]
        (pool,) = pools[before:]
        while gate.waiting:
            kept_now.append(gate.next(1, 0.5).window.numpy())
        if not before:
            continue
        assert gate.last_score_N is not None  # it chooses by score
        assert pool.document is not None  # the stream numbers its documents
        score = gate.last_score_N.cpu().numpy()
        inside = np.isin(pool.window.numpy(), np.concatenate(kept_now))
        middle = np.median(score[inside])
        side = np.where(inside, 0, np.where(score > middle, 1, 2))
        parts.append((pool.window.numpy(), pool.document.numpy(), pool.source.numpy(), score, side))
    return Choices(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def by_kind(found: Choices, names: Sequence[str]) -> list[dict[str, Any]]:
    """For each source: its share of what was offered, and of its own windows the share that went to each side."""
    rows = []
    for i, name in enumerate(names):
        of = found.side[found.source == i]
        if len(of):
            sides = {side: float((of == j).mean()) for j, side in enumerate(SIDES)}
            rows.append({"kind": name, "offered": len(of) / len(found.side), **sides})
    return sorted(rows, key=lambda row: -row["offered"])


def samples(found: Choices, corpus: Corpus, context: int, count: int, seed: int) -> list[dict[str, str | float]]:
    """`count` windows of each side, drawn evenly at random: side, document, score and text."""
    shown: list[dict[str, str | float]] = []
    for j, side in enumerate(SIDES):
        of = np.flatnonzero(found.side == j)
        order = np.argsort(uniform(key(seed, f"samples {side}"), found.window[of]))
        for i in of[order][:count].tolist():
            start = int(found.window[i]) * context
            text = corpus.tokenizer.decode(corpus.train_tokens[start : start + context])
            name = corpus.train_names[int(found.document[i])]
            shown.append(
                {"side": side, "document": name, "nats": round(float(found.score[i]), 3), "text": _printable(text)}
            )
    return shown


def _printable(text: bytes) -> str:
    return "".join(c if c.isprintable() else "·" for c in text.decode("utf-8", "replace"))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="spikegate study dropped", description="what the gate leaves out, by kind, sampled")
    made.add_argument("path", type=Path, help="a folder of `spikegate tokens packages`")
    made.add_argument("--keep", type=float, default=0.7, help="gate.keep_fraction (default: 0.7)")
    made.add_argument("--noise-cut", type=float, default=0.2, help="gate.noise_cut (default: 0.2)")
    made.add_argument("--windows", type=int, default=4096, help="offered windows (default: 4096)")
    made.add_argument("--context", type=int, default=128)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--show", type=int, default=4, help="windows shown of each side (default: 4)")
    add_json_argument(made)
    return made


@entry
def main(argv: Sequence[str]) -> int:
    """Print the table and the samples; 2 for settings or text that cannot be used."""
    args = parser().parse_args(list(argv))
    try:
        if args.windows < 1 or args.show < 0:
            raise ValueError(f"--windows {args.windows}, --show {args.show}: at least 1, and 0")
        data = DataConfig(name="packages", path=str(args.path))
        gate = GateConfig(unit="sequence", signal="ngram", keep_fraction=args.keep, noise_cut=args.noise_cut)
        corpus = load_corpus(data)
        found = choices(corpus, data, gate, args.context, args.windows, args.seed)
    except (CorpusError, ValueError) as error:
        print(f"dropped: {error}", file=sys.stderr)
        return 2
    rows = by_kind(found, make_stream(corpus, data, args.context, args.seed).source_names)
    shown = samples(found, corpus, args.context, args.show, args.seed)
    print(f"{'kind':<14}{'offered':>9}" + "".join(f"{side:>16}" for side in SIDES))
    for row in rows:
        print(f"{row['kind']:<14}{row['offered']:>9.3f}" + "".join(f"{row[side]:>16.3f}" for side in SIDES))
    for one in shown:
        print(f"{one['side']}, {one['nats']} nats: {one['document']}\n    {one['text']}")
    finish({"windows": len(found.side), "by_kind": rows, "samples": shown}, "study")
    return 0
