"""Reptile task by task, against its loop by hand."""

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
from problems import assert_close, network, network_problem, one

import fomaml_jax as fj


@pytest.mark.usefixtures("float64", "standard_promotion")
@pytest.mark.parametrize("keep", [False, True])
def test_each_task_starts_where_the_last_one_left(keep):
    params, tasks = network_problem(3)
    adam = optax.adam(0.05)
    learner = fj.serial_reptile(network, adam, 4, optax.sgd(0.5), keep_inner_state=keep)
    state, info = jax.jit(learner.step)(learner.init(params), tasks)
    theta, inner_state = params, adam.init(params)
    for i in range(3):
        phi = theta
        inner_state = inner_state if keep else adam.init(phi)
        for _ in range(4):
            grads = jax.grad(network)(phi, one(tasks, i).support)
            updates, inner_state = adam.update(grads, inner_state, phi)
            phi = optax.apply_updates(phi, updates)
        assert_close(info.tasks.query_loss[i], network(phi, one(tasks, i).query))
        theta = jax.tree.map(lambda t, p: t + 0.5 * (p - t), theta, phi)
    assert_close(state.params, theta)
    assert int(state.step) == 3


@pytest.mark.makes_nans
def test_a_task_that_diverges_changes_nothing():
    params, tasks = network_problem(3)
    broken = jax.tree.map(lambda x: x.at[1].set(jnp.nan), tasks)
    without = jax.tree.map(lambda x: x[jnp.array([0, 2])], tasks)
    learner = fj.serial_reptile(
        network, optax.sgd(0.1, momentum=0.9), 2, optax.sgd(0.5), keep_inner_state=True
    )
    state, info = learner.step(learner.init(params), broken)
    expected, _ = learner.step(learner.init(params), without)
    assert_close(state.params, expected.params, 1e-6)
    assert_close(state.opt_state, expected.opt_state, 1e-6)
    assert info.tasks.finite.tolist() == [True, False, True]
    assert int(info.num_finite) == 2


@pytest.mark.usefixtures("float64")
def test_a_minibatch_for_every_step():
    params, tasks = network_problem(3)  # three minibatches of one task
    adapted, info = fj.adapt(
        network, params, tasks.support, optax.sgd(0.1), 3, per_step_support=True
    )
    theta = params
    for k in range(3):
        assert_close(info.losses[k], network(theta, one(tasks, k).support))
        grads = jax.grad(network)(theta, one(tasks, k).support)
        theta = jax.tree.map(lambda t, g: t - 0.1 * g, theta, grads)
    assert_close(adapted, theta)
    reptile = fj.reptile(network, optax.sgd(0.1), 3, per_step_support=True)
    grads, _ = reptile(params, tasks._replace(query=one(tasks).query))
    assert_close(grads, jax.tree.map(jnp.subtract, params, theta))


def test_minibatches_for_another_number_of_steps_are_refused():
    params, tasks = network_problem(3)
    with pytest.raises(ValueError, match="must lead with num_steps=4"):
        fj.adapt(network, params, tasks.support, optax.sgd(0.1), 4, per_step_support=True)


@pytest.mark.usefixtures("standard_promotion")
def test_the_outer_optimizer_is_told_the_loss():
    params, tasks = network_problem(3)
    plateau = optax.chain(optax.sgd(0.5), optax.contrib.reduce_on_plateau(patience=1))
    learner = fj.serial_reptile(network, optax.sgd(0.1), 2, plateau)
    state, info = jax.jit(learner.step)(learner.init(params), tasks)
    (_, seen), _ = state.opt_state
    assert_close(seen.best_value, info.tasks.query_loss.min(), 1e-6)


def test_a_norm_beyond_float16_is_no_divergence():
    """Of 300,000 finite gradients of a half."""
    params = jnp.zeros(300_000, jnp.float16)
    loss = lambda theta, batch: jnp.sum((theta - batch).astype(jnp.float32) ** 2) / 2
    tasks = fj.Task(jnp.ones((1, 1), jnp.float16), jnp.ones((1, 1), jnp.float16))
    serial = fj.serial_reptile(loss, optax.sgd(0.5), 1, optax.sgd(1.0))
    at_once = fj.meta_learner(fj.over_tasks(fj.reptile(loss, optax.sgd(0.5), 1)), optax.sgd(1.0))
    for learner in (serial, at_once):
        state, info = learner.step(learner.init(params), tasks)
        assert int(info.num_finite) == 1
        assert state.params[0] == 0.5
        assert_close(info.grad_norm, 0.5 * 300_000**0.5, 1e-5)


def test_each_device_its_own_tasks_from_a_shared_start():
    params, tasks = network_problem(2)
    learner = fj.serial_reptile(network, optax.sgd(0.1), 2, optax.sgd(0.5))
    state = learner.init(params)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    one_each, shared = jax.P("d"), jax.P()

    def of_a_device(state, tasks):
        return learner.step(state, tasks)[1].loss[None]

    losses = jax.shard_map(of_a_device, mesh=mesh, in_specs=(shared, one_each), out_specs=one_each)(
        state, tasks
    )
    for i in range(2):
        mine = jax.tree.map(lambda x, i=i: x[i : i + 1], tasks)
        assert_close(losses[i], learner.step(state, mine)[1].loss, 1e-6)


def test_what_is_no_task_is_refused_as_elsewhere():
    loss = lambda params, batch: jnp.mean((params - batch) ** 2)
    learner = fj.serial_reptile(loss, optax.sgd(0.1), 1, optax.sgd(1.0))
    state = learner.init(jnp.zeros(()))
    with pytest.raises(ValueError, match="query is empty"):
        learner.step(state, fj.Task(jnp.ones((2, 3)), jnp.ones((2, 0))))
    with pytest.raises(TypeError, match="task must be a"):
        learner.step(state, jnp.ones((2, 3)))


@pytest.mark.usefixtures("standard_promotion")
def test_an_inner_optimizer_that_keeps_the_parameters_can_be_donated():
    params, tasks = network_problem(2)
    inner = optax.contrib.prodigy(0.1)
    learner = fj.serial_reptile(network, inner, 1, optax.sgd(0.1), keep_inner_state=True)
    step = jax.jit(learner.step, donate_argnums=0)
    state, _ = step(learner.init(jax.tree.map(jnp.copy, params)), tasks)
    assert_close(state.params, learner.step(learner.init(params), tasks)[0].params, 1e-6)
