"""From one task to many: scan over chunks of tasks, `vmap` within a chunk."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fomaml_jax import refusals
from fomaml_jax.convolutions import native_convolutions_in
from fomaml_jax.dtypes import accumulator
from fomaml_jax.manual_axes import varying
from fomaml_jax.meta_gradients import finite_with
from fomaml_jax.types import MetaGradient, Params, TaskInfo
from fomaml_jax.variants import was_measured

TasksAtOnce = int | None | Literal["auto"]


@dataclasses.dataclass(frozen=True)
class OverTasks:
    """A meta-gradient over many tasks, as `over_tasks` makes it.

    Attributes:
        seeing: `(params, tasks, see) -> (mean grads, TaskInfo, see(TaskInfo))`, the last one summed
            over the devices in the same all-reduce as the gradients.
        devices: of the mesh: it takes a multiple of so many tasks.
        skips: whether tasks that are not finite are left out.
    """

    seeing: Callable[[Params, Any, Callable[[TaskInfo], Any]], tuple[Params, TaskInfo, Any]]
    devices: int = 1
    skips: bool = True

    __name__ = "over_tasks"  # of a function, as jax.named_call and profilers ask for

    def __call__(self, params: Params, tasks: Any) -> tuple[Params, TaskInfo]:
        """`(params, tasks) -> (mean grads, TaskInfo with a leading [tasks] axis)`."""
        return self.seeing(params, tasks, lambda info: ())[:2]


def over_tasks(
    meta_gradient: MetaGradient,
    *,
    tasks_at_once: TasksAtOnce = "auto",
    on_nonfinite: Literal["skip", "propagate"] = "skip",
    mesh: Mesh | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    task_weight: Callable[[Any], Any] | None = None,
) -> OverTasks:
    """Makes a per-task meta-gradient one for a meta-batch: the mean over its tasks.

    The tasks run `tasks_at_once` together under `vmap`, one such chunk after another in a
    `lax.scan` that carries the sum of the gradients (in float32 at least), so memory grows with
    `tasks_at_once` and not with the number of tasks. Every choice gives the same numbers up to
    the order of summation.

    `tasks` may be any pytree that the per-task function takes with a leading task axis. With a
    sampler composed in, the tasks are keys, and a meta-batch is never held in memory::

        over_tasks(lambda params, key: meta_gradient(params, sample_task(key)))

    Args:
        meta_gradient: `(params, task) -> (grads, TaskInfo)`, such as `fomaml(...)`.
        tasks_at_once: how many tasks run together; a remainder runs in a smaller chunk. `None` is
            all; `"auto"` is one on CPU, where a single task stays in cache, and all elsewhere.
        on_nonfinite: `"skip"` takes the mean over the tasks whose `TaskInfo.finite` is true (zero
            if there is none, and a `meta_learner` then moves nothing), so that one diverged task
            cannot poison a step; `TaskInfo.finite` says which were left out. Values are protected,
            not derivatives of the mean gradient. `"propagate"` takes the mean over all.
        mesh: shards the tasks over all axes of this mesh: each device runs its own, and one
            all-reduce joins the gradients. Their number must be a multiple of the mesh's size. On
            CPU set `jax.config.update("jax_num_cpu_devices", os.cpu_count())` first: a scan over
            small tasks keeps but one core busy. A learner's state comes back on every device of it:
            put the first one there too, `jax.device_put(state, NamedSharding(mesh,
            PartitionSpec()))`, and a jitted step is compiled once, not twice. `fj.train` does.
        axis_name: for use inside of a `jax.shard_map` or `pmap` of your own: the axes, or the one,
            among whose devices the tasks are shared out. Each device passes its own tasks, and gets
            the mean over those of all; `TaskInfo` is that of its own.
        task_weight: `task -> []`, how much a task counts in the mean gradient (the number of its
            records, say); relative, in float32, zero or between 1e-20 and 1e20. All tasks count the
            same unless given. A task whose weight is another is as one that is not finite.
            Where all weigh nothing the mean is zero, and an outer optimizer's momentum and decay
            still move.

    Returns:
        A function `(params, tasks) -> (mean grads, TaskInfo with a leading [tasks] axis)`.

    Raises:
        TypeError: for a `meta_gradient` that is no function, or returns something else.
        ValueError: for leaves that do not lead with the same number of tasks, no tasks,
            `tasks_at_once` below 1, an unknown `on_nonfinite`, tasks that do not divide among the
            devices of the mesh, both a mesh and an axis name; gradients that are not like `params`,
            a weight that is not a scalar.

    Warns:
        UserWarning: on CPU, where the per-task function holds native convolutions, which are
            several times slower there than with `matmul_convolutions`, and `tune` has not found
            them to be faster.

    Example:
        >>> import jax.numpy as jnp, optax, fomaml_jax as fj
        >>> loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
        >>> meta_gradient = fj.over_tasks(fj.fomaml(loss, optax.sgd(0.5), num_steps=1))
        >>> centres = jnp.array([[1.0], [3.0]])  # [tasks, ...]
        >>> grads, info = meta_gradient(jnp.zeros(1), fj.Task(centres, centres))
        >>> grads, info.query_loss
        (Array([-1.], dtype=float32), Array([0.125, 1.125], dtype=float32))
    """
    refusals.check_tasks_at_once(tasks_at_once)
    refusals.check_choice("on_nonfinite", on_nonfinite, ("skip", "propagate"))
    refusals.check_function("meta_gradient", meta_gradient, "(params, task) -> (grads, TaskInfo)")
    refusals.check_mesh(mesh)
    if task_weight is not None:
        refusals.check_function("task_weight", task_weight, "task -> weight")
    if mesh is not None and axis_name is not None:
        raise ValueError(
            "over_tasks was given a mesh, on which it shards the tasks itself, and an axis_name, "
            "for tasks that are sharded around it; pass one of them"
        )
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    axes = axes if mesh is None else mesh.axis_names

    def mean_meta_gradient(params, tasks, see):
        params = varying(params, tasks)  # whatever the per-task function does to differentiate

        def add_chunk(total, chunk):
            grads, info, weight = together(one_task, chunk)
            keep = jnp.ones_like(info.finite) if on_nonfinite == "propagate" else info.finite
            sums = jax.tree.map(lambda g: _sum_kept(g, keep), (grads, weight))
            return jax.tree.map(lambda t, s: t + s.astype(t.dtype), total, sums), info

        def one_task(task):
            grads, info = refusals.checked_meta_gradient(meta_gradient(params, task))
            refusals.check_gradients(grads, params)
            if task_weight is None:
                return grads, info, jnp.ones((), jnp.float32)
            weight = refusals.checked_weight(task_weight(task))
            weighted = jax.tree.map(lambda g: _times(weight, g), grads)
            return weighted, finite_with(info, weight), weight

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, accumulator(p.dtype)), params)
        start = varying((zeros, jnp.zeros((), jnp.float32)), params, tasks)
        total, info = in_chunks(add_chunk, start, tasks, tasks_at_once)
        (sums, weight), seen = _sum_over_devices((total, see(info)), axes)
        count = jnp.where(weight > 0, weight, 1)
        mean = jax.tree.map(lambda t, p: (t / count.astype(t.dtype)).astype(p.dtype), sums, params)
        return (mean, seen), info

    def seeing(params, tasks, see):
        num_tasks = refusals.check_task_axis(tasks)
        refusals.check_params(params)
        params, tasks = jax.tree.map(jnp.asarray, (params, tasks))
        _warn_of_native_convolutions(meta_gradient, params, tasks)
        on_each = functools.partial(mean_meta_gradient, see=see)
        if mesh is None:
            (mean, seen), info = on_each(params, tasks)
        else:
            refusals.check_divides(num_tasks, mesh)
            (mean, seen), info = shared_out(on_each, mesh, params, tasks)
        return mean, info, seen

    return OverTasks(seeing, 1 if mesh is None else mesh.size, on_nonfinite == "skip")


def shared_out(fn: Callable[[Params, Any], Any], mesh: Mesh, params: Params, tasks: Any) -> Any:
    """`fn(params, tasks) -> (for all, of its own tasks)` on each device of a mesh for its tasks."""
    one, each = PartitionSpec(), PartitionSpec(mesh.axis_names)
    if AxisType.Explicit in mesh.axis_types:  # in_specs would only assert: place the inputs
        params = jax.sharding.reshard(params, NamedSharding(mesh, one))
        tasks = jax.sharding.reshard(tasks, NamedSharding(mesh, each))
    # With check_vma=True a user's own loop from zeros would not trace: its carry comes to vary.
    return jax.shard_map(
        fn, mesh=mesh, in_specs=(one, each), out_specs=(one, each), check_vma=False
    )(params, tasks)


def _times(weight: jax.Array, grad: jax.Array) -> jax.Array:
    """In the dtype of the sum: a gradient that is finite stays so."""
    return weight.astype(accumulator(grad.dtype)) * grad.astype(accumulator(grad.dtype))


def _sum_over_devices(tree: Any, axes: tuple[str, ...]) -> Any:
    """Sums over the devices in one all-reduce a dtype."""
    if not axes:
        return tree
    if _is_sharded_besides():
        return jax.lax.psum(tree, axes)
    leaves, structure = jax.tree.flatten(tree)
    # In the order of the leaves: every process must send the same first.
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        places = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
        flat, unflatten = ravel_pytree([leaves[i] for i in places])
        for i, leaf in zip(places, unflatten(jax.lax.psum(flat, axes)), strict=True):
            leaves[i] = leaf
    return structure.unflatten(leaves)


def _is_sharded_besides() -> bool:
    """Whether JAX shards over other axes of the mesh: arrays joined into one would be whole."""
    around = jax.sharding.get_abstract_mesh()
    kinds = zip(around.axis_sizes, around.axis_types, strict=True)
    return any(size > 1 and kind != AxisType.Manual for size, kind in kinds)


def in_chunks(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    tasks: Any,
    tasks_at_once: TasksAtOnce,
) -> tuple[Any, Any]:
    """Scans `step(carry, chunk) -> (carry, out)` over chunks of tasks, remainder included.

    A chunk's leaves and every `out` lead with the chunk's tasks; the outs are joined in task order.
    """
    num_tasks = refusals.check_task_axis(tasks)
    size = min(resolve(tasks_at_once, num_tasks), num_tasks)
    whole = num_tasks // size * size
    outs = []
    if whole == size:  # one chunk needs no loop
        carry, out = step(carry, jax.tree.map(lambda x: x[:size], tasks))
    else:
        chunks = jax.tree.map(lambda x: x[:whole].reshape(whole // size, size, *x.shape[1:]), tasks)
        carry, out = jax.lax.scan(step, carry, chunks)
        out = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), out)
    outs.append(out)
    if whole < num_tasks:
        carry, out = step(carry, jax.tree.map(lambda x: x[whole:], tasks))
        outs.append(out)
    return carry, jax.tree.map(lambda *xs: jnp.concatenate(xs), *outs)


def together(fn: Callable[[Any], Any], tasks: Any) -> Any:
    """`jax.vmap(fn)(tasks)`; a single task is not batched, which compiles to simpler products."""
    if refusals.check_task_axis(tasks) > 1:
        return jax.vmap(fn)(tasks)
    return jax.tree.map(lambda x: jnp.asarray(x)[None], fn(jax.tree.map(lambda x: x[0], tasks)))


def resolve(tasks_at_once: TasksAtOnce, num_tasks: int) -> int:
    """One after another on CPU, where one task stays in cache; all at once elsewhere."""
    if tasks_at_once == "auto":
        return 1 if jax.default_backend() == "cpu" else num_tasks
    return tasks_at_once or num_tasks


def _sum_kept(grads: jax.Array, keep: jax.Array) -> jax.Array:
    """The sum over tasks, leaving out whole tasks, NaNs and all."""
    keep = keep.reshape(keep.shape + (1,) * (grads.ndim - 1))
    return jnp.where(keep, grads, jnp.zeros_like(grads)).sum(0, dtype=accumulator(grads.dtype))


def _warn_of_native_convolutions(meta_gradient: MetaGradient, params: Params, tasks: Any) -> None:
    if jax.default_backend() != "cpu" or was_measured(meta_gradient):
        return
    one_task = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tasks)
    if not _may_hold_convolutions(params, one_task):
        return
    if native_convolutions_in(meta_gradient, params, one_task):
        warnings.warn(
            "this loss holds native convolutions, which are several times slower on CPU when "
            "batched over tasks or run in a loop: wrap it, matmul_convolutions(loss_fn)",
            stacklevel=4,
        )


def _may_hold_convolutions(params: Params, task: Any) -> bool:
    """A convolution's sides have three axes or more; what a sampler makes of a key is not seen."""
    is_data = any(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(task))
    return not is_data or any(leaf.ndim >= 3 for leaf in jax.tree.leaves((params, task)))
