"""Learning from a stream: what is judged, remembered, drawn, forgotten, and taken up again."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from problems import assert_close, network, network_problem, one, quadratic, quadratic_problem

import fomaml_jax as fj
from fomaml_jax import checkpoints

KEY = jax.random.key(0)
QUIET = fj.cusum(false_alarm_every=1e9)


def counting(params, task):
    """An algorithm that does nothing but count how often it is shown each task, by its number."""
    shown = jax.nn.one_hot(task.query[0], len(params))
    return -shown, fj.TaskInfo(task.support[0] * 1.0, task.support, jnp.array(True), None)


def shown(losses, *, tasks_per_step=50, **options):
    """How often each task was shown after each arrival, `[arrivals, tasks]`, and what was seen."""
    arrivals = len(losses)
    learner = fj.online(
        fj.over_tasks(counting, tasks_at_once=None),
        optax.sgd(float(tasks_per_step)),
        tasks_per_step=tasks_per_step,
        **options,
    )
    tasks = fj.Task(jnp.asarray(losses, jnp.float32)[:, None], jnp.arange(arrivals)[:, None])
    state = learner.init(jnp.zeros(arrivals), one(tasks), KEY)

    def step(state, task):
        after, arrival = learner.step(state, task)
        return after, (after.learner.params - state.learner.params, arrival)

    state, (counts, arrival) = jax.jit(lambda s: jax.lax.scan(step, s, tasks))(state)
    return np.asarray(counts).round().astype(int), arrival, state


def test_draws_are_uniform_over_the_last_tasks():
    losses = np.random.default_rng(0).random(40)  # their mean tells which tasks it is of
    counts, arrival, _ = shown(losses, capacity=8, steps_per_arrival=3, detector=QUIET)
    for i, row in enumerate(counts):
        remembered = np.arange(max(0, i - 7), i + 1)
        assert row.sum() == row[remembered].sum() == 150
    ages = np.stack([counts[i, i - 7 : i + 1] for i in range(7, 40)]).sum(0)
    assert scipy.stats.chisquare(ages).pvalue > 0.01
    assert len({tuple(counts[i, i - 7 : i + 1]) for i in range(7, 40)}) == 33  # drawn afresh
    assert all(len(set(means)) == 3 for means in arrival.steps.loss[7:].tolist())  # each step too


def test_a_jump_makes_it_forget_the_tasks_before():
    losses = np.exp(0.3 * np.random.default_rng(0).normal(size=60))
    losses[40:] *= 6.0
    counts, arrival, state = shown(losses, capacity=30, tasks_per_step=200)
    (found,) = np.flatnonzero(arrival.change.jump)
    begin = found - int(arrival.change.since[found]) + 1
    assert 37 <= begin <= 40 <= found <= 42
    assert counts[found - 1, begin - 20 : begin].all()  # it still learned from the old ones
    assert counts[found:, :begin].sum() == 0
    assert counts[found, begin : found + 1].sum() == 200
    assert int(state.memory.remembered) == 60 - begin
    without, _, _ = shown(losses, capacity=30, tasks_per_step=200, detector=QUIET)
    assert without[found, :begin].any()


@pytest.mark.usefixtures("float64")
def test_the_newest_quadratic_in_closed_form():
    """With room for one task there is nothing to chance: theta - s (theta_K - q), twice."""
    params, task = quadratic_problem()
    learner = fj.online(
        fj.over_tasks(fj.fomaml(quadratic, optax.sgd(0.2), 3)),
        optax.sgd(0.5),
        capacity=1,
        steps_per_arrival=2,
    )
    state, arrival = jax.jit(learner.step)(learner.init(params, task, KEY), task)

    def adapted(theta):
        return jax.tree.map(lambda t, c: c + 0.8**3 * (t - c), theta, task.support)

    assert_close(arrival.loss, quadratic(adapted(params), task.query))
    expected = params
    for _ in range(2):
        grads = jax.tree.map(jnp.subtract, adapted(expected), task.query)
        expected = jax.tree.map(lambda t, g: t - 0.5 * g, expected, grads)
    assert_close(state.learner.params, expected)
    assert int(state.learner.step) == 2


def small_learner(**options):
    meta_gradient = fj.over_tasks(fj.fomaml(network, optax.sgd(0.1), 2), tasks_at_once=None)
    sizes = {"capacity": 4, "steps_per_arrival": 2, "tasks_per_step": 3}
    return fj.online(meta_gradient, optax.sgd(0.05, momentum=0.9), **sizes | options)


def test_every_loss_is_of_parameters_that_had_not_seen_the_task():
    params, tasks = network_problem(6)
    learner = small_learner()
    state, step = learner.init(params, one(tasks), KEY), jax.jit(learner.step)
    for i in range(6):
        before, task = state.learner.params, one(tasks, i)
        state, arrival = step(state, task)
        adapted, info = fj.adapt(network, before, task.support, optax.sgd(0.1), 2)
        assert_close(arrival.loss, network(adapted, task.query), 1e-5)
        assert_close(arrival.task.support_losses, info.losses, 1e-5)
        other = task._replace(query=jax.tree.map(lambda x: 3 * x, task.query))
        assert_close(step(state, other)[1].change, step(state, task)[1].change, 0)


def test_compiles_once_scans_and_does_not_grow():
    params, tasks = network_problem(9)
    learner = small_learner()
    start = learner.init(params, one(tasks), KEY)
    step = jax.jit(chex.assert_max_traces(learner.step, 1))
    state, losses = start, []
    for i in range(9):
        state, arrival = step(state, one(tasks, i))
        losses.append(arrival.loss)
    scanned, arrivals = jax.lax.scan(learner.step, start, tasks)
    assert_close(state.learner, scanned.learner, 1e-5)
    assert_close(arrivals.loss, jnp.stack(losses), 1e-5)
    sizes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert sizes(state) == sizes(start)


@pytest.mark.slow
def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    params, tasks = network_problem(8)
    learner = small_learner()
    start = learner.init(params, one(tasks), KEY)
    step = jax.jit(learner.step)

    def after(state, numbers):
        losses = []
        for i in numbers:
            state, arrival = step(state, one(tasks, i))
            losses.append(arrival.loss)
        return state, losses

    whole, losses = after(start, range(8))
    half, first = after(start, range(5))
    checkpoints.save(tmp_path / "run", checkpoints.Checkpoint(5, half, {}))
    found, damaged = checkpoints.newest(tmp_path / "run", start)
    assert found.step == 5
    assert not damaged
    leaves, structure = jax.tree.flatten(half._replace(key=jax.random.key_data(half.key)))
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as file:
        loaded = structure.unflatten(jnp.asarray(file[name]) for name in file.files)
    loaded = loaded._replace(key=jax.random.wrap_key_data(loaded.key))
    as_read = jax.tree.map(np.asarray, loaded._replace(key=()))._replace(key=loaded.key)
    _, arrival = learner.step(as_read, one(tasks, 5))  # not compiled
    assert_close(arrival.loss, losses[5], 1e-5)
    for resumed in (found.tree, loaded):
        end, rest = after(resumed, range(5, 8))
        chex.assert_trees_all_equal(end, whole)
        assert [float(x) for x in first + rest] == [float(x) for x in losses]


@pytest.mark.makes_nans
def test_a_broken_task_costs_its_turn_and_no_more():
    params, tasks = network_problem(12)
    tasks = jax.tree.map(lambda x: x.at[5].set(jnp.nan), tasks)
    learner = small_learner()
    state, arrivals = jax.lax.scan(learner.step, learner.init(params, one(tasks), KEY), tasks)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.learner))
    assert np.flatnonzero(~np.isfinite(arrivals.loss)).tolist() == [5]
    assert int(arrivals.steps.num_finite.min()) < 3
    assert (arrivals.steps.num_finite[9:] == 3).all()  # it is out of the memory


@pytest.mark.makes_nans
def test_a_task_that_cannot_be_learned_from_is_no_reason_to_forget():
    """Its loss before adaptation is finite, and so far off that it would be taken for a jump."""
    params, tasks = network_problem(40)
    (x, y), (_, judged) = tasks
    support, query = (x, y.at[30].multiply(1e6)), (x, judged.at[30].set(jnp.nan))
    tasks, learner = fj.Task(support, query), small_learner(capacity=40)
    _, arrivals = jax.lax.scan(learner.step, learner.init(params, one(tasks), KEY), tasks)
    assert not arrivals.task.finite[30]
    assert np.isfinite(arrivals.task.support_losses[30, 0])
    assert not arrivals.change.jump[30]


def test_over_a_mesh_the_numbers_are_the_same():
    params, tasks = network_problem(6)
    found = []
    for mesh in (None, jax.make_mesh((2,), ("tasks",), (jax.sharding.AxisType.Auto,))):
        over_tasks = fj.over_tasks(fj.fomaml(network, optax.sgd(0.1), 2), mesh=mesh)
        learner = fj.online(over_tasks, optax.sgd(0.05), capacity=4, tasks_per_step=4)
        state, arrivals = learner.init(params, one(tasks), KEY), []
        step = jax.jit(learner.step)
        for i in range(6):
            state, arrival = step(state, one(tasks, i))
            arrivals.append(float(arrival.loss))
        found.append((state.learner.params, arrivals))
    assert_close(found[1], found[0], 1e-5)


@pytest.mark.reuses_keys
def test_tasks_may_carry_keys_and_parameters_a_state():
    params, tasks = network_problem(5)

    def loss(params, batch, state, key):
        noise = jax.random.normal(key, batch[0].shape)
        return network(params, (batch[0] + 0.1 * noise, batch[1])), (state + 1, None)

    learner = fj.online(
        fj.over_tasks(fj.fomaml(loss, optax.sgd(0.1), 2, has_state=True)),
        fj.with_state(optax.sgd(0.05)),
        capacity=3,
    )
    keyed = fj.KeyedTask(*tasks, jax.random.split(KEY, 5))
    start = learner.init(fj.WithState(params, jnp.zeros(())), one(keyed), KEY)
    state, arrivals = jax.lax.scan(learner.step, start, keyed)
    assert float(state.learner.params.state) == 3 * 5  # two support batches and a query, each time
    assert jnp.isfinite(arrivals.loss).all()


def test_two_streams_by_vmap():
    params, tasks = network_problem(4)
    learner = small_learner()
    start = lambda seed: learner.init(params, one(tasks), jax.random.key(seed))
    run = lambda state: jax.lax.scan(learner.step, state, tasks)[1].steps.loss
    both = jax.vmap(lambda seed: run(start(seed)))(jnp.arange(2))
    for seed in range(2):
        assert_close(both[seed], run(start(seed)), 1e-5)
    assert not np.allclose(both[0], both[1])


PARAMS, TASKS = network_problem(2)
SHORT = jax.tree.map(lambda x: x[:, :3], TASKS)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda: small_learner(capacity=0), ValueError, "capacity must be an integer of at least"),
        (lambda: small_learner(steps_per_arrival=0), ValueError, "steps_per_arrival must be an in"),
        (lambda: small_learner(tasks_per_step=1.5), ValueError, "tasks_per_step must be an intege"),
        (lambda: small_learner(detector=3.0), TypeError, "detector must be a ChangeDetector"),
        (lambda: fj.online(counting, 0.1), TypeError, "optimizer must be an optax"),
        (lambda: small_learner().init(PARAMS, (), KEY), ValueError, "task holds no arrays"),
        (lambda: small_learner().init(PARAMS, [1.0], KEY), TypeError, r"task\[0\] is a float, not"),
        (lambda: small_learner().init({}, one(TASKS), KEY), ValueError, "params holds no arrays"),
        (
            lambda: after_one(small_learner(), one(SHORT)),
            ValueError,
            "task must have the structure",
        ),
        (
            lambda: after_one(small_learner(), TASKS.support),
            ValueError,
            "the structure, shapes and",
        ),
        (lambda: after_one(small_learner(), (1.0, 2.0)), TypeError, r"task\[0\] is a float"),
        (
            lambda: alone(fj.online(fj.fomaml(quadratic, optax.sgd(0.1), 1), optax.sgd(0.1))),
            ValueError,
            r"wrap it: over_tasks\(meta_gradient\)",
        ),
        (
            lambda: after_one(
                fj.online(fj.over_tasks(fj.fomaml(network, optax.sgd(0.1), 0)), optax.sgd(0.1))
            ),
            ValueError,
            "no inner steps, so no support loss; pass num_steps >= 1",
        ),
        (
            lambda: fj.online(fj.fomaml(network, optax.sgd(0.1), 1), optax.sgd(0.1)).init(
                jnp.ones(1),
                fj.Task(jnp.ones(1), jnp.ones(1)),
                5,  # pyright: ignore[reportArgumentType]
            ),
            TypeError,
            "key must be one PRNG key, such as",
        ),
        (
            lambda: small_learner().step({"w": 1.0}, TASKS),  # pyright: ignore[reportArgumentType]
            TypeError,
            "^state must be what init or step gave, got a dict$",
        ),
    ],
)
def test_what_cannot_be_learned_from_is_refused(use, error, message):
    with pytest.raises(error, match=message):
        use()


def alone(learner):
    params, task = quadratic_problem()
    wide = jax.tree.map(lambda x: x[None], params)  # such that a batch of one task fits too
    return learner.step(learner.init(wide, task, KEY), task)


def after_one(learner, task=None):
    state = learner.init(PARAMS, one(TASKS), KEY)
    return learner.step(state, one(TASKS) if task is None else task)


@pytest.mark.usefixtures("standard_promotion")
def test_a_fresh_state_can_be_donated():
    """What is in it twice could not be."""
    params, tasks = network_problem(1)
    learner = fj.online(fj.over_tasks(fj.fomaml(network, optax.sgd(0.1), 1)), optax.adam(0.1))
    state = learner.init(jax.tree.map(jnp.copy, params), one(tasks), jax.random.key(0))
    kept = jax.jit(learner.step)(state, one(tasks))[0]
    given = jax.jit(learner.step, donate_argnums=0)(state, one(tasks))[0]
    assert_close(given.learner.params, kept.learner.params)
