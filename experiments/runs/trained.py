"""A finished training run taken up again: its model and text, and the integer graphs that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from experiments.runs.deploy_config import DeployConfig
from experiments.runs.folder import RunError, read_json
from experiments.runs.gated import restore
from hardware.datafile import DataFileError
from hardware.placement import DoesNotFit
from neuro.analysis.compatibility import CompatibilityReport, NothingToMap, analyse
from neuro.conversion.calibration import calibrate
from neuro.conversion.plan import Plan
from neuro.conversion.routes import convert
from sparse_update.data.corpus import DataConfig, load_corpus
from sparse_update.data.records import Corpus, CorpusError
from sparse_update.data.regimes import clean_stream
from sparse_update.data.tokens import tokenizer_from_record
from sparse_update.loop.checkpoint import CheckpointError, load_checkpoint
from sparse_update.loop.stored_model import stored_model
from sparse_update.transformer import Transformer

EXPECTED = (RunError, CorpusError, CheckpointError, NothingToMap, DoesNotFit, DataFileError)
"""Errors whose message says all."""


def load_run(folder: Path) -> tuple[Transformer, Corpus, DataConfig, dict[str, Any]]:
    """(model in eval mode, its corpus, what was trained on, run.json) of a finished training run.

    A point of the activity study is one too: the corpus and the record of its run, the arm's name and the seed its own.
    Raises RunError for a folder that is no finished run, or whose corpus has changed since.
    """
    if (folder / "point.json").exists():
        return load_point(folder)
    record = read_json(folder / "run.json")
    if record.get("kind") != "train":
        raise RunError(f"{folder} is a {record.get('kind')} run: name the folder of a training run")
    if record.get("status") != "finished":
        raise RunError(
            f"{folder}: the run is {record.get('status')}, not finished: the command that began it goes on with it"
        )
    checkpoint = load_checkpoint(folder / "checkpoint")
    if "data" not in checkpoint.meta["config"]:
        raise RunError(
            f"{folder} is a run on a model of one's own ({record.get('module') or 'given from Python'}): what follows a "
            "training reads the package's own Transformer only"
        )
    data = DataConfig(**checkpoint.meta["config"]["data"])
    on_tasks = bool((checkpoint.meta["config"].get("task") or {}).get("tasks"))
    corpus = _no_text(checkpoint.meta) if on_tasks else load_corpus(data)
    if corpus.sha256 != checkpoint.meta["corpus_sha256"]:
        raise RunError(
            f"{folder}: its corpus had sha256 {checkpoint.meta['corpus_sha256']}, the one read now has {corpus.sha256}: "
            "held-out loss would not be comparable"
        )
    return stored_model(checkpoint).eval(), corpus, data, record


def _no_text(meta: Mapping[str, Any]) -> Corpus:
    """What a run on tasks has in the place of a corpus: its tokenizer, and no text."""
    none, start = np.zeros(0, dtype=np.uint16), np.zeros(1, dtype=np.int64)
    tokenizer = tokenizer_from_record(meta["tokenizer"])
    sha256 = str(meta["corpus_sha256"])
    return Corpus("tasks", none, start, (), none, start, (), tokenizer.vocab_size, 0, 0, sha256, tokenizer)


def load_point(folder: Path) -> tuple[Transformer, Corpus, DataConfig, dict[str, Any]]:
    """`load_run` of a point of `experiments.studies.activity`: its model with the gates that it was trained with.

    Raises RunError where the point is not finished or its run is gone.
    """
    record = read_json(folder / "point.json")
    run = Path(record["settings"]["run"])
    if not (run / "run.json").exists():
        raise RunError(f"{folder} is a point of the run {run}, which is not there: call from the folder it was made from")
    model, corpus, data, trained = load_run(run)
    restore(model, folder / "checkpoint")
    return model.eval(), corpus, data, trained | {"arm": record["name"], "seed": record["seed"]}


def calibration_windows(cfg: DeployConfig, corpus: Corpus, data: DataConfig, context: int, seed: int) -> Tensor:
    """Inputs of the first training windows of a seed, int64 (N, T)."""
    stream = clean_stream(corpus, data, context, seed)
    return stream.take(max(1, cfg.calibration_tokens // context)).tokens[:, :-1]


def converted(cfg: DeployConfig, model: Transformer, training_NT: Tensor) -> tuple[CompatibilityReport, Plan]:
    """Verdicts and integer graphs of a model, its ranges from training windows int64 (N, T).

    Raises RunError, with what `neuro` says, for a model or text that cannot be converted; NothingToMap; DoesNotFit.
    """
    try:
        report = analyse(model, training_NT[:1], cfg.chip, route=cfg.route, chips=cfg.chips or None)
        ranges = calibrate(model, training_NT.split(16), percentile=cfg.percentile, method=cfg.calibration_method)
        return report, convert(model, ranges, report, cfg.settings)
    except EXPECTED:
        raise
    except ValueError as error:
        raise RunError(f"{cfg.run} cannot be converted: {error}") from error
