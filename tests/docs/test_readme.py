"""The README is short, its tree is the tree, and what it shows of the demo and of the results stands in the log."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.docs.pages import ROOT, blocks

README = ROOT / "README.md"
FLOORS = ("experiments", "sparse_update", "neuro", "hardware", "configs")
BESIDE = {
    "docs/": "The site that `make docs` builds",
    "examples/": "Scripts that run as they are",
    "findings/": "What other tools do that one would guess wrong",
    "tests/": "Mirrors the rooms",
}


def purpose(package: Path) -> str:
    """The first clause of a package's docstring."""
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    return re.split(r"[:;]|\. |\.$", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]


def rooms(floor: str) -> list[Path]:
    """Packages directly under a floor that hold code; folders of data are named in their own README."""
    found = sorted(path.parent for path in (ROOT / floor).glob("*/__init__.py"))
    return [room for room in found if any(path != room / "__init__.py" for path in room.rglob("*.py"))]


def tree() -> str:
    lines = []
    for floor in FLOORS:
        lines.append(f"{floor + '/':<19}{purpose(ROOT / floor)}")
        lines += [f"  {room.name + '/':<17}{purpose(room)}" for room in rooms(floor)]
    return "\n".join([*lines, *(f"{folder:<19}{text}" for folder, text in BESIDE.items())])


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_tree_of_the_readme_is_the_tree():
    shown = next(block.text for block in blocks(README) if block.language == "tree")
    assert shown.strip() == tree()
    assert all((ROOT / folder).is_dir() for folder in BESIDE)


def test_what_the_readme_links_to_is_there():
    text = README.read_text(encoding="utf-8")
    links = re.findall(r"\]\(((?!https?:)[^)#]+)", text)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_figure_of_the_readme_is_one_of_the_log():
    """Losses and shares of time with three decimals; what a command printed is the demo's and stands in its page."""
    text = re.sub(r"```.*?```", "", README.read_text(encoding="utf-8"), flags=re.S)
    log = (ROOT / "experiments/LOG.md").read_text(encoding="utf-8")
    figures = re.findall(r"\d\.\d{3,}", text)
    assert figures
    assert [figure for figure in figures if figure not in log] == []


def test_what_the_demo_printed_is_on_its_page():
    shown = [block.text for block in blocks(README) if block.language == "text"]
    page = (ROOT / "docs/results/demo.md").read_text(encoding="utf-8")
    lines = [line.strip() for text in shown for line in text.splitlines() if line.strip(" .")]
    assert lines
    assert [line for line in lines if line not in page] == []
