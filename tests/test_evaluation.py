"""Evaluation: the interval means what it says, and plans do not change the tasks."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close

import fomaml_jax as fj


def normal_task(key):
    """A task whose support is one standard normal number."""
    number = jax.random.normal(key, (1,))
    return fj.Task(number, number)


@pytest.mark.parametrize(("impl", "told"), [("rbg", True), ("threefry2x32", False)])
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_keys_whose_tasks_depend_on_how_many_run_together_are_warned_of(impl, told, make_key):
    key = make_key(0, impl=impl)
    calls = (
        lambda: fj.tasks.task_keys(key, 0, 2),
        lambda: fj.evaluate(lambda p, s: p, lambda p, q: p, 1.0, normal_task, key, num_tasks=2),
    )
    for call in calls:
        warned = pytest.warns(UserWarning, match=r"keys of rbg under vmap: which tasks these are")
        with jax.default_prng_impl(impl), warned if told else contextlib.nullcontext():
            call()


def evaluate(key=0, **kwargs):
    return fj.evaluate(
        lambda params, support: support[0] + params,
        lambda adapted, query: {"sum": adapted, "right": adapted > 0},
        3.0,
        normal_task,
        jax.random.key(key),
        **kwargs,
    )


def test_mean_and_interval_of_every_metric():
    report = evaluate(num_tasks=50)
    sums = np.asarray(report.per_task["sum"])
    assert sums.shape == (50,)
    np.testing.assert_allclose(report.mean["sum"], sums.mean(), rtol=1e-6)
    expected = 1.96 * sums.std(ddof=1) / np.sqrt(50)
    np.testing.assert_allclose(report.ci95["sum"], expected, rtol=1e-5)
    np.testing.assert_allclose(report.mean["right"], (sums > 0).mean(), rtol=1e-6)
    assert report.num_tasks == 50


def test_the_interval_covers_the_truth_at_the_nominal_rate():
    reports = jax.vmap(lambda seed: evaluate(seed, num_tasks=60, tasks_at_once=None))(
        jnp.arange(2000)
    )
    covered = jnp.abs(reports.mean["sum"] - 3.0) <= reports.ci95["sum"]
    assert 0.93 < covered.mean() < 0.965


@pytest.mark.parametrize("tasks_at_once", [1, 4, 7, None, "auto"])
def test_every_plan_sees_the_same_tasks(tasks_at_once):
    expected = jax.vmap(lambda i: normal_task(jax.random.fold_in(jax.random.key(0), i)))
    report = evaluate(num_tasks=20, tasks_at_once=tasks_at_once)
    assert_close(report.per_task["sum"], expected(jnp.arange(20)).support[:, 0] + 3, 1e-6)


@pytest.mark.parametrize("num_tasks", [2, 7, 20])
@pytest.mark.parametrize("explicit", [False, True])
def test_devices_share_any_number_of_tasks(num_tasks, explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("tasks",), (kind,))
    shared = jax.jit(lambda: evaluate(num_tasks=num_tasks, mesh=mesh)._replace(num_tasks=0))()
    assert_close(shared, evaluate(num_tasks=num_tasks)._replace(num_tasks=0), 1e-6)


def test_a_longer_evaluation_begins_with_the_shorter_one():
    short, long = evaluate(num_tasks=10), evaluate(num_tasks=30)
    assert_close(short.per_task["sum"], long.per_task["sum"][:10], 1e-6)


@pytest.mark.makes_nans
def test_a_task_that_is_not_finite_shows():
    report = fj.evaluate(
        lambda params, support: support[0],
        lambda adapted, query: jnp.where(adapted > 2, jnp.nan, adapted),
        (),
        normal_task,
        jax.random.key(0),
        num_tasks=200,
    )
    assert jnp.isnan(report.mean)
    assert 0 < jnp.isnan(report.per_task).sum() < 50


def test_refusals():
    with pytest.raises(ValueError, match="num_tasks must be an integer of at least 2, got 1"):
        evaluate(num_tasks=1)
    for wrong in (0, True, -1, "all"):
        with pytest.raises(ValueError, match="tasks_at_once must be an integer of at least 1"):
            evaluate(tasks_at_once=wrong)
    with pytest.raises(ValueError, match=r"metric_fn must return scalars, got \{\}"):
        fj.evaluate(lambda p, s: s, lambda a, q: {}, (), normal_task, jax.random.key(0))
    with pytest.raises(ValueError, match="must return real scalars, got one of dtype complex64"):
        fj.evaluate(lambda p, s: s, lambda a, q: 3j, (), normal_task, jax.random.key(0))
    with pytest.raises(ValueError, match=r"must return scalars, got an array of shape \(1,\)"):
        fj.evaluate(lambda p, s: s, lambda a, q: a, (), normal_task, jax.random.key(0))


def test_a_paired_difference_has_the_variance_of_the_differences():
    rng = np.random.default_rng(0)
    tasks, gap = rng.normal(size=200) * 10, rng.normal(size=200)
    one, other = (
        fj.Evaluation(None, None, {"score": jnp.asarray(x)}, 200) for x in (tasks + gap, tasks)
    )
    found = fj.paired_difference(one, other)
    np.testing.assert_allclose(found.mean["score"], gap.mean(), rtol=1e-3)
    np.testing.assert_allclose(
        found.ci95["score"], 1.96 * gap.std(ddof=1) / np.sqrt(200), rtol=1e-3
    )
    compiled = jax.jit(fj.paired_difference)(one, other)  # the number of tasks is a leaf
    assert_close(compiled.ci95, found.ci95, 1e-5)
    short = other._replace(per_task={"score": jnp.zeros(3)})
    with pytest.raises(ValueError, match="200 and 3 tasks; evaluate both on the same"):
        fj.paired_difference(one, short)


def test_metrics_of_few_bits_are_averaged_in_float32():
    report = fj.evaluate(
        lambda params, support: support,
        lambda adapted, query: (100 + query[0]).astype(jnp.bfloat16),
        0.0,
        normal_task,
        jax.random.key(0),
        num_tasks=64,
    )
    assert report.mean.dtype == report.per_task.dtype == jnp.float32
    assert_close(report.mean, np.asarray(report.per_task).mean(), 1e-6)


@pytest.mark.parametrize("within", [False, True])
def test_what_tasks_are_made_of_may_lie_on_explicit_axes(within):
    mesh = jax.make_mesh((2,), ("tasks",), (jax.sharding.AxisType.Explicit,))
    spread = jax.sharding.NamedSharding(mesh, jax.P("tasks"))
    tasks = jax.device_put(fj.Task(jnp.zeros((4, 5)), jnp.arange(4.0)[:, None]), spread)
    error = lambda mean, query: jnp.abs(query - mean).mean()
    with jax.set_mesh(mesh) if within else contextlib.nullcontext():
        found = fj.evaluate_on(lambda p, s: s.mean(), error, (), tasks, mesh=mesh)
        other = evaluate(num_tasks=3, mesh=mesh)
    assert_close(found.per_task, jnp.arange(4.0))
    assert_close(other.per_task, evaluate(num_tasks=3).per_task, 1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sample_task": lambda key: (key, key)}, "sample_task must make a fomaml_jax.Task.*tuple"),
        ({"sample_task": None}, "sample_task must be a function key -> Task, got None"),
        ({"adapt_fn": None}, r"adapt_fn must be a function \(params, support\) -> adapted"),
        ({"metric_fn": 3}, r"metric_fn must be a function \(adapted, query\) -> metric, got 3"),
        ({"key": 0}, "key must be one PRNG key, such as jax.random.key"),
        ({"mesh": 2}, "mesh must be a jax.sharding.Mesh, such as .*, got 2"),
    ],
)
def test_what_is_no_function_key_or_mesh_is_refused(changed, message):
    arguments = {
        "adapt_fn": lambda params, support: params,
        "metric_fn": lambda adapted, query: query[0],
        "params": 3.0,
        "sample_task": normal_task,
        "key": jax.random.key(0),
    }
    with pytest.raises(TypeError, match=message):
        fj.evaluate(**arguments | changed)
