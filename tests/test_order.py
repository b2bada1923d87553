"""The proof of the order, and the diagnosis of how far the orders are apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import OPTIMIZERS, assert_close, every, network, network_problem, one, quadratic

import fomaml_jax as fj

ORDERS = {"first": fj.fomaml, "second": fj.maml, "neither": fj.reptile}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("verdict", ORDERS)
@every("optimizer", OPTIMIZERS, "sgd", "adam")
def test_every_algorithm_is_recognised(verdict, optimizer):
    params, tasks = network_problem(1)
    args = (network, params, one(tasks), optimizer(), 3)
    meta_gradient = ORDERS[verdict](network, optimizer(), 3)
    assert fj.check_order(*args, meta_gradient).verdict == verdict


@pytest.mark.parametrize("verdict", ORDERS)
def test_so_is_one_that_adapts_a_part(verdict):
    params, tasks = network_problem(1)
    head = lambda path: path in ("w2", "b2")
    meta_gradient = ORDERS[verdict](network, optax.sgd(0.1), 3, trainable=head)
    args = (network, params, one(tasks), optax.sgd(0.1), 3, meta_gradient)
    assert fj.check_order(*args, trainable=head).verdict == verdict
    assert fj.check_order(*args).verdict == "neither"
    assert fj.check_order(*args[:-1], trainable=head).verdict == "first"


def test_gradients_may_come_in_any_form():
    params, tasks = network_problem(1)
    args = (network, params, one(tasks), optax.sgd(0.1), 2)
    grads, _ = fj.maml(network, optax.sgd(0.1), 2)(params, one(tasks))
    assert fj.check_order(*args, grads).verdict == "second"
    assert fj.check_order(*args, lambda params, task: grads).verdict == "second"


@pytest.mark.parametrize(
    ("tolerance", "verdict"), [(0.005, "neither"), (0.02, "first"), (0.2, "either")]
)
def test_agreement_is_within_the_tolerance(tolerance, verdict):
    given = quadratic, jnp.zeros(2), fj.Task(jnp.ones(2), -jnp.ones(2)), optax.sgd(0.1), 1
    by_hand = jnp.full(2, 0.1 - -1.0)  # second order has a factor of 0.9 more
    order = fj.check_order(*given, 1.01 * by_hand, tolerance=tolerance)
    assert order.verdict == verdict
    np.testing.assert_allclose((order.to_first, order.to_second), (0.01, 0.11 / 0.9), rtol=1e-3)


def test_the_librarys_own_is_first_order_and_says_so():
    params, tasks = network_problem(1)
    order = fj.check_order(network, params, one(tasks), optax.sgd(0.1), 3)
    assert order.verdict == "first"
    assert str(order).startswith("first order: ")
    assert order.to_first < 1e-5 < 1e-2 < order.to_second


@pytest.mark.usefixtures("standard_promotion")
def test_a_line_search_has_no_second_order_and_is_told_so():
    params, tasks = network_problem(1)
    inner = optax.lbfgs()
    with pytest.raises(ValueError, match=r"such as the line search of optax\.lbfgs: use fomaml"):
        fj.maml(network, inner, 1)(params, one(tasks))
    with pytest.raises(ValueError, match="second order differentiates through the inner loop"):
        fj.check_order(network, params, one(tasks), inner, 1)


@pytest.mark.makes_nans
def test_a_task_without_finite_gradients_is_of_no_order():
    params, tasks = network_problem(1)
    broken = jax.tree.map(lambda x: x * jnp.nan, one(tasks))
    with pytest.raises(ValueError, match="task has a loss or gradients that are not finite"):
        fj.check_order(network, params, broken, optax.sgd(0.1), 1)


def test_without_steps_the_orders_are_one():
    params, tasks = network_problem(1)
    assert fj.check_order(network, params, one(tasks), optax.sgd(0.1), 0).verdict == "either"


def test_gradients_of_other_parameters_are_refused():
    params, tasks = network_problem(1)
    with pytest.raises(ValueError, match="meta_gradient must have the structure"):
        fj.check_order(network, params, one(tasks), optax.sgd(0.1), 1, {"w": jnp.ones(1)})


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("part", [None, {"w1": False, "b1": False, "w2": True, "b2": True}])
def test_the_diagnosis_is_what_the_gradients_say(part):
    params, tasks = network_problem(3)
    given = network, optax.sgd(0.1), 2
    report = jax.jit(lambda p, t: fj.diagnose(network, p, t, optax.sgd(0.1), 2, trainable=part))(
        params, tasks
    )
    flat = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]
    firsts, seconds = (
        np.stack([flat(f(params, one(tasks, i))[0]) for i in range(3)])
        for f in (jax.jit(make(*given, trainable=part)) for make in (fj.fomaml, fj.maml))
    )

    def cosine(a, b):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    assert_close(report.cosine, cosine(firsts, seconds))
    assert_close(report.mean_cosine, cosine(firsts.mean(0), seconds.mean(0)))
    norms = [np.linalg.norm(grads, axis=-1) for grads in (firsts, seconds)]
    assert_close(report.norm_ratio, norms[0] / norms[1])

    @functools.partial(jax.jit, static_argnums=1)
    def loss_after(support, k):
        adapted, _ = fj.adapt(network, params, support, optax.sgd(0.1), k, trainable=part)
        return network(adapted, support)

    after = [[loss_after(one(tasks, i).support, k) for k in range(3)] for i in range(3)]
    assert_close(report.support_drop, -np.diff(np.mean(after, 0)))


def test_norms_beyond_float16_hide_nothing():
    def loss(params, batch):
        return 100 * jnp.sum((params - batch) ** 2)

    params = jnp.full(4, 2.0, jnp.float16)
    task = fj.Task(jnp.ones(4, jnp.float16), -jnp.ones(4, jnp.float16))
    given = loss, params, task, optax.sgd(1e-3), 1  # gradients of 560, whose squares overflow
    first, second = (make(loss, optax.sgd(1e-3), 1) for make in (fj.fomaml, fj.maml))
    assert fj.check_order(*given, first).verdict == "first"
    assert fj.check_order(*given, second).verdict == "second"
    assert fj.check_order(*given, lambda *at: first(*at)[0] * 0.9).verdict == "neither"
    of_tasks = jax.tree.map(lambda x: x[None], task)
    found = fj.diagnose(loss, params, of_tasks, optax.sgd(1e-3), 1)
    np.testing.assert_allclose((found.cosine[0], found.norm_ratio[0]), (1, 1.25), rtol=1e-2)
