"""Every code block that a reader may copy works: Python runs and prints what the page says, commands are understood.

`python` blocks of a page run in order in one process, after its `file` blocks have been written; then the commands behind
`$ ` of its `console` blocks run, in the same folder. Commands in `sh` blocks are read by the parser that they are meant
for (argparse, or Hydra with all settings composed and checked) and go no further.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from experiments.runs.hydra_app import run_app
from sparse_update.data import sources
from sparse_update.gates import policies
from sparse_update.signals import SIGNALS
from tests.docs.pages import ROOT, SHELLS, Block, blocks, commands, name, pages
from tests.experiments.console import spikegate

LANGUAGES = ("python", *SHELLS, "text", "yaml", "toml", "json", "bibtex", "tree")
HYDRA = ("train", "deploy", "compare", "pays")
FREE = ("cd", "git", "tensorboard", "xdg-open")
"""Programs that are none of ours, and whose arguments nobody checks."""
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": f"{ROOT}{os.pathsep}.",
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
}


def with_blocks(chosen: Callable[[Block], bool]) -> list[object]:
    return [pytest.param(page, id=name(page)) for page in pages() if any(chosen(block) for block in blocks(page))]


def is_code(block: Block) -> bool:
    return block.language == "python" and not block.file and not block.not_run


def is_session(block: Block) -> bool:
    return block.language == "console" and not block.not_run


def write_files(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text)


def run(words: Sequence[str | Path], folder: Path, text: str | None = None) -> str:
    done = subprocess.run(
        words, cwd=folder, env=ENVIRONMENT, input=text, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("part", ["docs", "rooms"])
@pytest.mark.slow
def test_python_blocks_run_and_print_what_the_page_says(part, tmp_path):
    given, expected = [], {}
    for number, page in enumerate(page for page in pages() if (page.name == "README.md") == (part == "rooms")):
        code = [block for block in blocks(page) if is_code(block)]
        if code:
            folder = tmp_path / str(number)
            folder.mkdir()
            write_files(page, folder)
            told = [{"text": block.text, "line": block.line} for block in code]
            given.append({"page": name(page), "folder": str(folder), "blocks": told})
            expected[name(page)] = code
    found = json.loads(run([sys.executable, ROOT / "tests/docs/run_pages.py"], tmp_path, json.dumps(given)))
    wrong = [f"{page}\n{answer['error']}" for page, answer in found.items() if "error" in answer]
    for page, answer in found.items():
        for block, printed in zip(expected[page], answer.get("printed", []), strict=False):
            if printed.strip() != (block.output or "").strip():
                wrong.append(f"{page}, line {block.line}: printed\n{printed}")
    assert not wrong, "\n\n".join(wrong)
    assert len(found) >= 3


@pytest.mark.parametrize("page", with_blocks(is_session))
@pytest.mark.slow
def test_sessions_run(page, tmp_path):
    """In this process: that `spikegate` is there as a program is for tests/test_packaging.py."""
    write_files(page, tmp_path)
    for block in filter(is_session, blocks(page)):
        for line in block.text.splitlines():
            if line.startswith("$ "):
                program, *words = shlex.split(line[2:])
                assert program == "spikegate", f"who runs {program!r} here?"
                spikegate(*words, cwd=tmp_path)


class Understood(Exception):
    """Raised in the place of the work, once a command's arguments are parsed."""


def understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a command as far as its parser. Raises AssertionError where it is not understood."""
    match words:
        case ["make", *targets]:
            assert {word for word in targets if "=" not in word} <= set(TARGETS), words
        case ["pip", "install", *names]:
            extras = re.findall(r"spikegate\[([\w,-]+)\]|^\.\[([\w,-]+)\]", " ".join(names))
            assert {one for pair in extras for one in ",".join(filter(None, pair)).split(",")} <= set(EXTRAS), words
        case ["spikegate", command, *rest] if command in HYDRA:
            composed(command, rest, monkeypatch)
        case ["python", "-m", module, *rest] if module.removeprefix("experiments.") in HYDRA:
            composed(module.removeprefix("experiments."), rest, monkeypatch)
        case ["torchrun", *rest] if "-m" in rest:
            understood(["python", *rest[rest.index("-m") :]], monkeypatch)
        case ["spikegate", *rest]:
            parsed("experiments.cli", rest)
        case ["python", "-m", module, *rest] if module.split(".")[0] in ("experiments", "neuro", "hardware"):
            parsed(module, rest)
        case _:
            assert words[0] in FREE, f"who checks {words[0]!r}? Mark the block as not run, with a reason"


def composed(command: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra composes and checks every setting as it would; what the settings are for is not done."""
    module = importlib.import_module(f"experiments.{command}")
    seen: list[object] = []

    def note(settings: object) -> dict[str, str]:
        seen.append(settings)
        return {}

    def instead(name: str, schema: type, function: object, argv: Sequence[str] | None = None, **more: object) -> int:
        place = {key: value for key, value in more.items() if key == "configs"}
        return run_app(name, schema, note, argv, **place)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "run_app", instead)
    for one in _jobs(words):
        code = module.main(one)
        assert code == 0, (command, one)
    assert seen or "--cfg" in words or "--help" in words, (command, words)


def _jobs(words: list[str]) -> Iterator[list[str]]:
    """Every value of every setting that `-m` varies, in as few jobs as that takes."""
    if "-m" not in words:
        yield words
        return
    choices = [word.split(",") if "=" in word and "[" not in word else [word] for word in words if word != "-m"]
    for number in range(max(map(len, choices))):
        chosen = [values[min(number, len(values) - 1)] for values in choices]
        heads = [values[0].partition("=")[0] for values in choices]
        yield [
            word if "=" in word or word.startswith("-") else f"{head}={word}"
            for head, word in zip(heads, chosen, strict=True)
        ]


def parsed(module: str, words: list[str]) -> None:
    original = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: object = None) -> None:
        original(parser, args, namespace)
        raise Understood

    ended = "it went on without parsing its arguments"
    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            importlib.import_module(module).main(words)
        except Understood:
            return
        except SystemExit as stopped:
            ended = f"exit {stopped.code}"
    assert {"--help", "--version"} & set(words), f"{module} {words}: {ended}"


@contextmanager
def registries_as_they_were() -> Iterator[None]:
    """What a page's own modules register is forgotten, and so are the modules."""
    before = set(sys.modules)
    with mock.patch.dict(SIGNALS), mock.patch.dict(policies._POLICIES), mock.patch.dict(sources._REGISTRY):
        yield
    for module in set(sys.modules) - before:
        if module.startswith("my_"):
            del sys.modules[module]


@pytest.mark.parametrize("page", with_blocks(lambda block: block.language in SHELLS and not block.not_run))
def test_commands_are_understood(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_files(page, tmp_path)
    for block in blocks(page):
        if block.language in SHELLS and not block.not_run:
            for words in commands(block):
                with monkeypatch.context() as patch, registries_as_they_were():
                    understood(words, patch)
                for path in (word for word in words if re.fullmatch(r"configs/[\w/]+\.yaml", word)):
                    assert (ROOT / path).exists(), f"{name(page)}: {path}"


@pytest.mark.parametrize(
    "words",
    [
        ["spikegate", "train", "gate.keep=0.5"],
        ["spikegate", "train", "gate=unheard_of"],
        ["spikegate", "simulate", "--backend"],
        ["python", "-m", "experiments.studies.activity", "--no-such-option"],
        ["make", "nothing"],
        ["pip", "install", "spikegate[nothing]"],
        ["rm", "-r", "runs"],
    ],
    ids=" ".join,
)
def test_a_command_that_is_wrong_is_found(words, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError):
        understood(words, monkeypatch)


def test_every_block_says_what_it_is():
    for page in pages():
        for block in blocks(page):
            assert block.language in LANGUAGES, f"{name(page)}, line {block.line}: language {block.language!r}"
            assert block.language != "console" or "$ " in block.text, f"{name(page)}, line {block.line}: no `$ `"


@pytest.mark.parametrize("room", ["sparse_update", "neuro", "hardware"])
def test_every_room_has_an_example_that_runs(room):
    assert any(block.language == "python" and not block.not_run for block in blocks(ROOT / room / "README.md"))
