"""The outer step on the devices there are, its tasks shared out among them."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import jax
import optax
from jax.sharding import AxisType, Mesh

from fomaml_jax.learner import MetaLearner, meta_learner
from fomaml_jax.parallel import TasksAtOnce, over_tasks
from fomaml_jax.tasks import TaskDistribution, task_keys
from fomaml_jax.tuning import Plan, tune
from fomaml_jax.types import MetaGradient, Params
from fomaml_jax.variants import in_every_form, variants_of


def use_every_core() -> None:
    """One CPU device a core, before JAX starts: a scan over small tasks keeps but one busy.

    Unless `JAX_NUM_CPU_DEVICES` says how many.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    with contextlib.suppress(RuntimeError):  # JAX has started, and keeps the devices it has
        jax.config.update("jax_num_cpu_devices", _cores())


def _cores() -> int:
    """Those that this process may use, such as a part of a shared machine's."""
    allowed = getattr(os, "sched_getaffinity", None)  # of Linux
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def keep_compiled_programs(folder: Path | None) -> None:
    """Turns on JAX's persistent compilation cache, for all that takes noticeable time.

    Raises:
        ValueError: where the folder cannot be made.
    """
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--compilation-cache {folder}: {error.strerror or error}") from None
        jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def every_device() -> Mesh:
    """All devices, for tasks that need not divide among them."""
    return jax.make_mesh((jax.device_count(),), ("tasks",), (AxisType.Auto,))


def mesh_for(num_tasks: int) -> Mesh:
    """As many of this process's devices as divide the tasks evenly.

    Of several processes all devices, if they do; if not, each process takes all the tasks.
    """
    if jax.process_count() > 1 and num_tasks % jax.device_count() == 0:
        return every_device()
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if num_tasks % n == 0)
    return jax.make_mesh((count,), ("tasks",), (AxisType.Auto,), devices=devices[:count])


def sampled_learner(
    meta_gradient: MetaGradient,
    tasks: TaskDistribution,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    tasks_at_once: TasksAtOnce,
) -> MetaLearner:
    """A learner whose tasks are keys, sampled one as it is needed.

    So memory does not grow with the tasks of a step.
    """
    sampled = _sampled(tasks)(meta_gradient)
    return meta_learner(over_tasks(sampled, tasks_at_once=tasks_at_once, mesh=mesh), optimizer)


def tune_sampled(
    meta_gradient: MetaGradient,
    tasks: TaskDistribution,
    params: Params,
    key: jax.Array,
    *,
    tasks_per_step: int,
) -> Plan:
    """Measures how a `sampled_learner` had best run a step, sampling included.

    Returns:
        A `Plan` whose per-task function and tasks at once `sampled_learner` takes.
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
