"""The outer step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from problems import assert_close, network, network_problem, one, quadratic

import fomaml_jax as fj

META_GRADIENT = fj.over_tasks(fj.fomaml(network, optax.sgd(0.1), 2))


def test_is_the_optimizers_step_on_the_mean_meta_gradient():
    params, tasks = network_problem(4)
    learner = fj.meta_learner(META_GRADIENT, optax.sgd(0.5, momentum=0.9))
    state, step, mean = learner.init(params), jax.jit(learner.step), jax.jit(META_GRADIENT)
    expected, trace = params, jax.tree.map(jnp.zeros_like, params)
    for _ in range(3):
        grads, _ = mean(expected, tasks)
        trace = jax.tree.map(lambda t, g: 0.9 * t + g, trace, grads)
        expected = jax.tree.map(lambda p, t: p - 0.5 * t, expected, trace)
        state, info = step(state, tasks)
    assert_close(state.params, expected, 1e-5)
    assert int(state.step) == 3
    assert_close(info.grad_norm, optax.tree.norm(grads), 1e-5)
    assert_close(info.loss, info.tasks.query_loss.mean(), 1e-6)


def test_compiles_once_and_scans():
    params, tasks = network_problem(4)
    learner = fj.meta_learner(META_GRADIENT, optax.sgd(0.1))
    step = jax.jit(chex.assert_max_traces(learner.step, 1))
    state = learner.init(params)
    for _ in range(4):
        state, _ = step(state, tasks)
    scanned, infos = jax.lax.scan(
        lambda s, _: learner.step(s, tasks), learner.init(params), length=4
    )
    assert_close(state.params, scanned.params, 1e-5)
    assert infos.tasks.support_losses.shape == (4, 4, 2)


def test_a_population_of_learners_by_vmap():
    params, tasks = network_problem(4)

    def trained(rate):
        learner = fj.meta_learner(META_GRADIENT, optax.sgd(rate))
        return learner.step(learner.init(params), tasks)[0].params

    rates = jnp.array([0.1, 0.5])
    population = jax.vmap(trained)(rates)
    for i, rate in enumerate(rates):
        assert_close(one(population, i), trained(rate), 1e-5)


@pytest.mark.makes_nans
def test_reports_the_loss_of_finite_tasks_and_how_many():
    params, tasks = network_problem(4)
    learner = fj.meta_learner(META_GRADIENT, optax.sgd(0.1))
    broken = jax.tree.map(lambda x: x.at[2].set(jnp.nan), tasks)
    state, info = learner.step(learner.init(params), broken)
    assert int(info.num_finite) == 3
    healthy = np.delete(np.asarray(info.tasks.query_loss), 2)
    np.testing.assert_allclose(info.loss, healthy.mean(), rtol=1e-6)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.params))


def test_a_meta_gradient_of_one_task_is_refused():
    params, tasks = network_problem(4)
    learner = fj.meta_learner(fj.fomaml(network, optax.sgd(0.1), 1), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"wrap it: over_tasks\(meta_gradient\)"):
        learner.step(learner.init(params), one(tasks))


@pytest.mark.parametrize("gives", [lambda grads: grads, lambda grads: (grads, None)])
def test_gradients_without_their_information_are_refused(gives):
    """A dictionary of two would be unpacked into its names."""
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    learner = fj.meta_learner(lambda params, tasks: gives(params), optax.sgd(0.1))
    with pytest.raises(
        TypeError, match=r"^meta_gradient must return \(grads, fomaml_jax\.TaskInfo\)"
    ):
        learner.step(learner.init(params), jnp.ones(2))


def test_learns_what_a_quadratic_has_to_teach():
    """The optimum of FOMAML on quadratics with equal support and query is the mean of centres."""
    centres = jnp.array([[0.0, 1.0], [2.0, 3.0], [4.0, -1.0]])
    loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
    learner = fj.meta_learner(fj.over_tasks(fj.fomaml(loss, optax.sgd(0.3), 2)), optax.sgd(1.0))
    tasks = fj.Task(centres, centres)
    state, _ = jax.lax.scan(
        lambda s, _: learner.step(s, tasks), learner.init(jnp.zeros(2)), length=40
    )
    assert_close(state.params, centres.mean(0), 1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_an_optimizer_that_keeps_the_parameters_can_be_donated():
    params, tasks = network_problem(2)
    learner = fj.meta_learner(META_GRADIENT, optax.contrib.prodigy(0.1))
    step = jax.jit(learner.step, donate_argnums=0)
    state, info = step(learner.init(params), tasks)
    assert int(step(state, tasks)[1].num_finite) == int(info.num_finite) == 2


@pytest.mark.usefixtures("standard_promotion")
def test_an_outer_optimizer_that_needs_the_loss():
    """A plateau that nothing leaves must shrink the rate: every loss is held against the first."""
    params, tasks = network_problem(4)
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.99)
    learner = fj.meta_learner(META_GRADIENT, optax.chain(optax.sgd(0.1), plateau))
    state, step = learner.init(params), jax.jit(learner.step)
    state, info = step(state, tasks)
    first = info.loss
    for _ in range(4):
        state, _ = step(state, tasks)
    assert_close(optax.tree.get(state.opt_state, "best_value"), first, 1e-6)
    assert float(optax.tree.get(state.opt_state, "scale")) == 0.5**4


@pytest.mark.makes_nans
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("seldom", [False, True], ids=["meta_learner", "scheduled_learner"])
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(0.1, weight_decay=0.1),
        optax.chain(optax.sgd(0.1, momentum=0.9), optax.contrib.reduce_on_plateau(patience=2)),
    ],
    ids=["adamw", "plateau"],
)
def test_a_step_without_a_finite_task_moves_nothing(optimizer, seldom):
    params, tasks = network_problem(2)
    if seldom:
        learner = fj.scheduled_learner(lambda step: META_GRADIENT, optimizer)
    else:
        learner = fj.meta_learner(META_GRADIENT, optimizer)
    step = jax.jit(learner.step)
    state, _ = step(learner.init(params), tasks)
    after, info = step(state, jax.tree.map(lambda x: x * jnp.nan, tasks))
    chex.assert_trees_all_equal(after, state._replace(step=state.step + 1))
    assert int(info.num_finite) == 0
    moved, _ = step(after, tasks)
    assert (moved.params["w1"] != state.params["w1"]).any()


@pytest.mark.makes_nans
def test_what_is_to_propagate_does():
    params, tasks = network_problem(2)
    meta_gradient = fj.over_tasks(fj.fomaml(network, optax.sgd(0.1), 2), on_nonfinite="propagate")
    learner = fj.meta_learner(meta_gradient, optax.sgd(0.5))
    state, _ = learner.step(learner.init(params), jax.tree.map(lambda x: x * jnp.nan, tasks))
    assert jnp.isnan(state.params["w1"]).all()


@pytest.mark.makes_nans
@pytest.mark.parametrize(
    "wrap", [jax.jit, lambda m: lambda params, tasks: m(params, tasks)], ids=["jit", "function"]
)
def test_a_function_around_over_tasks_has_the_same_steps(wrap):
    params, tasks = network_problem(2)
    learners = [
        fj.meta_learner(m, optax.sgd(0.1, momentum=0.9))
        for m in (META_GRADIENT, wrap(META_GRADIENT))
    ]
    states = [learner.init(params) for learner in learners]
    steps = [jax.jit(learner.step) for learner in learners]
    for factor in (1.0, jnp.nan, 1.0):
        given = jax.tree.map(lambda x, f=factor: x * f, tasks)
        states = [step(state, given)[0] for step, state in zip(steps, states, strict=True)]
        assert_close(states[0], states[1], 1e-6)


@pytest.mark.makes_nans
def test_devices_without_a_finite_task_of_their_own_move_with_the_others():
    """Even where a function around `over_tasks` hides what the others have seen."""
    params, tasks = network_problem(4)
    tasks = jax.tree.map(lambda x: x.at[:2].set(jnp.nan).reshape(2, 2, *x.shape[1:]), tasks)
    over = fj.over_tasks(fj.fomaml(network, optax.sgd(0.1), 1), axis_name="i")
    learner = fj.meta_learner(lambda p, t: over(p, t), optax.sgd(0.1, momentum=0.9))
    step = jax.vmap(learner.step, in_axes=(None, 0), axis_name="i")
    state, info = step(learner.init(params), tasks)
    assert info.num_finite.tolist() == [0, 2]
    assert_close(one(state.params, 0), one(state.params, 1), 1e-6)
    assert (one(state.params)["w1"] != params["w1"]).any()


def test_what_is_no_function_is_refused():
    for make in (fj.meta_learner, fj.scheduled_learner):
        with pytest.raises(TypeError, match=r"meta_gradient must be a function .*, got None"):
            make(None, optax.sgd(0.1))


@pytest.mark.parametrize("params", [{"a": jnp.array(0.5)}, [jnp.full((1,), 0.5)]])
def test_weakly_typed_parameters_are_compiled_for_once(params):
    chex.clear_trace_counter()
    meta_gradient = fj.over_tasks(fj.fomaml(quadratic, optax.sgd(0.1), 1))
    learner = fj.meta_learner(meta_gradient, optax.sgd(0.1, momentum=0.9))
    centres = jax.tree.map(lambda x: jnp.ones((2, *x.shape)), params)
    step, state = jax.jit(chex.assert_max_traces(learner.step, 1)), learner.init(params)
    for _ in range(3):
        state, _ = step(state, fj.Task(centres, centres))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("rate", [np.nan, np.inf])
def test_outer_rates_that_are_not_finite_are_refused(rate):
    meta_gradient = fj.over_tasks(fj.fomaml(quadratic, optax.sgd(0.1), 1))
    for outer in (optax.sgd(rate), optax.adam(rate), optax.chain(optax.clip(1.0), optax.sgd(rate))):
        with pytest.raises(ValueError, match=rf"by a number that is not finite \(-?{rate}\); pass"):
            fj.meta_learner(meta_gradient, outer).init(jnp.ones(2))


@pytest.mark.parametrize("kind", ["plain", "scheduled", "serial"])
def test_parameters_in_the_place_of_a_state_are_refused(kind):
    meta_gradient = fj.over_tasks(fj.fomaml(quadratic, optax.sgd(0.1), 1))
    learner = {
        "plain": lambda: fj.meta_learner(meta_gradient, optax.sgd(0.1)),
        "scheduled": lambda: fj.scheduled_learner(lambda step: meta_gradient, optax.sgd(0.1)),
        "serial": lambda: fj.serial_reptile(quadratic, optax.sgd(0.1), 1, optax.sgd(0.1)),
    }[kind]()
    centres = jnp.ones((2, 3))
    with pytest.raises(TypeError, match=r"state must be what the learner's init or step gave, got"):
        learner.step(jnp.ones(3), fj.Task(centres, centres))
