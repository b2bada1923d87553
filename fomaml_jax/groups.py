"""Tables as tasks: the rows of a group, a patient's say, are one task of uneven size."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fomaml_jax import kept_numbers, refusals
from fomaml_jax.padding import without_padding
from fomaml_jax.types import Batch, Task

Support = Literal["first", "random"]
"""Which rows of a group are given: its first ones, or random ones."""


def from_groups(
    rows: Batch,
    counts: jax.Array | np.ndarray,
    *,
    shots: int,
    queries: int | None = None,
    support: Support = "first",
) -> Callable[[jax.Array], Task]:
    """A task is a group of rows, such as a patient: some are given, others are to be predicted.

    A group is drawn at random. With rows in the order of time its first `shots` are the support,
    and only later ones are ever in the query. Groups have different numbers of rows, so batches are
    padded and weighted as in `fj.uneven`, and one compiled program runs them all.

    Args:
        rows: any pytree whose leaves are `[groups, rows, ...]`, such as features and targets; each
            group's rows in the order of time, padding behind them. Kept on the device.
        counts: `[groups]` integers: the first `counts[g]` rows of group `g` are real.
        shots: support rows of a task.
        queries: query rows, drawn without replacement; a group that has fewer is padded. `None`
            takes all, in their order.
        support: "first", where the query is of the rows after them, or "random", where it is of all
            others.

    Returns:
        `key -> Task`; support and query are pairs `(batch, weights)` as of `uneven.stack_tasks`,
        with weights `[shots]` and `[queries]` (or fewer, if no group has as many rows after its
        support), 1 for a row and 0 for padding. A loss over such pairs is
        `uneven.weighted_mean(losses, weights)`.

    Raises:
        ValueError: for counts that do not fit the rows, a group without a row to predict, or values
            that are not finite.

    Example:
        >>> import jax, numpy as np, fomaml_jax as fj
        >>> x, y = np.zeros((42, 150, 3)), np.zeros((42, 150))  # [patients, recordings, ...]
        >>> counts = np.full(42, 120)
        >>> sample_task = fj.tasks.from_groups((x, y), counts, shots=5, queries=20)
        >>> (features, scores), weights = sample_task(jax.random.key(0)).query
        >>> features.shape, scores.shape, weights.shape
        ((20, 3), (20,), (20,))
    """
    rows, counts = _checked(rows, counts, shots)
    most = jax.tree.leaves(rows)[0].shape[1]
    refusals.check_choice("support", support, ("first", "random"))
    if queries is not None:
        refusals.check_at_least("queries", queries, 1)
    asked = most - shots if queries is None else min(queries, most - shots)

    def sample_task(key: jax.Array) -> Task:
        group_key, support_key, query_key = jax.random.split(key, 3)
        group = jax.random.randint(group_key, (), 0, len(counts))
        places = jnp.arange(most)
        if support == "random":
            given_first = _order(support_key, places < counts[group])
            # The others in the order of time again.
            places = jnp.concatenate([given_first[:shots], jnp.sort(given_first[shots:])])
        later = places[shots:]
        if queries is not None:
            later = later[_order(query_key, later < counts[group])]
        return _task(rows, counts, group, places[:shots], later[:asked])

    return sample_task


def each_group(rows: Batch, counts: jax.Array | np.ndarray, *, shots: int) -> Task:
    """Every group once, as a meta-batch: its first rows given, all later ones to be predicted.

    For an evaluation: with few groups, drawing them at random would count some several times.

    Args:
        rows: as for `from_groups`.
        counts: as for `from_groups`.
        shots: support rows of a task.

    Returns:
        A `Task` of pairs `(batch, weights)` with leaves `[groups, shots, ...]` and
        `[groups, rows - shots, ...]`, for `fj.evaluate_on`.

    Raises:
        ValueError: as `from_groups`.

    Example:
        >>> import numpy as np, fomaml_jax as fj
        >>> scores, counts = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]]), np.array([3, 2])
        >>> (later,), weights = fj.tasks.each_group((scores,), counts, shots=1).query
        >>> later.tolist(), weights.tolist()
        ([[2.0, 3.0], [5.0, 0.0]], [[1.0, 1.0], [1.0, 0.0]])
    """
    rows, counts = _checked(rows, counts, shots)
    places = jnp.arange(jax.tree.leaves(rows)[0].shape[1])
    return jax.vmap(lambda group: _task(rows, counts, group, places[:shots], places[shots:]))(
        jnp.arange(len(counts))
    )


def _task(rows: Batch, counts: Any, group: Any, given: jax.Array, later: jax.Array) -> Task:
    def batch(places: jax.Array) -> tuple[Batch, jax.Array]:
        weights = (places < counts[group]).astype(jnp.float32)

        def leaf(x: jax.Array) -> jax.Array:
            may_be_nan = jnp.issubdtype(x.dtype, jnp.inexact)
            return without_padding(x[group, places], weights if may_be_nan else None)

        return jax.tree.map(leaf, rows), weights

    return Task(batch(given), batch(later))


def _order(key: jax.Array, real: jax.Array) -> jax.Array:
    """A random order of the places, in which those that are not real are last."""
    drawn = jax.random.uniform(key, real.shape)
    return jnp.argsort(jnp.where(real, drawn, jnp.full_like(drawn, 2.0)))


def _checked(rows: Any, counts: Any, shots: int) -> tuple[Any, jax.Array]:
    refusals.check_at_least("shots", shots, 1)
    leaves = jax.tree.leaves_with_path(rows)
    if not leaves:
        raise ValueError("rows holds no arrays; pass a pytree with leaves [groups, rows, ...]")
    shapes = {f"rows{jax.tree_util.keystr(path)}": np.shape(x) for path, x in leaves}
    first = next(iter(shapes.values()))[:2]
    for name, shape in shapes.items():
        if len(shape) < 2 or shape[:2] != first:
            raise ValueError(
                f"{name} has shape {shape}; every leaf must be [groups, rows, ...], here {first}"
            )
    if np.shape(counts) != first[:1]:
        raise ValueError(f"counts must be [{first[0]}], got shape {np.shape(counts)}")
    if not first[0]:
        raise ValueError("rows has no groups; pass at least one")
    if not isinstance(counts, Tracer):
        _check_counts(np.asarray(counts), first[1], shots)
        for path, leaf in leaves:
            _check_finite(f"rows{jax.tree_util.keystr(path)}", leaf, np.asarray(counts))
    return jax.tree.map(jnp.asarray, rows), jnp.asarray(counts, jnp.int32)


def _check_counts(counts: np.ndarray, most: int, shots: int) -> None:
    if counts.dtype.kind not in "iu":
        raise ValueError(f"counts must be integers, got dtype {counts.dtype}")
    if counts.max() > most:
        raise ValueError(f"counts says {counts.max()} rows, but rows has {most} a group")
    if counts.min() <= shots:
        group, plural = int(counts.argmin()), "" if counts.min() == 1 else "s"
        raise ValueError(
            f"group {group} has {counts.min()} row{plural}, and shots={shots} leaves none of them "
            "to predict; leave such groups out, or give fewer"
        )


def _check_finite(name: str, leaf: Any, counts: np.ndarray) -> None:
    # Integers and keys of JAX's own are as it keeps them.
    sure = isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jnp.inexact)
    if sure or isinstance(leaf, Tracer):
        return
    real = np.arange(leaf.shape[1]) < counts[:, None]
    finite = kept_numbers.kept_by_jax(np.asarray(leaf)).reshape(*leaf.shape[:2], -1).all(-1)
    wrong = np.argwhere(real & ~finite)
    if len(wrong):
        g, r = wrong[0].tolist()
        raise ValueError(
            f"{name}[{g}, {r}] is {kept_numbers.not_kept(leaf.dtype)} ({len(wrong)} rows in all); "
            "leave such rows out, or fill them in"
        )
