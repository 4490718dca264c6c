"""`spikegate scale` over run folders."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.laws.points import LawError, read_points
from experiments.scale import main
from tests.experiments.laws.conftest import FLOPS_EACH, LAW, grid, noisy


def last(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def test_fit_predict_and_judge(write_runs, tmp_path, capsys):
    n, d = grid(4, 4)
    runs = write_runs(n, d, noisy(LAW, n, d, 0))
    assert (
        main(["fit", str(runs), "--draws", "20", "--figure", str(tmp_path / "law.png"), "--irreducible-at-most", "0.5"])
        == 0
    )
    out = capsys.readouterr().out
    found = last(out)
    assert found["runs"] == 16
    assert found["coefficients"]["size_exponent"]["value"] == pytest.approx(0.35, abs=0.1)
    assert "lies above 0.5000" in out
    assert (tmp_path / "law.png").stat().st_size > 10_000

    prediction = tmp_path / "coming.json"
    words = ["predict", str(runs), "--draws", "20", "--size", "9000000", "--tokens", "100000000", "--to", str(prediction)]
    assert main(words) == 0
    assert main(words) == 2
    assert "a prediction is written once" in capsys.readouterr().err
    big = np.array([9e6]), np.array([1e8])
    folder = write_runs(*big, LAW.loss(*big), seed=7, started="2099-01-01T00:00:00+0000") / "dense-7-0"
    assert main(["judge", str(prediction), str(folder)]) in (0, 1)
    judged = last(capsys.readouterr().out)
    assert judged["before"]
    assert judged["over_largest"] == pytest.approx(FLOPS_EACH * 9e6 * 1e8 / (FLOPS_EACH * n.max() * d.max()))
    assert judged["error_nats"] == pytest.approx(0, abs=0.05)

    changed = prediction.read_text().replace('"tokens": 100000000', '"tokens": 100000001')
    prediction.write_text(changed)
    assert main(["judge", str(prediction), str(folder)]) == 2
    assert "changed since it was written" in capsys.readouterr().err


def test_a_prediction_after_the_run_is_no_prediction(write_runs, tmp_path, capsys):
    n, d = grid(4, 4)
    runs = write_runs(n, d, LAW.loss(n, d))
    words = ["--draws", "20", "--size", "9000000", "--tokens", "100000000", "--to", str(tmp_path / "p.json")]
    assert main(["predict", str(runs), *words]) == 0
    big = np.array([9e6]), np.array([1e8])
    folder = write_runs(*big, LAW.loss(*big), seed=7) / "dense-7-0"
    assert main(["judge", str(tmp_path / "p.json"), str(folder)]) == 1
    assert "the run started at 2026-11-30" in capsys.readouterr().out


def test_a_run_that_diverged_is_named_and_left_out(write_runs, capsys):
    n, d = grid(4, 4)
    loss = LAW.loss(n, d)
    loss[3] = np.nan
    runs = write_runs(n, d, loss)
    assert main(["fit", str(runs), "--draws", "20"]) == 0
    found = last(capsys.readouterr().out)
    assert found["runs"] == 15
    assert found["left_out"][0]["reason"].startswith("diverged")


def test_runs_of_two_tokenizers_are_no_law(write_runs, capsys):
    n, d = grid(4, 4)
    write_runs(n, d, LAW.loss(n, d))
    runs = write_runs(n, d, LAW.loss(n, d), seed=1, data={"tokenizer": "bpe", "vocab_size": 512})
    assert main(["fit", str(runs)]) == 2
    assert "different tokenizers" in capsys.readouterr().err


def test_too_few_runs_say_how_many_are_needed(write_runs, capsys):
    n, d = grid(2, 2)
    assert main(["fit", str(write_runs(n, d, LAW.loss(n, d)))]) == 2
    assert "at least 6 are needed" in capsys.readouterr().err


def test_embeddings_are_told_from_the_blocks(write_runs):
    model = {"width": 64, "layers": 3, "hidden_ratio": 4}
    runs = write_runs(np.array([180672.0]), np.array([1e6]), np.array([2.0]), model=model)
    (found,) = read_points([runs]).points
    assert found.embedding_parameters == 2 * 256 * 64  # the size tiny, untied, on bytes
    assert found.size(embeddings=False) == 180672 - 2 * 256 * 64
    runs = write_runs(np.array([50.0]), np.array([1e6]), np.array([2.0]), seed=1, model=model)
    with pytest.raises(LawError, match="cannot be told apart"):
        read_points([runs / "dense-1-0"]).points[0].size(embeddings=False)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("run.json", {"seed": "x"}),
        ("run.json", {"seed": [1]}),
        ("run.json", {"seed": {"a": 1}}),
        ("result.json", {"params": 10**400}),
        ("result.json", {"tokens": "nan"}),
        ("result.json", {"budget_reference_s": 10**400}),
        ("config.yaml", {"data": [1]}),
        ("config.yaml", {"data": "x"}),
        ("config.yaml", {"model": [1]}),
    ],
)
def test_a_run_with_an_odd_value_is_left_out_by_name(write_runs, file, change):
    n, d = grid(2, 2)
    folder = write_runs(n, d, LAW.loss(n, d))
    odd = sorted(path.parent for path in folder.rglob("run.json"))[0]
    whole = json.loads((odd / file).read_text()) if (odd / file).exists() else {}
    (odd / file).write_text(json.dumps({**whole, **change}))  # JSON is YAML too
    found = read_points([folder])
    assert len(found.points) == 3
    assert [one.folder for one in found.left_out] == [str(odd)]
