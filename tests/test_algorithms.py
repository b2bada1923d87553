"""Every algorithm and option through one table of contracts, against loops written out by hand."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from problems import assert_close, network, network_problem, one

import fomaml_jax as fj

STEPS, RATE = 3, 0.1
WEIGHTS = (0.2, 0.3, 0.5)
HEAD = ("w2", "b2")


def in_head(path):
    return path in HEAD


def in_body(path):
    return path not in HEAD


def fresh_head(params, support):
    """A head that depends on the support set, and on no head before."""
    level = jax.lax.stop_gradient(support[1].mean())
    return {**params, "w2": jnp.zeros_like(params["w2"]), "b2": jnp.full_like(params["b2"], level)}


class Case(NamedTuple):
    """An algorithm, what it is called on, and the same by hand."""

    make: Callable[[Any], fj.MetaGradient]
    reference: Callable[[Any, fj.Task], Any]
    shared: Callable[[fj.Params], Any] = lambda params: params


def by_hand(
    params,
    task,
    loss=network,
    stop=jax.lax.stop_gradient,
    weights=(0, 0, 1),
    adapted=lambda path: True,
    rates=lambda k, path: RATE,
):
    """The weighted query loss after each step of gradient descent."""
    total = 0.0
    for k in range(STEPS):
        grads = stop(jax.grad(loss)(params, task.support))
        params = {
            name: p - rates(k, name) * grads[name] if adapted(name) else p
            for name, p in params.items()
        }
        total += weights[k] * loss(params, task.query)
    return total


def gradient(**options):
    return jax.grad(functools.partial(by_hand, **options))


def reptile_by_hand(params, task, adapted=lambda path: True):
    theta = params
    for _ in range(STEPS):
        grads = jax.grad(network)(theta, task.support)
        theta = {name: p - RATE * adapted(name) * grads[name] for name, p in theta.items()}
    return jax.tree.map(jnp.subtract, params, theta)


def with_rates(**kinds):
    """The parameters beside rates that differ from tensor to tensor, element and step."""

    def shared(params):
        rates = fj.rates.like(params, RATE, **kinds)
        leaves, structure = jax.tree.flatten(rates)
        varied = [
            x * jnp.linspace(0.5, 1.5, x.size, dtype=x.dtype).reshape(x.shape) * (i + 1) / 2
            for i, x in enumerate(leaves)
        ]
        return fj.WithRates(params, structure.unflatten(varied))

    return shared


def rates_by_hand(per_step=False, **options):
    def total(shared, task):
        def rates(k, path):
            rate = shared.rates[path]
            return rate[k] if per_step else rate

        return by_hand(shared.params, task, rates=rates, **options)

    return jax.grad(total)


def from_fresh_head(params, task):
    return by_hand(fresh_head(params, task.support), task)


sgd = optax.sgd(RATE)
through = {"stop": lambda x: x}
CASES = {
    "FOMAML": Case(lambda loss: fj.fomaml(loss, sgd, STEPS), gradient()),
    "FOMAML, unrolled": Case(lambda loss: fj.fomaml(loss, sgd, STEPS, unroll=True), gradient()),
    "MAML": Case(lambda loss: fj.maml(loss, sgd, STEPS), gradient(**through)),
    "MAML, rematerialised": Case(
        lambda loss: fj.maml(loss, sgd, STEPS, remat=True), gradient(**through)
    ),
    "Reptile": Case(lambda loss: fj.reptile(loss, sgd, STEPS), reptile_by_hand),
    "ANIL": Case(
        lambda loss: fj.fomaml(loss, sgd, STEPS, trainable=in_head), gradient(adapted=in_head)
    ),
    "ANIL, second order": Case(
        lambda loss: fj.maml(loss, sgd, STEPS, trainable=in_head),
        gradient(adapted=in_head, **through),
    ),
    "BOIL": Case(
        lambda loss: fj.fomaml(loss, sgd, STEPS, trainable=in_body), gradient(adapted=in_body)
    ),
    "Reptile of the head": Case(
        lambda loss: fj.reptile(loss, sgd, STEPS, trainable=in_head),
        functools.partial(reptile_by_hand, adapted=in_head),
    ),
    "multi-step FOMAML": Case(
        lambda loss: fj.fomaml(loss, sgd, STEPS, step_weights=jnp.array(WEIGHTS)),
        gradient(weights=WEIGHTS),
    ),
    "multi-step MAML": Case(
        lambda loss: fj.maml(loss, sgd, STEPS, step_weights=jnp.array(WEIGHTS)),
        gradient(weights=WEIGHTS, **through),
    ),
    "multi-step ANIL": Case(
        lambda loss: fj.fomaml(
            loss, sgd, STEPS, step_weights=jnp.array(WEIGHTS), trainable=in_head
        ),
        gradient(weights=WEIGHTS, adapted=in_head),
    ),
    "a rate for every tensor": Case(
        lambda loss: fj.meta_sgd(loss, STEPS), rates_by_hand(), with_rates()
    ),
    "Meta-SGD": Case(
        lambda loss: fj.meta_sgd(loss, STEPS), rates_by_hand(), with_rates(per="element")
    ),
    "LSLR": Case(
        lambda loss: fj.meta_sgd(loss, STEPS, per_step=True),
        rates_by_hand(per_step=True),
        with_rates(num_steps=STEPS),
    ),
    "multi-step LSLR": Case(
        lambda loss: fj.meta_sgd(loss, STEPS, per_step=True, step_weights=jnp.array(WEIGHTS)),
        rates_by_hand(per_step=True, weights=WEIGHTS),
        with_rates(num_steps=STEPS),
    ),
    "Meta-SGD of the head": Case(
        lambda loss: fj.meta_sgd(loss, STEPS, trainable=in_head),
        rates_by_hand(adapted=in_head),
        with_rates(per="element"),
    ),
    "FOMAML from a fresh head": Case(
        lambda loss: fj.starting_from(fresh_head, fj.fomaml(loss, sgd, STEPS)),
        jax.grad(from_fresh_head),
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.mark.usefixtures("float64")
@cases
def test_agrees_with_the_loop_by_hand(case):
    params, tasks = network_problem(1)
    shared, task = case.shared(params), one(tasks)
    grads, info = case.make(network)(shared, task)
    assert_close(grads, case.reference(shared, task), 1e-12)
    assert info.support_losses.shape == (STEPS,)
    assert bool(info.finite)


@cases
def test_structure_and_dtypes_are_kept(case):
    params, tasks = network_problem(1, dtype=jnp.float32)
    shared = case.shared(params)
    grads, _ = case.make(network)(shared, one(tasks))
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, shared)


@cases
def test_works_under_every_transformation_and_compiles_once(case):
    chex.clear_trace_counter()
    params, tasks = network_problem(3)
    shared, meta_gradient = case.shared(params), case.make(network)
    expected = [meta_gradient(shared, one(tasks, i))[0] for i in range(3)]
    jitted = jax.jit(chex.assert_max_traces(meta_gradient, 1))
    by_vmap, _ = jax.vmap(meta_gradient, (None, 0))(shared, tasks)
    _, (by_scan, _) = jax.lax.scan(lambda _, t: (None, meta_gradient(shared, t)), None, tasks)
    for i in range(3):
        assert_close(jitted(shared, one(tasks, i))[0], expected[i], 1e-5)
        assert_close(one(by_vmap, i), expected[i], 1e-5)
        assert_close(one(by_scan, i), expected[i], 1e-5)


@pytest.mark.usefixtures("float64")
@cases
def test_any_number_of_tasks_at_once_is_the_same(case):
    params, tasks = network_problem(5)
    shared = case.shared(params)
    each = [case.make(network)(shared, one(tasks, i))[0] for i in range(5)]
    mean = jax.tree.map(lambda *g: sum(g) / 5, *each)
    for tasks_at_once in (1, 2, None):
        over_tasks = fj.over_tasks(case.make(network), tasks_at_once=tasks_at_once)
        assert_close(jax.jit(over_tasks)(shared, tasks)[0], mean, 1e-12)
