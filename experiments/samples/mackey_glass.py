"""The Mackey-Glass series, generated: a chaotic time series whose next values a network foretells.

dx/dt = beta x(t - tau) / (1 + x(t - tau)^n) - gamma x(t), after Mackey and Glass, "Oscillation and chaos in physiological
control systems", Science 197:287 (1977), with the constants that are common for benchmarks: beta 0.2, gamma 0.1, n 10,
tau 17, at which the series is weakly chaotic (Jaeger and Haas, Science 304:78, 2004).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from experiments.samples.records import DataError, Samples

BETA, GAMMA, POWER, TAU = 0.2, 0.1, 10, 17.0
STEPS_PER_UNIT = 10  # of the integration; one value a unit of time is kept
WARM_UP = 1000  # units of time that are thrown away
START = 1.2


def integrate(history: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """So many steps of a tenth of a unit from the end of a history, by the classic Runge-Kutta method of fourth order.

    Args:
        history: x at the steps of one delay and at its end, float64 (tau x 10 + 1,); between two of them the mean is taken.
        steps: at least 0.

    Returns:
        x at the end of the history and after each step, float64 (steps + 1,).
    """
    delay = len(history) - 1
    x = np.concatenate([history, np.empty(steps)])
    h = 1.0 / STEPS_PER_UNIT

    def slope(now: float, past: float) -> float:
        return BETA * past / (1.0 + past**POWER) - GAMMA * now

    for t in range(delay, delay + steps):
        past, after = float(x[t - delay]), float(x[t - delay + 1])
        between, now = 0.5 * (past + after), float(x[t])
        k1 = slope(now, past)
        k2 = slope(now + 0.5 * h * k1, between)
        k3 = slope(now + 0.5 * h * k2, between)
        k4 = slope(now + h * k3, after)
        x[t + 1] = now + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6
    return x[delay:]


def mackey_glass(length: int, *, tau: float = TAU, seed: int = 0) -> NDArray[np.float64]:
    """`length` values of the series, one a unit of time, float64, after a warm-up of 1,000 units.

    `seed` draws the history before time 0 around 1.2. Raises DataError for a length below 1 or a tau that is no positive
    multiple of a tenth.
    """
    delay = round(tau * STEPS_PER_UNIT)
    if length < 1:
        raise DataError(f"length is {length}; at least 1 value is needed")
    if delay < 1 or abs(delay / STEPS_PER_UNIT - tau) > 1e-9:
        raise DataError(f"tau is {tau}; it is a positive multiple of {1 / STEPS_PER_UNIT:g}, such as {TAU:g}")
    history = START + 0.2 * (np.random.default_rng(seed).random(delay + 1) - 0.5)
    x = integrate(history, (WARM_UP + length) * STEPS_PER_UNIT)
    return x[WARM_UP * STEPS_PER_UNIT :: STEPS_PER_UNIT][:length].copy()


def load_mackey_glass(
    seed: int = 0, *, steps: int = 100, horizon: int = 10, train: int = 20, held_out: int = 20
) -> Samples:
    """Streams of `steps` values, (N, steps, 1), and what each is `horizon` units later, (N, steps, 1), both float32.

    The series less its mean over the training part; the first `train` streams are of that part, the held-out ones follow
    after a gap of one stream.
    """
    streams = train + held_out + 1
    series = mackey_glass(streams * steps + horizon, seed=seed)
    series = (series - series[: train * steps].mean()).astype(np.float32)
    x = series[: streams * steps].reshape(streams, steps, 1)
    y = series[horizon : horizon + streams * steps].reshape(streams, steps, 1)
    return Samples(
        "mackey_glass",
        f"Mackey-Glass, tau {TAU:g}, {horizon} units ahead, seed {seed} (Science 197:287, 1977)",
        x[:train],
        y[:train],
        x[train + 1 :],
        y[train + 1 :],
        (f"streams of {steps} steps follow one another in one series: their errors are not fully independent",),
    )
