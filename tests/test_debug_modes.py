"""Nothing trips JAX's own checks: for NaN, leaked tracers, keys used twice, hidden transfers."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import network, network_problem
from test_algorithms import CASES

import fomaml_jax as fj

pytestmark = pytest.mark.slow
MODES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "checking_leaks": jax.checking_leaks,
    "debug_key_reuse": lambda: jax.debug_key_reuse(True),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
}
KEY = jax.random.key(0)
SGD = optax.sgd(0.1)


@contextlib.contextmanager
def watched():
    with contextlib.ExitStack() as stack:
        for mode in MODES.values():
            stack.enter_context(mode())
        yield


def divide_by_zero(x):
    jax.jit(lambda x: (x - x) / (x - x))(x).block_until_ready()


def leak(x):
    kept = []
    jax.jit(lambda x: kept.append(x + 1))(x)


def reuse_a_key(x):
    jax.jit(lambda key: jax.random.normal(key) + jax.random.uniform(key))(KEY)


def transfer(x):
    jax.jit(lambda x, y: x + y)(x, np.ones(2))


MISTAKES = {
    "debug_nans": (divide_by_zero, "nan"),
    "checking_leaks": (leak, "[Ll]eaked"),
    "debug_key_reuse": (reuse_a_key, "consumed|reused"),
    "transfer_guard": (transfer, "Disallowed host-to-device"),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_check_that_is_on_finds_something(mode):
    mistake, message = MISTAKES[mode]
    x = jnp.ones(2)
    with MODES[mode](), pytest.raises(Exception, match=message):
        mistake(x)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_algorithm(case):
    params, tasks = network_problem(3)
    shared = case.shared(params)
    over_tasks = jax.jit(fj.over_tasks(case.make(network), tasks_at_once=2))
    with watched():
        jax.block_until_ready(over_tasks(shared, tasks))


def test_sharded_over_devices():
    params, tasks = network_problem(4)
    mesh = jax.make_mesh((2,), ("tasks",))
    over_tasks = jax.jit(fj.over_tasks(fj.fomaml(network, SGD, 2), mesh=mesh))
    everywhere = jax.NamedSharding(mesh, jax.P())
    params, tasks = jax.device_put((params, tasks), everywhere)
    with watched():
        jax.block_until_ready(over_tasks(params, tasks))


def test_losses_that_draw_random_numbers():
    def noisy(params, batch, state, key):
        return network(params, batch) * jax.random.uniform(key), (state, None)

    params, tasks = network_problem(3)
    shared = fj.WithState(params, jnp.zeros(()))
    keyed = fj.KeyedTask(*tasks, jax.random.split(KEY, 3))
    over_tasks = jax.jit(fj.over_tasks(fj.fomaml(noisy, SGD, 2, has_state=True)))
    with watched():
        jax.block_until_ready(over_tasks(shared, keyed))


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_episodes(kind):
    images = np.random.default_rng(0).integers(0, 255, (6, 5, 8, 8, 1), dtype=np.uint8)
    shift = fj.tasks.random_shift(1)
    images = jax.device_put(images.astype(kind))
    make = functools.partial(fj.tasks.episodes, ways=3, shots=1, queries=2, rotations=True)
    sample_task = make(images, augment=shift)
    keys = fj.tasks.task_keys(KEY, 3, 4)
    with watched():
        jax.block_until_ready(jax.jit(jax.vmap(sample_task))(keys))


@pytest.mark.parametrize("inner_steps", [0, 2])
def test_training_resuming_and_evaluation(tmp_path, inner_steps):
    params, _ = network_problem(1)
    sample_task = fj.tasks.sinusoid()
    over_tasks = fj.over_tasks(fj.fomaml(network, SGD, inner_steps))
    learner = fj.meta_learner(over_tasks, optax.sgd(0.01))

    @jax.jit
    def judge(params):
        adapt = lambda params, support: fj.adapt(network, params, support, SGD, 2)[0]
        return fj.evaluate(adapt, network, params, sample_task, KEY, num_tasks=4).mean

    def train(**kwargs):
        return fj.train(
            learner,
            params,
            sample_task,
            KEY,
            tasks_per_step=2,
            report_every=5,
            validate=judge,
            validate_every=5,
            lower_is_better=True,
            name=None,
            folder=tmp_path,
            **kwargs,
        )

    with watched():
        train(steps=10)
        trained = train(steps=20, resume=True)
    assert len(trained.metrics) == 4
