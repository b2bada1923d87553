"""Tasks of uneven size: padding has no influence at all, and weights count as examples do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, network_problem, one

import fomaml_jax as fj

NET = fj.models.conv4(ways=3, width=4)


def image_loss(params, batch):
    (x, y), weights = batch
    each = optax.softmax_cross_entropy_with_integer_labels(NET.apply(params, x, weights), y)
    return fj.uneven.weighted_mean(each, weights)


def image_task(seed, shots, queries):
    rng = np.random.default_rng(seed)

    def batch(n):
        x = jnp.asarray(rng.random((3 * n, 28, 28, 1), np.float32))
        return x, jnp.asarray(np.tile(np.arange(3), n))

    return fj.Task(batch(shots), batch(queries))


PARAMS = jax.jit(NET.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
FOMAML = jax.jit(fj.fomaml(image_loss, optax.sgd(0.1), 2))


def alone(task):
    """One task, with weights of one and no padding."""
    return one(fj.uneven.stack_tasks([task]))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("content", [7.0, np.nan, np.inf])
def test_padding_has_exactly_no_influence(content):
    tasks = fj.uneven.stack_tasks([image_task(0, 1, 2), image_task(1, 3, 1)])
    grads, info = FOMAML(PARAMS, one(tasks))

    def filled(batch):
        (x, y), weights = batch
        real = weights.reshape(-1, 1, 1, 1) > 0
        return (jnp.where(real, x, content), jnp.where(weights > 0, y, 2)), weights

    same, again = FOMAML(PARAMS, fj.Task(*map(filled, one(tasks))))
    for a, b in zip(jax.tree.leaves((grads, info)), jax.tree.leaves((same, again)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_uneven_tasks_in_one_program_are_what_each_is_alone():
    several = [image_task(0, 1, 2), image_task(1, 3, 1), image_task(2, 2, 2)]
    each = [FOMAML(PARAMS, alone(task))[0] for task in several]

    def plain_loss(params, batch):
        logits = NET.apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    plain, _ = jax.jit(fj.fomaml(plain_loss, optax.sgd(0.1), 2))(PARAMS, several[0])
    assert_close(each[0], plain, 1e-5)
    per_task = fj.fomaml(fj.matmul_convolutions(image_loss), optax.sgd(0.1), 2)
    together, _ = jax.jit(fj.over_tasks(per_task))(PARAMS, fj.uneven.stack_tasks(several))
    assert_close(together, jax.tree.map(lambda *g: sum(g) / 3, *each), 1e-5)


def test_a_weight_of_two_is_the_example_twice():
    (x, y), query = image_task(0, 2, 1)
    weights = jnp.array([2.0, 1, 1, 1, 1, 0])
    twice = jnp.array([0, 0, 1, 2, 3, 4])
    query = alone(fj.Task(query, query)).query
    weighted, _ = FOMAML(PARAMS, fj.Task(((x, y), weights), query))
    repeated, _ = FOMAML(PARAMS, fj.Task(((x[twice], y[twice]), jnp.ones(6)), query))
    assert_close(weighted, repeated, 1e-5)


@pytest.mark.makes_nans
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("tasks_at_once", [1, 2, None])
def test_the_mean_over_tasks_by_weight(tasks_at_once):
    def loss(params, batch):
        return 0.5 * jnp.sum((params - batch["centre"]) ** 2)

    centres = jnp.arange(10.0).reshape(5, 2)
    weights = jnp.array([1.0, 0.0, 2.0, 3.0, 5.0])
    batch = {"centre": centres.at[3].set(jnp.nan), "count": weights}
    over_tasks = fj.over_tasks(
        fj.fomaml(loss, optax.sgd(0.5), 1),
        tasks_at_once=tasks_at_once,
        task_weight=lambda task: task.query["count"],
    )
    grads, info = jax.jit(over_tasks)(jnp.zeros(2), fj.Task(batch, batch))
    each = -centres / 2
    expected = (each[0] + 2 * each[2] + 5 * each[4]) / 8
    assert_close(grads, expected)
    assert info.finite.tolist() == [True, True, True, False, True]


def test_no_weight_at_all_is_a_zero_gradient():
    params, tasks = network_problem(2)
    loss = lambda params, batch: jnp.sum(params["w1"] ** 2)
    over_tasks = fj.over_tasks(fj.fomaml(loss, optax.sgd(0.1), 1), task_weight=lambda task: 0.0)
    assert (over_tasks(params, tasks)[0]["w1"] == 0).all()
    assert fj.uneven.weighted_mean(jnp.ones(2), jnp.zeros(2)) == 0
    assert fj.uneven.weighted_mean(jnp.ones((0, 3)), jnp.ones(0)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fj.uneven.pad_batch(jnp.ones(3), 2), "3 examples, more than size=2"),
        (lambda: fj.uneven.pad_batch((jnp.ones(3), jnp.ones(2)), 4), "leads with 2 examples"),
        (
            lambda: fj.uneven.pad_batch(jnp.ones(3), 3.5),
            "size must be an integer of at least 1, got",
        ),  # pyright: ignore[reportArgumentType]
        (lambda: fj.uneven.stack_tasks([]), "tasks is empty"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.makes_nans
@pytest.mark.parametrize("content", [jnp.nan, jnp.inf, 1e38])
def test_a_weighted_mean_does_not_see_what_has_no_weight(content):
    values = jnp.array([[1.0, 3.0], [content, content], [5.0, 7.0]])
    assert fj.uneven.weighted_mean(values, jnp.array([3.0, 0.0, 1.0])) == 3.0
    assert fj.uneven.weighted_mean(values, jnp.zeros(3)) == 0.0


@pytest.mark.parametrize("dtype", [jnp.bool, jnp.int32, jnp.float32])
def test_hits_and_misses_have_their_weights(dtype):
    mean = fj.uneven.weighted_mean(jnp.array([1, 0], dtype), jnp.array([0.5, 1.5]))
    assert mean.dtype == jnp.float32
    assert float(mean) == 0.25


def test_keys_stay_with_their_tasks():
    keys = jax.random.split(jax.random.key(0), 2)
    tasks = [fj.KeyedTask(jnp.ones((n, 1)), jnp.ones((3, 1)), keys[n - 1]) for n in (1, 2)]
    stacked = fj.uneven.stack_tasks(tasks)
    assert isinstance(stacked, fj.KeyedTask)
    assert (stacked.key == keys).all()


@pytest.mark.parametrize(
    ("count", "value", "dtype"),
    [(100, 1000, jnp.float16), (70_000, 0.5, jnp.float16), (257, 3, jnp.bfloat16)],
)
def test_a_mean_of_few_bits_neither_overflows_nor_stands_still(count, value, dtype):
    found = fj.uneven.weighted_mean(jnp.full(count, value, dtype), jnp.ones(count))
    assert (found, found.dtype) == (value, dtype)


def test_weights_that_are_not_one_an_example_are_refused():
    for values, weights in [((4, 1), (4, 1)), ((4,), (1,)), ((), ())]:
        with pytest.raises(ValueError, match=r"weights must be one an example"):
            fj.uneven.weighted_mean(jnp.ones(values), jnp.ones(weights))


def test_empty_batches_are_refused():
    task = fj.Task(jnp.ones((2, 1)), ())
    with pytest.raises(ValueError, match="query holds no arrays"):
        fj.uneven.stack_tasks([task, task])


def test_examples_with_keys_are_padded():
    keys = jax.random.split(jax.random.key(0), 3)
    batch, weights = fj.uneven.pad_batch({"x": jnp.ones(3), "key": keys}, 5)
    assert batch["key"].shape == batch["x"].shape == (5,)
    assert (batch["key"][:3] == keys).all()
    assert weights.tolist() == [1, 1, 1, 0, 0]


def test_weights_may_be_a_list():
    assert fj.uneven.weighted_mean(jnp.array([1.0, 3.0]), [1.0, 0.0]) == 1


def test_integers_that_would_wrap_around_are_refused():
    with pytest.raises(ValueError, match="batch holds numbers that are beyond int32, so shift or"):
        fj.uneven.pad_batch(np.array([0, 2**40]), 3)
    missing = np.array([1.0, np.nan])
    np.testing.assert_array_equal(fj.uneven.pad_batch(missing, 2)[0], missing)
