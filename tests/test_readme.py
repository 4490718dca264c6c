"""The READMEs tell the truth: their Python examples print what they say, their quick commands run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", *(ROOT / room / "README.md" for room in ("sparse_update", "neuro", "hardware"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(path):
    return [(m.group(1), m.group(2)) for m in BLOCK.finditer(path.read_text())]


def python_examples():
    for path in READMES:
        found = blocks(path)
        for number, (kind, text) in enumerate(found):
            if kind == "python":
                answer = found[number + 1] if number + 1 < len(found) else ("", "")
                assert answer[0] == "text", f"{path}: Python example {number} is not followed by its output"
                yield pytest.param(text, answer[1], id=f"{path.parent.name}-{number}")


def commands():
    """Every `$ command` of a console block of the root README."""
    for kind, text in blocks(ROOT / "README.md"):
        if kind == "console":
            for line in text.splitlines():
                if line.startswith("$ "):
                    yield line[2:]


def run(words, folder):
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(("code", "expected"), list(python_examples()))
def test_python_examples_print_what_the_readme_says(code, expected, tmp_path):
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected.strip()


def test_every_room_has_examples():
    rooms = {p.id.split("-")[0] for p in python_examples()}
    assert {"sparse_update", "neuro", "hardware"} <= rooms


def test_quick_commands_of_the_readme_run_in_order(tmp_path):
    found = list(commands())
    assert len(found) >= 3
    for command in found:
        done = run(["bash", "-c", command], tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        if command.startswith(("spikegate", "python -m experiments")):
            json.loads(done.stdout.strip().splitlines()[-1])


def test_the_tree_in_the_readme_is_the_tree():
    text = (ROOT / "README.md").read_text()
    tree = next(body for kind, body in blocks(ROOT / "README.md") if kind == "tree")
    named = set(re.findall(r"[\w./-]+\.(?:py|yaml|md)|[\w-]+/", tree))
    there = set()
    for room in ROOT.iterdir():
        if not room.name.startswith("."):  # environments have thousands of folders
            there |= {path.relative_to(ROOT).as_posix() for path in (room, *room.rglob("*"))}
    for name in named:
        found = any(f"/{path}".endswith(f"/{name.rstrip('/')}") for path in there)
        assert found, f"the README's tree names {name}, which is not there"
    for room in ("hardware", "neuro", "sparse_update", "experiments"):
        for path in (ROOT / room).glob("*.py"):
            if path.name != "__init__.py":
                assert path.name in tree, f"{room}/{path.name} is missing from the README's tree"
    assert "LICENSE" in text
