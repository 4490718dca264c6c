"""`spikegate WORDS...` for tests: in this process, or in one of its own where that is what matters."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest import mock

import torch

from experiments import cli


def spikegate(*words: str, cwd: Path, check: bool = True, process: bool = False, **env: str) -> CompletedProcess[str]:
    """Run a command in a folder.

    Importing torch and Hydra takes a process some seconds, so `process` is for what only a process shows: a clean start, an
    exit code, numbers that another process repeats. In this process an unexpected exception fails the test by itself.

    Args:
        words: what follows `spikegate`.
        check: assert that it succeeds.
        env: variables of the environment beside those that are there.
    """
    done = _process(words, cwd, env) if process else _here(words, cwd, env)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def document(printed: str) -> dict[str, Any]:
    """Everything that a command had to say: the last line, or the file that it names where the line is only a part."""
    line = printed.splitlines()[-1]
    assert len(line.encode()) <= 4096
    found: dict[str, Any] = json.loads(line)
    return json.loads(Path(found["file"]).read_text()) if found.get("file") else found


def _process(words: tuple[str, ...], cwd: Path, env: dict[str, str]) -> CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.cli", *words]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **env}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500, check=False, env=environment)


def _here(words: tuple[str, ...], cwd: Path, env: dict[str, str]) -> CompletedProcess[str]:
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    with (
        contextlib.chdir(cwd),
        mock.patch.dict(os.environ, env),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = cli.main(words)
        except SystemExit as stop:  # argparse
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            torch.set_num_threads(threads)
    return CompletedProcess(list(words), code, out.getvalue(), err.getvalue())
