"""What tests of training share: `fj.train` on a small network, and on tasks of known losses."""

import jax
import jax.numpy as jnp
import optax
from problems import network, network_problem

import fomaml_jax as fj
from fomaml_jax import devices

KEY = jax.random.key(3)
SAMPLE = fj.tasks.sinusoid(shots=3, queries=4)
FOMAML = fj.fomaml(network, optax.sgd(0.05), 2)
PARAMS, _ = network_problem(1)
STEPS = 3


def outer():
    """An optimizer with state and a rate that changes from step to step."""
    return optax.adam(optax.cosine_decay_schedule(0.05, STEPS))


def train(
    meta_gradient=FOMAML,
    sample_task=SAMPLE,
    params=PARAMS,
    optimizer=None,
    key=KEY,
    tasks_at_once="auto",
    **kwargs,
):
    """`fj.train` with the tasks shared out among the devices; what was reported beside it."""
    kwargs = {"steps": STEPS, "tasks_per_step": 4, "name": None} | kwargs
    mesh = devices.mesh_for(int(kwargs["tasks_per_step"]))
    learner = devices.sampled_learner(
        meta_gradient, sample_task, optimizer or outer(), mesh=mesh, tasks_at_once=tasks_at_once
    )
    return fj.train(learner, params, lambda key: key, key, mesh=mesh, **kwargs)


# A task whose loss is the value it was drawn as, and whose meta-gradient is one.


def uniform_task(key):
    level = jax.random.uniform(key, (1,))
    return fj.Task(level, level)


def of_level(params, task):
    level = task.query[0]
    finite = jnp.isfinite(level)
    grads = jnp.where(finite, jnp.ones_like(params), jnp.nan)
    return grads, fj.TaskInfo(level, level, finite, None)


LEVELS = {
    "meta_gradient": of_level,
    "sample_task": uniform_task,
    "params": jnp.zeros(1),
    "optimizer": optax.sgd(1.0),
}
