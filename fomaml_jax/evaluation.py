"""Adapt to many tasks never trained on, and report the mean with its interval."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fomaml_jax import refusals
from fomaml_jax.parallel import TasksAtOnce, in_chunks, shared_out, together
from fomaml_jax.types import Batch, Params, Task


class Evaluation(NamedTuple):
    """A metric over many tasks; `mean`, `ci95` and `per_task` have the metric's structure.

    Attributes:
        mean: `[]`, the mean over tasks. A task whose metric is not finite shows here: none is
            left out.
        ci95: `[]`, half the width of the normal 95% interval of the mean, `1.96 s / sqrt(n)`.
        per_task: `[num_tasks]`, in task order.
        num_tasks: how many tasks.
    """

    mean: Any
    ci95: Any
    per_task: Any
    num_tasks: int


def evaluate(
    adapt_fn: Callable[[Params, Batch], Any],
    metric_fn: Callable[[Any, Batch], Any],
    params: Params,
    sample_task: Callable[[jax.Array], Task],
    key: jax.Array,
    *,
    num_tasks: int = 600,
    tasks_at_once: TasksAtOnce = "auto",
    mesh: Mesh | None = None,
) -> Evaluation:
    """Adapts to `num_tasks` sampled tasks and takes the metric of each on its query batch.

    Task `i` is `sample_task(jax.random.fold_in(key, i))`, whatever runs at once, so that the first
    tasks of a longer evaluation are those of a shorter one, and two models can be compared pair by
    pair. Pure: wrap it in `jax.jit` for speed.

    A network that normalises by its batch sees the queries of a task together: the metric is then
    transductive. `fj.batch_statistics` has queries one at a time, and both in one report by name.

    Args:
        adapt_fn: `(params, support) -> adapted`. The result may be anything `metric_fn` takes, the
            parameters after each step for instance.
        metric_fn: `(adapted, query) -> scalar`, or a pytree of scalars.
        params: the shared parameters.
        sample_task: a task distribution, `key -> Task`.
        key: a PRNG key; not consumed, only folded.
        num_tasks: at least 2. The interval shrinks as `1 / sqrt(num_tasks)`: 600 tasks leave about
            0.5 points of accuracy, a claim wants 10,000.
        tasks_at_once: as in `over_tasks`.
        mesh: shares the tasks out among all devices of this mesh, however many tasks there are.

    Returns:
        An `Evaluation`, the same on every device.

    Raises:
        ValueError: for fewer than 2 tasks, `tasks_at_once` below 1, or a metric that is not made of
            real scalars.

    Warns:
        UserWarning: for keys of `rbg`, as in `fj.tasks.task_keys`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, fomaml_jax as fj
        >>> sample_task = fj.tasks.sinusoid(shots=5, queries=10)
        >>> constant = lambda level, batch: jnp.mean((level - batch[1]) ** 2)
        >>> report = fj.evaluate(
        ...     lambda level, support: fj.adapt(constant, level, support, optax.sgd(0.5), 1)[0],
        ...     constant, jnp.zeros(()), sample_task, jax.random.key(0), num_tasks=100)
        >>> report.per_task.shape, bool(report.ci95 < report.mean)
        ((100,), True)
    """
    refusals.check_at_least("num_tasks", num_tasks, 2)
    refusals.check_function("sample_task", sample_task, "key -> Task")
    refusals.check_key(key)
    refusals.warn_of_rbg(key)

    def task_of(key: jax.Array, index: jax.Array) -> Task:
        task = sample_task(jax.random.fold_in(key, index))
        refusals.check_kind_of_task("sample_task must make", task)
        return task

    return _evaluate(adapt_fn, metric_fn, (params, key), task_of, num_tasks, tasks_at_once, mesh)


def evaluate_on(
    adapt_fn: Callable[[Params, Batch], Any],
    metric_fn: Callable[[Any, Batch], Any],
    params: Params,
    tasks: Task,
    *,
    tasks_at_once: TasksAtOnce = "auto",
    mesh: Mesh | None = None,
) -> Evaluation:
    """`evaluate` on the tasks of a meta-batch, each once: all the patients there are, say.

    Args:
        adapt_fn: as for `evaluate`.
        metric_fn: as for `evaluate`.
        params: the shared parameters.
        tasks: a meta-batch, with leaves `[tasks, examples, ...]`, of at least 2 tasks.
        tasks_at_once: as in `over_tasks`.
        mesh: as for `evaluate`.

    Returns:
        An `Evaluation`, in the order of the tasks.

    Raises:
        TypeError: for `tasks` that are no `Task`.
        ValueError: as `evaluate`.

    Example:
        >>> import jax.numpy as jnp, fomaml_jax as fj
        >>> tasks = fj.Task(support=jnp.zeros((3, 5)), query=jnp.arange(3.0)[:, None])
        >>> own_mean = lambda params, support: support.mean()
        >>> error = lambda mean, query: jnp.abs(query - mean).mean()
        >>> fj.evaluate_on(own_mean, error, (), tasks).per_task
        Array([0., 1., 2.], dtype=float32)
    """
    refusals.check_kind_of_task("tasks must be", tasks)
    num_tasks = refusals.check_task_axis(tasks)
    refusals.check_at_least("the number of tasks", num_tasks, 2)

    def task_of(tasks: Task, index: jax.Array) -> Task:
        return jax.tree.map(lambda x: jnp.asarray(x)[index], tasks)  # clamped

    return _evaluate(adapt_fn, metric_fn, (params, tasks), task_of, num_tasks, tasks_at_once, mesh)


def _evaluate(
    adapt_fn: Callable[[Params, Batch], Any],
    metric_fn: Callable[[Any, Batch], Any],
    given: tuple[Params, Any],
    task_of: Callable[[Any, jax.Array], Task],
    num_tasks: int,
    tasks_at_once: TasksAtOnce,
    mesh: Mesh | None,
) -> Evaluation:
    """On the tasks of indices; `given` are the parameters, and what tasks are made of."""
    refusals.check_tasks_at_once(tasks_at_once)
    refusals.check_function("adapt_fn", adapt_fn, "(params, support) -> adapted")
    refusals.check_function("metric_fn", metric_fn, "(adapted, query) -> metric")
    refusals.check_mesh(mesh)

    def one_task(given, index):
        params, source = given
        task = task_of(source, index)
        metric = metric_fn(adapt_fn(params, task.support), task.query)
        if not jax.tree.leaves(metric):
            raise ValueError(f"metric_fn must return scalars, got {metric!r}")
        return jax.tree.map(_scalar, metric)

    def of_tasks(given, indices):
        each = functools.partial(one_task, given)
        return in_chunks(
            lambda _, chunk: (None, together(each, chunk)), None, indices, tasks_at_once
        )[1]

    if mesh is None:
        per_task = of_tasks(given, jnp.arange(num_tasks, dtype=jnp.uint32))
    else:
        per_task = _shared_out(of_tasks, mesh, given, num_tasks)
    return _summary(per_task, num_tasks)


def _shared_out(of_tasks: Callable[..., Any], mesh: Mesh, given: Any, num_tasks: int) -> Any:
    """`of_tasks(given, indices)` of all tasks from the devices of a mesh, in task order."""

    def on_a_device(given, indices):
        mine = of_tasks(given, indices)
        return jax.lax.all_gather(mine, mesh.axis_names, tiled=True), None

    # As many for every device; those beyond the last are left out again.
    indices = jnp.arange(-(-num_tasks // mesh.size) * mesh.size, dtype=jnp.uint32)
    per_task, _ = shared_out(on_a_device, mesh, given, indices)
    return jax.tree.map(lambda x: x[:num_tasks], per_task)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of examples whose greatest logit is their label's; NaN where a logit is NaN.

    `argmax` takes NaN for the greatest, so that a network of nothing else would be right by chance.

    Example:
        >>> import jax.numpy as jnp
        >>> labels = jnp.array([0, 1])
        >>> accuracy(jnp.array([[2.0, 1.0], [1.0, 0.0]]), labels).item()
        0.5
        >>> accuracy(jnp.full((2, 2), jnp.nan), labels).item()
        nan
    """
    return jnp.where(jnp.isnan(logits).any(), jnp.nan, jnp.mean(logits.argmax(-1) == labels))


def paired_difference(one: Evaluation, other: Evaluation) -> Evaluation:
    """How far one evaluation is above another of the same tasks, task by task.

    Much of the variance is that of the tasks, and the difference has none of it: its interval is
    narrower than either's.

    Args:
        one: an evaluation.
        other: one with the same metric on the same tasks: the same distribution, key and number.

    Returns:
        An `Evaluation` of `one - other`.

    Raises:
        ValueError: for different numbers of tasks, or metrics of different structure.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> sample_task = fj.tasks.sinusoid()
        >>> error = lambda level, query: jnp.mean((query[1] - level) ** 2)
        >>> low, high = (
        ...     fj.evaluate(lambda level, support: level, error, jnp.full((), level), sample_task,
        ...                 jax.random.key(0), num_tasks=100) for level in (0.0, 0.1))
        >>> difference = fj.paired_difference(high, low)
        >>> bool(difference.ci95 < low.ci95)
        True
    """
    kinds = [jax.tree.structure(found.per_task) for found in (one, other)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"the evaluations are of different metrics, {kinds[0]} and {kinds[1]}")
    # By their shapes: under a transformation the number is an array, which may be traced.
    ours, theirs = (len(jax.tree.leaves(found.per_task)[0]) for found in (one, other))
    if ours != theirs:
        raise ValueError(
            f"the evaluations have {ours} and {theirs} tasks; evaluate both on the same"
        )
    return _summary(jax.tree.map(jnp.subtract, one.per_task, other.per_task), ours)


def _summary(per_task: Any, num_tasks: int) -> Evaluation:
    mean = jax.tree.map(lambda x: x.mean(), per_task)
    ci95 = jax.tree.map(lambda x: 1.96 * x.std(ddof=1) / np.sqrt(num_tasks), per_task)
    return Evaluation(mean, ci95, per_task, num_tasks)


def _scalar(metric: Any) -> jax.Array:
    if np.shape(metric) != ():
        raise ValueError(
            f"metric_fn must return scalars, got an array of shape {np.shape(metric)}; "
            "take the mean over the query examples"
        )
    metric = jnp.asarray(metric)
    if jnp.issubdtype(metric.dtype, jnp.complexfloating):
        raise ValueError(f"metric_fn must return real scalars, got one of dtype {metric.dtype}")
    is_float = jnp.issubdtype(metric.dtype, jnp.floating)
    # A mean of many in few bits would be worth less than its interval.
    return metric if is_float and jnp.finfo(metric.dtype).bits >= 32 else metric.astype(jnp.float32)
