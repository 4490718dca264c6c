"""Importing the package is light, and its README runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import hardware

ROOM = Path(hardware.__file__).parent
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.S)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOM.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    heavy = ("torch", "yaml", "numpy", "pynvml", "lava")
    assert run(f"import sys, hardware; print([name for name in {heavy} if name in sys.modules])").strip() == "[]"


def test_import_reads_no_file_and_starts_no_process() -> None:
    code = """
import sys
seen = []
def hook(event, args):
    data = event == "open" and not str(args[0]).endswith((".py", ".pyc"))
    if data or event in ("subprocess.Popen", "socket.connect"):
        seen.append((event, str(args[0])))
sys.addaudithook(hook)
import hardware
print(seen)
"""
    assert run(code).strip() == "[]"


def test_readme_examples_print_what_they_say() -> None:
    examples = EXAMPLE.findall((ROOM / "README.md").read_text(encoding="utf-8"))
    assert len(examples) == 3
    assert (ROOM / "README.md").read_text(encoding="utf-8").count("```python") == 3
    for code, expected in examples:
        assert run(code) == expected


def test_readme_names_every_shipped_file_and_profile() -> None:
    text = (ROOM / "README.md").read_text(encoding="utf-8")
    for path in ROOM.glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in text
    for name in (*hardware.list_profiles(), *hardware.list_rates()):
        assert f"`{name}`" in text
