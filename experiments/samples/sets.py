"""Name of a data set -> its samples; what `data=` takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.samples.arrays import load_arrays
from experiments.samples.mackey_glass import load_mackey_glass
from experiments.samples.pictures import load_digits, load_fashion_mnist
from experiments.samples.recordings import load_events
from experiments.samples.records import Samples, SettingError

ARRAYS, EVENTS, DIGITS, FASHION, MACKEY_GLASS = "arrays", "events", "digits", "fashion_mnist", "mackey_glass"
NAMES = (ARRAYS, EVENTS, DIGITS, FASHION, MACKEY_GLASS)


@dataclass(frozen=True)
class Recording:
    """How events become frames: microseconds of a step, steps, (W, H) of the sensor, and whether a step is one flat row."""

    step_us: float = 0.0
    steps: int = 0
    sensor: tuple[int, int] = (0, 0)
    flat: bool = False


def load_samples(
    name: str,
    path: str = "",
    *,
    seed: int = 0,
    scale: float = 0.0,
    calibration: int = 256,
    recording: Recording = Recording(),
) -> Samples:
    """Samples by name.

    Args:
        name: arrays, events, digits, fashion_mnist or mackey_glass.
        path: the .npz file of arrays and events; of fashion_mnist, a folder of its own.
        seed: of the split of digits, and of the history of Mackey-Glass.
        scale, calibration: of arrays; see `load_arrays`. `calibration` is one of events too.
        recording: of events.

    Raises:
        SettingError: an unknown name, a path that is missing or that nothing reads, a setting of another data set.
        DataError: what the data set itself refuses.
    """
    if name not in NAMES:
        raise SettingError(f"data={name!r} is unknown; known: {', '.join(NAMES)}")
    if recording != Recording() and name != EVENTS:
        raise SettingError(f"step_us, steps, sensor and flat are for data=events; {name} holds samples already")
    if name in (ARRAYS, EVENTS):
        if not path:
            raise SettingError(f"data={name} needs the file: path=FILE.npz")
        if name == ARRAYS:
            return load_arrays(Path(path), scale=scale, calibration=calibration)
    if scale:
        raise SettingError(f"scale={scale:g} is for data=arrays; {name} has a scale of its own")
    if name == EVENTS:
        own = recording
        settings = {"step_us": own.step_us, "steps": own.steps, "size": own.sensor, "flat": own.flat}
        return load_events(Path(path), **settings, calibration=calibration)  # type: ignore[arg-type]
    if name == FASHION:
        return load_fashion_mnist(Path(path) if path else None)
    if path:
        raise SettingError(f"path={path} is for data=arrays and data=fashion_mnist; data={name} reads no file")
    return load_digits(seed) if name == DIGITS else load_mackey_glass(seed)
