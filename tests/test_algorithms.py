"""Every algorithm and option through one table of contracts, against loops written out by hand."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from problems import assert_close, every, network, network_problem, one

import fomaml_jax as fj

STEPS, RATE, WAYS = 3, 0.1, 4
WEIGHTS = (0.2, 0.3, 0.5)
HEAD = ("w2", "b2")


def everywhere(path):
    return True


def in_head(path):
    return path in HEAD


def in_body(path):
    return path not in HEAD


def fresh_head(params, support):
    """A head that depends on the support set, and on no head before."""
    x, other = support
    uneven = isinstance(x, tuple)  # then support is ((x, y), weights)
    level = jax.lax.stop_gradient(fj.uneven.weighted_mean(x[0], other) if uneven else x.mean())
    return {**params, "w2": jnp.zeros_like(params["w2"]), "b2": jnp.full_like(params["b2"], level)}


class Case(NamedTuple):
    """An algorithm, what it is called on, the same by hand, and what its inner loop adapts."""

    make: Callable[..., fj.MetaGradient]
    reference: Callable[[Any, fj.Task], Any]
    shared: Callable[[fj.Params], Any] = lambda params: params
    adapted: Callable[[str], bool] = everywhere
    rate: Callable[[Any, int, str], Any] = lambda shared, step, name: RATE
    start: Callable[[Any, Any], Any] = lambda shared, support: getattr(shared, "params", shared)


def by_hand(
    params,
    task,
    loss=network,
    stop=jax.lax.stop_gradient,
    weights=(0, 0, 1),
    adapted=everywhere,
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


def losses_by_hand(case, shared, task):
    """The support loss before every step, and the query loss after the last."""
    params, of_support = case.start(shared, task.support), []
    for k in range(STEPS):
        value, grads = jax.value_and_grad(network)(params, task.support)
        of_support.append(value)
        params = {
            name: p - case.rate(shared, k, name) * grads[name] if case.adapted(name) else p
            for name, p in params.items()
        }
    return jnp.stack(of_support), network(params, task.query)


def learned(shared, step, name):
    return shared.rates[name]


def learned_for_the_step(shared, step, name):
    return shared.rates[name][step]


def gradient(**options):
    return jax.grad(functools.partial(by_hand, **options))


def reptile_by_hand(params, task, adapted=everywhere):
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
    "FOMAML": Case(lambda loss, **o: fj.fomaml(loss, sgd, STEPS, **o), gradient()),
    "FOMAML, unrolled": Case(
        lambda loss, **o: fj.fomaml(loss, sgd, STEPS, unroll=True, **o), gradient()
    ),
    "MAML": Case(lambda loss, **o: fj.maml(loss, sgd, STEPS, **o), gradient(**through)),
    "MAML, rematerialised": Case(
        lambda loss, **o: fj.maml(loss, sgd, STEPS, remat=True, **o), gradient(**through)
    ),
    "Reptile": Case(lambda loss, **o: fj.reptile(loss, sgd, STEPS, **o), reptile_by_hand),
    "ANIL": Case(
        lambda loss, **o: fj.fomaml(loss, sgd, STEPS, trainable=in_head, **o),
        gradient(adapted=in_head),
        adapted=in_head,
    ),
    "ANIL, second order": Case(
        lambda loss, **o: fj.maml(loss, sgd, STEPS, trainable=in_head, **o),
        gradient(adapted=in_head, **through),
        adapted=in_head,
    ),
    "BOIL": Case(
        lambda loss, **o: fj.fomaml(loss, sgd, STEPS, trainable=in_body, **o),
        gradient(adapted=in_body),
        adapted=in_body,
    ),
    "Reptile of the head": Case(
        lambda loss, **o: fj.reptile(loss, sgd, STEPS, trainable=in_head, **o),
        functools.partial(reptile_by_hand, adapted=in_head),
        adapted=in_head,
    ),
    "multi-step FOMAML": Case(
        lambda loss, **o: fj.fomaml(loss, sgd, STEPS, step_weights=jnp.array(WEIGHTS), **o),
        gradient(weights=WEIGHTS),
    ),
    "multi-step MAML": Case(
        lambda loss, **o: fj.maml(loss, sgd, STEPS, step_weights=jnp.array(WEIGHTS), **o),
        gradient(weights=WEIGHTS, **through),
    ),
    "multi-step ANIL": Case(
        lambda loss, **o: fj.fomaml(
            loss, sgd, STEPS, step_weights=jnp.array(WEIGHTS), trainable=in_head, **o
        ),
        gradient(weights=WEIGHTS, adapted=in_head),
        adapted=in_head,
    ),
    "a rate for every tensor": Case(
        lambda loss, **o: fj.meta_sgd(loss, STEPS, **o),
        rates_by_hand(),
        with_rates(),
        rate=learned,
    ),
    "Meta-SGD": Case(
        lambda loss, **o: fj.meta_sgd(loss, STEPS, **o),
        rates_by_hand(),
        with_rates(per="element"),
        rate=learned,
    ),
    "LSLR": Case(
        lambda loss, **o: fj.meta_sgd(loss, STEPS, per_step=True, **o),
        rates_by_hand(per_step=True),
        with_rates(num_steps=STEPS),
        rate=learned_for_the_step,
    ),
    "multi-step LSLR": Case(
        lambda loss, **o: fj.meta_sgd(
            loss, STEPS, per_step=True, step_weights=jnp.array(WEIGHTS), **o
        ),
        rates_by_hand(per_step=True, weights=WEIGHTS),
        with_rates(num_steps=STEPS),
        rate=learned_for_the_step,
    ),
    "Meta-SGD of the head": Case(
        lambda loss, **o: fj.meta_sgd(loss, STEPS, trainable=in_head, **o),
        rates_by_hand(adapted=in_head),
        with_rates(per="element"),
        adapted=in_head,
        rate=learned,
    ),
    "FOMAML from a fresh head": Case(
        lambda loss, **o: fj.starting_from(fresh_head, fj.fomaml(loss, sgd, STEPS, **o)),
        jax.grad(from_fresh_head),
        start=fresh_head,
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# Their options are transformed, chunked and sharded no otherwise than they are.
each_kind_of_case = every(
    "case",
    CASES,
    *("FOMAML", "MAML", "Reptile", "ANIL", "multi-step FOMAML", "Meta-SGD"),
    "FOMAML from a fresh head",
)


@pytest.mark.usefixtures("float64")
@cases
def test_agrees_with_the_loop_by_hand(case):
    params, tasks = network_problem(1)
    shared, task = case.shared(params), one(tasks)
    grads, info = jax.jit(case.make(network))(shared, task)
    assert_close(grads, jax.jit(case.reference)(shared, task), 1e-12)
    told = info.support_losses, info.query_loss
    assert_close(told, jax.jit(functools.partial(losses_by_hand, case))(shared, task), 1e-12)
    assert bool(info.finite)


@cases
def test_a_task_that_is_not_finite_is_told_and_left_out(case):
    params, tasks = network_problem(3)
    shared, over_tasks = case.shared(params), fj.over_tasks(case.make(network))
    grads, info = over_tasks(shared, jax.tree.map(lambda x: x.at[1].set(jnp.nan), tasks))
    assert info.finite.tolist() == [True, False, True]
    expected, _ = over_tasks(shared, jax.tree.map(lambda x: x[::2], tasks))
    assert_close(grads, expected, 1e-5)


@cases
def test_structure_and_dtypes_are_kept(case):
    params, tasks = network_problem(1, dtype=jnp.float32)
    shared = case.shared(params)
    grads, _ = case.make(network)(shared, one(tasks))
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, shared)


@each_kind_of_case
def test_works_under_every_transformation_and_compiles_once(case):
    chex.clear_trace_counter()
    params, tasks = network_problem(3)
    shared, meta_gradient = case.shared(params), case.make(network)
    jitted = jax.jit(chex.assert_max_traces(meta_gradient, 1))
    expected = [jitted(shared, one(tasks, i))[0] for i in range(3)]
    by_vmap, _ = jax.vmap(meta_gradient, (None, 0))(shared, tasks)
    _, (by_scan, _) = jax.lax.scan(lambda _, t: (None, meta_gradient(shared, t)), None, tasks)
    for i in range(3):
        assert_close(one(by_vmap, i), expected[i], 1e-5)
        assert_close(one(by_scan, i), expected[i], 1e-5)


def temporary_bytes(meta_gradient, *args):
    compiled = jax.jit(meta_gradient).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("weights", [None, jnp.full(20, 0.05)])
def test_rematerialised_steps_keep_nothing_of_what_they_compute(weights):
    params, tasks = network_problem(1, examples=256, width=64, dtype=jnp.float32)

    def needed(remat):
        made = fj.maml(network, optax.sgd(0.01), 20, remat=remat, step_weights=weights)
        return temporary_bytes(made, params, one(tasks))

    assert (3 if weights is None else 6) * needed(True) < needed(False)


def test_what_is_seen_beside_the_losses_of_a_multi_step_loss_is_kept_of_the_last_step_alone():
    params, tasks = network_problem(1, dtype=jnp.float32)

    def loss(params, batch):
        value = network(params, batch)
        return value, {"wide": jnp.full(100_000, value), "examples": len(batch[0])}

    def needed(num_steps):
        weights = jnp.full(num_steps, 1 / num_steps)
        made = fj.maml(loss, optax.sgd(0.01), num_steps, has_aux=True, step_weights=weights)
        return temporary_bytes(made, params, one(tasks))

    assert needed(40) < needed(2) + 2_000_000  # stacked, they would be 16,000,000


@pytest.mark.usefixtures("float64")
@each_kind_of_case
def test_any_number_of_tasks_at_once_is_the_same(case):
    params, tasks = network_problem(5)
    shared, jitted = case.shared(params), jax.jit(case.make(network))
    each = [jitted(shared, one(tasks, i))[0] for i in range(5)]
    mean = jax.tree.map(lambda *g: sum(g) / 5, *each)
    for tasks_at_once in (1, 2, None):
        over_tasks = fj.over_tasks(case.make(network), tasks_at_once=tasks_at_once)
        assert_close(jax.jit(over_tasks)(shared, tasks)[0], mean, 1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
@each_kind_of_case
def test_the_same_inside_of_a_shard_map_of_ones_own(case, check_vma):
    params, tasks = network_problem(4)
    shared, mesh = case.shared(params), jax.make_mesh((2,), ("tasks",), (AxisType.Auto,))
    expected, reference = jax.jit(fj.over_tasks(case.make(network)))(shared, tasks)
    spread = fj.over_tasks(case.make(network), axis_name="tasks")
    one, each = jax.P(), jax.P("tasks")
    mapped = jax.shard_map(
        spread, mesh=mesh, in_specs=(one, each), out_specs=(one, each), check_vma=check_vma
    )
    grads, info = jax.jit(mapped)(shared, tasks)
    assert_close(grads, expected, 1e-12)
    assert_close(info, reference, 1e-12)


@cases
def test_the_inner_loop_moves_what_it_adapts_and_nothing_else(case):
    params, tasks = network_problem(1)

    def telling(params, batch):  # the aux: the parameters that the loss is given
        return network(params, batch), params

    _, info = jax.jit(case.make(telling, has_aux=True))(case.shared(params), one(tasks))
    for name, leaf in params.items():
        same = np.array_equal(info.aux[name], leaf)
        assert same != case.adapted(name), name


@cases
def test_masked_examples_have_exactly_no_influence(case):
    def loss(params, batch):
        (x, y), weights = batch
        x, y = (fj.models.without_padding(part, weights) for part in (x, y))
        hidden = jnp.tanh(x @ params["w1"] + params["b1"][None])
        errors = (hidden @ params["w2"] + params["b2"][None] - y) ** 2
        return fj.uneven.weighted_mean(errors, weights)

    params, tasks = network_problem(1)
    shared, task, meta_gradient = case.shared(params), one(tasks), jax.jit(case.make(loss))

    def padded(batch, content):
        (x, y), weights = fj.uneven.pad_batch(batch, 9)
        real = weights[:, None] > 0
        return (jnp.where(real, x, content), jnp.where(real, y, content)), weights

    found = [
        meta_gradient(shared, fj.Task(*(padded(batch, content) for batch in task)))
        for content in (0.0, 1e30, jnp.nan)
    ]
    for other in found[1:]:
        chex.assert_trees_all_equal(other, found[0])
    plain = case.make(network)(shared, task)
    assert_close(found[0], plain, 1e-5)


@pytest.mark.usefixtures("float64")
@cases
def test_permuted_labels_permute_the_head_and_change_nothing_else(case):
    order = np.array([2, 0, 3, 1])

    def permuted(tree):
        """The outputs of every leaf that belongs to the head, in another order."""

        def leaf(path, x):
            of_head = str(path[-1].key) in HEAD and x.shape[-1:] == (WAYS,)
            return x[..., order] if of_head else x

        return jax.tree.map_with_path(leaf, tree)

    def loss(params, batch):
        x, labels = batch
        hidden = jnp.tanh(x @ params["w1"] + params["b1"][None])
        logits = hidden @ params["w2"] + params["b2"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params, tasks = network_problem(1)
    rng = np.random.default_rng(1)
    params |= {"w2": jnp.asarray(rng.normal(size=(8, WAYS))), "b2": jnp.zeros(WAYS)}
    x_support, x_query = (one(batch[0]) for batch in tasks)
    labels = jnp.asarray(rng.integers(0, WAYS, 6))
    position = jnp.asarray(np.argsort(order))  # where each class's output has gone
    meta_gradient, shared = jax.jit(case.make(loss)), case.shared(params)
    grads, info = meta_gradient(shared, fj.Task((x_support, labels), (x_query, labels)))
    turned = fj.Task((x_support, position[labels]), (x_query, position[labels]))
    found, same = meta_gradient(permuted(shared), turned)
    assert_close(found, permuted(grads), 1e-12)
    assert_close(same, info, 1e-12)
    before, after = jax.tree.leaves(grads)[1], jax.tree.leaves(found)[1]  # of b2
    assert not (before.any() and np.allclose(before, after, atol=1e-6))
