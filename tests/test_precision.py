"""`compute_in`: fewer bits inside, full precision outside."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import network, network_problem

import fomaml_jax as fj


def problem():
    params, tasks = network_problem(1)
    one_task = jax.tree.map(lambda x: x[0], tasks)
    return jax.tree.map(lambda x: x.astype(jnp.float32), (params, one_task))


def test_inside_is_half_and_outside_is_full():
    seen = []

    def loss(params, batch):
        seen.extend([params["w"].dtype.name, batch["x"].dtype.name, batch["keep"]])
        return jnp.sum(params["w"] * batch["x"]), batch["label"]

    params = {"w": jnp.arange(3.0)}
    batch = {"x": jnp.ones(3), "label": jnp.arange(3), "keep": 2.5}
    (value, labels), grads = jax.value_and_grad(fj.compute_in(jnp.bfloat16, loss), has_aux=True)(
        params, batch
    )
    assert seen == ["bfloat16", "bfloat16", 2.5]
    assert (value.dtype, labels.dtype, grads["w"].dtype) == (jnp.float32, jnp.int32, jnp.float32)


def test_arguments_by_name_are_as_those_by_place():
    """A running average moves by less than bfloat16 can hold, however it is given."""

    def loss(params, batch, state, key):
        assert params.dtype == batch.dtype == jnp.bfloat16
        return jnp.sum(params * batch), (0.999 * state + 0.001 * key, None)

    few = fj.compute_in(jnp.bfloat16, loss)
    params, state, key = jnp.ones(2), jnp.full((), 100.0), jnp.full((), 101.0)
    expected = few(params, params, state, key)
    assert expected[1][0] == pytest.approx(100.001, abs=1e-4)
    by_name = few(params=params, batch=params, state=state, key=key)
    assert (by_name, few(params, params, state=state, key=key)) == (expected, expected)


def test_small_updates_do_not_vanish():
    """1 - 0.01 * 0.1 stays 1 in bfloat16."""
    loss = fj.compute_in(jnp.bfloat16, lambda w, x: jnp.sum(w * x))
    adapted, _ = fj.adapt(loss, jnp.ones(1), jnp.full(1, 0.1), optax.sgd(0.01), 5)
    np.testing.assert_allclose(adapted, 1 - 5 * 0.001, rtol=1e-4)


@pytest.mark.parametrize("algorithm", [fj.fomaml, fj.maml, fj.reptile])
def test_meta_gradients_agree_to_the_bits_that_are_left(algorithm):
    params, task = problem()
    full, _ = algorithm(network, optax.sgd(0.05), 2)(params, task)
    half, _ = algorithm(fj.compute_in(jnp.bfloat16, network), optax.sgd(0.05), 2)(params, task)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(full))
    for one, other in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, atol=0.02 * largest)


def test_float32_changes_nothing():
    params, task = problem()
    same = fj.compute_in(jnp.float32, network)(params, task.support)
    assert same == network(params, task.support)


def test_composes_with_matmul_convolutions():
    def loss(kernel, images):
        return jnp.sum(
            jax.lax.conv_general_dilated(
                images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )

    images, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))
    for wrapped in (
        fj.matmul_convolutions(fj.compute_in(jnp.bfloat16, loss)),
        fj.compute_in(jnp.bfloat16, fj.matmul_convolutions(loss)),
    ):
        assert "conv_general_dilated" not in str(jax.make_jaxpr(jax.grad(wrapped))(kernel, images))
        np.testing.assert_allclose(
            jax.grad(wrapped)(kernel, images), jax.grad(loss)(kernel, images), rtol=1e-2
        )


def test_refusals():
    with pytest.raises(TypeError, match="floating-point"):
        fj.compute_in(jnp.int32, network)
    with pytest.raises(TypeError, match=r"^fn must be a function"):
        fj.compute_in(jnp.bfloat16, 3)


def test_numpy_batches_are_cast_too():
    seen = fj.compute_in(jnp.bfloat16, lambda w, x: (w.dtype.name, x.dtype.name))(
        np.ones(2, np.float32), np.ones(2, np.float32)
    )
    assert seen == ("bfloat16", "bfloat16")


def test_arguments_given_by_name_are_cast_too():
    names = fj.compute_in(jnp.bfloat16, lambda w, x, n: (w.dtype.name, x.dtype.name, n.dtype.name))
    found = names(jnp.ones(2), x=jnp.ones(2), n=jnp.arange(2))
    assert found == ("bfloat16", "bfloat16", "int32")


def test_the_state_of_a_loss_stays_in_full():
    """A running average that is moved by less than bfloat16 tells apart, and a count beyond 256."""

    def loss(params, batch, state, key):
        mean = 0.999 * state["mean"] + 0.001 * batch.mean()
        return jnp.mean((params - batch) ** 2), ({"mean": mean, "n": state["n"] + 1}, None)

    with jax.numpy_dtype_promotion("standard"):
        state = fj.adapt(
            fj.compute_in(jnp.bfloat16, loss),
            jnp.zeros(()),
            jnp.full(4, 2.0),
            optax.sgd(0.01),
            1000,
            has_state=True,
            state={"mean": jnp.ones(()), "n": jnp.zeros(())},
            key=jax.random.key(0),
        )[1].state
    assert int(state["n"]) == 1000
    np.testing.assert_allclose(state["mean"], 2 - 0.999**1000, rtol=1e-3)


def test_support_losses_in_few_bits_are_reported_as_they_are():
    def loss(params, batch):
        return 100.0 + jnp.mean((params - batch) ** 2)

    learner = fj.meta_learner(fj.over_tasks(fj.fomaml(loss, optax.sgd(0.1), 1)), optax.sgd(0.1))
    ones = lambda key: fj.Task(*[jnp.ones(2, jnp.float16)] * 2)
    trained = fj.train(
        *(learner, jnp.zeros((), jnp.float16), ones, jax.random.key(0)),
        tasks_per_step=1000,
        steps=1,
        name=None,
    )
    (row,) = trained.metrics  # the sum over tasks is beyond float16
    np.testing.assert_allclose(row["support_loss_first"], 101.0, rtol=1e-6)


def test_what_a_function_takes_by_any_name_stays_as_it_is():
    """Only its first two arguments are cast, also where the names of others are not known."""
    dtypes = []

    def recorded(params, x, **others):
        dtypes.extend([x.dtype, others["mask"].dtype])
        return jnp.zeros(())

    fj.compute_in(jnp.bfloat16, recorded)(jnp.ones(3), x=jnp.ones(3), mask=jnp.ones(3))
    assert dtypes == [jnp.bfloat16, jnp.float32]
