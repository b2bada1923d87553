"""The outer step on this process's devices."""

import jax
import optax
import pytest
from problems import assert_close, network, network_problem

import fomaml_jax as fj
from fomaml_jax import devices

FOMAML = fj.fomaml(network, optax.sgd(0.05), 2)
SAMPLE = fj.tasks.sinusoid(shots=3, queries=4)
PARAMS, _ = network_problem(1)


@pytest.mark.parametrize(("num_tasks", "num_devices"), [(1, 1), (2, 2), (3, 1), (8, 2)])
def test_as_many_devices_as_divide_the_tasks(num_tasks, num_devices):
    mesh = devices.mesh_for(num_tasks)
    assert list(mesh.devices.flat) == jax.local_devices()[:num_devices]


def test_a_tuned_step_is_the_same_step():
    keys = fj.tasks.task_keys(jax.random.key(3), 0, 4)
    plan = devices.tune_sampled(FOMAML, SAMPLE, PARAMS, jax.random.key(3), tasks_per_step=4)
    assert {trial.variant for trial in plan.trials} == {"as given", "unrolled"}

    def stepped(meta_gradient, tasks_at_once):
        learner = devices.sampled_learner(
            meta_gradient,
            SAMPLE,
            optax.sgd(0.1),
            mesh=devices.mesh_for(4),
            tasks_at_once=tasks_at_once,
        )
        return jax.jit(learner.step)(learner.init(PARAMS), keys)[0].params

    assert_close(stepped(plan.meta_gradient, plan.tasks_at_once), stepped(FOMAML, "auto"), 1e-5)
