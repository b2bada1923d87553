"""Losses that keep state and draw random numbers, in every algorithm and framework."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, network, network_problem, one

import fomaml_jax as fj

ALGORITHMS = {"fomaml": fj.fomaml, "maml": fj.maml, "reptile": fj.reptile}
algorithms = pytest.mark.parametrize("name", ALGORITHMS)
STEPS = 3


def counting(params, batch, state, key):
    """The network's loss; the state sums what was seen, and the aux is where a key shows."""
    seen = state + batch[0].sum()
    return network(params, batch), (seen, None if key is None else jax.random.uniform(key))


def problem(seed=0, num_tasks=1):
    params, tasks = network_problem(num_tasks)
    keys = jax.random.split(jax.random.key(seed), num_tasks)
    return fj.WithState(params, jnp.ones(())), fj.KeyedTask(*tasks, keys)


@pytest.mark.usefixtures("float64")
@algorithms
@pytest.mark.parametrize("keyed", [True, False])
def test_the_state_goes_from_step_to_step_and_back_to_the_shared_one(name, keyed):
    shared, tasks = problem()
    task = one(tasks) if keyed else fj.Task(*one(tasks)[:2])
    algorithm = ALGORITHMS[name]
    meta_gradient = algorithm(counting, optax.sgd(0.1), STEPS, has_state=True)
    grads, info = jax.jit(meta_gradient)(shared, task)
    plain, same = algorithm(network, optax.sgd(0.1), STEPS)(shared.params, task)
    assert_close(grads.params, plain)
    assert_close(info._replace(aux=None), same)
    last = 1 + STEPS * task.support[0].sum()
    if name != "reptile":  # whose parameters have not seen the query batch either
        last += task.query[0].sum()
    assert_close(grads.state, 1 - last)


def test_the_state_of_multi_step_losses_sees_one_query_batch_alone():
    shared, tasks = problem()
    weights = jnp.full(STEPS, 1 / STEPS)
    for algorithm in (fj.fomaml, fj.maml):
        plain, several = (
            algorithm(counting, optax.sgd(0.1), STEPS, has_state=True, step_weights=w)
            for w in (None, weights)
        )
        grads, _ = several(shared, one(tasks))
        assert_close(grads.state, plain(shared, one(tasks))[0].state, 1e-6)


def test_every_step_and_every_task_has_a_key_of_its_own():
    shared, tasks = problem(num_tasks=3)

    def of_task(task):
        _, info = fj.adapt(
            counting, shared.params, task.support, optax.sgd(0.1), STEPS,
            has_state=True, state=shared.state, key=task.key,
        )  # fmt: skip
        meta_gradient = fj.fomaml(counting, optax.sgd(0.1), STEPS, has_state=True)
        return jnp.append(info.aux, meta_gradient(shared, task)[1].aux)

    drawn = jax.vmap(of_task)(tasks)
    assert len(set(drawn.ravel().tolist())) == 3 * (STEPS + 1)
    np.testing.assert_array_equal(drawn[1], of_task(one(tasks, 1)))


def test_tasks_at_once_change_nothing():
    shared, tasks = problem(num_tasks=5)
    meta_gradient = fj.fomaml(counting, optax.sgd(0.1), STEPS, has_state=True)
    reference, info = fj.over_tasks(meta_gradient, tasks_at_once=None)(shared, tasks)
    for tasks_at_once in (1, 2):
        grads, same = fj.over_tasks(meta_gradient, tasks_at_once=tasks_at_once)(shared, tasks)
        assert_close(grads, reference, 1e-5)
        assert_close(same.aux, info.aux)


class Net(nn.Module):
    """Batch normalisation with running averages, and dropout."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.Dropout(0.2, deterministic=not train)(nn.tanh(x)))


@pytest.mark.usefixtures("standard_promotion")
def test_flax_batch_statistics_and_dropout():
    net = Net()
    _, tasks = network_problem(4, examples=32)
    variables = net.init(jax.random.key(0), jnp.ones((1, 1)), train=False)

    def loss(params, batch, batch_stats, key):
        out, updated = net.apply(
            {"params": params, "batch_stats": batch_stats},
            batch[0],
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return jnp.mean((out - batch[1]) ** 2), (updated["batch_stats"], None)

    meta_gradient = fj.over_tasks(fj.fomaml(loss, optax.sgd(0.1), 2, has_state=True))
    learner = fj.meta_learner(meta_gradient, fj.with_state(optax.adam(1e-2)))
    state = learner.init(fj.WithState(variables["params"], variables["batch_stats"]))
    keyed = fj.KeyedTask(*tasks, jax.random.split(jax.random.key(1), 4))
    state, info = jax.jit(
        lambda s: jax.lax.scan(lambda s, _: learner.step(s, keyed), s, length=30)
    )(state)
    assert info.loss[-1] < info.loss[0]
    learned = state.params
    x = jnp.concatenate([tasks.support[0].reshape(-1, 1), tasks.query[0].reshape(-1, 1)])
    hidden = x @ learned.params["Dense_0"]["kernel"] + learned.params["Dense_0"]["bias"][None]
    running = learned.state["BatchNorm_0"]
    np.testing.assert_allclose(running["mean"], hidden.mean(0), atol=0.3)
    np.testing.assert_allclose(running["var"], hidden.var(0), rtol=0.5)


def test_refusals():
    shared, tasks = problem()
    stateful = fj.fomaml(counting, optax.sgd(0.1), 1, has_state=True)
    with pytest.raises(TypeError, match="WithState"):
        stateful(shared.params, one(tasks))
    plain = fj.fomaml(lambda p, b, s, k: network(p, b), optax.sgd(0.1), 1, has_state=True)
    with pytest.raises(TypeError, match=r"must return \(loss, \(state, aux\)\)"):
        plain(shared, one(tasks))
    other = lambda p, b, s, k: (network(p, b), ((s, s), None))
    with pytest.raises(ValueError, match="loss_fn's state must have the structure"):
        fj.fomaml(other, optax.sgd(0.1), 1, has_state=True)(shared, one(tasks))
