"""Runs in the environment of `make energy-check`: the real Zeus and our meter over one faked RAPL counter, or none.

Called as PYTHON energy_check_job.py FOLDER [JOULES]: a powercap folder that holds intel-rapl:0, and by how much its counter
grows; without JOULES the folder does not exist. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from hardware.meters.meter import Meter
from hardware.meters.zeus import ZeusCheck, compare


def main(folder: str, joules: float | None = None) -> None:
    import zeus.device.cpu.rapl as rapl
    from zeus.monitor import ZeusMonitor

    rapl.RAPL_DIR = rapl.CONTAINER_RAPL_DIR = folder
    with Meter(gpu=False, powercap=Path(folder)) as meter, ZeusCheck() as check:
        time.sleep(0.2)
        if joules is not None:
            counter = Path(folder) / "intel-rapl:0" / "energy_uj"
            counter.write_text(str(int(counter.read_text()) + round(1e6 * joules)))
    monitor = ZeusMonitor()
    monitor.begin_window("plain")
    plain: Any = monitor.end_window("plain")
    cpu = [reading for reading in check.readings if "GPU" not in reading.source]
    print(
        json.dumps(
            {
                "own": [reading.to_dict() for reading in meter.readings],
                "zeus": [reading.to_dict() for reading in cpu],
                "gpus": len(check.readings) - len(cpu),
                "plain_total_j": plain.total_energy,
                "compared": [compare(a, b) for a, b in zip(meter.readings, cpu, strict=False)],
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))
