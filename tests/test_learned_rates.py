"""Inner rates as parameters: trees, optimizers, gradients, reports, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, network, network_problem, one, quadratic

import fomaml_jax as fj


@pytest.mark.usefixtures("float64", "standard_promotion")
def test_any_optimizer_made_from_numbers():
    params, tasks = network_problem(1)
    task = one(tasks)

    def adam(numbers):
        return optax.adam(numbers["rate"], b1=numbers["b1"], eps_root=1e-8)

    def by_hand(numbers):
        stop = jax.lax.stop_gradient
        theta, state = params, adam(numbers).init(params)
        for _ in range(3):
            grads = stop(jax.grad(network)(theta, task.support))
            updates, state = adam(numbers).update(grads, state, stop(theta))
            theta = optax.apply_updates(theta, updates)
        return network(theta, task.query)

    numbers = {"rate": jnp.array(0.05), "b1": jnp.array(0.8)}
    meta_gradient = jax.jit(fj.learned_rates(network, adam, 3))
    grads, _ = meta_gradient(fj.WithRates(params, numbers), task)
    assert_close(grads.rates, jax.jit(jax.grad(by_hand))(numbers))


@pytest.mark.usefixtures("float64")
def test_rates_in_logarithms_stay_positive():
    params, tasks = network_problem(4)

    def sgd(logs):
        return fj.rates.scale_by_rates(jax.tree.map(jnp.exp, logs))

    learner = fj.meta_learner(
        fj.over_tasks(fj.learned_rates(network, sgd, 2)),
        optax.sgd(1.0),  # far too large a step
    )
    logs = jax.tree.map(jnp.log, fj.rates.like(params, 0.1))
    state, _ = learner.step(learner.init(fj.WithRates(params, logs)), tasks)
    assert all((jnp.exp(x) > 0).all() for x in jax.tree.leaves(state.params.rates))
    assert state.params.rates["w2"] != logs["w2"]


def test_no_backward_pass_through_the_losses():
    """What is kept of a step is its gradient: nothing grows with the examples."""

    def temporary_bytes(examples, num_steps):
        params, tasks = network_problem(1, examples=examples, width=64, dtype=jnp.float32)
        shared = fj.WithRates(params, fj.rates.like(params, 0.1))
        program = jax.jit(fj.meta_sgd(network, num_steps)).lower(shared, one(tasks)).compile()
        return program.memory_analysis().temp_size_in_bytes

    grown = temporary_bytes(4096, 20) - temporary_bytes(4096, 2)
    assert grown <= 2 * 18 * 4 * (64 * 3 + 1)


def test_after_the_last_step_its_rates_stay():
    rates = fj.rates.scale_by_rates(jnp.array([0.5, 0.25]), per_step=True)
    state, seen = rates.init(jnp.zeros(())), []
    for _ in range(4):
        update, state = rates.update(jnp.ones(()), state)
        seen.append(float(update))
    assert seen == [-0.5, -0.25, -0.25, -0.25]


@pytest.mark.parametrize(
    ("kinds", "shapes"),
    [
        ({}, {"w": (), "b": ()}),
        ({"per": "element"}, {"w": (3, 2), "b": (2,)}),
        ({"num_steps": 5}, {"w": (5,), "b": (5,)}),
        ({"per": "element", "num_steps": 5}, {"w": (5, 3, 2), "b": (5, 2)}),
    ],
)
def test_trees_of_rates(kinds, shapes):
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2, jnp.bfloat16)}
    rates = fj.rates.like(params, 0.5, **kinds)
    assert jax.tree.map(jnp.shape, rates) == shapes
    assert jax.tree.map(lambda x: x.dtype, rates) == jax.tree.map(lambda x: x.dtype, params)
    assert all((x == 0.5).all() for x in jax.tree.leaves(rates))


def test_the_report_tells_how_rates_moved():
    before = {"head": {"kernel": np.full((2, 2), 0.1)}, "body": np.array(0.1)}
    after = {"head": {"kernel": np.array([[0.3, -0.1], [0.2, 0.0]])}, "body": np.array(0.2)}
    lines = fj.rates.report(before, after).splitlines()
    assert lines[1].split() == ["body", "0.1", "0.2", "0.2", "0.2", "0", "of", "1"]
    assert lines[2].split() == ["head/kernel", "0.1", "0.1", "-0.1", "0.3", "2", "of", "4"]


def test_a_gradient_of_rates_that_is_not_finite_leaves_its_task_out():
    """The rates' is a product of two gradients, each of which is still finite."""
    loss = lambda params, batch: batch * params
    slopes = jnp.array([1.0, 1e25])
    start = fj.WithRates(jnp.zeros(()), jnp.float32(1e-30))
    grads, info = fj.over_tasks(fj.meta_sgd(loss, 1))(start, fj.Task(slopes, slopes))
    assert info.finite.tolist() == [True, False]
    assert_close((grads.params, grads.rates), (jnp.float32(1.0), jnp.float32(-1.0)))


def of_rates(make, **options):
    """Uses rates for the parameters `[3]` and `[3, 3]` for a step."""

    def call(p, t):
        params = {"bias": jnp.zeros(3), "kernel": jnp.zeros((3, 3))}
        loss = lambda params, batch: jnp.sum(batch @ params["kernel"] + params["bias"])
        optimizer = fj.rates.scale_by_rates(make(params), **options)
        return fj.adapt(loss, params, jnp.ones((2, 3)), optimizer, 1)

    return call


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            of_rates(lambda p: fj.rates.like(p, 0.1, num_steps=3)),
            ValueError,
            r"rates\['kernel'\] has shape \(3,\), expected \(\) or \(3, 3\) \(per_step=True where",
        ),
        (
            of_rates(lambda p: fj.rates.like(p, 0.1), per_step=True),
            ValueError,
            r"rates\['bias'\] is a scalar, but with per_step rates lead with the step",
        ),
        (of_rates(lambda p: 0.1), ValueError, "rates must have the structure of params"),
        (
            lambda p, t: fj.adapt(network, fj.WithRates(p, 0.1), t.support, optax.sgd(0.1), 1),
            TypeError,
            "the parameters are a fomaml_jax.WithRates",
        ),
        (
            lambda p, t: fj.fomaml(network, optax.sgd(0.1), 1)(fj.WithState(p, None), t),
            TypeError,
            "the parameters are a fomaml_jax.WithState: pass has_state=True",
        ),
        (
            lambda p, t: fj.learned_rates(network, None, 1),
            TypeError,
            "make_optimizer must be",
        ),
        (lambda p, t: fj.meta_sgd(network, 2)(p, t), TypeError, "WithRates"),
        (lambda p, t: fj.meta_sgd(network, jnp.array(2)), TypeError, "Python int"),
        (lambda p, t: fj.rates.like(p, 0.1, per="layer"), ValueError, "per must be one of"),
        (lambda p, t: fj.rates.like(p, 0.1, num_steps=0), ValueError, "at least 1"),
        (
            lambda p, t: fj.fomaml(network, optax.sgd(0.1), 2, step_weights=jnp.ones(3)),
            ValueError,
            "step_weights must be 2 floating-point numbers",
        ),
        (
            lambda p, t: fj.fomaml(network, optax.sgd(0.1), jnp.array(2), step_weights=jnp.ones(2)),
            TypeError,
            "step_weights needs num_steps to be a Python int",
        ),
    ],
)
def test_refusals(call, error, message):
    params, tasks = network_problem(1)
    with pytest.raises(error, match=message):
        call(params, one(tasks))


def test_rates_for_a_part_of_the_parameters():
    loss = lambda params, batch: jnp.sum((params["a"] * params["b"] - batch) ** 2)
    params, task = {"a": jnp.ones(2), "b": jnp.ones(2)}, fj.Task(jnp.zeros(2), jnp.ones(2))
    rates = fj.rates.scale_by_rates(fj.rates.like(params, 0.1))
    mixed = optax.partition(
        {"fixed": optax.sgd(0.1), "learned": rates}, {"a": "fixed", "b": "learned"}
    )
    found, expected = (
        fj.fomaml(loss, optimizer, 2)(params, task)[0] for optimizer in (mixed, optax.sgd(0.1))
    )
    assert_close(found, expected, 1e-6)


def test_the_gradient_of_a_rate_is_summed_in_its_own_bits():
    params = fj.WithRates(jnp.zeros(100_000, jnp.float16), jnp.float32(0.1))

    def loss(params, x):
        return jnp.sum(params.astype(jnp.float32) * x)

    grads, info = fj.meta_sgd(loss, 1)(params, fj.Task(jnp.float32(1.0), jnp.float32(1.0)))
    assert info.finite
    assert_close(grads.rates, jnp.float32(-100_000.0), 1e-5)


def test_the_report_has_nothing_to_say_of_no_rates():
    rates = {"v": jnp.zeros(0), "w": jnp.ones(2)}
    assert len(fj.rates.report(rates, rates).splitlines()) == 2


@pytest.mark.makes_nans
def test_rates_that_are_no_numbers_are_not_above_zero():
    report = fj.rates.report({"w": jnp.ones(2)}, {"w": jnp.full(2, jnp.nan)})
    assert report.endswith("2 of 2")


@pytest.mark.parametrize("rate", [1, np.array(1), jnp.array(1)])
def test_a_rate_that_is_an_integer_is_the_number_it_is(rate):
    half = fj.adapt(quadratic, jnp.zeros(2), jnp.full(2, 0.5), fj.rates.scale_by_rates(rate), 1)[0]
    np.testing.assert_array_equal(half, 0.5)


@pytest.mark.parametrize("order", [1, -1])
def test_rates_of_other_16_bits_than_the_parameters_keep_their_digits(order):
    """As if both had 32: of the two kinds neither holds what the other does."""
    of_rate, of_params = (jnp.float16, jnp.bfloat16)[::order]
    rate, update = jnp.array(0.37, of_rate), jnp.array([300.0], of_params)
    ours, _ = fj.rates.scale_by_rates(rate).update(update, optax.ScaleByScheduleState(jnp.array(0)))
    assert ours.dtype == of_params
    np.testing.assert_array_equal(ours, jnp.asarray([-float(rate) * 300.0], of_params))
