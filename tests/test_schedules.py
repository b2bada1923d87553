"""What changes over the outer steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, network, network_problem, quadratic

import fomaml_jax as fj


@pytest.mark.parametrize(("num_steps", "until"), [(1, 10), (5, 10)])
def test_step_weights_go_from_equal_to_the_last_alone(num_steps, until):
    """Against MAML++'s code, epoch by epoch: its weights, and from `until` on the last alone."""
    for epoch in range(2 * until):
        expected = np.full(num_steps, 1 / num_steps)
        for i in range(num_steps - 1):
            expected[i] = max(1 / num_steps - epoch / num_steps / until, 0.03 / num_steps)
        last = 1 / num_steps + epoch * (num_steps - 1) / num_steps / until
        expected[-1] = min(last, 1 - (num_steps - 1) * 0.03 / num_steps)
        if epoch >= until:
            expected = np.eye(num_steps)[-1]
        ours = jax.jit(lambda step: fj.schedules.multi_step_weights(num_steps, step, until))(epoch)
        np.testing.assert_allclose(ours, expected, atol=1e-6)
        np.testing.assert_allclose(ours.sum(), 1, atol=1e-6)


def trained(learner, params, tasks, steps):
    state = learner.init(params)
    return jax.lax.scan(lambda s, _: learner.step(s, tasks), state, length=steps)[0]


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_first_order_then_second_in_one_run():
    params, tasks = network_problem(3)
    orders = [fj.over_tasks(f(network, optax.sgd(0.1), 2)) for f in (fj.fomaml, fj.maml)]
    annealed = fj.scheduled_learner(
        fj.schedules.first_then_second_order(*orders, 2), optax.adam(0.01)
    )
    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(lambda p: trained(annealed, p, tasks, 5))(params)
        by_hand = fj.meta_learner(orders[0], optax.adam(0.01)).init(params)
        for step in range(5):
            learner = fj.meta_learner(orders[step >= 2], optax.adam(0.01))
            by_hand, _ = learner.step(by_hand, tasks)
    assert_close(state, by_hand)


@pytest.mark.makes_nans
@pytest.mark.parametrize("of_first", ["skip", "propagate"])
@pytest.mark.parametrize("of_second", ["skip", "propagate"])
def test_annealing_hides_nothing_that_its_order_is_to_propagate(of_first, of_second):
    first = fj.over_tasks(fj.fomaml(quadratic, optax.sgd(0.1), 1), on_nonfinite=of_first)
    second = fj.over_tasks(fj.maml(quadratic, optax.sgd(0.1), 1), on_nonfinite=of_second)
    learner = fj.scheduled_learner(
        fj.schedules.first_then_second_order(first, second, 0), optax.sgd(0.1)
    )
    broken = jnp.full((2, 3), jnp.nan)
    state, _ = jax.jit(learner.step)(learner.init(jnp.ones(3)), fj.Task(broken, broken))
    assert np.isnan(state.params).all() == (of_second == "propagate")


@pytest.mark.usefixtures("float64")
def test_weights_that_follow_the_outer_step():
    params, tasks = network_problem(3)

    def at(step):
        weights = fj.schedules.multi_step_weights(2, step, until=4).astype(jnp.float64)
        return fj.over_tasks(fj.fomaml(network, optax.sgd(0.1), 2, step_weights=weights))

    state = trained(fj.scheduled_learner(at, optax.sgd(0.1)), params, tasks, 3)
    by_hand = fj.meta_learner(at(0), optax.sgd(0.1)).init(params)
    for step in range(3):
        by_hand, _ = fj.meta_learner(at(jnp.array(step)), optax.sgd(0.1)).step(by_hand, tasks)
    assert_close(state, by_hand)


@pytest.mark.makes_nans
def test_a_step_without_inner_steps_leaves_the_reported_support_losses_alone():
    def at(step):
        return fj.over_tasks(fj.fomaml(quadratic, optax.sgd(0.5), jnp.minimum(step, 3)))

    rows = []
    fj.train(
        fj.scheduled_learner(at, optax.sgd(0.1)),
        jnp.zeros(1),
        lambda key: fj.Task(*jax.random.normal(key, (2, 1))),
        jax.random.key(0),
        tasks_per_step=2,
        steps=20,
        report_every=10,
        name=None,
        on_report=lambda row, params: rows.append(row),
    )
    assert len(rows) == 2
    assert all(np.isfinite(row["support_loss_first"]) for row in rows)
