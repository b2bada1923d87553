"""Inner loops that start elsewhere: prototypes, context parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, network, network_problem, one

import fomaml_jax as fj
from fomaml_jax.variants import variants_of


@pytest.mark.usefixtures("float64")
def test_logits_of_a_prototype_head_are_distances_to_class_means():
    rng = np.random.default_rng(0)
    features, labels = jnp.asarray(rng.normal(size=(9, 4))), jnp.asarray([0, 1, 2] * 3)
    kernel, bias = fj.prototype_head(features, labels, ways=3)
    query = jnp.asarray(rng.normal(size=(5, 4)))
    means = np.stack([features[labels == k].mean(0) for k in range(3)])
    squared = ((query[:, None] - means[None]) ** 2).sum(-1)
    assert_close(query @ kernel + bias[None], (query**2).sum(-1)[:, None] - squared)


def test_the_gradient_of_prototypes_is_stopped_and_absent_classes_are_finite():
    def total(features):
        kernel, bias = fj.prototype_head(features, jnp.array([0, 0]), ways=2)
        return kernel.sum() + bias.sum()

    assert (jax.grad(total)(jnp.ones((2, 3))) == 0).all()
    assert jnp.isfinite(total(jnp.ones((2, 3))))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [3.0, 300.0])
def test_nothing_is_taken_for_a_class_without_examples(dtype, size):
    """Where its mean would be, at the origin, there is none; 300 squared is beyond float16."""
    features = jnp.array([[size, 0.0], [0.0, size]], dtype)
    kernel, bias = fj.prototype_head(features, jnp.array([0, 1]), ways=3)
    logits = jnp.array([[9.0, 8.0], [0.0, 1.0]], dtype) @ kernel + bias[None]
    assert jnp.isfinite(bias).all()
    assert logits.argmax(1).tolist() == [0, 1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([2, 2]))
    assert jnp.isfinite(losses).all()


@pytest.mark.parametrize("sizes", [(150.0, 200.0), (100.0, 255.0), (300.0, 310.0)])
def test_classes_far_from_the_origin_are_told_apart_in_float16(sizes):
    features = jnp.array(sizes, jnp.float16)[:, None] / 8
    features = jnp.repeat(features, 64, axis=1)  # the means' norms are `sizes`
    kernel, bias = fj.prototype_head(features, jnp.array([0, 1]), ways=3)
    logits = (features / 8) @ kernel + bias[None] / 8  # an eighth: all of them in range
    assert logits.argmax(1).tolist() == [0, 1]
    between = logits[:, 1] - logits[:, 0]
    half = (sizes[1] - sizes[0]) ** 2 / 8
    np.testing.assert_allclose(between, [-half, half], atol=16)


@pytest.mark.usefixtures("float64")
def test_it_can_be_had_in_every_form_of_the_algorithm():
    params, tasks = network_problem(1)
    algorithm = fj.fomaml(network, optax.sgd(0.1), 2)
    started = fj.starting_from(lambda params, support: jax.tree.map(jnp.tanh, params), algorithm)
    expected, _ = started(params, one(tasks))
    forms = variants_of(started)
    assert set(forms) == set(variants_of(algorithm)) > {"as given"}
    for form in forms.values():
        assert_close(form(params, one(tasks))[0], expected, 1e-12)


@pytest.mark.usefixtures("float64")
def test_a_start_that_is_not_stopped_is_differentiated():
    params, tasks = network_problem(1)
    task = one(tasks)

    def halved(params, support):
        del support
        return {**params, "w1": params["w1"] / 2}

    inner = fj.maml(network, optax.sgd(0.1), 2)
    grads, _ = fj.starting_from(halved, inner)(params, task)
    direct, _ = inner(halved(params, None), task)
    assert_close(grads, {**direct, "w1": direct["w1"] / 2})


@pytest.mark.parametrize("prepare", [lambda p, s: {}, lambda p, s: {**p, "b2": jnp.zeros(3)}])
def test_refusals(prepare):
    params, tasks = network_problem(1)
    with pytest.raises(ValueError, match="prepare must have the structure"):
        fj.starting_from(prepare, fj.fomaml(network, optax.sgd(0.1), 1))(params, one(tasks))


def test_no_gradient_goes_through_the_prototypes():
    labels = jnp.array([0, 1, 1])

    def total(features):
        return sum(leaf.sum() for leaf in fj.prototype_head(features, labels, 2))

    np.testing.assert_array_equal(jax.grad(total)(jnp.full((3, 4), 3.0)), 0)


@pytest.mark.makes_nans
def test_a_task_whose_start_has_no_finite_gradient_is_left_out():
    """The inner loop is finite; the way back through the start is not, at a norm of zero."""

    def scaled(params, support):
        return {"w": params["w"] / (1 + jnp.sqrt(jnp.sum((params["w"] * support) ** 2)))}

    def loss(params, batch):
        return jnp.mean((params["w"] - batch) ** 2)

    algorithm = fj.starting_from(scaled, fj.fomaml(loss, optax.sgd(0.1), 1))
    support = jnp.array([[0.0, 0.0], [1.0, 2.0]])
    tasks = fj.Task(support, jnp.ones((2, 2)))
    params = {"w": jnp.ones(2)}
    grads, info = jax.jit(fj.over_tasks(algorithm))(params, tasks)
    assert info.finite.tolist() == [False, True]
    assert_close(grads, algorithm(params, one(tasks, 1))[0], 1e-6)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (jnp.array([[200], [200]], jnp.uint8), 400),
        (jnp.array([[True], [True]]), 2),
        (jnp.full((2000, 1), 50, jnp.float16), 100),
    ],
    ids=["uint8", "bool", "float16"],
)
def test_prototypes_of_numbers_in_few_bits(features, expected):
    kernel, bias = fj.prototype_head(features, jnp.zeros(len(features), int), ways=1)
    assert kernel.tolist() == [[expected]]
    assert bias.tolist() == [-(expected**2) / 4]


def test_gradients_in_more_bits_than_the_parameters():
    def in_full(params, task):
        info = fj.TaskInfo(jnp.zeros(()), jnp.zeros(1), jnp.array(True), None)
        return jnp.ones(2, jnp.float32), info

    algorithm = fj.starting_from(lambda params, support: 2 * params, in_full)
    grads, _ = algorithm(jnp.ones(2, jnp.bfloat16), fj.Task(jnp.ones(1), jnp.ones(1)))
    assert grads.dtype == jnp.bfloat16
    assert grads.tolist() == [2, 2]
