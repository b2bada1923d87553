"""The precision in which numbers of few bits are summed, and places in a picture computed."""

from typing import Any

import jax
import jax.numpy as jnp


def accumulator(dtype: Any) -> Any:
    """The dtype itself, or float32 in place of one of 16 bits: sums overflow there, or stand still.

    Example:
        >>> import jax.numpy as jnp
        >>> accumulator(jnp.bfloat16) == jnp.float32, accumulator(jnp.float64) == jnp.float64
        (True, True)
    """
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def widened(tree: Any) -> Any:
    """A pytree of floats in as many bits as their sums and norms need.

    Example:
        >>> import jax.numpy as jnp
        >>> widened({"w": jnp.ones(1, jnp.float16)})
        {'w': Array([1.], dtype=float32)}
    """
    return jax.tree.map(lambda x: x.astype(accumulator(x.dtype)), tree)
