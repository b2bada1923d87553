"""Tasks of uneven size in one shape: padding, and means that do not see it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fomaml_jax import kept_numbers, refusals
from fomaml_jax.dtypes import accumulator
from fomaml_jax.types import Batch, KeyedTask, Task


def pad_batch(batch: Batch, size: int) -> tuple[Batch, jax.Array]:
    """Adds examples of zeros (of PRNG keys, copies) up to `size`, and says which are real.

    Args:
        batch: any pytree whose leaves lead with the same number of examples.
        size: examples in the result.

    Returns:
        The padded batch, and weights `[size]` float32: 1 for an example, 0 for padding. Scale them
        where examples count differently.

    Raises:
        ValueError: for a batch that is larger, empty, or of uneven leaves; integers that JAX does
            not keep.

    Example:
        >>> import jax.numpy as jnp, fomaml_jax as fj
        >>> fj.uneven.pad_batch(jnp.array([5.0, 6.0]), 3)
        (Array([5., 6., 0.], dtype=float32), Array([1., 1., 0.], dtype=float32))
    """
    refusals.check_batch("batch", batch)
    refusals.check_at_least("size", size, 1)
    examples = refusals.check_same_examples(batch)
    if examples > size:
        raise ValueError(
            f"batch has {examples} examples, more than size={size}; pass a larger size"
        )

    def padded(x):
        if isinstance(x, np.ndarray) and x.dtype.kind in "iu":
            kept_numbers.check_kept("batch", x)
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # such as keys, of which there is no zero
            return jnp.concatenate([x, jnp.repeat(x[-1:], size - examples, 0)])
        return jnp.pad(x, [(0, size - examples)] + [(0, 0)] * (np.ndim(x) - 1))

    return jax.tree.map(padded, batch), jnp.asarray(np.arange(size) < examples, jnp.float32)


def stack_tasks(tasks: Sequence[Any]) -> Any:
    """A meta-batch from tasks of any numbers of examples, so that one compiled program runs them.

    Args:
        tasks: each a `Task`, or each a `KeyedTask`, whose batches differ in their number of
            examples alone.

    Returns:
        A `Task` (or `KeyedTask`) whose support and query are pairs `(batch, weights)` with leaves
        `[tasks, examples, ...]` and weights `[tasks, examples]`, as from `pad_batch`, padded to the
        most examples of all. A loss over such pairs is `weighted_mean(losses, weights)`.

    Raises:
        ValueError: for no tasks, tasks of both kinds, or batches of different structures or shapes.

    Example:
        >>> import jax.numpy as jnp, fomaml_jax as fj
        >>> short, long = jnp.ones((2, 1)), jnp.ones((5, 1))
        >>> tasks = fj.uneven.stack_tasks([fj.Task(short, long), fj.Task(long, short)])
        >>> tasks.support[0].shape, tasks.support[1]
        ((2, 5, 1), Array([[1., 1., 0., 0., 0.],
               [1., 1., 1., 1., 1.]], dtype=float32))
    """
    if not tasks:
        raise ValueError("tasks is empty; pass at least one task")

    def stacked(name):
        batches = [getattr(task, name) for task in tasks]
        for batch in batches:
            refusals.check_batch(name, batch)
        size = max(refusals.check_same_examples(batch) for batch in batches)
        return jax.tree.map(lambda *x: jnp.stack(x), *(pad_batch(batch, size) for batch in batches))

    support, query = stacked("support"), stacked("query")
    keyed = [task for task in tasks if isinstance(task, KeyedTask)]
    if not keyed:
        return Task(support, query)
    if len(keyed) < len(tasks):
        raise ValueError("some of the tasks have a key and others none; pass all of one kind")
    return KeyedTask(support, query, jnp.stack([task.key for task in keyed]))


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """The mean over examples, in which those of weight zero have no part, NaN or not.

    Args:
        values: `[examples, ...]`; in float32 unless they are floats. A NaN of weight zero does no
            harm here, but what it was computed from does to the gradient: pass inputs and targets
            through `models.without_padding`.
        weights: `[examples]`, not negative.

    Returns:
        `[]`: the mean over all axes, each example by its weight; zero if no example has any.

    Raises:
        ValueError: for weights that are not one an example.

    Example:
        >>> import jax.numpy as jnp, fomaml_jax as fj
        >>> fj.uneven.weighted_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1.0, 1.0, 0.0]))
        Array(2., dtype=float32)
    """
    values, weights = jnp.asarray(values), jnp.asarray(weights)
    if not np.ndim(values) or np.shape(weights) != np.shape(values)[:1]:
        raise ValueError(
            f"weights must be one an example, [examples], got {np.shape(weights)} for values of "
            f"shape {np.shape(values)}"
        )
    is_float = jnp.issubdtype(values.dtype, jnp.floating)  # and not hits and misses
    dtype = values.dtype if is_float else jnp.float32
    wide = accumulator(dtype)
    weights = weights.astype(wide)
    each = values.astype(wide).mean(tuple(range(1, np.ndim(values))))
    total = weights.sum()
    # Not by the product alone: zero times NaN is NaN.
    each = jnp.where(weights > 0, each, jnp.zeros_like(each))
    mean = (weights * each).sum() / jnp.where(total > 0, total, jnp.ones_like(total))
    return mean.astype(dtype)
