"""Task distributions on the device: pure functions from a key to a task."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fomaml_jax import augmentation, kept_numbers, refusals
from fomaml_jax.augmentation import (
    Augmentation,
    as_float,
    random_affine,
    random_shift,
    resampled,
    rotated_classes,
)
from fomaml_jax.groups import each_group, from_groups
from fomaml_jax.streams import Waves, drift_and_jumps, drifting, sine_waves
from fomaml_jax.types import Task

__all__ = [
    "Augmentation",
    "TaskDistribution",
    "Waves",
    "as_float",
    "drift_and_jumps",
    "drifting",
    "each_group",
    "episodes",
    "from_groups",
    "random_affine",
    "random_shift",
    "resampled",
    "rotated_classes",
    "sine_waves",
    "sinusoid",
    "task_keys",
]

TaskDistribution = Callable[[jax.Array], Task]
"""`key -> Task`, pure; `jax.vmap` of it makes a meta-batch."""


def task_keys(key: jax.Array, step: int | jax.Array, num_tasks: int) -> jax.Array:
    """The keys of an outer step, `[num_tasks]`: key `i` is a function of `(key, step, i)` alone.

    However many tasks a step has, and wherever they run, its first tasks stay the same; so a
    resumed run needs no sampler state.

    Args:
        key: a PRNG key; not consumed, only folded.
        step: the outer step, at least 0; may be traced.
        num_tasks: how many keys.

    Raises:
        ValueError: for fewer than one.

    Warns:
        UserWarning: for keys of `rbg`, from which JAX draws other numbers under `vmap`, so that
            what is sampled depends on how many tasks are sampled together.

    Example:
        >>> import jax, fomaml_jax as fj
        >>> sample_task = fj.tasks.sinusoid(shots=5, queries=10)
        >>> tasks = jax.vmap(sample_task)(fj.tasks.task_keys(jax.random.key(0), 7, 25))
        >>> tasks.support[0].shape
        (25, 5, 1)
    """
    refusals.check_at_least("num_tasks", num_tasks, 1)
    refusals.warn_of_rbg(key)
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(jnp.arange(num_tasks))


def sinusoid(
    *,
    shots: int = 10,
    queries: int = 10,
    amplitude: tuple[float, float] = (0.1, 5.0),
    phase: tuple[float, float] = (0.0, np.pi),
    x_range: tuple[float, float] = (-5.0, 5.0),
) -> TaskDistribution:
    r"""Regression of :math:`y = a \sin(x - b)`, the MAML paper's toy problem.

    Amplitude, phase and inputs are uniform in their ranges, drawn afresh for every task.

    Args:
        shots: support points.
        queries: query points.
        amplitude: range of `a`.
        phase: range of `b`, in radians.
        x_range: range of the inputs.

    Returns:
        `key -> Task`; each batch is `(x [n, 1], y [n, 1])` in the default float dtype.

    Raises:
        ValueError: for counts below 1, or a range that is not `low < high`.

    Example:
        >>> import jax, fomaml_jax as fj
        >>> task = fj.tasks.sinusoid(shots=5, queries=20)(jax.random.key(0))
        >>> task.support[0].shape, task.query[1].shape
        ((5, 1), (20, 1))

    References:
        Finn, Abbeel, Levine, `Model-Agnostic Meta-Learning <https://arxiv.org/abs/1703.03400>`_,
        2017, section 5.1.
    """
    refusals.check_at_least("shots", shots, 1)
    refusals.check_at_least("queries", queries, 1)
    for name, ends in {"amplitude": amplitude, "phase": phase, "x_range": x_range}.items():
        refusals.check_range(name, ends)

    def sample_task(key: jax.Array) -> Task:
        a_key, b_key, x_key = jax.random.split(key, 3)
        a = jax.random.uniform(a_key, minval=amplitude[0], maxval=amplitude[1])
        b = jax.random.uniform(b_key, minval=phase[0], maxval=phase[1])
        x = jax.random.uniform(x_key, (shots + queries, 1), minval=x_range[0], maxval=x_range[1])
        y = a * jnp.sin(x - b)
        return Task((x[:shots], y[:shots]), (x[shots:], y[shots:]))

    return sample_task


def episodes(
    images: jax.Array | np.ndarray,
    *,
    ways: int,
    shots: int,
    queries: int,
    counts: Sequence[int] | jax.Array | np.ndarray | None = None,
    groups: Sequence[int] | np.ndarray | None = None,
    rotations: bool = False,
    augment: Augmentation | None = None,
) -> TaskDistribution:
    """N-way K-shot classification episodes over classes resident on the device.

    An episode draws `ways` classes and, of each, `shots + queries` examples, all without
    replacement, so that support and query never share an example. Which class gets which label,
    and the order of the examples, is random in every episode: neither carries information.

    Args:
        images: `[classes, examples, ...]`, any arrays (pictures are `[..., height, width,
            channels]`). Kept as they are on the device; uint8 becomes float32 in `[0, 1]` in the
            episode, which keeps a data set four times smaller. A jitted function that closes over
            the distribution holds them in its program, which with jax 0.10 takes seconds longer to
            compile for each 100 MB; one that is given them, and makes the distribution inside, does
            not.
        ways: classes in an episode.
        shots: support examples a class.
        queries: query examples a class.
        counts: `[classes]` integers: only the first `counts[c]` examples of class `c` are real,
            the rest is padding. `None`: all are.
        groups: `[classes]` integers: the classes of an episode then all come from one group, each
            of those with enough classes being as likely. Letters of one alphabet are harder to
            tell apart than letters of many.
        rotations: turns every class of an episode by its own random multiple of 90 degrees, the
            same for its support and query. Needs square pictures.
        augment: `(key, example) -> example`, applied to every example, such as `random_shift(2)`.

    Returns:
        `key -> Task`; a batch is `(x [ways * n, ...], y [ways * n] int32)`, labels `0..ways - 1`.

    Raises:
        ValueError: for more ways than classes, or than any group has, more shots and queries than
            a class has examples, counts below 1, pixels that are not finite, or rotations of what
            is not a square picture.
        TypeError: for what is not one array of numbers.

    Example:
        >>> import jax, numpy as np, fomaml_jax as fj
        >>> images = np.zeros((20, 10, 28, 28, 1), np.uint8)  # [classes, examples, ...]
        >>> sample_task = fj.tasks.episodes(images, ways=5, shots=1, queries=3)
        >>> x, y = sample_task(jax.random.key(0)).query
        >>> x.shape, x.dtype, y.shape
        ((15, 28, 28, 1), dtype('float32'), (15,))

    References:
        Vinyals et al., `Matching Networks <https://arxiv.org/abs/1606.04080>`_, 2016.
    """
    counts = None if counts is None else np.asarray(counts)
    _check_episodes(images, ways, shots, queries, counts, rotations)
    draw_classes = _class_draw(images.shape[0], ways, groups)
    images = jnp.asarray(images)
    everything = jnp.full(images.shape[:1], images.shape[1])
    counts = jnp.asarray(everything if counts is None else counts, jnp.int32)

    def sample_task(key: jax.Array) -> Task:
        class_key, example_key, turn_key, support_key, query_key = jax.random.split(key, 5)
        classes = draw_classes(class_key)
        draw = functools.partial(_draw, count=shots + queries)
        examples = jax.vmap(draw)(jax.random.split(example_key, ways), counts[classes])
        turns = jax.random.randint(turn_key, (ways,), 0, 4) if rotations else None

        def batch(key, examples):
            """The examples `[ways, n]` of the classes, in random order."""
            order_key, augment_key = jax.random.split(key)
            order = _shuffle(order_key, examples.size)
            labels = order // examples.shape[1]
            x = as_float(images[classes[labels], examples.reshape(-1)[order]])
            x = x if turns is None else jax.vmap(augmentation.turned)(x, turns[labels])
            if augment is not None:
                x = jax.vmap(augment)(jax.random.split(augment_key, len(x)), x)
            return x, labels.astype(jnp.int32)

        return Task(batch(support_key, examples[:, :shots]), batch(query_key, examples[:, shots:]))

    return sample_task


def _draw(key: jax.Array, population: int | jax.Array, count: int) -> jax.Array:
    """`count` of `range(population)` without replacement, in random order.

    Floyd's algorithm: the cost depends on `count` alone, where sorting a population of thousands
    can take as long as a good part of a step of adaptation. `population` may be traced.

    References:
        Bentley, Floyd, `A Sample of Brilliance <https://doi.org/10.1145/30401.315746>`_, 1987.
    """
    draw_key, order_key = jax.random.split(key)
    last = jnp.asarray(population, jnp.int32) - count + jnp.arange(count, dtype=jnp.int32)
    draws = jax.random.randint(draw_key, (count,), 0, last + 1, jnp.int32)

    def add(i, chosen):
        taken = (chosen == draws[i]).any()
        return chosen.at[i].set(jnp.where(taken, last[i], draws[i]))

    chosen = jax.lax.fori_loop(0, count, add, jnp.full((count,), -1, jnp.int32))
    return chosen[_shuffle(order_key, count)]


def _class_draw(
    num_classes: int, ways: int, groups: Sequence[int] | np.ndarray | None
) -> Callable[[jax.Array], jax.Array]:
    """`key -> [ways]` different classes, of one group where there are groups."""
    if groups is None:
        return lambda key: _draw(key, num_classes, ways)
    if np.shape(groups) != (num_classes,):
        raise ValueError(f"groups must be [{num_classes}], got shape {np.shape(groups)}")
    _, starts, sizes = np.unique(np.sort(groups), return_index=True, return_counts=True)
    enough = sizes >= ways
    if not enough.any():
        raise ValueError(f"ways={ways} is more than the {sizes.max()} classes of the largest group")
    by_group, starts, sizes = map(jnp.asarray, (np.argsort(groups), starts[enough], sizes[enough]))

    def draw(key: jax.Array) -> jax.Array:
        group_key, class_key = jax.random.split(key)
        group = jax.random.randint(group_key, (), 0, len(sizes))
        return by_group[starts[group] + _draw(class_key, sizes[group], ways)]

    return draw


def _shuffle(key: jax.Array, count: int) -> jax.Array:
    return jnp.argsort(jax.random.bits(key, (count,)))


def _check_episodes(images, ways, shots, queries, counts, rotations) -> None:
    for name, value in {"ways": ways, "shots": shots, "queries": queries}.items():
        refusals.check_at_least(name, value, 1)
    kind = getattr(getattr(images, "dtype", None), "kind", "O")
    if not isinstance(images, jax.Array | np.ndarray) or kind in "OSUMm":
        found = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        if isinstance(getattr(images, "images", None), np.ndarray):  # a split of a data set
            raise TypeError(f"images must be an array: pass the {found}'s .images, and .counts")
        raise TypeError(
            f"images must be one array [classes, examples, ...] of numbers, got {found}; bring "
            "pictures of different sizes to one size first, as datasets.image_folder does"
        )
    if images.ndim < 2:
        raise ValueError(f"images must be [classes, examples, ...], got shape {images.shape}")
    if ways > images.shape[0]:
        raise ValueError(f"ways={ways} is more than the {images.shape[0]} classes there are")
    if counts is not None and np.shape(counts) != images.shape[:1]:
        raise ValueError(f"counts must be [{images.shape[0]}], got shape {np.shape(counts)}")
    if counts is not None and not jnp.issubdtype(jnp.result_type(counts), jnp.integer):
        raise ValueError(f"counts must be integers, got dtype {jnp.result_type(counts)}")
    if counts is not None and np.max(counts) > images.shape[1]:
        raise ValueError(
            f"counts says {np.max(counts)} examples, but images has {images.shape[1]} a class"
        )
    fewest = images.shape[1] if counts is None else int(np.min(counts))
    if shots + queries > fewest:
        raise ValueError(
            f"shots={shots} plus queries={queries} is more than the {fewest} examples of the "
            "smallest class; ask for fewer, or leave that class out"
        )
    if rotations:
        augmentation.check_square(images.shape)
    _check_finite(images, counts)


def _check_finite(images: jax.Array | np.ndarray, counts: jax.Array | np.ndarray | None) -> None:
    sure = images.dtype.itemsize <= 4 and not jnp.issubdtype(images.dtype, jnp.inexact)
    if sure or isinstance(images, Tracer):
        return
    if isinstance(images, np.ndarray):
        # Class by class: without a second array of that size.
        each = map(kept_numbers.kept_by_jax, images)
        finite = np.array([of_class.reshape(len(of_class), -1).all(-1) for of_class in each])
    elif images.is_fully_addressable:
        with jax.ensure_compile_time_eval():
            each = jnp.isfinite(images).reshape(*images.shape[:2], -1).all(-1)
            finite = np.asarray(jax.device_get(each))
    else:
        return
    real = True if counts is None else np.arange(images.shape[1]) < np.asarray(counts)[:, None]
    wrong = np.argwhere(real & ~finite)
    if len(wrong):
        c, e = wrong[0]
        raise ValueError(
            f"images[{c}, {e}] has pixels that are {kept_numbers.not_kept(images.dtype)} "
            f"({len(wrong)} examples in all); leave such examples out"
        )
