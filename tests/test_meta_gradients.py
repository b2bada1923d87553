"""One table of contracts for every algorithm, and the truth that each is held against."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    OPTIMIZERS,
    assert_close,
    network,
    network_problem,
    one,
    quadratic,
    quadratic_problem,
)

import fomaml_jax as fj

ALGORITHMS = {"fomaml": fj.fomaml, "maml": fj.maml, "reptile": fj.reptile}
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


# What each algorithm has to give on a quadratic: theta, theta_K, query centre, (1 - rate) ** K.
CLOSED_FORMS = {
    "fomaml": lambda theta, adapted, query, shrunk: adapted - query,
    "maml": lambda theta, adapted, query, shrunk: shrunk * (adapted - query),
    "reptile": lambda theta, adapted, query, shrunk: theta - adapted,
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("num_steps", [0, 1, 3, 20])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_closed_form(name, num_steps, rate):
    params, task = quadratic_problem()
    shrunk = (1 - rate) ** num_steps
    adapted = jax.tree.map(lambda p, c: c + shrunk * (p - c), params, task.support)
    expected = jax.tree.map(
        lambda p, a, q: CLOSED_FORMS[name](p, a, q, shrunk), params, adapted, task.query
    )
    grads, info = ALGORITHMS[name](quadratic, optax.sgd(rate), num_steps)(params, task)
    assert_close(grads, expected)
    assert_close(info.query_loss, quadratic(adapted, task.query))
    assert info.support_losses.shape == (num_steps,)
    assert bool(info.finite)


def unrolled(params, task, optimizer, num_steps, stop):
    """The query loss after an inner loop written out by hand, with `stop` on what is constant."""
    theta, state = params, optimizer.init(stop(params))
    for _ in range(num_steps):
        grads = stop(jax.grad(network)(theta, task.support))
        updates, state = optimizer.update(grads, state, stop(theta))
        theta = optax.apply_updates(theta, updates)
    return network(theta, task.query)


@pytest.mark.usefixtures("float64", "standard_promotion")
@optimizers
def test_fomaml_is_maml_with_stopped_inner_gradients(optimizer):
    params, tasks = network_problem(1)
    task = one(tasks)
    grads, info = jax.jit(fj.fomaml(network, optimizer(), 4))(params, task)
    by_hand = lambda params: unrolled(params, task, optimizer(), 4, jax.lax.stop_gradient)
    loss, expected = jax.jit(jax.value_and_grad(by_hand))(params)
    assert_close(grads, expected)
    assert_close(info.query_loss, loss)


@pytest.mark.usefixtures("float64", "standard_promotion")
@optimizers
def test_maml_differentiates_through_everything(optimizer):
    params, tasks = network_problem(1)
    task = one(tasks)
    grads, _ = jax.jit(fj.maml(network, optimizer(), 4))(params, task)
    by_hand = lambda params: unrolled(params, task, optimizer(), 4, lambda x: x)
    assert_close(grads, jax.jit(jax.grad(by_hand))(params))


@pytest.mark.usefixtures("float64")
def test_first_and_second_order_differ():
    """The two references above could agree by accident; they must not."""
    params, tasks = network_problem(1)
    first, _ = jax.jit(fj.fomaml(network, optax.sgd(0.1), 4))(params, one(tasks))
    second, _ = jax.jit(fj.maml(network, optax.sgd(0.1), 4))(params, one(tasks))
    assert abs(first["w1"] - second["w1"]).max() > 1e-2


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("algorithm", [fj.fomaml, fj.maml])
def test_zero_steps_give_the_plain_gradient(algorithm):
    params, tasks = network_problem(1)
    grads, _ = algorithm(network, optax.sgd(0.1), 0)(params, one(tasks))
    assert_close(grads, jax.grad(network)(params, one(tasks).query))


@pytest.mark.usefixtures("float64")
def test_a_learned_rate_keeps_its_gradient():
    """For SGD, d/d alpha of the query loss is minus the sum of <g_k, query gradient>."""
    params, tasks = network_problem(1)
    task = one(tasks)

    def query_loss(alpha):
        return fj.fomaml(network, optax.sgd(alpha), 3)(params, task)[1].query_loss

    theta, inner = params, []
    for _ in range(3):
        inner.append(jax.grad(network)(theta, task.support))
        theta = jax.tree.map(lambda t, g: t - 0.1 * g, theta, inner[-1])
    outer = jax.grad(network)(theta, task.query)
    expected = -sum(optax.tree.vdot(g, outer) for g in inner)
    assert_close(jax.jit(jax.grad(query_loss))(0.1), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", [fj.fomaml, fj.reptile, fj.maml])
def test_the_query_loss_keeps_its_gradient_in_what_is_not_adapted(make):
    """In the query batch; and, inner gradients being constants, in a temperature t of the loss."""
    theta, support, query, t = jnp.zeros(()), jnp.ones(1), -jnp.ones(1), 2.0

    def query_loss(query, t):
        loss = lambda theta, centre: t * 0.5 * jnp.sum((theta - centre) ** 2)
        return make(loss, optax.sgd(0.25), 1)(theta, fj.Task(support, query))[1].query_loss

    adapted = 0.25 * t  # by one step from zero, on the way to one
    of_query, of_temperature = jax.grad(query_loss, argnums=(0, 1))(query, t)
    assert_close(of_query, jnp.array([-t * (adapted + 1)]))
    direct, through = 0.5 * (adapted + 1) ** 2, t * (adapted + 1) * 0.25
    assert_close(of_temperature, direct + through if make is fj.maml else direct)


@algorithms
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_structure_and_dtypes_are_kept(algorithm, dtype):
    params, task = quadratic_problem()
    params, task = jax.tree.map(lambda x: x.astype(dtype), (params, task))
    grads, _ = algorithm(quadratic, optax.sgd(0.1), 2)(params, task)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)


@algorithms
def test_aux_of_the_query_batch_is_handed_on(algorithm):
    params, tasks = network_problem(1)
    with_aux = lambda params, batch: (network(params, batch), {"examples": len(batch[0])})
    with_aux = algorithm(with_aux, optax.sgd(0.1), 2, has_aux=True)
    grads, info = jax.jit(with_aux)(params, one(tasks))
    plain, _ = jax.jit(algorithm(network, optax.sgd(0.1), 2))(params, one(tasks))
    assert_close(grads, plain, 1e-6)
    assert int(info.aux["examples"]) == 6


@algorithms
@pytest.mark.parametrize("unroll", [2, True])
def test_unrolling_changes_nothing(algorithm, unroll):
    params, tasks = network_problem(1)
    grads, _ = algorithm(network, optax.sgd(0.1), 4, unroll=unroll)(params, one(tasks))
    expected, _ = algorithm(network, optax.sgd(0.1), 4)(params, one(tasks))
    assert_close(grads, expected, 1e-6)


@pytest.mark.makes_nans
@algorithms
@pytest.mark.parametrize("broken", ["support", "query"])
def test_a_diverged_task_says_so(algorithm, broken):
    params, tasks = network_problem(1)
    task = one(tasks)
    task = task._replace(**{broken: jax.tree.map(lambda x: x * jnp.nan, getattr(task, broken))})
    _, info = algorithm(network, optax.sgd(0.1), 2)(params, task)
    assert not bool(info.finite)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinite_gradient_of_a_finite_loss_is_seen(sign):
    params = {"w": jnp.array([1.0, 0.0])}
    task = fj.Task(jnp.zeros(()), jnp.zeros(()))
    meta_gradient = fj.fomaml(lambda params, _: sign * jnp.sqrt(params["w"]).sum(), optax.sgd(1), 0)
    grads, info = meta_gradient(params, task)
    assert grads["w"][1] == sign * jnp.inf
    assert jnp.isfinite(info.query_loss)
    assert not bool(info.finite)


@pytest.mark.makes_nans
@pytest.mark.parametrize("algorithm", [fj.fomaml, fj.reptile])
@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_a_traced_number_of_steps(algorithm, num_steps):
    params, tasks = network_problem(1)

    @jax.jit
    def traced(num_steps):
        return algorithm(network, optax.sgd(0.1), num_steps)(params, one(tasks))

    grads, info = traced(num_steps)
    expected, reference = algorithm(network, optax.sgd(0.1), num_steps)(params, one(tasks))
    assert_close(grads, expected, 1e-6)
    ends = reference.support_losses[jnp.array([0, -1])] if num_steps else [np.nan] * 2
    np.testing.assert_allclose(info.support_losses, ends, rtol=1e-6)


@pytest.mark.makes_nans
def test_one_number_of_steps_for_each_task():
    params, tasks = network_problem(3)
    steps = jnp.array([0, 2, 5])
    run = lambda task, k: fj.fomaml(network, optax.sgd(0.1), k)(params, task)[0]
    together = jax.jit(jax.vmap(run))(tasks, steps)
    for i, k in enumerate(steps.tolist()):
        alone = jax.jit(run, static_argnums=1)(one(tasks, i), k)
        assert_close(one(together, i), alone, 1e-5)


def test_memory_is_flat_in_the_steps_for_first_order_alone():
    params, tasks = network_problem(4, examples=64, width=128, dtype=jnp.float32)

    def in_several_steps(loss_fn, optimizer, num_steps):
        """With all that a loss can hand on."""

        def large(params, batch):
            return loss_fn(params, batch), jnp.outer(params["w1"][0], params["w1"][0])

        weights = jnp.full(num_steps, 1 / num_steps)
        return fj.fomaml(large, optimizer, num_steps, step_weights=weights, has_aux=True)

    def temporary_bytes(algorithm, num_steps):
        step = fj.over_tasks(algorithm(network, optax.sgd(0.01), num_steps), tasks_at_once=1)
        compiled = jax.jit(step).lower(params, tasks).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(fj.fomaml, 50) <= 1.05 * temporary_bytes(fj.fomaml, 1)
    assert temporary_bytes(in_several_steps, 50) <= 1.05 * temporary_bytes(in_several_steps, 2)
    assert temporary_bytes(fj.maml, 50) > 3 * temporary_bytes(fj.maml, 1)


@pytest.mark.makes_nans
@pytest.mark.usefixtures("standard_promotion")
def test_second_order_through_adam_warns_unless_it_has_eps_root():
    params, tasks = network_problem(1)

    def run(optimizer):
        return jax.jit(fj.maml(network, optimizer, 1))(params, one(tasks))

    with pytest.warns(UserWarning, match="eps_root"):
        run(optax.adam(0.05))
    with pytest.warns(UserWarning, match="eps_root") as caught:
        fj.maml(network, optax.adam(0.05), 1)(params, one(tasks))
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="eps_root") as caught:
        fj.adapt(network, params, one(tasks).support, optax.adam(0.05), 1, first_order=False)
    assert caught[0].filename == __file__
    for first_order in (True, False):  # without a step there is nothing to warn of
        steps = int(first_order)
        inner = network, params, one(tasks).support, optax.adam(0.05), steps
        fj.adapt(*inner, first_order=first_order)
    fj.maml(network, optax.adam(0.05), 0)(params, one(tasks))
    for optimizer in (optax.adam(0.05, eps_root=1e-8), optax.sgd(0.1), OPTIMIZERS["clipped"]()):
        run(optimizer)  # a warning would be an error
    jax.jit(lambda rate: run(optax.adam(rate, eps_root=1e-8)))(0.1)  # a rate that is traced


@pytest.mark.usefixtures("standard_promotion")
def test_optimizers_that_need_the_loss():
    params, tasks = network_problem(1)
    task = one(tasks)
    for optimizer in (optax.polyak_sgd(), optax.lbfgs()):
        adapted, info = fj.adapt(network, params, task.support, optimizer, 5)
        assert network(adapted, task.support) < info.losses[0]


@pytest.mark.usefixtures("float64", "standard_promotion")
@pytest.mark.parametrize("moved", ["ab", "a"])
@pytest.mark.parametrize("most", [10.0, 0.3])
def test_polyak_steps_are_told_the_loss(most, moved):
    """They are `min(most, loss / |gradient| ** 2)`, of the gradient in what is adapted alone."""
    params, task = quadratic_problem()
    trainable = {name: name in moved for name in params}
    polyak = optax.polyak_sgd(max_learning_rate=most)
    adapted, _ = fj.adapt(quadratic, params, task.support, polyak, 3, trainable=trainable)
    expected = params
    for _ in range(3):
        loss, grads = jax.value_and_grad(quadratic)(expected, task.support)
        grads = {name: g if name in moved else 0 * g for name, g in grads.items()}
        rate = jnp.minimum(most, loss / optax.tree.norm(grads, squared=True))
        expected = jax.tree.map(lambda p, g, rate=rate: p - rate * g, expected, grads)
    assert_close(adapted, expected)


@pytest.mark.usefixtures("float64", "standard_promotion")
@pytest.mark.parametrize(("moved", "increase"), [("ab", 2.0), ("a", np.inf)])
def test_a_line_search_sees_the_loss_along_the_line(moved, increase):
    """A step of 3.6 leads away from the centre of a quadratic, half of it to 0.8 beyond."""
    params, task = quadratic_problem()
    search = optax.scale_by_backtracking_linesearch(
        10, slope_rtol=0.05, decrease_factor=0.5, increase_factor=increase
    )
    adapted, _ = fj.adapt(
        quadratic, params, task.support, optax.chain(optax.sgd(3.6), search), 3,
        trainable={name: name in moved for name in params},
    )  # fmt: skip
    for name, centre in task.support.items():
        shrunk = (-0.8) ** 3 if name in moved else 1
        assert_close(adapted[name], centre + shrunk * (params[name] - centre))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_steps", [0, 2])
def test_what_fomaml_returns_has_the_derivatives_of_what_it_computes(num_steps):
    """The gradient of the query loss at what `adapt` finds, whose derivative is the identity."""
    params, tasks = network_problem(1)
    task, rate = one(tasks), 0.3

    def by_hand(params, rate):
        theta, _ = fj.adapt(network, params, task.support, optax.sgd(rate), num_steps)
        return jax.value_and_grad(network)(theta, task.query)

    def ours(params, rate):
        grads, info = fj.fomaml(network, optax.sgd(rate), num_steps)(params, task)
        return info.query_loss, grads

    for wrt in (0, 1):
        jacobians = (jax.jit(jax.jacrev(f, argnums=wrt)) for f in (ours, by_hand))
        found, expected = (jacobian(params, rate) for jacobian in jacobians)
        assert_close(found, expected)
    assert optax.tree.norm(jax.jit(jax.jacrev(ours))(params, rate)[1]) > 0.1
