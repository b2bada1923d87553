"""Streams of tasks: a task distribution that changes from arrival to arrival."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fomaml_jax import refusals
from fomaml_jax.types import Task

Context = Any
"""What a task distribution depends on beside its key: any pytree."""

Family = Callable[[jax.Array, Context], Task]
"""`(key, context) -> Task`: a task distribution for every context."""

Path = Callable[[jax.Array, Any], Context]
"""`(key, index) -> context`: where a stream is at each arrival."""

Stream = Callable[[jax.Array, Any], Task]
"""`(key, index) -> Task`: task `index` of the stream that `key` names."""


def drifting(family: Family, path: Path) -> Stream:
    """A stream of tasks whose distribution changes: at arrival `i`, that of context `path(i)`.

    Task `i` is a pure function of `(key, i)`: there is no state to lose, a stream may be taken up
    anywhere, and `jax.vmap` over indices makes many arrivals at once.

    Args:
        family: `(key, context) -> Task`, a task distribution for every context, such as
            `sine_waves()`.
        path: `(key, index) -> context`, such as `drift_and_jumps(...)`; one that needs no chance
            ignores its key.

    Returns:
        `(key, index) -> Task`.

    Raises:
        TypeError: for what is not a function.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> def family(key, level):
        ...     x = level + jax.random.normal(key, (6, 1))
        ...     return fj.Task(support=x[:2], query=x[2:])
        >>> stream = fj.tasks.drifting(family, lambda key, index: jnp.sin(index / 100))
        >>> stream(jax.random.key(0), 7).support.shape
        (2, 1)
    """
    refusals.check_function("family", family, "(key, context) -> Task")
    refusals.check_function("path", path, "(key, index) -> context")

    def task_at(key: jax.Array, index: int | jax.Array) -> Task:
        path_key, task_key = jax.random.split(key)
        return family(jax.random.fold_in(task_key, index), path(path_key, index))

    return task_at


def drift_and_jumps(
    low: Context, high: Context, *, drift: float = 0.0, jump_every: int | None = None
) -> Path:
    """A path through a box of contexts: it drifts at a constant speed, and at times it jumps.

    Arrivals come in blocks of `jump_every`, each with one jump at an arrival drawn from the block,
    to a context drawn uniformly from the box. From there each number drifts by `drift` times its
    range an arrival, up or down as drawn, and turns round at the ends of its range. The cost does
    not depend on the index.

    Args:
        low: any pytree of real numbers or arrays, the lower ends.
        high: the upper ends, of the same structure and shapes; a number may have equal ends.
        drift: by what part of its range a number moves from arrival to arrival, from 0 to 1.
        jump_every: arrivals from jump to jump, on average; there are no jumps unless given.

    Returns:
        `(key, index) -> context`, floating-point arrays in the structure of `low`; `index` is at
        least 0.

    Raises:
        ValueError: for ends that are not finite or not `low <= high`, of different structures or
            shapes, a drift outside of 0 to 1, `jump_every` below 1.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> path = fj.tasks.drift_and_jumps(0.0, 10.0, drift=0.001, jump_every=50)
        >>> contexts = jax.vmap(lambda i: path(jax.random.key(0), i))(jnp.arange(1000))
        >>> steps = jnp.abs(jnp.diff(contexts))
        >>> print(f"{jnp.median(steps):.3f}", int((steps > 0.011).sum()))
        0.010 20
    """
    ends, structure = _checked_ends(low, high)
    if not 0 <= drift <= 1:
        raise ValueError(f"drift must be a part of the range, from 0 to 1, got {drift}")
    if jump_every is not None:
        refusals.check_at_least("jump_every", jump_every, 1)

    def context_at(key: jax.Array, index: int | jax.Array) -> Context:
        jump_key, place_key = jax.random.split(key)
        jumps, age = _since_jump(jump_key, jnp.asarray(index, jnp.int32), jump_every)
        keys = jax.random.split(jax.random.fold_in(place_key, jumps), len(ends))
        places = [_bounced(k, age, drift, *leaf) for k, leaf in zip(keys, ends, strict=True)]
        return jax.tree.unflatten(structure, places)

    return context_at


class Waves(NamedTuple):
    """Four numbers of a sine wave, `level + amplitude * sin(frequency * x - phase)`.

    Attributes:
        amplitude: half of the height.
        phase: in radians.
        frequency: in radians a unit of x.
        level: the mean.
    """

    amplitude: Any
    phase: Any
    frequency: Any = 1.0
    level: Any = 0.0


def sine_waves(
    spread: Waves,
    *,
    shots: int = 10,
    queries: int = 10,
    x_range: tuple[float, float] = (-5.0, 5.0),
) -> Family:
    """Regression of sine waves, a family of task distributions with a centre.

    The four numbers of a task's wave are uniform, each within its `spread` of those of the context.
    `sinusoid()` has the centre `Waves(2.55, pi / 2)` and the spread `Waves(2.45, pi / 2, 0, 0)`.

    Args:
        spread: how far from the centre each number may be; at least 0.
        shots: support points.
        queries: query points.
        x_range: range of the inputs, which are uniform.

    Returns:
        `(key, centre) -> Task` with `centre` a `Waves`; batches are `(x [n, 1], y [n, 1])`.

    Raises:
        ValueError: for counts below 1, a spread that is negative or not finite, a range that is not
            `low < high`.

    Example:
        >>> import jax, fomaml_jax as fj
        >>> family = fj.tasks.sine_waves(fj.tasks.Waves(1.0, 0.5, 0.0, 0.0), shots=5)
        >>> family(jax.random.key(0), fj.tasks.Waves(3.0, 1.0)).support[0].shape
        (5, 1)
    """
    refusals.check_at_least("shots", shots, 1)
    refusals.check_at_least("queries", queries, 1)
    if not all(np.isfinite(number) and number >= 0 for number in spread):
        raise ValueError(f"spread must be four finite numbers of at least 0, got {spread}")
    refusals.check_range("x_range", x_range)

    def sample_task(key: jax.Array, centre: Waves) -> Task:
        wave_key, x_key = jax.random.split(key)
        keys = jax.random.split(wave_key, len(spread))
        a, b, w, c = (
            middle + far * jax.random.uniform(key, minval=-1.0)
            for key, middle, far in zip(keys, centre, spread, strict=True)
        )
        x = jax.random.uniform(x_key, (shots + queries, 1), minval=x_range[0], maxval=x_range[1])
        y = c + a * jnp.sin(w * x - b)
        return Task((x[:shots], y[:shots]), (x[shots:], y[shots:]))

    return sample_task


def _since_jump(key: jax.Array, index: jax.Array, jump_every: int | None) -> tuple[Any, jax.Array]:
    """How many jumps there were up to an arrival, and the arrivals since the last of them."""
    if jump_every is None:
        return 0, index
    block = index // jump_every

    def jump_in(block):
        offset = jax.random.randint(jax.random.fold_in(key, block), (), 0, jump_every, jnp.int32)
        return jnp.where(block < 0, 0, block * jump_every + offset)

    jumped = index >= jump_in(block)
    last = jnp.where(jumped, jump_in(block), jump_in(block - 1))
    return jnp.where(jumped, block + 1, block), index - last


def _bounced(key: jax.Array, age: jax.Array, drift: float, low: Any, high: Any) -> jax.Array:
    """Up and down between the ends, twice the range a round, from a place anywhere in a round."""
    low, high = jnp.asarray(low), jnp.asarray(high)
    start = jax.random.uniform(key, low.shape, low.dtype, maxval=2.0)
    # A round is what an unsigned integer holds: it turns over, and loses no digit at a great age.
    gone = age.astype(jnp.uint32) * np.uint32(round(float(drift) * 2**31))
    place = (start + gone.astype(low.dtype) * 2.0**-31) % 2.0
    return low + (high - low) * (1.0 - jnp.abs(1.0 - place))


def _checked_ends(low: Context, high: Context) -> tuple[list[tuple[np.ndarray, ...]], Any]:
    """The ends of each leaf, and the structure of both."""
    structure = jax.tree.structure(low)
    if structure != jax.tree.structure(high) or not structure.num_leaves:
        raise ValueError(
            "low and high must be numbers, or pytrees of one structure; got "
            f"{structure} and {jax.tree.structure(high)}"
        )
    ends = [
        (np.asarray(one, float), np.asarray(other, float))
        for one, other in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True)
    ]
    for one, other in ends:
        if one.shape != other.shape or not (
            np.isfinite([one, other]).all() and (one <= other).all()
        ):
            raise ValueError(
                f"low and high must be finite, of one shape, and low <= high; got {one} and {other}"
            )
    return ends, structure
