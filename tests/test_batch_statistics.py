"""Queries normalised together or one at a time: the same network, another question."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close

import fomaml_jax as fj
from fomaml_jax.batch_statistics import Beside

NET = fj.models.conv4(ways=3, width=4)
PICTURES = np.random.default_rng(0).random((6, 12, 16, 16, 1), np.float32)


@jax.jit
def native(params, x) -> jax.Array:
    return jnp.asarray(NET.apply(params, x))


predict = fj.batch_statistics.one_at_a_time(fj.matmul_convolutions(native))


def loss(params, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y).mean()


def accuracy(params, batch):
    x, y = batch
    return jnp.mean(predict(params, x).argmax(-1) == y)


@pytest.fixture
def params():
    return jax.jit(NET.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))


sample_task = fj.tasks.episodes(PICTURES, ways=3, shots=1, queries=2)
sample_beside = fj.batch_statistics.beside_support(sample_task)


def test_each_query_is_predicted_in_a_batch_with_the_support_set(params):
    support, query = jnp.asarray(PICTURES[0, :5]), jnp.asarray(PICTURES[1, :4])
    found = predict(params, Beside(support, query))
    for i in range(4):
        batch = jnp.concatenate([support, query[i : i + 1]])
        assert_close(found[i], native(params, batch)[-1], 1e-5)
    # No other query has a say, where in the same batch it had one.
    others = jnp.concatenate([query[:1], query[:0:-1]])
    assert_close(predict(params, Beside(support, others))[0], found[0], 1e-5)
    together = [predict(params, query[:n])[0] for n in (2, 4)]
    assert np.abs(together[0] - together[1]).max() > 1e-3


@pytest.mark.parametrize("queries_at_once", [1, 3, 4])
def test_queries_at_once_change_nothing(params, queries_at_once):
    inputs = Beside(jnp.asarray(PICTURES[0, :5]), jnp.asarray(PICTURES[1, :4]))
    chunked = fj.batch_statistics.one_at_a_time(native, queries_at_once=queries_at_once)
    assert_close(chunked(params, inputs), predict(params, inputs), 1e-5)


def test_queries_at_once_bound_the_memory():
    def centred(weights, x):
        hidden = jnp.tanh(x @ weights)
        return (hidden - hidden.mean(0, keepdims=True)) @ weights.T

    inputs = Beside(jnp.ones((9, 8)), jnp.ones((64, 8)))

    def temporary_bytes(queries_at_once):
        chunked = fj.batch_statistics.one_at_a_time(centred, queries_at_once=queries_at_once)
        compiled = jax.jit(chunked).lower(jnp.ones((8, 128)), inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert 2 * temporary_bytes(1) < temporary_bytes(4)
    assert 2 * temporary_bytes(4) < temporary_bytes(16)


def test_other_inputs_are_predicted_together(params):
    x = jnp.asarray(PICTURES[0])
    assert_close(predict(params, x), native(params, x), 1e-5)


@pytest.mark.slow
def test_an_algorithm_learns_from_queries_one_at_a_time(params):
    task = sample_beside(jax.random.key(1))
    grads, info = jax.jit(fj.fomaml(loss, optax.sgd(0.1), 2))(params, task)
    adapted, _ = jax.jit(lambda p: fj.adapt(loss, p, task.support, optax.sgd(0.1), 2))(params)
    inputs, labels = task.query

    def by_hand(params):
        logits = [
            native(params, jnp.concatenate([inputs.support, query[None]]))[-1]
            for query in inputs.query
        ]
        return optax.softmax_cross_entropy_with_integer_labels(jnp.stack(logits), labels).mean()

    value, expected = jax.jit(jax.value_and_grad(by_hand))(adapted)
    assert_close(info.query_loss, value, 1e-5)
    assert_close(grads, expected, 1e-3)


def test_both_in_one_evaluation(params):
    def evaluated(metric_fn, sample):
        def adapt_fn(params, support):
            return fj.adapt(loss, params, support, optax.sgd(0.1), 1)[0]

        return fj.evaluate(adapt_fn, metric_fn, params, sample, jax.random.key(2), num_tasks=20)

    found = evaluated(fj.batch_statistics.both(accuracy), sample_beside)
    together = evaluated(accuracy, sample_task)
    separate = evaluated(accuracy, sample_beside)
    assert set(found.mean) == {"transductive", "one-at-a-time"}
    np.testing.assert_array_equal(found.per_task["transductive"], together.per_task)
    np.testing.assert_array_equal(found.per_task["one-at-a-time"], separate.per_task)
    assert not np.array_equal(together.per_task, separate.per_task)


def test_refusals(params):
    x = jnp.asarray(PICTURES[0])
    with pytest.raises(ValueError, match="nothing but their number of examples"):
        predict(params, Beside(x, x[:, :8]))
    with pytest.raises(ValueError, match="nothing but their number of examples"):
        predict(params, Beside(x, (x > 0).astype(jnp.uint8)))
    with pytest.raises(TypeError, match=r"query inputs must be a Beside.*beside_support"):
        fj.batch_statistics.both(accuracy)(params, (x, jnp.zeros(12, int)))
    alone = fj.batch_statistics.beside_support(lambda key: fj.Task(x, x))
    with pytest.raises(TypeError, match=r"support batch must be a pair \(inputs, targets\)"):
        alone(jax.random.key(0))


class Normalised(nn.Module):
    """A user's network with Flax's own batch normalisation."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.9)(nn.Dense(4)(x))
        return nn.Dense(1)(nn.tanh(x))


@pytest.mark.usefixtures("standard_promotion")
def test_running_statistics_of_every_inner_step():
    net, steps = Normalised(), 3
    x = jnp.linspace(-1, 1, 8)[:, None]
    variables = net.init(jax.random.key(0), x)

    def stateful(params, batch, statistics, key):
        out, updated = net.apply(
            {"params": params, "batch_stats": statistics}, batch[0], mutable=["batch_stats"]
        )
        return jnp.mean((out - batch[1]) ** 2), (updated["batch_stats"], None)

    _, info = fj.adapt(
        stateful, variables["params"], (x, x**2), optax.sgd(0.5), steps,
        has_state=True, state=fj.PerStep.like(variables["batch_stats"], steps),
    )  # fmt: skip
    found = info.state.steps["BatchNorm_0"]
    params = variables["params"]
    for k in range(steps):
        hidden = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None]
        assert_close(found["mean"][k], 0.1 * hidden.mean(0), 1e-5)
        assert_close(found["var"][k], 0.9 + 0.1 * hidden.var(0), 1e-5)
        plain = lambda p: stateful(p, (x, x**2), variables["batch_stats"], None)[0]
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(plain)(params))


def test_a_tasks_key_stays_with_it():
    def keyed(key):
        x, y = jnp.ones((2, 1)), jnp.ones(2)
        return fj.KeyedTask((x, y), (x, y), key)

    key = jax.random.key(3)
    task = fj.batch_statistics.beside_support(keyed)(key)
    assert isinstance(task, fj.KeyedTask)
    assert (task.key == key).all()


def test_no_queries_have_no_predictions():
    params = NET.init(jax.random.key(0), PICTURES[0])
    separately = fj.batch_statistics.one_at_a_time(native, queries_at_once=4)
    assert separately(params, Beside(PICTURES[0], PICTURES[0, :0])).shape == (0, 3)


def test_a_network_of_several_outputs():
    def centred(params, x):
        return {"sum": (x - x.mean()) + params, "twice": (2 * (x - x.mean()), x)}

    inputs = Beside(jnp.zeros(1), jnp.array([1.0, 3.0]))
    found = fj.batch_statistics.one_at_a_time(centred)(jnp.zeros(()), inputs)
    assert found["sum"].tolist() == [0.5, 1.5]
    assert [x.tolist() for x in found["twice"]] == [[1.0, 3.0], [1.0, 3.0]]
