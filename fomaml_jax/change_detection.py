"""Whether losses have gone up: a test at every arrival, with a stated rate of false alarms."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fomaml_jax import refusals

_MOST_EXPONENT = 700.0
"""What `math.exp` takes without an overflow."""


class Change(NamedTuple):
    """What a detector says of one arrival.

    Attributes:
        jump: `[]` bool, whether it raises an alarm.
        statistic: `[]`, what it compares with its threshold.
        since: `[]` int32, how many of the last arrivals, this one included, are of the new level if
            there is one.
    """

    jump: jax.Array
    statistic: jax.Array
    since: jax.Array


class ChangeDetector(NamedTuple):
    """A test for a change, as two pure functions.

    Attributes:
        init: `() -> state`, a pytree of arrays.
        step: `(state, loss []) -> (state, Change)`.
    """

    init: Callable[[], Any]
    step: Callable[[Any, jax.Array], tuple[Any, Change]]


class CusumState(NamedTuple):
    """What `cusum` knows of the logarithms of the losses since the last alarm.

    Attributes:
        number: `[]` int32, how many there are, at most the window.
        mean: `[]`, their mean.
        variance: `[]`, their variance about it.
        statistic: `[]`, the cumulative sum.
        since: `[]` int32, arrivals since the sum was last zero.
    """

    number: jax.Array
    mean: jax.Array
    variance: jax.Array
    statistic: jax.Array
    since: jax.Array


def cusum(
    *, false_alarm_every: float = 1000.0, shift: float = 1.0, window: int = 100
) -> ChangeDetector:
    r"""Hawkins' self-starting CUSUM of the logarithms of positive losses: finds when they go up.

    Each log-loss is compared with the mean :math:`m` and the standard deviation :math:`s` of the
    :math:`n` before it. If all are normal and alike, then

    .. math:: T = \frac{\log L - m}{s \sqrt{1 + 1/n}}, \qquad U = \Phi^{-1}(F_{t, n-1}(T))

    is standard normal and independent from arrival to arrival from the third on, whatever their
    level and scale. The sum :math:`S \leftarrow \max(0, S + U - k)` with :math:`k` half the `shift`
    raises an alarm above the threshold that Siegmund's formula gives for `false_alarm_every`; then
    all starts afresh. :math:`F` is in Wallace's closed approximation, as in Hawkins' paper.

    An alarm's arrivals `since` the sum was last zero are the maximum-likelihood estimate of those
    after the change. A `window` makes the comparison forget, so that it follows losses that sink
    while something is learned; the rate of false alarms is then not exact. The tests simulate it:
    with normal log-losses, false alarms come 0.9 to 1.3 times as far apart as asked for while that
    is no more than twice the window; with squared errors, whose logarithms are skewed to the left,
    farther. The shorter the window, the later they come, as the comparison follows every loss: with
    the defaults 1.3 times as far apart, with a window of 30 3 times, with one of 10 hardly ever.

    Args:
        false_alarm_every: arrivals from one false alarm to the next, on average, while nothing
            changes; above 1.
        shift: the change to be found soonest, in standard deviations of the log-loss; above 0.
        window: of how many arrivals the mean and the variance are, with weights that decay
            exponentially once there are more; at least 3.

    Returns:
        A `ChangeDetector`. A loss that is not finite is passed over; one of zero, or below, counts
        as the smallest number: losses that may be negative (log-densities) need an offset first.

    Raises:
        ValueError: for numbers outside of these ranges.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> detector = fj.cusum(false_alarm_every=500)
        >>> losses = jnp.exp(0.3 * jax.random.normal(jax.random.key(0), (60,)))
        >>> losses = losses.at[50:].multiply(3.0)
        >>> _, change = jax.lax.scan(detector.step, detector.init(), losses)
        >>> first = change.jump.argmax()
        >>> int(first), int(first - change.since[first]) + 1  # the alarm, the change's estimate
        (51, 48)

    References:
        Page, `Continuous inspection schemes <https://doi.org/10.1093/biomet/41.1-2.100>`_, 1954;
        Hawkins, `Self-starting CUSUM charts for location and scale
        <https://doi.org/10.2307/2348827>`_, 1987; Siegmund, Sequential Analysis, 1985, chapter 2.
    """
    _check_above("false_alarm_every", false_alarm_every, 1)
    _check_above("shift", shift, 0)
    refusals.check_at_least("window", window, 3)
    allowance = shift / 2
    threshold = _threshold(false_alarm_every, allowance)

    def init() -> CusumState:
        # Each an array of its own: one that is there twice could not be donated.
        mean, variance, statistic = (jnp.zeros(()) for _ in range(3))
        number, since = (jnp.zeros((), jnp.int32) for _ in range(2))
        return CusumState(number, mean, variance, statistic, since)

    def step(state: CusumState, loss: jax.Array) -> tuple[CusumState, Change]:
        loss = jnp.asarray(loss).astype(state.mean.dtype)  # 16 bits would round the logarithm
        seen = jnp.isfinite(loss)
        loss = jnp.where(seen, loss, 1)
        log_loss = jnp.log(jnp.maximum(loss, jnp.finfo(loss.dtype).tiny))
        total = jnp.maximum(state.statistic + _score(state, log_loss) - allowance, 0)
        since = jnp.where(total > 0, state.since + 1, 0)
        jump = total > threshold
        number, mean, variance = _with(log_loss, state, window)
        after = CusumState(number, mean, variance, total, since)
        after = jax.tree.map(lambda fresh, on: jnp.where(jump, fresh, on), init(), after)
        # What is passed over has arrived all the same.
        passed = state._replace(since=jnp.where(state.since > 0, state.since + 1, 0))
        after = jax.tree.map(lambda on, before: jnp.where(seen, on, before), after, passed)
        return after, Change(
            jump & seen,
            jnp.where(seen, total, passed.statistic),
            jnp.where(seen, since, passed.since),
        )

    return ChangeDetector(init, step)


def _score(state: CusumState, log_loss: jax.Array) -> jax.Array:
    """A log-loss as a standard normal number, zero while there is nothing to compare it with."""
    n = jnp.maximum(state.number, 2).astype(log_loss.dtype)
    freedom = n - 1
    known = (state.number >= 2) & (state.variance > 0)
    variance = jnp.where(known, state.variance, 1)  # no root of zero, whose slope is infinite
    spread = jnp.sqrt(variance * (n + 1) / freedom)  # the variance has n below, not n - 1
    t = (log_loss - state.mean) / spread
    # Finite where losses stood still too: after an infinite score it would see nothing any more.
    u = jnp.minimum(t**2 / freedom, jnp.finfo(t.dtype).max)
    shrunk = jnp.sqrt(jnp.where(u > 0, jnp.log1p(u) / jnp.where(u > 0, u, 1), 1))
    score = t * (8 * freedom + 1) / (8 * freedom + 3) * shrunk
    return jnp.where(known, score, 0)


def _with(log_loss: jax.Array, state: CusumState, window: int) -> tuple[jax.Array, ...]:
    """The number, mean and variance with one more."""
    number = jnp.minimum(state.number + 1, window)
    share = 1 / number.astype(log_loss.dtype)
    off = log_loss - state.mean
    return number, state.mean + share * off, (1 - share) * (state.variance + share * off**2)


def _threshold(false_alarm_every: float, allowance: float) -> float:
    """Where the mean time to a false alarm, by Siegmund's formula, is as asked for."""

    def run_length(threshold):
        x = 2 * allowance * (threshold + 1.166)  # the mean overshoot of a normal walk, twice
        return (math.exp(x) - x - 1) / (2 * allowance**2) if x < _MOST_EXPONENT else math.inf

    low, high = 0.0, 1.0
    while run_length(high) < false_alarm_every:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if run_length(middle) < false_alarm_every else (low, middle)
    return high


def _check_above(name: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value > least):
        raise ValueError(f"{name} must be a finite number above {least}, got {value!r}")
