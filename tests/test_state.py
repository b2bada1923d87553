"""Losses that keep state and draw random numbers, in every algorithm and framework."""

import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, network, network_problem, one

import fomaml_jax as fj

ALGORITHMS = {"fomaml": fj.fomaml, "maml": fj.maml, "reptile": fj.reptile}
algorithms = pytest.mark.parametrize("name", ALGORITHMS)
STEPS = 3


def counting(params, batch, state, key):
    """The network's loss; the state sums what was seen, and the aux is where a key shows."""
    seen = state + batch[0].sum()
    return network(params, batch), (seen, None if key is None else jax.random.uniform(key))


def problem(seed=0, num_tasks=1):
    params, tasks = network_problem(num_tasks)
    keys = jax.random.split(jax.random.key(seed), num_tasks)
    return fj.WithState(params, jnp.ones(())), fj.KeyedTask(*tasks, keys)


@pytest.mark.usefixtures("float64")
@algorithms
@pytest.mark.parametrize("keyed", [True, False])
def test_the_state_goes_from_step_to_step_and_back_to_the_shared_one(name, keyed):
    shared, tasks = problem()
    task = one(tasks) if keyed else fj.Task(*one(tasks)[:2])
    algorithm = ALGORITHMS[name]
    meta_gradient = algorithm(counting, optax.sgd(0.1), STEPS, has_state=True)
    grads, info = jax.jit(meta_gradient)(shared, task)
    plain, same = algorithm(network, optax.sgd(0.1), STEPS)(shared.params, task)
    assert_close(grads.params, plain)
    assert_close(info._replace(aux=None), same)
    last = 1 + STEPS * task.support[0].sum()
    if name != "reptile":  # whose parameters have not seen the query batch either
        last += task.query[0].sum()
    assert_close(grads.state, 1 - last)


def growing(params, centre, state, key):
    """A loss that the state scales; and a state that the parameters make."""
    return jnp.sum((params - centre) ** 2) * (1 + state), (state + params.sum(), None)


def grown(params, state, centre, stop):
    """Parameters and state after `STEPS` of `growing` by hand, with `stop` on what is constant."""
    for _ in range(STEPS):
        grads = 2 * (params - centre) * (1 + state)
        params, state = params - 0.1 * stop(grads), stop(state + params.sum())
    return params, state


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("first_order", [True, False])
def test_what_a_state_was_computed_from_is_differentiated_in_second_order_alone(first_order):
    params, state = jnp.array([0.3, -0.2]), jnp.array(0.5)
    task = fj.Task(jnp.array([1.0, -0.5]), jnp.array([-1.0, 0.4]))
    stop = jax.lax.stop_gradient if first_order else lambda x: x

    by_hand = lambda params, state: grown(params, state, task.support, stop)

    def query_loss(params):
        end, last = by_hand(params, state)
        return growing(end, task.query, last, None)[0]

    def adapted(params, state):
        end, info = fj.adapt(
            growing, params, task.support, optax.sgd(0.1), STEPS,
            first_order=first_order, has_state=True, state=state,
        )  # fmt: skip
        return end, info.state

    assert_close(jax.jit(adapted)(params, state), by_hand(params, state))
    found, expected = (jax.jit(jax.jacrev(f, (0, 1)))(params, state) for f in (adapted, by_hand))
    assert_close(found, expected)
    algorithm = fj.fomaml if first_order else fj.maml
    meta_gradient = jax.jit(algorithm(growing, optax.sgd(0.1), STEPS, has_state=True))
    grads, info = meta_gradient(fj.WithState(params, state), task)
    loss, expected = jax.jit(jax.value_and_grad(query_loss))(params)
    assert_close((info.query_loss, grads.params), (loss, expected))


def test_the_state_of_multi_step_losses_sees_one_query_batch_alone():
    shared, tasks = problem()
    weights = jnp.full(STEPS, 1 / STEPS)
    for algorithm in (fj.fomaml, fj.maml):
        plain, several = (
            algorithm(counting, optax.sgd(0.1), STEPS, has_state=True, step_weights=w)
            for w in (None, weights)
        )
        grads, _ = several(shared, one(tasks))
        assert_close(grads.state, plain(shared, one(tasks))[0].state, 1e-6)


@algorithms
@pytest.mark.parametrize("slots", [1, 2, STEPS])
def test_every_step_can_have_a_state_of_its_own(name, slots):
    shared, tasks = problem()
    per_step = fj.WithState(shared.params, fj.PerStep.like(shared.state, slots))
    meta_gradient = ALGORITHMS[name](counting, optax.sgd(0.1), STEPS, has_state=True)
    grads, info = jax.jit(meta_gradient)(per_step, one(tasks))
    plain, same = jax.jit(meta_gradient)(shared, one(tasks))
    assert_close(grads.params, plain.params, 1e-6)
    assert_close(info, same, 1e-6)
    support, query = (float(batch[0].sum()) for batch in one(tasks)[:2])
    uses = np.ones(slots)
    uses[-1] += STEPS - slots  # steps beyond the last share its state
    expected = -support * uses
    if name != "reptile":
        expected = expected - query * (np.arange(slots) == slots - 1)
    assert_close(grads.state.steps, jnp.asarray(expected, jnp.float32), 1e-5)


def test_a_query_loss_has_the_state_of_the_step_before_it():
    def told(params, batch, state, key):  # the aux is the state that was given
        return network(params, batch), (state + batch[0].sum(), state)

    shared, tasks = problem()
    task = one(tasks)
    start = fj.WithState(shared.params, fj.PerStep(jnp.arange(float(STEPS)) * 100))
    for steps in range(1, STEPS + 1):
        meta_gradient = fj.fomaml(told, optax.sgd(0.1), steps, has_state=True)
        given = jax.jit(meta_gradient)(start, task)[1].aux
        assert_close(given, 100.0 * (steps - 1) + task.support[0].sum(), 1e-5)


def test_the_query_loss_of_a_step_and_the_next_support_loss_have_different_keys():
    shared, tasks = problem()
    drawn = []

    def telling(params, batch, state, key):
        jax.debug.callback(lambda k: drawn.append(tuple(k.tolist())), jax.random.key_data(key))
        return network(params, batch), (state, None)

    weights = jnp.full(STEPS, 1 / STEPS)
    for algorithm in (fj.fomaml, fj.maml):
        drawn.clear()
        with jax.disable_jit():
            algorithm(telling, optax.sgd(0.1), STEPS, has_state=True, step_weights=weights)(
                shared, one(tasks)
            )
        jax.effects_barrier()
        assert len(set(drawn)) == 2 * STEPS


def test_learned_rates_with_state():
    shared, tasks = problem()
    rates = fj.rates.like(shared.params, 0.1)
    stateful = fj.meta_sgd(counting, STEPS, has_state=True)
    grads, info = jax.jit(stateful)(fj.WithRates(shared, rates), one(tasks))
    plain, same = jax.jit(fj.meta_sgd(network, STEPS))(
        fj.WithRates(shared.params, rates), fj.Task(*one(tasks)[:2])
    )
    assert_close((grads.params.params, grads.rates), (plain.params, plain.rates), 1e-6)
    assert_close(info.query_loss, same.query_loss, 1e-6)
    task = one(tasks)
    assert_close(grads.params.state, -STEPS * task.support[0].sum() - task.query[0].sum(), 1e-5)


@algorithms
def test_a_state_that_is_not_finite_leaves_its_task_out(name):
    def diverging(params, batch, state, key):
        return network(params, batch), (
            state + jnp.where(batch[1].max() == 7.0, jnp.nan, 1.0),
            None,
        )

    shared, tasks = problem(num_tasks=2)
    tasks = tasks._replace(support=(tasks.support[0], tasks.support[1].at[1].set(7.0)))
    algorithm = ALGORITHMS[name](diverging, optax.sgd(0.01), 1, has_state=True)
    grads, info = jax.jit(fj.over_tasks(algorithm))(shared, tasks)
    assert info.finite.tolist() == [True, False]
    assert jnp.isfinite(grads.state)


def test_with_state_takes_rates_too_and_tells_them_apart():
    """With, around and inside of `optax.partition`."""
    shared, tasks = problem(num_tasks=2)
    start = fj.WithRates(shared, fj.rates.like(shared.params, 0.1))
    meta_gradient = fj.over_tasks(fj.meta_sgd(counting, STEPS, has_state=True))
    (grads, _), both = jax.jit(meta_gradient)(start, tasks), fj.WithRates("network", "rates")

    def stepped(outer):
        learner = fj.meta_learner(meta_gradient, outer)
        return jax.jit(learner.step)(learner.init(start), tasks)[0].params

    apart = {"network": optax.sgd(0.1), "rates": optax.sgd(0.01)}
    for outer in (
        fj.with_state(optax.partition(apart, both)),
        optax.partition(apart | {"network": fj.with_state(optax.sgd(0.1))}, both),
    ):
        found = stepped(outer)
        assert_close(found.params.state, shared.state - grads.params.state, 1e-6)
        for rate, after, before, grad in (
            (0.1, found.params.params, shared.params, grads.params.params),
            (0.01, found.rates, start.rates, grads.rates),
        ):
            expected = jax.tree.map(lambda p, g, rate=rate: p - rate * g, before, grad)
            assert_close(after, expected, 1e-6)
    with pytest.raises(TypeError, match="must be a fomaml_jax\\.WithState"):
        fj.with_state(optax.sgd(0.1)).init(shared.params)


@pytest.mark.parametrize("with_rates", [False, True])
def test_a_plain_outer_optimizer_of_a_state_is_warned_of(with_rates):
    shared, _ = problem(num_tasks=1)
    shared = fj.WithRates(shared, jnp.ones(())) if with_rates else shared
    over_tasks = fj.over_tasks(fj.fomaml(counting, optax.sgd(0.1), STEPS, has_state=True))
    with pytest.warns(UserWarning, match=r"takes the state of a WithState for parameters: wrap it"):
        fj.meta_learner(over_tasks, optax.sgd(0.1)).init(shared)
    for outer in (fj.with_state(optax.sgd(0.1)), optax.chain(fj.with_state(optax.sgd(0.1)))):
        fj.meta_learner(over_tasks, outer).init(shared)  # a warning would be an error


ADAMW = optax.adamw(0.1, mask=lambda shared: jax.tree.map(lambda x: x.ndim > 1, shared))
NETWORK = {"network": optax.adam(0.1), "rates": optax.sgd(0.1)}


@pytest.mark.parametrize(
    ("outer", "moves_it"),
    [
        (ADAMW, True),
        (optax.partition(NETWORK, fj.WithRates("network", "rates")), True),
        (optax.MultiSteps(ADAMW, 2), True),
        (fj.with_state(ADAMW), False),
        (optax.MultiSteps(fj.with_state(optax.adam(0.1)), 2), False),
        (
            optax.partition(
                NETWORK | {"network": fj.with_state(optax.adam(0.1))},
                fj.WithRates("network", "rates"),
            ),
            False,
        ),
        (
            optax.partition(
                NETWORK | {"state": optax.sgd(0.5)},
                fj.WithRates(fj.WithState("network", "state"), "rates"),
            ),
            False,
        ),
    ],
)
def test_a_mask_that_does_not_keep_the_state_out_is_warned_of_too(outer, moves_it):
    shared, _ = problem(num_tasks=1)
    shared = fj.WithRates(shared, jnp.ones(()))
    over_tasks = fj.over_tasks(fj.meta_sgd(counting, STEPS, has_state=True))
    learner = fj.meta_learner(over_tasks, outer)
    if not moves_it:
        learner.init(shared)  # a warning would be an error
        return
    with pytest.warns(UserWarning, match=r"takes the state of a WithState for parameters: wrap it"):
        learner.init(shared)


def test_every_step_and_every_task_has_a_key_of_its_own():
    shared, tasks = problem(num_tasks=3)

    def of_task(task):
        _, info = fj.adapt(
            counting, shared.params, task.support, optax.sgd(0.1), STEPS,
            has_state=True, state=shared.state, key=task.key,
        )  # fmt: skip
        meta_gradient = fj.fomaml(counting, optax.sgd(0.1), STEPS, has_state=True)
        return jnp.append(info.aux, meta_gradient(shared, task)[1].aux)

    drawn = jax.jit(jax.vmap(of_task))(tasks)
    assert len(set(drawn.ravel().tolist())) == 3 * (STEPS + 1)
    np.testing.assert_array_equal(drawn[1], jax.jit(of_task)(one(tasks, 1)))


def test_tasks_at_once_change_nothing():
    shared, tasks = problem(num_tasks=5)
    meta_gradient = fj.fomaml(counting, optax.sgd(0.1), STEPS, has_state=True)
    over_tasks = [
        jax.jit(fj.over_tasks(meta_gradient, tasks_at_once=size)) for size in (None, 1, 2)
    ]
    reference, info = over_tasks[0](shared, tasks)
    for other in over_tasks[1:]:
        grads, same = other(shared, tasks)
        assert_close(grads, reference, 1e-5)
        assert_close(same.aux, info.aux)


class Net(nn.Module):
    """Batch normalisation with running averages, and dropout."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.Dropout(0.2, deterministic=not train)(nn.tanh(x)))


def falls(loss, params, state):
    """Meta-trains a little; returns what was learned, once the loss has fallen."""
    _, tasks = network_problem(4, examples=32)
    meta_gradient = fj.over_tasks(fj.fomaml(loss, optax.sgd(0.1), 2, has_state=True))
    learner = fj.meta_learner(meta_gradient, fj.with_state(optax.adam(1e-2)))
    keyed = fj.KeyedTask(*tasks, jax.random.split(jax.random.key(1), 4))
    start = learner.init(fj.WithState(params, state))
    end, info = jax.jit(lambda s: jax.lax.scan(lambda s, _: learner.step(s, keyed), s, length=30))(
        start
    )
    assert info.loss[-1] < info.loss[0]
    x = jnp.concatenate([tasks.support[0].reshape(-1, 1), tasks.query[0].reshape(-1, 1)])
    return end.params, x


def check_running(mean, var, hidden):
    np.testing.assert_allclose(mean.ravel(), hidden.mean(0), atol=0.3)
    np.testing.assert_allclose(var.ravel(), hidden.var(0), rtol=0.5)


@pytest.mark.usefixtures("standard_promotion")
def test_nnx_batch_statistics_and_dropout():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(1, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
            self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
            self.dropout = nnx.Dropout(0.2)

        def __call__(self, x, rngs):
            return self.last(self.dropout(nnx.tanh(self.norm(self.first(x))), rngs=rngs))

    graph, params, statistics = nnx.split(Model(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def loss(params, batch, statistics, key):
        model = nnx.merge(graph, params, statistics, copy=True)
        out = model(batch[0], nnx.Rngs(key))
        value = jnp.mean((out - batch[1]) ** 2)
        return value, (nnx.state(model, nnx.BatchStat), None)

    learned, x = falls(loss, params, statistics)
    model = nnx.merge(graph, learned.params, learned.state)
    check_running(model.norm.mean[...], model.norm.var[...], model.first(x))


@pytest.mark.usefixtures("standard_promotion")
def test_haiku_state_and_dropout():
    hk = pytest.importorskip("haiku")

    def forward(x):
        norm = hk.BatchNorm(True, True, decay_rate=0.5)
        hidden = jnp.tanh(norm(hk.Linear(8, name="first")(x), is_training=True))
        return hk.Linear(1)(hk.dropout(hk.next_rng_key(), 0.2, hidden))

    net = hk.transform_with_state(forward)
    params, state = net.init(jax.random.key(0), jnp.ones((4, 1)))

    def loss(params, batch, state, key):
        out, state = net.apply(params, state, key, batch[0])
        return jnp.mean((out - batch[1]) ** 2), (state, None)

    # Haiku counts the steps of its averages in integers, which no optimizer moves. It divides them
    # by 1 - decay ** counter: with one that stands still, by 1 only if that is large.
    counters, averages = hk.data_structures.partition(lambda m, n, v: n == "counter", state)
    counters = jax.tree.map(lambda count: jnp.full_like(count, 10**6), counters)

    def of_averages(params, batch, averages, key):
        value, (state, aux) = loss(params, batch, hk.data_structures.merge(counters, averages), key)
        return value, (hk.data_structures.partition(lambda m, n, v: n == "counter", state)[1], aux)

    learned, x = falls(of_averages, params, averages)
    hidden = x @ learned.params["first"]["w"] + learned.params["first"]["b"][None]
    for name in ("hidden", "average"):  # what is updated, and what inference takes
        mean, variance = (learned.state[f"batch_norm/~/{of}_ema"][name] for of in ("mean", "var"))
        check_running(mean, variance, hidden)


@pytest.mark.usefixtures("standard_promotion")
def test_flax_batch_statistics_and_dropout():
    net = Net()
    variables = net.init(jax.random.key(0), jnp.ones((1, 1)), train=False)

    def loss(params, batch, batch_stats, key):
        out, updated = net.apply(
            {"params": params, "batch_stats": batch_stats},
            batch[0],
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return jnp.mean((out - batch[1]) ** 2), (updated["batch_stats"], None)

    learned, x = falls(loss, variables["params"], variables["batch_stats"])
    hidden = x @ learned.params["Dense_0"]["kernel"] + learned.params["Dense_0"]["bias"][None]
    running = learned.state["BatchNorm_0"]
    check_running(running["mean"], running["var"], hidden)


def test_refusals():
    shared, tasks = problem()
    stateful = fj.fomaml(counting, optax.sgd(0.1), 1, has_state=True)
    with pytest.raises(TypeError, match="WithState"):
        stateful(shared.params, one(tasks))
    plain = fj.fomaml(lambda p, b, s, k: network(p, b), optax.sgd(0.1), 1, has_state=True)
    with pytest.raises(TypeError, match=r"must return \(loss, \(state, aux\)\)"):
        plain(shared, one(tasks))
    other = lambda p, b, s, k: (network(p, b), ((s, s), None))
    with pytest.raises(ValueError, match="loss_fn's state must have the structure"):
        fj.fomaml(other, optax.sgd(0.1), 1, has_state=True)(shared, one(tasks))
