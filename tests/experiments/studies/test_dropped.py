"""What a gate leaves out: the study's choice is the gate's own, and noise is found to be too surprising."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.studies import dropped
from sparse_update.data.corpus import DataConfig, load_corpus
from sparse_update.data.records import Corpus
from sparse_update.data.regimes import make_stream
from sparse_update.gates.choice import make_gate
from sparse_update.gates.config import GateConfig
from sparse_update.gates.gate import GateContext

GATE = GateConfig(unit="sequence", signal="ngram", keep_fraction=0.7, noise_cut=0.2)


@pytest.fixture
def text(tmp_path: Path) -> tuple[Corpus, DataConfig]:
    rng = np.random.default_rng(0)
    for name in ("noise0", "noise1", "noise2"):
        (tmp_path / name).write_bytes(rng.integers(1, 256, 4000, dtype=np.uint8).tobytes())
        (tmp_path / name.replace("noise", "same")).write_text("the same line again\n" * 200)
    for name in "abcd":
        words = rng.integers(0, 40, 4000)
        (tmp_path / name).write_text(" ".join(f"word{i}" for i in words))
    cfg = DataConfig(name="files", path=str(tmp_path), holdout_fraction=0.01)
    return load_corpus(cfg), cfg


def test_the_choice_is_the_one_that_a_run_makes(text: tuple[Corpus, DataConfig]) -> None:
    corpus, cfg = text
    found = dropped.choices(corpus, cfg, GATE, 32, 512, seed=3)
    gate = make_gate(GATE, make_stream(corpus, cfg, 32, 3), GateContext(corpus.vocab_size, 32, 3))
    kept = int((found.side == 0).sum())
    run = [gate.next(1, 0.5).window.item() for _ in range(kept * 2)]  # of this many, the last pool among them
    ours = found.window[found.side == 0].tolist()
    assert len(ours) == kept > 100
    assert run[kept:] == ours  # two pools, of which the first is left out
    assert kept / len(found.side) == pytest.approx(0.7, abs=0.01)
    assert (found.side == 1).mean() == pytest.approx(0.2, abs=0.02)


def test_noise_is_too_surprising_and_what_repeats_too_familiar(text: tuple[Corpus, DataConfig]) -> None:
    corpus, cfg = text
    found = dropped.choices(corpus, cfg, GATE, 32, 1024, seed=3)
    of = np.array(corpus.train_names)[found.document]
    noise, same = np.char.startswith(of, "noise"), np.char.startswith(of, "same")
    assert min(noise.sum(), same.sum()) > 20  # at most one document of a kind is held out
    assert (found.side[noise] == 1).mean() > 0.9
    assert (found.side[same] == 2).mean() > 0.5
    rows = dropped.by_kind(found, make_stream(corpus, cfg, 32, 3).source_names)
    assert sum(row["offered"] for row in rows) == pytest.approx(1)
    shown = dropped.samples(found, corpus, 32, 2, 0)
    assert [one["side"] for one in shown] == [side for side in dropped.SIDES for _ in range(2)]
    for one in shown:
        assert one["document"] in corpus.train_names


def test_a_gate_that_needs_a_model_and_a_folder_that_is_none_are_refused(
    text: tuple[Corpus, DataConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="only whole windows by ngram"):
        dropped.choices(*text, GateConfig(unit="token", signal="token_loss"), 32, 64, 0)
    assert dropped.main([str(tmp_path / "none")]) == 2
    assert "no text of packages" in capsys.readouterr().err
