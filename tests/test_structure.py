"""The shape of the house: no import circle (a lazy import does not hide one), no crowded folder, no file of two rooms.

Read from the source, as in `tests/test_floors.py` (who may import whom). Planted breaches show that the rules bite.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_floors import FLOORS, ROOT, WORKER

MOST_FILES = 15
MOST_LINES = 450

Edge = tuple[str, str]


def structure(root: Path, files: list[str]) -> list[str]:
    """Every breach under `root`, one sentence each; `files` are the paths that belong to the project."""
    return [*_circles(root, files), *_own_front_doors(root, files), *_crowded(files), *_long(root, files)]


def _modules(files: list[str]) -> dict[str, str]:
    """Dotted name -> file, for the packages of the floors; a package's name is that of its __init__.py."""
    ours = [file for file in files if file.endswith(".py") and file.split("/")[0] in FLOORS and not file.startswith(WORKER)]
    return {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in ours}


def _edges(root: Path, modules: dict[str, str], name: str) -> Iterator[tuple[str, int, bool]]:
    """(module, line, inside a function) of what `name` imports of ours. What only a type checker reads does not count."""
    file = modules[name]
    package = name if file.endswith("__init__.py") else name.rpartition(".")[0]

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                for other in child.orelse:
                    yield from walk(other, lazy)
                continue
            for target in _targets(child, package):
                if known := _longest(target, modules):
                    yield known, child.lineno, lazy  # type: ignore[attr-defined]
            yield from walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from walk(ast.parse((root / file).read_text(encoding="utf-8"), file), lazy=False)


def _targets(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base += node.module.split(".") if node.module else []
        return [".".join([*base, alias.name]) for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in {"import_module", "__import__"}:
            return [str(node.args[0].value)]
    return []


def _longest(target: str, modules: dict[str, str]) -> str:
    while target and target not in modules:
        target = target.rpartition(".")[0]
    return target


def _circles(root: Path, files: list[str]) -> Iterator[str]:
    modules = _modules(files)
    places: dict[Edge, tuple[int, bool]] = {}
    follow: dict[str, set[str]] = {name: set() for name in modules}
    for name in modules:
        for target, line, lazy in _edges(root, modules, name):
            if target != name:
                follow[name].add(target)
                places.setdefault((name, target), (line, lazy))
    for group in _strongly_connected(follow):
        inside = {edge: at for edge, at in places.items() if set(edge) <= group}
        names = ", ".join(sorted(group))
        hidden = [f"{modules[a]}:{line}" for (a, _), (line, lazy) in sorted(inside.items()) if lazy]
        yield f"import circle: {names}" + (f" (hidden by a lazy import at {', '.join(hidden)})" if hidden else "")


def _strongly_connected(follow: dict[str, set[str]]) -> list[set[str]]:
    """Groups of more than one node that reach each other, by two depth-first passes (Kosaraju)."""

    def visit(start: str, arrows: dict[str, set[str]], seen: set[str]) -> list[str]:
        order, stack = [], [(start, iter(sorted(arrows[start])))]
        seen.add(start)
        while stack:
            node, rest = stack[-1]
            fresh = next((other for other in rest if other not in seen), None)
            if fresh is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(fresh)
                stack.append((fresh, iter(sorted(arrows[fresh]))))
        return order

    seen: set[str] = set()
    finished = [node for name in follow if name not in seen for node in visit(name, follow, seen)]
    back: dict[str, set[str]] = {name: set() for name in follow}
    for name, targets in follow.items():
        for target in targets:
            back[target].add(name)
    seen = set()
    groups = [set(visit(name, back, seen)) for name in reversed(finished) if name not in seen]
    return [group for group in groups if len(group) > 1]


def _own_front_doors(root: Path, files: list[str]) -> Iterator[str]:
    """A module that takes a name from the top of its own package hides where it comes from, and circles with it."""
    modules = _modules(files)
    for name, file in modules.items():
        top = name.split(".")[0]
        for target, line, _ in _edges(root, modules, name):
            if target == top != name:
                yield f"{file}:{line}: takes a name from `{top}` itself; import the module that defines it"


def _crowded(files: list[str]) -> Iterator[str]:
    folders: dict[str, int] = {}
    for file in files:
        folder = file.rpartition("/")[0]
        folders[folder] = folders.get(folder, 0) + 1
    for folder, count in sorted(folders.items()):
        if folder and count > MOST_FILES:  # the root holds what tools look for there
            yield f"{folder}/ holds {count} files; more than {MOST_FILES} are two rooms"


def _long(root: Path, files: list[str]) -> Iterator[str]:
    for file in files:
        if file.endswith(".py"):
            lines = len((root / file).read_text(encoding="utf-8").splitlines())
            if lines > MOST_LINES:
                yield f"{file} has {lines} lines; more than {MOST_LINES} are two rooms"


def _project_files() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    return [file for file in done.stdout.splitlines() if (ROOT / file).is_file()]


def test_the_house_has_no_circles_crowds_or_giants():
    assert structure(ROOT, _project_files()) == []


PLANTED = {
    "circle": ({"neuro/a.py": "import neuro.b", "neuro/b.py": "from neuro import a"}, "import circle: neuro.a, neuro.b"),
    "lazy circle": (
        {"neuro/a.py": "import neuro.b", "neuro/b.py": "def f():\n    from neuro.a import x"},
        "import circle: neuro.a, neuro.b (hidden by a lazy import at neuro/b.py:2)",
    ),
    "dynamic circle": (
        {"neuro/a.py": "import neuro.b", "neuro/b.py": "import importlib\nimportlib.import_module('neuro.a')"},
        "import circle: neuro.a, neuro.b",
    ),
    "circle of three": (
        {
            "hardware/a.py": "from hardware import b",
            "hardware/b.py": "from . import c",
            "hardware/c.py": "from .a import x",
        },
        "import circle: hardware.a, hardware.b, hardware.c",
    ),
    "front door": (
        {"neuro/__init__.py": "", "neuro/a.py": "from neuro import deploy"},
        "neuro/a.py:1: takes a name from `neuro` itself; import the module that defines it",
    ),
    "crowd": (
        {f"configs/gate/g{n}.yaml": "" for n in range(16)},
        "configs/gate/ holds 16 files; more than 15 are two rooms",
    ),
    "giant": ({"tests/test_x.py": "x = 1\n" * 451}, "tests/test_x.py has 451 lines; more than 450 are two rooms"),
}
HONEST = {
    "neuro/__init__.py": "from neuro.a import x",
    "neuro/a.py": "from typing import TYPE_CHECKING\nfrom neuro import b\nif TYPE_CHECKING:\n    from neuro.c import y",
    "neuro/b.py": "def f():\n    import neuro.d",
    "neuro/c.py": "import neuro.a\nimport hardware.a",
    "neuro/d.py": "x = 1\n" * 450,
    "hardware/a.py": "",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_breach_is_found(tmp_path, name):
    files, sentence = PLANTED[name]
    _plant(tmp_path, files)
    assert structure(tmp_path, sorted(files)) == [sentence]


def test_an_honest_tree_has_no_breach(tmp_path):
    _plant(tmp_path, HONEST)
    assert structure(tmp_path, sorted(HONEST)) == []


def _plant(root: Path, files: dict[str, str]) -> None:
    for file, source in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(source)
