"""Problems that tests share: a quadratic whose every answer is known, and a small network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fomaml_jax as fj

# Every kind of inner optimizer: plain, with state, with weight decay, with a rate that changes.
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.05, eps_root=1e-8),
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1, eps_root=1e-8),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    "scheduled": lambda: optax.sgd(optax.piecewise_constant_schedule(0.1, {2: 0.5})),
}


def every(name, table, *quick):
    """Runs a test on a whole table: on the rows named here, and with `-m slow` on the others."""
    rows = [
        pytest.param(value, id=key, marks=() if key in quick else pytest.mark.slow)
        for key, value in table.items()
    ]
    assert len(quick) == sum(not row.marks for row in rows)
    return pytest.mark.parametrize(name, rows)


@functools.partial(jax.jit, inline=True)  # one program where it is called as it is, not ten
def quadratic(params, batch):
    """Half the squared distance of the parameters from the batch's centre."""
    apart = jax.tree.map(lambda p, c: jnp.sum((p - c) ** 2), params, batch)
    return 0.5 * sum(jax.tree.leaves(apart))


def quadratic_problem(seed=0):
    rng = np.random.default_rng(seed)

    def tree():
        return {"a": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.asarray(rng.normal(size=4))}

    return tree(), fj.Task(support=tree(), query=tree())


@functools.partial(jax.jit, inline=True)
def network(params, batch):
    """Mean squared error of a network with one hidden layer."""
    x, y = batch
    hidden = jnp.tanh(x @ params["w1"] + params["b1"][None])
    return jnp.mean((hidden @ params["w2"] + params["b2"][None] - y) ** 2)


def network_problem(num_tasks, seed=0, examples=6, width=8, dtype=None):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype or jnp.result_type(float))

    params = {"w1": draw(1, width), "b1": draw(width), "w2": draw(width, 1), "b2": draw(1)}
    batch = lambda: (draw(num_tasks, examples, 1), draw(num_tasks, examples, 1))
    return params, fj.Task(support=batch(), query=batch())


def one(tasks, index=0):
    return jax.tree.map(lambda x: x[index], tasks)


def assert_close(actual, expected, tolerance=1e-10):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance)
