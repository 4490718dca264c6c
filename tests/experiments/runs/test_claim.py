"""Who may write into a run's folder, and how a run in it begins: new, from its checkpoint, or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from experiments.runs.claim import Start, begin
from experiments.runs.hydra_app import ConfigError
from experiments.runs.lock import LOCK, exclusive
from experiments.runs.plain_json import write_json
from sparse_update.loop.checkpoint import save_checkpoint


@dataclass
class Inner:
    lr: float = 0.1
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class Settings:
    optim: Inner = field(default_factory=Inner)
    seed: int = 0
    progress: bool = True


def before(folder: Path, status: str, settings: dict[str, Any] | None = None, *, saved: bool = False) -> Path:
    """A folder as a run leaves it that ended with `status`."""
    folder.mkdir()
    write_json(folder / "run.json", {"kind": "train", "status": status})
    told = {"optim": {"lr": 0.1, "weights": {}}, "seed": 0, "progress": True} if settings is None else settings
    (folder / "config.yaml").write_text(yaml.safe_dump(told))
    (folder / "metrics.jsonl").write_text("{}\n")
    if saved:
        save_checkpoint(folder / "checkpoint", {"w": torch.ones(1)}, {}, {"step": 1})
    if status == "finished":
        write_json(folder / "result.json", {})
    return folder


def start(folder: Path, resume: bool | str, settings: Settings | None = None) -> Start:
    return begin(folder, settings or Settings(), resume, {"progress"})


@pytest.mark.parametrize("resume", [False, True, "auto"])
def test_an_empty_folder_is_a_new_run(tmp_path: Path, resume: bool | str) -> None:
    assert start(tmp_path, resume) is Start.NEW
    assert start(tmp_path / "not there", resume) is Start.NEW


@pytest.mark.parametrize("resume", [True, "auto"])
@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path, resume: bool | str, status: str) -> None:
    folder = before(tmp_path / "run", status)
    (folder / "notes.txt").write_text("the user's own")
    with pytest.raises(ConfigError, match="already holds a run: without resume=false the same command goes on"):
        start(folder, False)
    assert start(folder, resume) is Start.NEW
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("resume", [True, "auto"])
@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_what_was_saved_is_gone_on_with(tmp_path: Path, resume: bool | str, status: str) -> None:
    folder = before(tmp_path / "run", status, saved=True)
    assert start(folder, resume, Settings(progress=False)) is Start.GO_ON
    assert (folder / "metrics.jsonl").exists()
    (folder / "checkpoint").rename(folder / ".checkpoint.old")  # as a save leaves it that died between its two moves
    assert start(folder, resume) is Start.GO_ON


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_finished_run_stays_as_it_is(tmp_path: Path, resume: bool | str) -> None:
    folder = before(tmp_path / "run", "finished", saved=True)
    assert start(folder, resume) is Start.FINISHED
    with pytest.raises(ConfigError, match=r"finished run in .* had other settings: seed was 0, is 3\. Give"):
        start(folder, resume, Settings(seed=3))
    with pytest.raises(
        ConfigError, match=r"already holds a run: it is finished, and without resume=false the same command shows what"
    ):
        start(folder, False)
    assert (folder / "result.json").exists()


@pytest.mark.parametrize("saved", [False, True])
def test_other_settings_are_refused_with_both_values(tmp_path: Path, saved: bool) -> None:
    folder = before(tmp_path / "run", "interrupted", saved=saved)
    now = Settings(Inner(0.2, {"known": 0.3}), seed=1)
    with pytest.raises(ConfigError) as caught:
        start(folder, True, now)
    assert "optim.lr was 0.1, is 0.2; optim.weights was {}, is {'known': 0.3}; seed was 0, is 1" in str(caught.value)
    long = before(tmp_path / "long", "interrupted", {"optim": {"weights": {str(i): i for i in range(9999)}}}, saved=saved)
    with pytest.raises(ConfigError) as caught:
        start(long, True)
    assert "(9,999 items)" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_auto_begins_anew_after_mended_settings_and_sets_aside_what_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = before(tmp_path / "run", "failed", saved=True)
    with exclusive(folder, "a test"):
        assert start(folder, "auto", Settings(seed=1)) is Start.NEW
    assert [path.name for path in folder.iterdir()] == [LOCK]
    assert (tmp_path / "run.aside-1" / "checkpoint" / "meta.json").exists()
    assert "seed was 0, is 1" in capsys.readouterr().err
    torn = before(tmp_path / "torn", "failed")  # nothing was saved: nothing to keep
    assert start(torn, "auto", Settings(seed=1)) is Start.NEW
    assert not (tmp_path / "torn.aside-1").exists()


def test_later_settings_do_not_make_another_run_and_lost_ones_do(tmp_path: Path) -> None:
    older = before(tmp_path / "older", "interrupted", {"optim": {"lr": 0.1}}, saved=True)
    assert start(older, True) is Start.GO_ON
    newer = before(tmp_path / "newer", "interrupted", {"seed": 0, "gone": 1}, saved=True)
    with pytest.raises(ConfigError, match="gone was 1, is no setting of this version"):
        start(newer, True)
    (older / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="nothing says with which settings"):
        start(older, True)


def test_what_is_no_training_run_is_left_alone(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"kind": "deploy", "status": "finished"})
    with pytest.raises(ConfigError, match="holds a deploy, not a training run"):
        start(tmp_path, "auto")
    with pytest.raises(ConfigError, match="already holds a run, a deploy: run=FOLDER"):
        start(tmp_path, False)


HOLD = """
import sys, time
from pathlib import Path
from experiments.runs.lock import exclusive
with exclusive(Path(sys.argv[1]), "holding"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_and_free_after_kill_9(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=rf"in progress \(holding, process {holder.pid}\)"), exclusive(tmp_path, "mine"):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with exclusive(tmp_path, "mine"), pytest.raises(ConfigError, match="in progress"), exclusive(tmp_path, "again"):
        pass
