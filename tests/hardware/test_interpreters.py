"""A program in another environment sees the variables that it needs and none of ours besides."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from hardware.interpreters import KEPT, Worker, ask, clean_environment

ROOT = Path(__file__).resolve().parents[2]
WORKER = Worker("Python", (), "install it", ("seen",), "took longer than {seconds} s", RuntimeError, OSError, TimeoutError)
SHOW = "import json, os; print(json.dumps({'seen': sorted(os.environ)}))"


def test_a_worker_gets_the_variables_it_needs_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "CLOUD_SECRET_KEY",
        "HF_TOKEN",
        "PYTHONPATH",
        "PYTHONSTARTUP",
        "LD_PRELOAD",
        "PIP_INDEX_URL",
        "MY_SETTING",
    ):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    seen = set(ask(WORKER, [sys.executable, "-c", SHOW], 60)["seen"])
    assert {"OMP_NUM_THREADS", "LC_ALL", "PATH"} <= seen
    assert not {name for name in seen if name not in KEPT and not name.startswith(("LC_", "SLURM_"))} - {"LC_CTYPE"}


def test_what_is_kept_is_named() -> None:
    given = {"PATH": "/bin", "SLURM_JOB_ID": "1", "BOARD": "ncl", "AWS_SECRET_ACCESS_KEY": "x", "PYTHONPATH": "y"}
    assert clean_environment(given) == {"PATH": "/bin", "SLURM_JOB_ID": "1", "BOARD": "ncl"}


def test_no_program_of_another_environment_gets_all_of_ours() -> None:
    """Where these rooms start one, `os.environ` is not handed on."""
    paths = [
        *(ROOT / "neuro").rglob("*.py"),
        ROOT / "hardware" / "interpreters.py",
        *(ROOT / "hardware/boards").glob("*.py"),
    ]
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict):
                found += [path for key, value in zip(node.keys, node.values, strict=True) if key is None and _ours(value)]
            elif isinstance(node, ast.keyword) and node.arg == "env":
                found += [path for _ in [0] if _ours(node.value)]
    assert found == []


def _ours(node: ast.AST) -> bool:
    return ast.unparse(node) in ("os.environ", "os.environ.copy()", "dict(os.environ)")
