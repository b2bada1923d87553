"""The outer loop: meta-steps compiled together, with progress and metrics at fixed intervals."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fomaml_jax.learner import MetaLearner, MetaState, meta_learner
from fomaml_jax.parallel import TasksAtOnce, over_tasks
from fomaml_jax.tasks import TaskDistribution, task_keys
from fomaml_jax.tuning import Plan, tune
from fomaml_jax.types import MetaGradient, Params
from fomaml_jax.variants import in_every_form, variants_of


class Report(NamedTuple):
    """What happened since the last report.

    Attributes:
        loss: the mean over steps of the mean query loss over finite tasks.
        grad_norm: the mean norm of the meta-gradient.
        left_out: how many tasks were not finite.
    """

    loss: jax.Array
    grad_norm: jax.Array
    left_out: jax.Array


def meta_train(
    meta_gradient: MetaGradient,
    tasks: TaskDistribution,
    params: Params,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    steps: int,
    tasks_per_step: int,
    tasks_at_once: TasksAtOnce = "auto",
    name: str = "meta-training",
) -> Generator[tuple[Params, dict[str, Any]], None, None]:
    """Trains on a task distribution under a progress bar.

    The tasks are shared out among this process's devices, as many as divide `tasks_per_step`. They
    are sampled inside the compiled step, one as it is needed, so memory does not grow with
    `tasks_per_step`. Task `i` of step `n` is a function of `(key, n, i)` alone.

    Args:
        meta_gradient: `(params, task) -> (grads, TaskInfo)` for one task.
        tasks: the distribution to train on.
        params: where training starts.
        optimizer: the outer optimizer.
        key: a PRNG key; not consumed, only folded.
        steps: outer steps.
        tasks_per_step: tasks in a meta-batch.
        tasks_at_once: as in `over_tasks`.
        name: what the progress bar calls it.

    Yields:
        About a hundred times: the parameters, and a row of metrics on the steps since the last:
        `step`, `tasks`, `loss`, `grad_norm`, `left_out`. The caller may stop at any of them.
    """
    mesh = mesh_for(tasks_per_step)
    sampled = _sampled(tasks)(meta_gradient)
    learner = meta_learner(over_tasks(sampled, tasks_at_once=tasks_at_once, mesh=mesh), optimizer)
    report_every = max(1, min(steps // 100, 500))
    left_out = 0
    with _progress_bar(steps * tasks_per_step, name) as bar:
        # Placed as it will come back, so that the second call does not compile again; copied,
        # because every call takes the buffers of its state for the next one.
        state = jax.tree.map(jnp.copy, learner.init(params))
        state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        stretches = _stretches(learner, state, key, steps, tasks_per_step, report_every)
        for state, report in stretches:
            left_out += int(report.left_out)
            row = {"step": int(state.step), "tasks": int(state.step) * tasks_per_step}
            row |= {"loss": float(report.loss), "grad_norm": float(report.grad_norm)}
            row |= {"left_out": int(report.left_out)}
            note = f", {left_out} tasks left out" if left_out else ""
            bar.set_postfix_str(f"loss {row['loss']:.3f}{note}", refresh=False)
            bar.update(row["tasks"] - bar.n)
            yield jax.tree.map(jnp.copy, state.params), row


def tune_training(
    meta_gradient: MetaGradient,
    tasks: TaskDistribution,
    params: Params,
    key: jax.Array,
    *,
    tasks_per_step: int,
) -> Plan:
    """Measures how `meta_train` had best run a step, sampling included.

    Returns:
        A `Plan` whose per-task function and tasks at once `meta_train` takes.
    """
    sampled = in_every_form(meta_gradient, _sampled(tasks))
    keys = task_keys(key, 0, tasks_per_step)
    plan = tune(sampled, params, keys, mesh=mesh_for(tasks_per_step))
    return plan._replace(meta_gradient=variants_of(meta_gradient)[plan.variant])


def _sampled(tasks: TaskDistribution) -> Callable[[MetaGradient], MetaGradient]:
    """Lets a per-task function take keys in the place of tasks."""

    def wrap(meta_gradient: MetaGradient) -> MetaGradient:
        return lambda params, key: meta_gradient(params, tasks(key))

    return wrap


def use_every_core() -> None:
    """One CPU device a core, before JAX starts: a scan over small tasks keeps but one busy."""
    with contextlib.suppress(RuntimeError):  # JAX has started, and keeps the devices it has
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


def mesh_for(num_tasks: int) -> Mesh:
    """As many of this process's devices as divide the tasks evenly."""
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if num_tasks % n == 0)
    return jax.make_mesh((count,), ("tasks",), (AxisType.Auto,), devices=devices[:count])


def _stretches(
    learner: MetaLearner,
    state: MetaState,
    key: jax.Array,
    steps: int,
    tasks_per_step: int,
    report_every: int,
) -> Iterator[tuple[MetaState, Report]]:
    """Steps until `state.step == steps`, those between two reports in one compiled loop."""

    @functools.partial(jax.jit, donate_argnums=0)
    def stretch(state: MetaState, num_steps: int) -> tuple[MetaState, Report]:
        def body(_, carry):
            state, total = carry
            state, info = learner.step(state, task_keys(key, state.step, tasks_per_step))
            seen = Report(info.loss, info.grad_norm, tasks_per_step - info.num_finite)
            return state, jax.tree.map(lambda t, s: t + s.astype(t.dtype), total, seen)

        zero = Report(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32))
        state, total = jax.lax.fori_loop(0, num_steps, body, (state, zero))
        mean = total.loss / num_steps, total.grad_norm / num_steps
        return state, Report(*mean, total.left_out)

    done = int(state.step)
    while done < steps:
        now = min(report_every - done % report_every, steps - done)
        state, report = jax.block_until_ready(stretch(state, now))
        done += now
        yield state, report


def _progress_bar(total: int, name: str) -> Any:
    """Moves often in a terminal, and seldom in a log file."""
    from tqdm import tqdm  # an extra: only the command line shows progress

    seconds = 0.1 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=total, desc=name, unit=" tasks", unit_scale=True, mininterval=seconds, ncols=100
    )
