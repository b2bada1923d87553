"""The change detector: against scipy, and its rate of false alarms against simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fomaml_jax as fj
from fomaml_jax.change_detection import _score, _threshold

KEY = jax.random.key(0)
pytestmark = pytest.mark.reuses_keys  # one serves every test


def watched(losses, **options):
    """What the detector says of each series `[series, arrivals]`."""
    detector = fj.cusum(**options)

    def of(series):
        return jax.lax.scan(detector.step, detector.init(), series)[1]

    return jax.device_get(jax.jit(jax.vmap(of))(losses))


def by_hand(log_losses, allowance, threshold):
    """Hawkins' chart with scipy's distributions and nothing forgotten."""
    seen, total, since, found = [], 0.0, 0, []
    for x in log_losses:
        score = 0.0
        if len(seen) >= 2:
            n, spread = len(seen), np.std(seen, ddof=1)
            t = (x - np.mean(seen)) / (spread * np.sqrt(1 + 1 / n))
            score = -scipy.stats.norm.ppf(scipy.stats.t.sf(t, n - 1))
        seen.append(x)
        total = max(0.0, total + score - allowance)
        since = since + 1 if total else 0
        found.append((total > threshold, total, since))
        if total > threshold:
            seen, total, since = [], 0.0, 0
    return np.array(found)


@pytest.mark.usefixtures("float64")
def test_is_hawkins_chart():
    """But for Wallace's approximation of Student's t, which is good to a few hundredths."""
    rng = np.random.default_rng(0)
    log_losses = rng.normal(-2.0, 0.7, (5, 80))
    log_losses[:, 50:] += 2.0
    change = watched(jnp.exp(log_losses), false_alarm_every=200, shift=1.4, window=1000)
    for i, series in enumerate(log_losses):
        jump, statistic, since = by_hand(series, 0.7, _threshold(200, 0.7)).T
        np.testing.assert_array_equal(change.jump[i], jump)
        np.testing.assert_allclose(change.statistic[i], statistic, atol=0.05)
        np.testing.assert_array_equal(change.since[i], since)
    assert change.jump[:, 50:].any(1).sum() >= 3


def test_scores_are_standard_normal_and_independent_whatever_level_and_scale():
    detector = fj.cusum(false_alarm_every=1e12, window=1000)
    log_losses = 3.0 + 0.2 * jax.random.normal(KEY, (2000, 8))

    def scores(series):
        def step(state, x):
            return detector.step(state, jnp.exp(x))[0], _score(state, x)

        return jax.lax.scan(step, detector.init(), series)[1]

    found = np.asarray(jax.vmap(scores)(log_losses))
    assert (found[:, :2] == 0).all()
    assert scipy.stats.kstest(found[:, 2:].ravel(), "norm").pvalue > 0.01
    apart = np.corrcoef(found[:, 2:].T) - np.eye(6)
    assert np.abs(apart).max() < 4 / np.sqrt(2000)


def test_neither_the_unit_nor_the_power_of_a_loss_matters():
    losses = jnp.exp(jax.random.normal(KEY, (3, 60)))
    one, other = watched(losses), watched(7.0 * losses**0.5)
    np.testing.assert_allclose(one.statistic, other.statistic, atol=1e-3)


def time_between_alarms(losses, **options):
    """The mean, from the number of alarms in all the time that there was."""
    return losses.size / watched(losses, **options).jump.sum()


@pytest.mark.parametrize(("asked", "shift"), [(50, 1.0), (200, 1.0), (200, 2.0)])
def test_false_alarms_are_as_rare_as_asked_for(asked, shift):
    losses = jnp.exp(jax.random.normal(KEY, (300, 10 * asked)))
    found = time_between_alarms(losses, false_alarm_every=asked, shift=shift)
    assert 0.9 * asked < found < 1.3 * asked


@pytest.mark.parametrize(("window", "times"), [(100, 1.3), (30, 3.3)])
def test_false_alarms_are_rarer_the_shorter_the_window(window, times):
    losses = jnp.exp(jax.random.normal(KEY, (100, 6000)))
    found = time_between_alarms(losses, false_alarm_every=1000, window=window)
    assert found == pytest.approx(1000 * times, rel=0.15)
    assert time_between_alarms(losses, false_alarm_every=1000, window=10) > 20 * 1000


def test_false_alarms_of_squared_errors_are_rarer():
    losses = jnp.asarray(np.random.default_rng(0).chisquare(5, (300, 2000)), jnp.float32)
    assert time_between_alarms(losses, false_alarm_every=200) > 200


def test_a_shift_is_found_soon_and_its_beginning_estimated():
    log_losses = jax.random.normal(KEY, (500, 130)).at[:, 100:].add(3.0)
    change = watched(jnp.exp(log_losses), false_alarm_every=1000)
    jump = change.jump.copy()
    jump[:, :100] = False
    assert jump.any(1).mean() > 0.99
    first = jump.argmax(1)
    assert np.median(first) <= 102
    since = np.take_along_axis(change.since, first[:, None], 1)[:, 0]
    assert np.median(np.abs(first - since + 1 - 100)) <= 1


def test_losses_that_sink_raise_no_alarm():
    losses = jnp.exp(jax.random.normal(KEY, (200, 300)) * 0.5 - jnp.linspace(0, 4, 300)[None])
    assert watched(losses, false_alarm_every=1000).jump.sum() < 200 * 300 / 1000


@pytest.mark.makes_nans
def test_what_is_not_finite_is_passed_over():
    losses = jnp.exp(jax.random.normal(KEY, (1, 50)))
    broken = jnp.insert(losses, jnp.array([16, 30]), jnp.array([jnp.nan, jnp.inf]), axis=1)
    expected, found = watched(losses), watched(broken)
    kept = np.delete(np.arange(52), [16, 31])
    np.testing.assert_array_equal(found.statistic[:, kept], expected.statistic)
    assert not found.jump[:, [16, 31]].any()
    # They have arrived all the same, since the change that may have been: the first amid one.
    assert expected.since[0, 15] > 0
    assert expected.since[0, 16] > 0
    doubted = np.flatnonzero(expected.since[0])
    first = doubted - expected.since[0, doubted] + 1
    same = kept[doubted] - found.since[0, kept[doubted]] + 1
    np.testing.assert_array_equal(same, kept[first])
    assert np.isfinite(watched(jnp.zeros((1, 20))).statistic).all()


def test_false_alarms_can_be_made_as_rare_as_a_float_can_say():
    least, most = (_threshold(every, 0.5) for every in (1e3, 1e300))
    assert least < most < 700
    assert fj.cusum(false_alarm_every=1e300).init().number == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"false_alarm_every": 1.0}, "false_alarm_every must be a finite number above 1, got 1.0"),
        ({"false_alarm_every": np.inf}, "false_alarm_every must be a finite number above 1"),
        ({"shift": 0.0}, "shift must be a finite number above 0, got 0.0"),
        ({"window": 2}, "window must be an integer of at least 3, got 2"),
    ],
)
def test_impossible_detectors_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fj.cusum(**options)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_losses_in_few_bits_are_watched_in_full(dtype):
    """Those of float16 are below its smallest normal number here."""
    losses = (1e-5 * jnp.exp(0.3 * jax.random.normal(KEY, (1, 300)))).at[:, 200:].multiply(4)
    found, expected = watched(losses.astype(dtype)), watched(losses)
    assert abs(int(found.jump[0].argmax()) - int(expected.jump[0].argmax())) <= 2
    assert expected.jump[0].argmax() >= 200
    losses = jnp.array([[3, 5, 4, 60, 70]], jnp.int32)
    np.testing.assert_array_equal(
        watched(losses).statistic, watched(losses.astype(jnp.float32)).statistic
    )


@pytest.mark.usefixtures("float64")
def test_the_statistic_has_the_derivative_of_its_differences():
    """Through losses alike, of which the variance is zero, and one that is just their mean."""
    detector = fj.cusum(window=8)
    losses = jnp.exp(jnp.asarray(np.random.default_rng(0).normal(size=12)))
    losses = losses.at[:2].set(1.5)

    def total(losses):
        return jax.lax.scan(detector.step, detector.init(), losses)[1].statistic.sum()

    found = jax.grad(total)(losses)
    for i in range(3, 12):
        apart = jnp.zeros(12).at[i].set(1e-6)
        expected = (total(losses + apart) - total(losses - apart)) / 2e-6
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-6)
    assert jnp.isfinite(found).all()
    state = detector.init()._replace(number=jnp.array(4), variance=jnp.array(1.0))
    of_mean = jax.grad(lambda x: _score(state, x))(jnp.zeros(()))
    after = _score(state, jnp.array(1e-4)) / 1e-4
    np.testing.assert_allclose(of_mean, after, rtol=1e-6)


@pytest.mark.parametrize("still", [700, 800, 900])
def test_losses_that_stood_still_do_not_blind_it(still):
    """The deviations they have left are so small that a jump's square overflows."""
    detector = fj.cusum(window=10)
    losses = jnp.concatenate([jnp.array([2.0, 3.0, 1.5]), jnp.ones(still), jnp.full(60, 1e4)])
    _, changes = jax.lax.scan(detector.step, detector.init(), losses)
    assert np.asarray(changes.jump)[-60:].any()
