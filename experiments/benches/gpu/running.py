"""One part in a process of its own: a limit that holds whatever the part does, and an energy window around its work."""

from __future__ import annotations

import time
import traceback
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from experiments.benches.gpu.parts import Part
from experiments.benches.gpu.setting import Setting
from hardware.meters.meter import Meter
from hardware.text import short

DONE, STOPPED, FAILED = "done", "stopped at its limit", "failed"


def run_part(part: Part, setting: Setting) -> dict[str, Any]:
    """What a part found, JSON types.

    `status` is "done", "stopped at its limit" (with what was handed on before) or "failed" (with the error, and what was
    handed on); `wall_s` includes the start of the process; `energy` holds the readings of the window around its work.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(part, setting, theirs), name=f"bench gpu {part.name}")
    begin = time.monotonic()
    process.start()
    theirs.close()
    record: dict[str, Any] = {"part": part.name, "status": STOPPED, "found": {}}
    try:
        _listen(ours, begin + setting.seconds, record)
    finally:
        if process.is_alive() and record["status"] == STOPPED:
            process.kill()
        process.join()
    return record | {"wall_s": time.monotonic() - begin, "limit_s": setting.seconds}


def _listen(pipe: Connection, until: float, record: dict[str, Any]) -> None:
    """Take what comes into the record, until the part ends or the time is up."""
    while (left := until - time.monotonic()) > 0:
        if not pipe.poll(left):
            return
        try:
            record |= pipe.recv()
        except EOFError:  # died without a word: killed for its memory, say
            record |= {"status": FAILED, "error": "the process ended without a result; it may have run out of memory"}
            return
        if record["status"] != STOPPED:
            return


def _work(part: Part, setting: Setting, pipe: Connection) -> None:
    """The process of a part."""
    if setting.toy:
        torch.set_num_threads(1)  # toy sizes only wait for each other on more
    try:
        meter = Meter()
        with meter:
            found = part.measure(setting, lambda found: pipe.send({"found": found}))
            setting.wait()
        energy = [asdict(reading) for reading in meter.readings]
        pipe.send({"status": DONE, "found": found, "energy": energy})
    except Exception as error:  # whatever it is, the other parts are measured
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {short(str(error))} ({where.filename.rpartition('/')[2]}:{where.lineno})"
        pipe.send({"status": FAILED, "error": text})
