"""The command `spikegate bench gpu`: parts in turn, each written as it comes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.benches.gpu.parts import LIMIT_S, PARTS, Part
from experiments.benches.gpu.running import DONE, run_part
from experiments.benches.gpu.setting import Setting
from experiments.benches.gpu.table import lines
from experiments.benches.gpu.wheels import WheelError, pack
from experiments.benches.ratios import say
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import dump_line, plain
from hardware.text import short
from sparse_update.step.kernels import can_compile

NO_DEVICE = 3
"""Exit code where there is no GPU."""
TOY_LIMIT_S = 300.0
"""Of a part in a dry run, on a slow machine."""
OUT = Path("runs/bench-gpu.jsonl")


def arguments_parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="spikegate bench gpu",
        description="Every figure that needs a GPU, in at most eight minutes. Each part runs in a process of its own with "
        "its own time limit and is written as it comes; the same command again goes on with what is missing.",
    )
    names = ", ".join(part.name for part in PARTS)
    made.add_argument("--parts", default="", help=f"some of {names} (default: all)")
    made.add_argument("--dry-run", action="store_true", help="all paths at toy size on the CPU")
    made.add_argument("--out", type=Path, default=None, help=f"one JSON line for each part (default: {OUT})")
    made.add_argument("--again", action="store_true", help="measure what the file has already, too")
    made.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="auto: where a compiler is found")
    made.add_argument("--limit-s", type=float, default=LIMIT_S, help=f"seconds of all parts (default: {LIMIT_S:g})")
    made.add_argument(
        "--wheels", type=Path, default=None, metavar="FOLDER",
        help="measure nothing: pack what the core needs besides torch into this folder, for a machine without an index",
    )  # fmt: skip
    made.add_argument("--python", default="3.12", help="the version of Python that the wheels are for (default: 3.12)")
    add_json_argument(made)
    return made


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Measure. Exit code 0; 1 where a part failed or was stopped; 2 for bad arguments; 3 without a GPU; 130 when
    interrupted (what was written stays)."""
    options = arguments_parser().parse_args(argv)
    if options.wheels is not None:
        return _pack(options.wheels, options.python)
    try:
        parts = _wanted(options.parts)
        if not options.limit_s > 0:
            raise ValueError(f"--limit-s {options.limit_s:g}: must be above 0 seconds")
    except ValueError as error:
        print(f"bench gpu: {error}", file=sys.stderr)
        return 2
    if not options.dry_run and not torch.cuda.is_available():
        print(
            "bench gpu: torch sees no CUDA device, so nothing was measured; --dry-run runs all parts at toy size on the "
            "CPU",
            file=sys.stderr,
        )
        return NO_DEVICE
    out = options.out or (OUT.with_name("bench-gpu-dry.jsonl") if options.dry_run else OUT)
    try:
        found = measure(parts, options, out)
    except (KeyboardInterrupt, OSError, ValueError) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        print(f"bench gpu: {'interrupted; what was measured is in ' + str(out) if interrupted else error}", file=sys.stderr)
        return 130 if interrupted else 2
    for text in lines(found):
        print(text)
    print(f"written to {out}")
    finish(found, "bench-gpu", file=out)
    return 0 if all(record["status"] == DONE for record in found["parts"].values()) else 1


def measure(parts: Sequence[Part], options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Run the parts that the file does not have yet, and return the document.

    Raises:
        ValueError: a file of another device, size, commit or version of torch; one that is no such file.
        OSError: a file that cannot be written.
    """
    device = "cpu" if options.dry_run else "cuda"
    header = _header(device, options.dry_run)
    known = {} if options.again or not out.exists() else _read(out, header)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not known:
        out.write_text(dump_line({"header": header}) + "\n", encoding="utf-8")
    compiled = options.compile == "on" or (options.compile == "auto" and can_compile(torch.device(device)))
    end = time.monotonic() + (len(parts) * TOY_LIMIT_S if options.dry_run else options.limit_s)
    for part in parts:
        if part.name in known:
            say(f"{part.name}: measured before, in {out}")
            continue
        seconds = min(TOY_LIMIT_S if options.dry_run else part.limit_s, end - time.monotonic())
        if seconds < 1:
            known[part.name] = {"part": part.name, "status": "not begun: the time of the whole command was spent"}
            continue
        say(f"{part.name}: {part.title}, at most {seconds:.0f} s")
        record = plain(run_part(part, Setting(device, options.dry_run, compiled, seconds)))
        with out.open("a", encoding="utf-8") as file:
            file.write(dump_line(record) + "\n")
        known[part.name] = record
        say(f"{part.name}: {record['status']} after {record['wall_s']:.0f} s{_why(record)}")
    return {"header": header, "parts": {part.name: known[part.name] for part in parts}}


def _why(record: dict[str, Any]) -> str:
    return f": {record['error']}" if "error" in record else ""


def _wanted(text: str) -> list[Part]:
    names = [name for name in text.split(",") if name]
    known = {part.name: part for part in PARTS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--parts {short(unknown[0])}: known are {', '.join(known)}")
    return [known[name] for name in names] if names else list(PARTS)


def _header(device: str, toy: bool) -> dict[str, Any]:
    """Where and with what: figures of two of these never share a file."""
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    return {"device": name, "toy": toy, "torch": torch.__version__, "cuda": torch.version.cuda, "commit": _commit()}


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def _read(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Parts of a file that are done; a last line that was cut short is left out."""
    known: dict[str, Any] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines()):
        try:
            record = json.loads(text)
        except json.JSONDecodeError:
            record = None
        if number == 0:
            theirs = record.get("header") if isinstance(record, dict) else None
            if theirs != header:
                raise ValueError(
                    f"{path} is of another run ({short(str(theirs))}, this one is {short(str(header))}); "
                    "--out takes another file, --again begins this one anew"
                )
        elif isinstance(record, dict) and record.get("status") == DONE:
            known[record["part"]] = record
    return known


def _pack(folder: Path, python: str) -> int:
    try:
        wheels = pack(folder, python)
    except (WheelError, OSError) as error:
        print(f"bench gpu: {error}", file=sys.stderr)
        return 1
    print(
        f"{len(wheels)} wheels in {folder}, {sum(path.stat().st_size for path in wheels) / 2**20:.0f} MiB. On the machine:"
    )
    print(f"  python3 -m pip install --no-index --no-deps --target wheels-site {folder}/*.whl")
    print("  PYTHONPATH=wheels-site:. python3 -m experiments.bench gpu")
    return 0
