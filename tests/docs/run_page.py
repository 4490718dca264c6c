"""Runs the Python blocks of one page in order and in one namespace; a process of its own, started by the test.

Standard input: a JSON list of {"text", "line"}. Standard output: a JSON list of what each printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys


def main() -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = []
    for block in json.load(sys.stdin):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * block["line"] + block["text"], block["page"], "exec"), namespace)
        printed.append(out.getvalue())
    print(json.dumps(printed))


if __name__ == "__main__":
    main()
