"""The inner loop by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from problems import OPTIMIZERS, assert_close, network, network_problem, one

import fomaml_jax as fj

optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)

# Those whose state is made of the parameters, too.
KEEPING = {
    "dog": lambda: optax.contrib.dog(init_step=("distance", 0.1)),
    "schedule free": lambda: optax.contrib.schedule_free_sgd(0.1),
}


@pytest.mark.usefixtures("float64", "standard_promotion")
@optimizers
def test_takes_the_optimizers_steps(optimizer):
    params, tasks = network_problem(1)
    support = one(tasks).support
    adapted, info = fj.adapt(network, params, support, optimizer(), 4)
    theta, state, losses = params, optimizer().init(params), []
    for _ in range(4):
        loss, grads = jax.value_and_grad(network)(theta, support)
        updates, state = optimizer().update(grads, state, theta)
        theta = optax.apply_updates(theta, updates)
        losses.append(loss)
    assert_close(adapted, theta)
    assert_close(info.losses, jnp.stack(losses))


@pytest.mark.usefixtures("float64", "standard_promotion")
@pytest.mark.parametrize("optimizer", (OPTIMIZERS | KEEPING).values(), ids=OPTIMIZERS | KEEPING)
def test_first_order_derivative_is_the_identity(optimizer):
    params, tasks = network_problem(1, width=3)
    flat, unflatten = jax.flatten_util.ravel_pytree(params)

    def adapted(flat):
        theta, _ = fj.adapt(network, unflatten(flat), one(tasks).support, optimizer(), 3)
        return jax.flatten_util.ravel_pytree(theta)[0]

    identity = np.eye(flat.size)
    np.testing.assert_array_equal(jax.jacrev(adapted)(flat), identity)
    np.testing.assert_array_equal(jax.jacfwd(adapted)(flat), identity)


def test_inner_gradients_are_constants_of_what_the_loss_closes_over_too():
    """Such as features of a network outside, or a centre that is learned."""

    def adapted(centre, first_order):
        loss = lambda theta, batch: 0.5 * jnp.sum((theta - centre * batch) ** 2)
        theta, _ = fj.adapt(
            loss, jnp.zeros(1), jnp.ones(1), optax.sgd(0.5), 1, first_order=first_order
        )
        return theta[0]

    assert jax.grad(adapted)(1.0, True) == 0
    assert jax.grad(adapted)(1.0, False) == 0.5


def test_batches_of_numpy_are_batches_of_jax():
    """Also where there is no loop that would make them so."""
    pick = lambda params, batch: (params - batch[jnp.argmin(params[None])]).sum() ** 2
    support = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    theta, sgd = jnp.zeros(()), optax.sgd(0.1)
    expected, _ = fj.adapt(pick, theta, jnp.asarray(support), sgd, 3, per_step_support=True)
    assert_close(fj.adapt(pick, theta, support, sgd, 3, per_step_support=True)[0], expected)
    task = fj.Task(support[:1], support[:1])
    for found in (fj.fomaml(pick, sgd, 0), fj.maml(pick, sgd, 0), fj.reptile(pick, sgd, 0)):
        assert found(theta, task)[1].finite
    tasks = jax.tree.map(lambda x: x[None], task)
    assert fj.over_tasks(fj.fomaml(pick, sgd, 1))(theta, tasks)[1].finite.all()


def test_aux_of_every_step():
    params, tasks = network_problem(1)
    with_path = lambda params, batch: (network(params, batch), params)
    support = one(tasks).support
    adapted, info = fj.adapt(with_path, params, support, optax.sgd(0.1), 3, has_aux=True)
    for k in range(3):
        expected, _ = fj.adapt(network, params, support, optax.sgd(0.1), k)
        assert_close(one(info.aux, k), expected, 1e-6)
    assert_close(adapted, fj.adapt(network, params, support, optax.sgd(0.1), 3)[0], 1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_low_precision_parameters_keep_their_dtype():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    loss = lambda params, batch: jnp.mean((params["w"].astype(jnp.float32) - batch) ** 2)
    adapted, _ = fj.adapt(loss, params, jnp.zeros(3), optax.adam(0.1), 2)
    assert adapted["w"].dtype == jnp.bfloat16


def test_any_pytree_of_parameters():
    params = (jnp.ones(2), [{"deep": jnp.ones(())}])
    loss = lambda p, batch: jnp.sum((p[0] - batch) ** 2) + p[1][0]["deep"] ** 2
    adapted, _ = fj.adapt(loss, params, jnp.zeros(2), optax.sgd(0.5), 1)
    assert jax.tree.structure(adapted) == jax.tree.structure(params)
    assert_close(adapted, jax.tree.map(jnp.zeros_like, params))
