"""The front door: help without words, the version, names under a command, completion as a shell asks for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from experiments.bench import BENCHES, MODULES
from experiments.cli import HANDED_ON, HYDRA, OWN, main
from experiments.study import STUDIES

ROOT = Path(__file__).resolve().parents[2]


def test_without_words_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    for name in (*HYDRA, *HANDED_ON, *OWN):
        assert f"\n    {name} " in shown or f"\n    {name}\n" in shown, name


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"spikegate {version('spikegate')}\n"


@pytest.mark.parametrize("command", list(OWN))
def test_every_command_explains_itself_and_takes_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: spikegate {command} ")
    assert "--json" in shown or command == "completion"


@pytest.mark.parametrize(("command", "known"), [("bench", BENCHES), ("study", STUDIES)])
def test_names_under_a_command(command: str, known: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in known)
    assert main([command, "--help"]) == 0
    listed = capsys.readouterr().out
    for name in known:
        assert name in listed
        with pytest.raises(SystemExit) as stop:
            main([command, name, "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: spikegate {command} {name} ")
        assert "--json" in shown
    assert main([command, "x" * 500]) == 2
    assert f"there is no {command} 'xxx" in (error := capsys.readouterr().err)
    assert max(map(len, error.splitlines())) < 160


def test_every_module_with_a_main_is_in_the_lists() -> None:
    for folder, known, modules in (("benches", BENCHES, MODULES), ("studies", STUDIES, {})):
        room = ROOT / "experiments" / folder
        with_main = {p.stem for p in room.glob("*.py") if "\ndef main(" in p.read_text()}
        with_main |= {p.parent.name for p in room.glob("*/command.py")}
        assert with_main - {"sanafe_worker"} == {modules.get(name, name) for name in known}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_shells_code_is_read_by_the_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    code = capsys.readouterr().out
    assert "spikegate" in code
    if (found := shutil.which(shell)) is not None:
        done = subprocess.run([found, "-n"], input=code, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("spikegate com", {"compare", "compat", "completion"}),
        ("spikegate train gate=info", {"gate=infobatch"}),
        ("spikegate train subset=l", {"subset=layers", "subset=lisa", "subset=lora"}),
        ("spikegate sweep clean", {"clean", "clean_bpe"}),
        ("spikegate study d", {"digits", "dropped"}),
        ("spikegate place --enc", {"--encoding"}),
    ],
)
def test_what_the_shell_is_offered(line: str, offered: set[str], tmp_path: Path) -> None:
    """The protocol of argcomplete: the line in variables, the answer on file descriptor 8 or in a file."""
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    asked |= {
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_COMP_WORDBREAKS": "",
        "_ARGCOMPLETE_SHELL": "zsh",
    }
    command = [sys.executable, "-m", "experiments.cli"]
    subprocess.run(command, env={**os.environ, **asked}, capture_output=True, check=True)
    assert {text.split(":")[0].strip() for text in answer.read_text().split("\n") if text} == offered


@pytest.mark.parametrize(
    "words",
    [("deploy", "run={}"), ("compare", "folder={}"), ("rerun", "{}"), ("place", "{}"), ("compat", "{}"), ("export", "{}")],
)
def test_a_folder_that_is_not_there_is_a_wrong_command(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent")
    assert main([word.format(absent) for word in words]) == 2
    assert capsys.readouterr().err.startswith(f"{words[0]}: {absent}")


def test_an_interruption_while_a_command_loads_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.cli.importlib.import_module", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "train: interrupted\n"


def test_a_warning_is_one_line_without_code() -> None:
    script = (
        "import warnings\nfrom experiments import cli\n"
        "cli._run = lambda words: warnings.warn('levels are few', stacklevel=1) or 0\ncli.main(['place'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stderr == "warning: levels are few\n"
