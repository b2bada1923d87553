"""Streams of tasks: pure in (key, index), drifting and jumping as they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fomaml_jax as fj
from fomaml_jax.tasks import Waves

KEY = jax.random.key(0)
pytestmark = pytest.mark.reuses_keys  # one serves every test
SPREAD = Waves(amplitude=0.5, phase=0.3, frequency=0.1, level=1.0)


def contexts(path, count, key=KEY):
    return np.asarray(jax.vmap(lambda i: path(key, i))(jnp.arange(count)))


def test_a_task_is_a_function_of_key_and_index_alone():
    family = fj.tasks.sine_waves(SPREAD, shots=3, queries=2)
    path = fj.tasks.drift_and_jumps(Waves(1.0, 0.0), Waves(4.0, 6.0), drift=0.01, jump_every=5)
    stream = fj.tasks.drifting(family, path)
    together = jax.jit(jax.vmap(stream, (None, 0)))(KEY, jnp.arange(40))
    for i in (31, 0, 7):  # in any order, of any kind of integer
        alone = stream(KEY, i)
        for many, single in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(many[i], single, 1e-5, 1e-5)
    xs = np.asarray(together.support[0])
    assert len(np.unique(xs[:, 0])) == 40
    other = stream(jax.random.key(1), 7)
    assert not np.array_equal(other.support[0], xs[7])


def test_the_family_sees_the_context_of_its_index():
    family = lambda key, context: fj.Task(context, jax.random.normal(key))
    stream = fj.tasks.drifting(family, lambda key, index: 2 * index + 1)
    tasks = jax.vmap(stream, (None, 0))(KEY, jnp.arange(1000))
    np.testing.assert_array_equal(tasks.support, 2 * np.arange(1000) + 1)
    assert scipy.stats.kstest(np.asarray(tasks.query), "norm").pvalue > 0.01


def test_without_jumps_a_number_goes_up_and_down_its_range_at_constant_speed():
    found = contexts(fj.tasks.drift_and_jumps(-1.0, 3.0, drift=0.01), 1000)
    assert -1 <= found.min() < -0.95
    assert 2.95 < found.max() <= 3
    steps = np.abs(np.diff(found))
    turning = steps < 0.039  # on the way round an end it comes back a part of the step
    np.testing.assert_allclose(steps[~turning], 0.04, atol=1e-4)
    assert 8 <= turning.sum() <= 10
    np.testing.assert_allclose(found[:800], found[200:], atol=1e-3)  # a round takes 200


def test_the_speed_is_the_same_after_a_thousand_million_arrivals():
    path = fj.tasks.drift_and_jumps(0.0, 1.0, drift=0.001)
    late = jnp.asarray(2**30, jnp.int32) + jnp.arange(100)
    steps = np.diff(jax.vmap(lambda i: path(KEY, i))(late))
    np.testing.assert_allclose(np.abs(steps), 0.001, atol=1e-6)


def test_jumps_are_one_a_block_at_any_place_of_it_to_anywhere_in_the_box():
    path = fj.tasks.drift_and_jumps(np.zeros(2), np.array([1.0, 10.0]), jump_every=20)
    found = contexts(path, 20 * 2000)
    jumps = np.flatnonzero((np.diff(found, axis=0) != 0).any(1)) + 1
    blocks, offsets = np.divmod(jumps, 20)
    # The one of the first block may be at arrival 0, where nothing shows.
    np.testing.assert_array_equal(blocks[-1990:], np.arange(10, 2000))
    assert scipy.stats.chisquare(np.bincount(offsets, minlength=20)).pvalue > 0.01
    for number, size in zip(found[jumps].T, (1.0, 10.0), strict=True):
        assert scipy.stats.kstest(number, scipy.stats.uniform(0, size).cdf).pvalue > 0.01
    assert abs(np.corrcoef(found[jumps].T)[0, 1]) < 0.1


def test_drift_begins_anew_from_each_jump():
    found = contexts(fj.tasks.drift_and_jumps(0.0, 1.0, drift=0.002, jump_every=50), 500)
    steps = np.abs(np.diff(found))
    assert (steps > 0.0021).sum() in (9, 10)
    np.testing.assert_allclose(np.median(steps), 0.002, atol=1e-5)


def test_a_number_drifts_up_from_one_half_of_its_places_and_down_from_the_other():
    path = fj.tasks.drift_and_jumps(0.0, 1.0, drift=0.01)
    keys = jax.random.split(KEY, 2000)
    before, after = (jax.vmap(lambda key, i=i: path(key, i))(keys) for i in (0, 1))
    assert 0.45 < (after > before).mean() < 0.55
    assert scipy.stats.kstest(np.asarray(before), "uniform").pvalue > 0.01


def test_equal_ends_stay():
    path = fj.tasks.drift_and_jumps(Waves(1.0, 0.0), Waves(4.0, 6.0), drift=0.1, jump_every=3)
    context = jax.vmap(lambda i: path(KEY, i))(jnp.arange(50))
    assert (context.frequency == 1).all()
    assert (context.level == 0).all()
    assert np.ptp(context.amplitude) > 1


def test_waves_have_their_numbers_within_the_spread_of_the_centre():
    centre = Waves(amplitude=3.0, phase=1.0, frequency=1.5, level=-2.0)
    options = {"shots": 6, "queries": 9, "x_range": (-2.0, 7.0)}
    family = fj.tasks.sine_waves(SPREAD._replace(frequency=0.0), **options)
    tasks = jax.vmap(lambda key: family(key, centre))(jax.random.split(KEY, 2000))
    (x, y), (qx, qy) = jax.device_get(tasks)
    inputs = np.concatenate([x, qx], 1).ravel()
    assert scipy.stats.kstest(inputs, scipy.stats.uniform(-2, 9).cdf).pvalue > 0.01
    found = []
    for i in range(200):  # level + (a cos b) sin(wx) - (a sin b) cos(wx)
        basis = np.concatenate([np.ones_like(qx[i]), np.sin(1.5 * qx[i]), -np.cos(1.5 * qx[i])], 1)
        level, c, s = np.linalg.lstsq(basis, qy[i, :, 0], rcond=None)[0]
        at = level + c * np.sin(1.5 * x[i]) - s * np.cos(1.5 * x[i])
        np.testing.assert_allclose(at, y[i], atol=1e-2)
        found.append((np.hypot(c, s), np.arctan2(s, c), level))
    for numbers, middle, far in zip(np.transpose(found), (3, 1, -2), (0.5, 0.3, 1), strict=True):
        uniform = scipy.stats.uniform(middle - far, 2 * far)
        assert scipy.stats.kstest(numbers, uniform.cdf).pvalue > 0.01


@pytest.mark.usefixtures("float64")
def test_in_double_precision():
    stream = fj.tasks.drifting(
        fj.tasks.sine_waves(SPREAD), fj.tasks.drift_and_jumps(Waves(1.0, 0.0), Waves(4.0, 6.0))
    )
    assert stream(KEY, 3).support[1].dtype == jnp.float64


def family(key, context):
    return fj.Task(context, context)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fj.tasks.drifting(1.0, family), TypeError, r"family must be a function \(key, co"),
        (lambda: fj.tasks.drifting(family, None), TypeError, r"path must be a function \(key, ind"),
        (lambda: fj.tasks.drift_and_jumps(2.0, 1.0), ValueError, "low <= high; got 2.0 and 1.0"),
        (lambda: fj.tasks.drift_and_jumps(0.0, np.inf), ValueError, "must be finite"),
        (lambda: fj.tasks.drift_and_jumps(0.0, np.ones(2)), ValueError, "of one shape"),
        (lambda: fj.tasks.drift_and_jumps(0.0, {"a": 1.0}), ValueError, "pytrees of one structure"),
        (lambda: fj.tasks.drift_and_jumps((), ()), ValueError, "must be numbers, or pytrees"),
        (lambda: fj.tasks.drift_and_jumps(0.0, 1.0, drift=2), ValueError, "from 0 to 1, got 2"),
        (lambda: fj.tasks.drift_and_jumps(0.0, 1.0, drift=np.nan), ValueError, "got nan"),
        (
            lambda: fj.tasks.drift_and_jumps(0.0, 1.0, jump_every=0),
            ValueError,
            "jump_every must be an integer of at least 1, got 0",
        ),
        (lambda: fj.tasks.sine_waves(Waves(-1.0, 0.0)), ValueError, "four finite numbers of at"),
        (lambda: fj.tasks.sine_waves(SPREAD, shots=0), ValueError, "shots must be an integer"),
        (lambda: fj.tasks.sine_waves(SPREAD, queries=0), ValueError, "queries must be an integer"),
        (
            lambda: fj.tasks.sine_waves(SPREAD, x_range=(1.0, 1.0)),
            ValueError,
            "x_range must be a range",
        ),
    ],
)
def test_impossible_streams_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
