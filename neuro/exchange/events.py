"""Address events of an event camera or a silicon cochlea to frames, one for each time step.

    frames = events_to_frames(t, x, y, polarity, step_us=1000, size=(34, 34))
    frames.counts  # (T, 2, H, W)

An event says when (t), where (x, y) and in which direction (polarity) something changed. A frame counts the events of one
time step, which lasts `step_us`; the step is part of the result, since every rate and every time constant depends on it.
Shape letters: E events, T steps, H rows, W columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.text import quoted

US_IN = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}
"""Unit of time -> microseconds."""
LARGEST = 2**31
"""Values of one recording's frames that are made at most; beyond it, the step or the size is most likely wrong."""


class EventError(ValueError):
    """Events that cannot become frames; the message names the array, the value, the limit and what helps."""


@dataclass(frozen=True, eq=False)
class Frames:
    """Counts of events.

    Attributes:
        counts: float32 (T, 2, H, W): events of each step, channel 0 those with falling, 1 those with rising value.
        step_us: microseconds of one step.
        start_us: when the first step begins, in the recording's own time.
        left_out: events before the first step and after the last one.
    """

    counts: NDArray[np.float32]
    step_us: float
    start_us: float
    left_out: int

    @property
    def stream(self) -> NDArray[np.float32]:
        """One row for each step, (T, 2 H W), for a network of dense layers."""
        return self.counts.reshape(len(self.counts), -1)


def events_to_frames(
    t: Any,
    x: Any,
    y: Any,
    polarity: Any,
    *,
    step_us: float,
    size: tuple[int, int],
    steps: int | None = None,
    start_us: float | None = None,
    unit: str = "us",
    binary: bool = False,
) -> Frames:
    """Count the events of one recording in steps of `step_us`.

    Args:
        t: times in `unit`, whole numbers or floats (E,), never falling.
        x: columns, whole numbers 0..W-1 (E,).
        y: rows, whole numbers 0..H-1 (E,).
        polarity: 0 and 1, False and True, or -1 and 1 (E,).
        step_us: microseconds of one step.
        size: (W, H) of the sensor.
        steps: T; None: as many as hold the last event. Events after them are left out and counted.
        start_us: when the first step begins; None: at the first event.
        unit: of `t`: ns, us, ms or s.
        binary: 1 where there is any event in place of their number.

    Raises:
        EventError: arrays of unequal length or of other types, times that fall or are not finite, addresses beyond the
            sensor, another polarity, a step or size that is not positive, no event and no `steps`, more than 2^31 values.
    """
    width, height = _sensor(size)
    if not (isinstance(step_us, int | float) and math.isfinite(step_us) and step_us > 0):
        raise EventError(f"step_us is {quoted(step_us)}; a step lasts more than 0 microseconds")
    if unit not in US_IN:
        raise EventError(f"unit is {quoted(unit)}; times are in {', '.join(US_IN)}")
    if steps is not None and steps < 1:
        raise EventError(f"steps is {steps}; at least 1 is needed")
    times = _times(t) * US_IN[unit]
    columns, rows = _addresses("x", x, width, len(times)), _addresses("y", y, height, len(times))
    channel = _channels(polarity, len(times))
    if not len(times) and steps is None:
        raise EventError("there is no event, so nothing says how long the recording is; give steps")
    start = float(start_us) if start_us is not None else float(times[0]) if len(times) else 0.0
    at = np.floor((times - start) / step_us)
    total = steps if steps is not None else max(1, int(at[-1]) + 1)
    values = total * 2 * width * height
    if values > LARGEST:
        raise EventError(
            f"{total:,} steps of {step_us:g} us on a sensor of {width} x {height} are {values:,} values, "
            f"of at most {LARGEST:,}: are the times in {unit}, and is the step in microseconds? Longer steps, or steps=, "
            "make fewer"
        )
    inside = (at >= 0) & (at < total)
    step = at[inside].astype(np.int64)
    place = ((step * 2 + channel[inside]) * height + rows[inside]) * width + columns[inside]
    counts = np.bincount(place, minlength=values).reshape(total, 2, height, width)
    found = (counts > 0 if binary else counts).astype(np.float32)
    return Frames(found, float(step_us), start, int(np.count_nonzero(~inside)))


def _sensor(size: tuple[int, int]) -> tuple[int, int]:
    try:
        width, height = (int(edge) for edge in size)
    except (TypeError, ValueError):
        raise EventError(f"size is {quoted(size)}; (width, height) of the sensor is needed") from None
    if width < 1 or height < 1:
        raise EventError(f"size is {quoted(size)}; a sensor has at least one column and one row")
    return width, height


def _times(value: Any) -> NDArray[np.float64]:
    found = np.asarray(value)
    if found.ndim != 1 or found.dtype.kind not in "iuf":
        raise EventError(f"t is {found.dtype} of shape {found.shape}; one time for each event, (E,), is needed")
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        first = int(np.flatnonzero(~np.isfinite(found))[0])
        raise EventError(f"t[{first}] is {found[first]}; a time is finite, so leave the event out")
    falls = np.flatnonzero(found[1:] < found[:-1])
    if len(falls):
        i = int(falls[0])
        raise EventError(
            f"t falls at {len(falls):,} of {len(found):,}, first from {found[i]} to {found[i + 1]} at index {i + 1}; "
            "sort by order = numpy.argsort(t, kind='stable'), or unwrap a counter that has overflown"
        )
    return found.astype(np.float64)


def _addresses(name: str, value: Any, limit: int, events: int) -> NDArray[np.int64]:
    found = np.asarray(value)
    _one_each(name, found, events)
    if len(found) and found.dtype.kind not in "iu":
        raise EventError(f"{name} is {found.dtype}; addresses are whole numbers")
    wrong = np.flatnonzero((found < 0) | (found >= limit))
    if len(wrong):
        what = "columns" if name == "x" else "rows"
        raise EventError(
            f"{name}[{int(wrong[0])}] is {found[wrong[0]]}, beyond the {limit} {what} of the sensor ({len(wrong):,} events "
            "are); give the size of the sensor, (width, height), or leave those events out"
        )
    return found.astype(np.int64)


def _channels(value: Any, events: int) -> NDArray[np.int64]:
    found = np.asarray(value)
    _one_each("polarity", found, events)
    if len(found) and found.dtype.kind not in "iub":
        raise EventError(f"polarity is {found.dtype}; 0 and 1, False and True, or -1 and 1 are needed")
    seen = set(np.unique(found).tolist())
    if not (seen <= {0, 1} or seen <= {-1, 1}):
        odd = sorted(seen - {0, 1}) if 0 in seen else sorted(seen - {-1, 1})
        raise EventError(f"polarity holds {quoted(odd[0])}; 0 and 1, False and True, or -1 and 1 are needed")
    return (found > 0).astype(np.int64)


def _one_each(name: str, found: NDArray[Any], events: int) -> None:
    if found.ndim != 1 or len(found) != events:
        raise EventError(f"{name} has shape {found.shape} for {events:,} times; one for each event is needed")
