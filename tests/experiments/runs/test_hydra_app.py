"""The shared start of the Hydra applications, on a small application of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from experiments.runs.hydra_app import run_app
from experiments.runs.plain_json import dump_line, plain


@dataclass
class Lever:
    kind: str = "dense"
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"lever.keep = {self.keep}: must lie in (0, 1]")


@dataclass
class AppConfig:
    lever: Lever = field(default_factory=Lever)
    seed: int = 0
    must: str = "???"
    extra: dict[str, int] = field(default_factory=dict)


class Foreseen(Exception):
    pass


def application(cfg: AppConfig) -> dict[str, Any]:
    assert isinstance(cfg.lever, Lever)
    if cfg.seed == 13:
        raise Foreseen("no corpus: pip install it")
    if cfg.seed == 14:
        raise KeyError("a mistake of ours")
    print("a table")
    return {"seed": cfg.seed, "kind": cfg.lever.kind, "loss": float("nan")}


@pytest.fixture(autouse=True)
def app_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The application's YAML in a folder of its own, given as --config-dir; the current folder is empty."""
    folder = tmp_path / "yaml"
    (folder / "lever").mkdir(parents=True)
    (folder / "testapp.yaml").write_text("defaults:\n  - testapp_schema\n  - lever: dense\n  - _self_\n")
    for kind in ("dense", "surprise"):
        (folder / "lever" / f"{kind}.yaml").write_text(f"kind: {kind}\n")
    (folder / "lever" / "typo.yaml").write_text("knd: dense\n")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    yield
    assert sys.argv == ["pytest"]


def run(*words: str) -> int:
    return run_app("testapp", AppConfig, application, ["--config-dir", "../yaml", *words], expected=(Foreseen,))


def test_last_line_is_json_and_nothing_is_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("must=x", "lever=surprise", "seed=3") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "a table"
    assert json.loads(out[-1]) == {"seed": 3, "kind": "surprise", "loss": "nan"}
    assert list(Path.cwd().iterdir()) == []


def test_multirun_prints_one_document_per_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("must=x", "seed=0,1", "lever=dense,surprise", "-m") == 0
    documents = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert {(d["seed"], d["kind"]) for d in documents} == {
        (0, "dense"),
        (0, "surprise"),
        (1, "dense"),
        (1, "surprise"),
    }
    assert [path.name for path in Path.cwd().iterdir()] == ["runs"]


def test_a_sweep_goes_on_after_a_failed_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("must=x", "seed=13,1", "-m") == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["seed"] == 1
    assert "no corpus: pip install it" in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sed=1"], "unknown configuration key 'sed'; did you mean seed?"),
        (["lever.kep=1"], "unknown configuration key 'lever.kep'; did you mean lever.keep"),
        (["+lever.kep=1"], "unknown configuration key 'lever.kep'; did you mean lever.keep"),
        (["keep=1"], "unknown configuration key 'keep'; did you mean lever.keep?"),
        (["ex=1"], "unknown configuration key 'ex'; did you mean extra?"),
        (["lever.zzz=1"], "unknown configuration key 'lever.zzz'; did you mean lever.kind or lever.keep?"),
        (["zzz=1"], "unknown configuration key 'zzz'; known keys: lever, seed, must, extra"),
        (["lever=typo"], "unknown configuration key 'knd'; did you mean lever.kind?"),
        (["lever=surprize"], "lever=surprize: no such choice; there are dense, surprise, typo"),
        (
            ["lever.keep=lots"],
            "configuration key 'lever.keep': Value 'lots' of type 'str' could not be converted to Float",
        ),
        (["lever.keep=1.5"], "lever.keep = 1.5: must lie in (0, 1]"),
        (["must=???"], "configuration key 'must' has no value; give it one on the command line: must=..."),
        (["seed==["], "configuration key 'seed': the value =[ holds a character that Hydra reads as its own"),
        (["must=runs/lr=0.3"], "write \"must='runs/lr=0.3'\""),
        (["must=[a=1,b]"], "write \"must=['a=1',b]\""),
    ],
)
def test_wrong_configurations_say_what_to_do(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("must=x", *words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_free_dictionaries_stay_free(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["+extra.anything=3"], ["extra.anything=3"], ["extra={anything: 3}"], ["extra.a=3", "extra.a=4"]):
        assert run("must=x", *words) == 0, words


def test_foreseen_errors_have_no_traceback_and_mistakes_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("must=x", "seed=13") == 1
    assert capsys.readouterr().err == "testapp: no corpus: pip install it\n"
    with pytest.raises(KeyError, match="a mistake of ours"):
        run("must=x", "seed=14")


def test_plain_json_knows_what_json_lacks() -> None:
    import numpy as np

    assert dump_line({"a": float("-inf"), "b": np.float32(0.5), "c": (1, Path("x")), "d": np.arange(2)}) == (
        '{"a": "-inf", "b": 0.5, "c": [1, "x"], "d": [0, 1]}'
    )
    assert plain(True) is True
    with pytest.raises(TypeError, match="has no JSON form"):
        plain(object())
