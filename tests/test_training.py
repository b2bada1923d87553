"""The outer loop: plain steps in a row, on however many devices, reported as they were."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, network, network_problem

import fomaml_jax as fj
from fomaml_jax import training
from fomaml_jax.tasks import task_keys

pytestmark = pytest.mark.usefixtures("quick_compiles")

KEY = jax.random.key(3)
SAMPLE = fj.tasks.sinusoid(shots=3, queries=4)
FOMAML = fj.fomaml(network, optax.sgd(0.05), 2)
PARAMS, _ = network_problem(1)
STEPS = 3

pytestmark = pytest.mark.usefixtures("standard_promotion")


def outer():
    """An optimizer with state and a rate that changes from step to step."""
    return optax.adam(optax.cosine_decay_schedule(0.05, STEPS))


def run(sample_task=SAMPLE, optimizer=None, params=PARAMS, meta_gradient=FOMAML, **kwargs):
    kwargs = {"steps": STEPS, "tasks_per_step": 4} | kwargs
    optimizer = optimizer or outer()
    return list(training.meta_train(meta_gradient, sample_task, params, optimizer, KEY, **kwargs))


def mean(trees):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def plain_loop(num_tasks):
    """Parameters, loss and norm of the gradient at each step, task by task."""
    one_task = jax.jit(lambda params, key: FOMAML(params, SAMPLE(key)))
    optimizer, params, seen = outer(), PARAMS, []
    state = optimizer.init(params)
    for step in range(STEPS):
        step_key = jax.random.fold_in(KEY, step)
        keys = [jax.random.fold_in(step_key, i) for i in range(num_tasks)]
        grads, infos = zip(*(one_task(params, key) for key in keys), strict=True)
        norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(mean(grads))))
        updates, state = optimizer.update(mean(grads), state, params)
        params = optax.apply_updates(params, updates)
        seen.append((params, float(mean([i.query_loss for i in infos])), norm))
    return seen


def test_training_is_a_plain_loop():
    for (params, row), (reference, loss, norm) in zip(run(), plain_loop(4), strict=True):
        assert_close(params, reference, 1e-5)
        np.testing.assert_allclose([row["loss"], row["grad_norm"]], [loss, norm], rtol=1e-5)


def test_neither_devices_nor_tasks_at_once_change_the_numbers(monkeypatch):
    assert training.mesh_for(4).size == 2
    on_two = run()
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    assert training.mesh_for(4).size == 1
    on_one = run(tasks_at_once=None)
    for (params, row), (reference, other) in zip(on_two, on_one, strict=True):
        assert_close(params, reference, 1e-5)
        assert row.keys() == other.keys()
        assert_close(row, other, 1e-5)


@pytest.mark.parametrize(("num_tasks", "num_devices"), [(1, 1), (2, 2), (3, 1), (8, 2)])
def test_as_many_devices_as_divide_the_tasks(num_tasks, num_devices):
    mesh = training.mesh_for(num_tasks)
    assert list(mesh.devices.flat) == jax.local_devices()[:num_devices]


# A task whose loss is the value it was drawn as, and whose meta-gradient is one.


def uniform_task(key):
    level = jax.random.uniform(key, (1,))
    return fj.Task(level, level)


def of_level(params, task):
    level = task.query[0]
    finite = jnp.isfinite(level)
    grads = jnp.where(finite, jnp.ones_like(params), jnp.nan)
    return grads, fj.TaskInfo(level, level, finite, None)


def levels(step, num_tasks):
    return np.array([uniform_task(key).query[0] for key in task_keys(KEY, step, num_tasks)])


def run_levels(sample_task=uniform_task, **kwargs):
    return run(sample_task, optax.sgd(1.0), jnp.zeros(1), of_level, **kwargs)


def test_a_row_says_what_happened_since_the_last():
    rows = [row for _, row in run_levels(steps=203, tasks_per_step=2)]
    assert [row["step"] for row in rows] == [*range(2, 203, 2), 203]
    assert [row["tasks"] for row in rows] == [2 * row["step"] for row in rows]
    for row, steps in zip(rows, [[0, 1], [2, 3], [4, 5]], strict=False):
        seen = np.mean([levels(step, 2) for step in steps])
        np.testing.assert_allclose(row["loss"], seen, rtol=1e-5)
        assert row["grad_norm"] == 1
        assert row["left_out"] == 0
    np.testing.assert_allclose(rows[-1]["loss"], levels(202, 2).mean(), rtol=1e-5)


def test_every_step_is_taken_once():
    for params, row in run_levels(steps=203, tasks_per_step=2):
        assert params.item() == -row["step"]


def test_tasks_left_out_are_counted_and_harm_nobody(capsys):
    def sometimes_nan(key):
        return jax.tree.map(lambda x: jnp.where(x < 0.4, jnp.nan, x), uniform_task(key))

    trained = run_levels(sometimes_nan, steps=5, tasks_per_step=6)
    all_out = 0
    for step, (params, row) in enumerate(trained):
        drawn = levels(step, 6)
        assert row["left_out"] == (drawn < 0.4).sum()
        np.testing.assert_allclose(row["loss"], drawn[drawn >= 0.4].mean(), rtol=1e-5)
        assert params.item() == -(step + 1)
        all_out += row["left_out"]
    assert 0 < all_out < 30
    assert f"{all_out} tasks left out" in capsys.readouterr().err


def test_a_step_without_a_finite_task_changes_nothing():
    def always_nan(key):
        return jax.tree.map(lambda x: x * jnp.nan, uniform_task(key))

    (params, row), *_ = run_levels(always_nan, steps=1)
    assert params.item() == 0
    assert row == {"step": 1, "tasks": 4, "loss": 0, "grad_norm": 0, "left_out": 4}


def test_the_caller_may_stop_at_any_report(capsys):
    endless = training.meta_train(
        of_level, uniform_task, jnp.zeros(1), optax.sgd(1.0), KEY, steps=10**9, tasks_per_step=2
    )
    (params, row) = next(itertools.islice(endless, 1, None))
    endless.close()
    assert row["step"] == 1000
    assert params.item() == -1000
    assert capsys.readouterr().err.endswith("\n")


def test_the_bar_has_a_name_and_goes_to_standard_error(capsys):
    run_levels(steps=1, name="joint pre-training")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "joint pre-training: 100%" in captured.err
    assert "4.00/4.00" in captured.err


def test_every_report_and_the_start_keep_their_parameters():
    """The compiled step takes its state's buffers; nobody else's."""
    start = jax.tree.map(jnp.copy, PARAMS)
    reported = [params for params, _ in run(params=start)]
    for params in (start, *reported):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert_close(start, PARAMS, 0)


def test_a_tuned_step_is_the_same_step():
    plan = training.tune_training(FOMAML, SAMPLE, PARAMS, KEY, tasks_per_step=4)
    assert {trial.variant for trial in plan.trials} == {"as given", "unrolled"}
    tuned = run(meta_gradient=plan.meta_gradient, tasks_at_once=plan.tasks_at_once)
    assert_close(tuned[-1][0], run()[-1][0], 1e-5)
