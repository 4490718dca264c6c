"""`data=events path=FILE.npz`: recordings of address events, each counted in frames of a stated time step.

Shape letters: E events of all recordings, N recordings, T steps, H rows, W columns.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.samples.arrays import read_npz
from experiments.samples.records import DataError, Samples, SettingError
from neuro.exchange.events import EventError, events_to_frames

KEYS = ("t", "x", "y", "polarity", "recording", "label", "train")
LAYOUT = (
    "a file has t (microseconds), x, y, polarity and recording (whole numbers 0..N-1 that say whose event it is), one of "
    "each for every event, label (N,), and may have train (N,), True for those that set the ranges"
)


def load_events(
    path: Path, *, step_us: float, steps: int, size: tuple[int, int], flat: bool = False, calibration: int = 256
) -> Samples:
    """Recordings as float32 (N, T, 2, H, W), or (N, T, 2 H W) where `flat`.

    Args:
        path: an .npz file; see LAYOUT.
        step_us: microseconds of one step.
        steps: T, the same for all; later events are left out, and counted in the notes.
        size: (W, H) of the sensor.
        flat: one row for each step, for a network of dense layers.
        calibration: of a file without `train`, recordings from its beginning that set the ranges.

    Raises DataError for a file that cannot be read, and for events that cannot become frames (which recording, and why).
    """
    if not step_us or not steps or size == (0, 0):
        raise SettingError(
            "data=events needs step_us= (microseconds of a time step), steps= (steps of a recording) and "
            "sensor=[WIDTH,HEIGHT]: every rate and time constant depends on them, so none is assumed"
        )
    found = read_npz(path, KEYS, ("t", "x", "y", "polarity", "recording", "label"), LAYOUT)
    label, whose = found["label"], found["recording"]
    if label.ndim != 1 or label.dtype.kind not in "iu" or not len(label):
        raise DataError(f"label is {label.dtype} of shape {label.shape}; one class for each recording, (N,), is needed")
    if whose.shape != found["t"].shape or whose.dtype.kind not in "iu":
        raise DataError(f"recording is {whose.dtype} of shape {whose.shape} for {found['t'].shape} times; {LAYOUT}")
    if len(whose) and not 0 <= int(whose.min()) <= int(whose.max()) < len(label):
        raise DataError(f"recording holds {int(whose.min())} to {int(whose.max())}, and there are {len(label)} labels")
    frames, left_out = [], 0
    for number in range(len(label)):
        mine = whose == number
        part = {key: found[key][mine] for key in ("t", "x", "y", "polarity")}
        try:
            one = events_to_frames(**part, step_us=step_us, size=size, steps=steps)
        except EventError as error:
            raise DataError(f"{path}, recording {number}: {error}") from error
        frames.append(one.stream if flat else one.counts)
        left_out += one.left_out
    x, y = np.stack(frames), label.astype(np.int64)
    notes = [f"steps of {step_us:g} us, {steps} of each recording; {left_out:,} of {len(whose):,} events come later"]
    chosen = found["train"].astype(bool) if "train" in found else np.arange(len(y)) < calibration
    if chosen.shape != y.shape or chosen.all() or not chosen.any():
        raise DataError(
            f"{int(chosen.sum())} of {len(y)} recordings would set the ranges; some of them, and not all, are needed: give "
            "train (N,), or another calibration_samples"
        )
    if "train" not in found:
        notes.append(f"no train in the file: its first {calibration:,} recordings set the ranges, the others are held out")
    return Samples(path.name, str(path), x[chosen], y[chosen], x[~chosen], y[~chosen], tuple(notes))
