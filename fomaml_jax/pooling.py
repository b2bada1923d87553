"""Pooling over windows that do not overlap, with derivatives that are cheap on CPU."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

# Above this a maximum is hardly pooling, and one comparison an element of the window is dear.
_MAX_WINDOW = 16


def is_max_over_windows(equation: core.JaxprEqn) -> bool:
    """Pooling by reshape and maximum: `[n, h, 2, w, 2, c]` over small axes other than the last."""
    if equation.primitive is not primitives.reduce_max_p:
        return False
    operand: Any = equation.invars[0].aval
    axes = equation.params["axes"]
    size = math.prod(operand.shape[axis] for axis in axes)
    return (
        jnp.issubdtype(operand.dtype, jnp.floating)
        and 1 < size <= _MAX_WINDOW
        and operand.ndim - 1 not in axes
        and 0 not in operand.shape
        and equation.params.get("out_sharding") is None
    )


def is_tiled_window(equation: core.JaxprEqn) -> bool:
    """A maximum or sum by `lax.reduce_window` over windows side by side, without padding."""
    if equation.primitive not in (primitives.reduce_window_max_p, primitives.reduce_window_sum_p):
        return False
    operand: Any = equation.invars[0].aval
    parameters = equation.params
    window = parameters["window_dimensions"]
    return (
        jnp.issubdtype(operand.dtype, jnp.floating)
        and window == parameters["window_strides"]
        and all(pad == (0, 0) for pad in parameters["padding"])
        and all(d == 1 for d in (*parameters["base_dilation"], *parameters["window_dilation"]))
        and 1 < math.prod(window) <= _MAX_WINDOW
        and all(size >= width for size, width in zip(operand.shape, window, strict=True))
        and 0 not in operand.shape
    )


def max_over_windows(x: jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    """`x.max(axes)`; equal maxima share the derivative, as they do there."""
    return _max(x, axes, False)


def max_of_tiles(x: jax.Array, *, window: tuple[int, ...]) -> jax.Array:
    """`lax.reduce_window` with `lax.max`; the first of equal maxima has the derivative."""
    return _max(*_tiled(x, window), True)


def sum_of_tiles(x: jax.Array, *, window: tuple[int, ...]) -> jax.Array:
    """`lax.reduce_window` with `lax.add`."""
    tiles, axes = _tiled(x, window)
    return tiles.sum(axes)


def _tiled(x: jax.Array, window: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """Gives every window axis a place of its own; what is over at the end is left out."""
    counts = [size // width for size, width in zip(x.shape, window, strict=True)]
    limits = [count * width for count, width in zip(counts, window, strict=True)]
    x = lax.slice(x, (0,) * x.ndim, limits)
    shape = itertools.chain.from_iterable(
        (count, width) if width > 1 else (count,)
        for count, width in zip(counts, window, strict=True)
    )
    places = np.cumsum([2 if width > 1 else 1 for width in window]) - 1
    axes = tuple(int(place) for place, width in zip(places, window, strict=True) if width > 1)
    return x.reshape(tuple(shape)), axes


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _max(x: jax.Array, axes: tuple[int, ...], first: bool) -> jax.Array:
    del first
    # Elementwise, not a reduction, for which XLA:CPU would write what is before it to memory.
    return functools.reduce(lax.max, _elements(x, axes))


@_max.defjvp
def _max_jvp(axes, first, primals, tangents):
    """JAX's own rule counts equal maxima by a reduction over comparisons, all of them in memory.

    Here what a window says (the number of equal maxima, or the first one's place) comes from its
    elements one by one, and all that is as large as `x` is one elementwise choice.
    """
    (x,), (tangent,) = primals, tangents
    maximum = _max(x, axes, first)
    equal = [lax.eq(element, maximum) for element in _elements(x, axes)]
    if first:
        # A window with NaN gives its derivative to its first element, so that NaN goes on.
        equal = [is_equal | jnp.isnan(maximum) for is_equal in equal]
        place_of_first = jnp.full(maximum.shape, len(equal), jnp.int32)
        for place in reversed(range(len(equal))):
            place_of_first = jnp.where(equal[place], place, place_of_first)
        sizes = [x.shape[axis] for axis in axes]
        places = jnp.arange(len(equal), dtype=jnp.int32).reshape(sizes)
        chosen = lax.broadcast_in_dim(places, x.shape, axes) == _spread(place_of_first, x, axes)
        return maximum, jnp.where(chosen, tangent, jnp.zeros_like(tangent)).sum(axes)
    chosen = x == _spread(maximum, x, axes)
    count = functools.reduce(lax.add, [e.astype(x.dtype) for e in equal])
    return maximum, jnp.where(chosen, tangent, jnp.zeros_like(tangent)).sum(axes) / count


def _elements(x: jax.Array, axes: tuple[int, ...]) -> list[jax.Array]:
    """The first element of every window, the second, and so on."""

    def at(place):
        index: list[Any] = [slice(None)] * x.ndim
        for axis, i in zip(axes, place, strict=True):
            index[axis] = i
        return x[tuple(index)]

    return [at(place) for place in np.ndindex(*(x.shape[axis] for axis in axes))]


def _spread(small: jax.Array, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    kept = tuple(axis for axis in range(x.ndim) if axis not in axes)
    return lax.broadcast_in_dim(small, x.shape, kept)
