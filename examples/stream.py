"""A changing world: tasks come one at a time, from a distribution that drifts and jumps.

Sine waves about a centre that wanders slowly and, every 150 tasks or so, is somewhere else at a
stroke. Five ways to meet them start from the same meta-learned parameters (or from none), with each
rate the best of its grid on other streams. Run it: python examples/stream.py
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fomaml_jax as fj

INNER_STEPS = 5
CENTRES = fj.tasks.Waves(
    amplitude=(1.0, 4.0), phase=(0.0, 6.0), frequency=(0.5, 1.5), level=(-2.0, 2.0)
)
SPREAD = fj.tasks.Waves(amplitude=0.5, phase=0.8, frequency=0.0, level=0.5)
LOW, HIGH = (fj.tasks.Waves(*ends) for ends in zip(*CENTRES, strict=True))

family = fj.tasks.sine_waves(SPREAD, shots=5, queries=10)
path = fj.tasks.drift_and_jumps(LOW, HIGH, drift=0.001, jump_every=150)
stream = fj.tasks.drifting(family, path)
net = fj.models.mlp(hidden=(40, 40), outputs=1)


def loss_fn(params, batch):
    """Mean squared error."""
    x, y = batch
    return jnp.mean((net.apply(params, x) - y) ** 2)


def clipped(rate, make=optax.sgd):
    """An inner optimizer that five points near the ends of a steep wave do not make diverge."""
    return optax.chain(optax.clip_by_global_norm(10.0), make(rate))


def meta_trained(key, steps=3000):
    """A start for all that may come: meta-trained on waves about centres from the whole box."""
    anywhere = fj.tasks.drifting(family, fj.tasks.drift_and_jumps(LOW, HIGH, jump_every=1))
    meta_gradient = fj.over_tasks(
        fj.fomaml(loss_fn, clipped(0.02), INNER_STEPS), tasks_at_once=None
    )
    learner = fj.meta_learner(meta_gradient, optax.adam(optax.cosine_decay_schedule(2e-3, steps)))
    init_key, task_key = jax.random.split(key)

    def step(state, _):
        tasks = jax.vmap(anywhere, (None, 0))(task_key, 25 * state.step + jnp.arange(25))
        return learner.step(state, tasks)[0], None

    state = learner.init(net.init(init_key, jnp.zeros((1, 1))))
    return jax.lax.scan(step, state, length=steps)[0].params


# Each way to meet a stream is `(start, rate) -> (state, step)`, where `step(state, task)` gives the
# next state, and the query loss after adaptation to the support set, before the query was seen.


def online(start, rate, make_meta_gradient=fj.fomaml):
    """Meta-learning goes on: `fj.online` with an outer Adam at this rate."""
    meta_gradient = make_meta_gradient(loss_fn, clipped(0.02), INNER_STEPS)
    learner = fj.online(
        fj.over_tasks(meta_gradient, tasks_at_once=None),
        optax.adam(rate),
        capacity=50,
        steps_per_arrival=4,
        tasks_per_step=10,
    )

    def step(state, task):
        state, arrival = learner.step(state, task)
        return state, (arrival.loss, arrival.change.jump)

    example = stream(jax.random.key(0), 0)
    return learner.init(start, example, jax.random.key(0)), step


def joint(loss_fn, inner, num_steps):
    """Plain training on support and query together, as an algorithm: nothing is learned to learn."""
    judge = fj.fomaml(loss_fn, inner, num_steps)

    def meta_gradient(params, task):
        everything = jax.tree.map(lambda *x: jnp.concatenate(x), *task)
        return jax.grad(loss_fn)(params, everything), judge(params, task)[1]

    return meta_gradient


def joint_training(start, rate):
    """The same memory, detector and number of steps, without the meta-gradient."""
    return online(start, rate, joint)


def static(start, rate):
    """The meta-learned start as it is, with this inner rate."""

    def step(params, task):
        adapted, _ = fj.adapt(loss_fn, params, task.support, clipped(rate), INNER_STEPS)
        return params, (loss_fn(adapted, task.query), False)

    return start, step


def fine_tuning(start, rate):
    """One set of parameters, tuned on every task in turn: before it is judged and after."""
    inner, again = clipped(rate), 10 * INNER_STEPS

    def step(params, task):
        adapted, _ = fj.adapt(loss_fn, params, task.support, inner, INNER_STEPS)
        everything = jax.tree.map(lambda *x: jnp.concatenate(x), *task)
        tuned, _ = fj.adapt(loss_fn, adapted, everything, inner, again)
        return tuned, (loss_fn(adapted, task.query), False)

    return start, step


def from_scratch(start, rate):
    """For each task a network from random parameters: 100 steps of Adam on its support set."""
    fresh = net.init(jax.random.key(0), jnp.zeros((1, 1)))

    def step(state, task):
        adapted, _ = fj.adapt(loss_fn, fresh, task.support, optax.adam(rate), 100)
        return state, (loss_fn(adapted, task.query), False)

    return jnp.zeros(()), step


WAYS = {
    "online FOMAML": (online, [3e-4, 1e-3, 3e-3, 1e-2]),
    "joint training on the memory": (joint_training, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
    "static meta-learned start": (static, [0.003, 0.01, 0.02, 0.03, 0.05, 0.1]),
    "continued fine-tuning": (fine_tuning, [1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.05]),
    "training from scratch": (from_scratch, [1e-3, 3e-3, 0.01, 0.02, 0.05]),
}


def losses_on(make, start, rate, key, arrivals):
    """The losses `[arrivals]` of one way on one stream, and where it saw jumps."""
    state, step = make(start, rate)
    _, seen = jax.lax.scan(lambda s, i: step(s, stream(key, i)), state, jnp.arange(arrivals))
    return seen
