"""Shifts of the test distribution: pure functions that change a task, `(key, Task) -> Task`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fomaml_jax import augmentation, refusals
from fomaml_jax.dtypes import accumulator
from fomaml_jax.tasks import TaskDistribution
from fomaml_jax.types import Batch, Task

Shift = Callable[[jax.Array, Task], Task]
"""`(key, Task) -> Task`, pure; the batches are pairs `(inputs, labels)`."""

Strength = float | jax.Array
"""How far a shift goes, 0 for not at all. Traced, it lets one compiled program serve them all."""

Of = Literal["support", "query", "both"]
"""Whose pictures a shift changes."""

_STREAM = 0x5417F7ED
"""Keys of shifts are folded with this first: `split` gives what small numbers would."""


def shifted(sample_task: TaskDistribution, *shifts: Shift) -> TaskDistribution:
    """The same tasks, each shift applied to them in turn, with a key of its own.

    The tasks beneath are those that `sample_task` gives without any shift, so that accuracies may
    be compared pair by pair (`fj.paired_difference`). Compose `batch_statistics.beside_support`
    around the result, not within.

    Args:
        sample_task: a task distribution whose batches are pairs `(inputs, labels)`.
        *shifts: such as `rotation(30)`.

    Returns:
        `key -> Task`.

    Example:
        >>> import jax, numpy as np, fomaml_jax as fj
        >>> images = np.zeros((20, 10, 28, 28, 1), np.uint8)
        >>> sample_task = fj.shifts.shifted(
        ...     fj.tasks.episodes(images, ways=5, shots=5, queries=3),
        ...     fj.shifts.rotation(30, of="query"), fj.shifts.label_noise(0.2))
        >>> sample_task(jax.random.key(0)).query[0].shape
        (15, 28, 28, 1)
    """

    def sample(key: jax.Array) -> Task:
        stream = jax.random.fold_in(key, _STREAM)
        task = sample_task(key)
        for i, shift in enumerate(shifts):
            task = shift(jax.random.fold_in(stream, i), task)
        return task

    return sample


def rotation(degrees: Strength, *, of: Of = "both") -> Shift:
    """Turns pictures about their middle, counter-clockwise; what comes in is zero.

    Args:
        degrees: the angle, the same for all pictures. A multiple of 90 is `np.rot90`, where
            pictures are square; others are interpolated linearly.
        of: whose pictures.

    Returns:
        A shift of pictures `[n, height, width, ...]`.

    Raises:
        ValueError: for an angle that is not finite, or an unknown `of`; for pictures of another
            form when it is applied.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> batch = jnp.eye(3).reshape(1, 3, 3, 1), jnp.zeros(1, jnp.int32)
        >>> turned = fj.shifts.rotation(90)(jax.random.key(0), fj.Task(batch, batch))
        >>> turned.query[0][0, :, :, 0].round(3)
        Array([[0., 0., 1.],
               [0., 1., 0.],
               [1., 0., 0.]], dtype=float32)
    """
    _check_strength("degrees", degrees, least=-np.inf)

    def turn(key: jax.Array, x: jax.Array) -> jax.Array:
        angle = jnp.deg2rad(jnp.asarray(degrees, accumulator(x.dtype)))
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        # Rows go downwards; each pixel is fetched from where it was.
        matrix = jnp.stack([jnp.stack([cos, sin]), jnp.stack([-sin, cos])])
        return jax.vmap(lambda picture: augmentation.resampled(picture, matrix))(x)

    return _on_pictures(turn, of)


def noise(std: Strength, *, of: Of = "both") -> Shift:
    """Adds independent Gaussian noise to every pixel; pixels are not clipped.

    Args:
        std: its standard deviation, on the scale of the pixels (ink is 1).
        of: whose pictures.

    Returns:
        A shift of pictures `[n, height, width, ...]`.

    Raises:
        ValueError: as `rotation`, and below 0.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> batch = jnp.zeros((1, 28, 28, 1)), jnp.zeros(1, jnp.int32)
        >>> noisy = fj.shifts.noise(0.5)(jax.random.key(0), fj.Task(batch, batch))
        >>> round(float(noisy.query[0].std()), 1)
        0.5
    """
    _check_strength("std", std)

    def add(key: jax.Array, x: jax.Array) -> jax.Array:
        return x + jnp.asarray(std, x.dtype) * jax.random.normal(key, x.shape, x.dtype)

    return _on_pictures(add, of)


def blur(std: Strength, *, of: Of = "both") -> Shift:
    """Blurs pictures with a Gaussian, beyond the borders of which there is nothing.

    Away from the borders the sum of the pixels stays.

    Args:
        std: its standard deviation, in pixels.
        of: whose pictures.

    Returns:
        A shift of pictures `[n, height, width, ...]`.

    Raises:
        ValueError: as `rotation`, and below 0.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> batch = jnp.eye(28)[None, :, :, None], jnp.zeros(1, jnp.int32)
        >>> blurred = fj.shifts.blur(1.0)(jax.random.key(0), fj.Task(batch, batch))
        >>> round(float(blurred.query[0][0, 14, 14, 0]), 2)
        0.28
    """
    _check_strength("std", std)

    def spread(key: jax.Array, x: jax.Array) -> jax.Array:
        wide = jnp.asarray(std, accumulator(x.dtype))  # there are more places than 8 bits tell
        lines = [_gaussian(wide, n) for n in x.shape[1:3]]
        blurred = jnp.einsum(
            "ih,jw,nhw...->nij...", *lines, x.astype(wide.dtype), precision="highest"
        )
        return blurred.astype(x.dtype)

    return _on_pictures(spread, of)


def label_noise(share: Strength) -> Shift:
    """Gives a share of the support examples another label; queries keep theirs.

    Args:
        share: of all support examples, rounded to whole examples; between 0 and 1. Which they are
            is drawn, and so is each new label, among the other classes from 0 to the greatest.

    Returns:
        A shift of tasks with integer labels. A class may lose all of its examples.

    Raises:
        ValueError: for a share that is none.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> labels = jnp.repeat(jnp.arange(5), 5)
        >>> task = fj.Task((jnp.zeros((25, 1)), labels), (jnp.zeros((25, 1)), labels))
        >>> noisy = fj.shifts.label_noise(0.2)(jax.random.key(0), task)
        >>> int((noisy.support[1] != labels).sum()), int((noisy.query[1] != labels).sum())
        (5, 0)
    """
    _check_strength("share", share, most=1.0)

    def relabel(key: jax.Array, task: Task) -> Task:
        which_key, label_key = jax.random.split(key)
        x, y = _pair("support", task.support)
        rank = jnp.argsort(jnp.argsort(jax.random.bits(which_key, y.shape)))
        wide = y if y.dtype.itemsize >= 4 else y.astype(jnp.int32)  # for their sums
        ways = wide.max() + 1
        other = (wide + jax.random.randint(label_key, y.shape, 1, ways, wide.dtype)) % ways
        wrong = rank < jnp.round(jnp.asarray(share, jnp.float32) * len(y)).astype(rank.dtype)
        return task._replace(support=(x, jnp.where(wrong, other.astype(y.dtype), y)))

    return relabel


def class_imbalance(
    counts: Sequence[int] | np.ndarray | jax.Array, *, total: int | None = None
) -> Shift:
    """Leaves uneven numbers of support examples to the classes; queries stay as they are.

    Args:
        counts: `[ways]`, support examples that stay, at least 1 a class; which class gets which
            number is drawn. With the same total, sets of different balance have the same shape.
        total: their sum, which must be given where they are traced.

    Returns:
        A shift of tasks that have at least `max(counts)` support examples of every class: `total`
            of them stay, in their order.

    Raises:
        ValueError: for counts below 1, or another total; when it is applied, for more than there
            are, or another number of counts than of classes.
        TypeError: for traced counts without a total.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> labels = jnp.repeat(jnp.arange(3), 5)
        >>> task = fj.Task((jnp.zeros((15, 1)), labels), (jnp.zeros((15, 1)), labels))
        >>> uneven = fj.shifts.class_imbalance([1, 3, 5])(jax.random.key(0), task)
        >>> sorted(jnp.bincount(uneven.support[1]).tolist())
        [1, 3, 5]
    """
    total = _check_counts(counts, total)

    def thin_out(key: jax.Array, task: Task) -> Task:
        x, y = _pair("support", task.support)
        if total > len(y):
            raise ValueError(f"counts add up to {total}, more than the {len(y)} support examples")
        if not isinstance(counts, Tracer) and len(counts) * np.max(counts) > len(y):
            raise ValueError(
                f"counts ask for {np.max(counts)} examples of a class, but {len(counts)} classes "
                f"have {len(y)} support examples in all"
            )
        if not isinstance(y, Tracer):
            _check_classes(np.bincount(np.asarray(y)), counts)
        x, y = jnp.asarray(x), jnp.asarray(y)  # only now: under `jit` labels of NumPy are traced
        kept = jax.random.permutation(key, jnp.asarray(counts))
        same = y[:, None] == y[None, :]
        before = jnp.tril(same, -1).sum(1)  # examples of the same class
        left_out = before >= kept[y]
        stay = jnp.argsort(left_out, stable=True)[:total]
        return task._replace(support=(x[stay], y[stay]))

    return thin_out


def _check_classes(there: np.ndarray, counts: Any) -> None:
    if len(there) != len(counts):
        raise ValueError(f"counts must be one a class, of {len(there)}, got {len(counts)}")
    if not isinstance(counts, Tracer) and there.min() < np.max(counts):
        raise ValueError(
            f"counts ask for {np.max(counts)} examples of a class, but class {there.argmin()} has "
            f"{there.min()} support examples"
        )


def uneven_counts(ways: int, most: int, steepness: Strength) -> jax.Array:
    """Support examples for each of the classes, whose sum is the same however uneven they are.

    Args:
        ways: classes.
        most: the most that a class may have, an odd number.
        steepness: 0: all the same, `(most + 1) / 2`; 1: evenly from 1 to `most`; beyond: ever more
            classes with 1 or `most`.

    Returns:
        `[ways]` int32, for `class_imbalance`; the sum is `ways * (most + 1) / 2`.

    Raises:
        ValueError: for fewer than 2 ways, or an even or negative `most`.

    Example:
        >>> import fomaml_jax as fj
        >>> [fj.shifts.uneven_counts(5, 5, steepness).tolist() for steepness in (0, 1, 5)]
        [[3, 3, 3, 3, 3], [1, 2, 3, 4, 5], [1, 1, 3, 5, 5]]
    """
    refusals.check_at_least("ways", ways, 2)
    refusals.check_at_least("most", most, 1)
    if most % 2 == 0:
        raise ValueError(f"most must be odd, so that there is a middle, got {most}")
    half = (most - 1) // 2
    # To the bit minus itself backwards, and ties go to even: the sum is that of the middle.
    place = jnp.clip(steepness * (jnp.arange(1 - ways, ways, 2) / (ways - 1)), -1.0, 1.0)
    return (half + 1 + jnp.round(half * place)).astype(jnp.int32)


NAMED: Mapping[str, Callable[[Strength], Shift]] = {
    "rotation of the queries": lambda degrees: rotation(degrees, of="query"),
    "rotation of the whole task": rotation,
    "noise": noise,
    "blur": blur,
    "label noise": label_noise,
}
"""Shifts that keep all shapes, by name: strength 0 changes nothing, so all fit one program."""


def _on_pictures(change: Callable[[jax.Array, jax.Array], jax.Array], of: Of) -> Shift:
    """A shift by `(key, pictures) -> pictures`, with a key for each batch."""
    refusals.check_choice("of", of, ("support", "query", "both"))

    def shift(key: jax.Array, task: Task) -> Task:
        keys = dict(zip(("support", "query"), jax.random.split(key), strict=True))
        changed = {}
        for name in keys if of == "both" else (of,):
            x, y = _pair(name, getattr(task, name))
            changed[name] = (change(keys[name], _pictures(name, x)), y)
        return task._replace(**changed)

    return shift


def _gaussian(std: jax.Array, size: int) -> jax.Array:
    """`[size, size]`: what each pixel of a line gives to each."""
    # So narrow a Gaussian is the identity, exactly: what is one pixel off underflows.
    std = jnp.maximum(std, 0.01)

    def bell(apart: jax.Array) -> jax.Array:
        return jnp.exp(-0.5 * (apart / std) ** 2)

    place = jnp.arange(size, dtype=std.dtype)
    # Longer than the line, so that the sum has all that falls off its ends as well.
    everywhere = jnp.arange(-2 * size, 2 * size + 1, dtype=std.dtype)
    return bell(place[:, None] - place[None, :]) / bell(everywhere).sum()


def _pictures(name: str, x: jax.Array) -> jax.Array:
    if np.ndim(x) < 3:
        raise ValueError(
            f"the {name} batch must have pictures [n, height, width, ...], got shape {np.shape(x)}"
        )
    return augmentation.float_pixels(x)


def _pair(name: str, batch: Batch) -> tuple[jax.Array, jax.Array]:
    if not (isinstance(batch, tuple) and len(batch) == 2) or isinstance(batch[0], tuple):
        raise TypeError(
            f"the {name} batch must be a pair (pictures, labels); shift tasks before "
            "batch_statistics.beside_support, not after"
        )
    return batch


def _check_strength(
    name: str, value: Strength, *, least: float = 0.0, most: float = np.inf
) -> None:
    if isinstance(value, Tracer):
        return
    if np.ndim(value) or not (np.isfinite(value) and least <= value <= most):
        bounds = "" if np.isinf(least) else f" of at least {least:g}"
        bounds = bounds if np.isinf(most) else f" between {least:g} and {most:g}"
        raise ValueError(f"{name} must be a finite number{bounds}, got {value}")


def _check_counts(counts: Sequence[int] | np.ndarray | jax.Array, total: int | None) -> int:
    if isinstance(counts, Tracer):
        if total is None:
            raise TypeError("counts are traced: pass total, their sum")
        return total
    found = np.asarray(counts)
    if found.ndim != 1 or found.dtype.kind not in "iu" or found.size == 0 or found.min() < 1:
        raise ValueError(f"counts must be integers [ways] of at least 1, got {counts}")
    if total not in (None, found.sum()):
        raise ValueError(f"total must be the sum of counts, {found.sum()}, got {total}")
    return int(found.sum())
