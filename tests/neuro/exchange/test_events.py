"""Address events to frames: equal to a loop over the events, and typed errors for what cannot be one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuro.exchange.events import EventError, events_to_frames

EVENT = st.tuples(st.integers(0, 5000), st.integers(0, 4), st.integers(0, 2), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.lists(EVENT, max_size=40), st.sampled_from([1, 7, 100, 2500]), st.integers(1, 30), st.integers(0, 3000))
def test_frames_are_a_loop_over_the_events(
    events: list[tuple[int, int, int, bool]], step_us: int, steps: int, start_us: int
) -> None:
    events = sorted(events, key=lambda event: event[0])
    t, x, y, p = (np.array([event[i] for event in events], dtype=int) for i in range(4))
    expected = np.zeros((steps, 2, 3, 5), np.float32)
    left = 0
    for at, column, row, up in events:
        step = (at - start_us) // step_us
        if 0 <= step < steps:
            expected[step, int(up), row, column] += 1
        else:
            left += 1
    found = events_to_frames(t, x, y, p, step_us=step_us, size=(5, 3), steps=steps, start_us=start_us)
    np.testing.assert_array_equal(found.counts, expected)
    assert found.left_out == left
    assert found.counts.sum() == len(events) - left
    assert found.stream.shape == (steps, 30)
    signed = events_to_frames(t, x, y, 2 * p - 1, step_us=step_us, size=(5, 3), steps=steps, start_us=start_us, binary=True)
    np.testing.assert_array_equal(signed.counts, expected > 0)


def test_units_and_the_number_of_steps() -> None:
    t = np.array([5.0, 5.5, 9.0])
    one = events_to_frames(t, [0, 0, 0], [0, 0, 0], [1, 1, 0], step_us=1000, size=(1, 1), unit="ms")
    assert one.start_us == 5000
    np.testing.assert_array_equal(one.counts[:, 1, 0, 0], [2, 0, 0, 0, 0])
    np.testing.assert_array_equal(one.counts[:, 0, 0, 0], [0, 0, 0, 0, 1])
    two = events_to_frames(t * 1000, [0, 0, 0], [0, 0, 0], [1, 1, 0], step_us=1000, size=(1, 1))
    np.testing.assert_array_equal(one.counts, two.counts)
    nothing = events_to_frames([], np.zeros(0, int), np.zeros(0, int), np.zeros(0, bool), step_us=1, size=(2, 2), steps=3)
    assert nothing.counts.shape == (3, 2, 2, 2)
    assert not nothing.counts.any()


GOOD: dict[str, Any] = {
    "t": [0, 5, 9], "x": [0, 1, 2], "y": [0, 1, 1], "polarity": [0, 1, 1], "step_us": 2, "size": (3, 2)
}  # fmt: skip
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "times unsorted": ({"t": [0, 9, 5]}, r"t falls at 1 of 3, first from 9 to 5 at index 2; sort by"),
    "a time that is none": ({"t": [0.0, np.nan, 2.0]}, r"t\[1\] is nan"),
    "times of text": ({"t": ["a", "b", "c"]}, "one time for each event"),
    "a column too far": ({"x": [0, 3, 2]}, r"x\[1\] is 3, beyond the 3 columns"),
    "a row below 0": ({"y": [0, -1, 1]}, r"y\[1\] is -1, beyond the 2 rows"),
    "addresses as floats": ({"x": [0.0, 1.0, 2.0]}, "addresses are whole numbers"),
    "one address less": ({"y": [0, 1]}, "one for each event"),
    "odd polarity": ({"polarity": [0, 1, 2]}, "polarity holds 2"),
    "both codes of polarity": ({"polarity": [0, 1, -1]}, "polarity holds -1"),
    "no step": ({"step_us": 0}, "step_us is 0"),
    "a step without end": ({"step_us": float("inf")}, "step_us is inf"),
    "no sensor": ({"size": (0, 2)}, "at least one column"),
    "a number for a sensor": ({"size": 3}, "width, height"),
    "another unit": ({"unit": "min"}, "unit is 'min'"),
    "no steps": ({"steps": 0}, "steps is 0"),
    "a wrong unit": ({"t": [0, 5, 10**12], "step_us": 1e-3}, "are the times in us"),
    "nothing": ({"t": [], "x": [], "y": [], "polarity": []}, "there is no event"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_become_frames_is_named(name: str) -> None:
    events_to_frames(**GOOD)
    wrong, message = BAD[name]
    with pytest.raises(EventError, match=message):
        events_to_frames(**GOOD | wrong)
