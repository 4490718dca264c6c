"""Runs the Python blocks of pages, each page in a fork of this process and in a folder of its own, so that torch and
its compiler, which every optimizer loads, are loaded once and no page sees what another did.

Standard input: a JSON list of {"page", "folder", "blocks": [{"text", "line"}]}. Standard output: a JSON object, page ->
{"printed": [what each block printed]} or {"error": traceback}.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy  # noqa: F401
import torch
import torch._dynamo  # noqa: F401


def run(page: dict[str, Any]) -> dict[str, Any]:
    os.chdir(page["folder"])
    sys.path.insert(0, page["folder"])
    warnings.simplefilter("ignore")
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = []
    try:
        for block in page["blocks"]:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * block["line"] + block["text"], page["page"], "exec"), namespace)
            printed.append(out.getvalue())
    except BaseException:
        return {"error": traceback.format_exc()}
    return {"printed": printed}


def main() -> None:
    found = {}
    for page in json.load(sys.stdin):
        answer = Path(page["folder"], ".answer.json")
        child = os.fork()
        if child == 0:
            try:
                answer.write_text(json.dumps(run(page)))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        found[page["page"]] = json.loads(answer.read_text()) if answer.exists() else {"error": "the process died"}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
