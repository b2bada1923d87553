"""How many bits sums, norms and places in a picture need, of numbers in fewer."""

from typing import Any

import jax.numpy as jnp


def accumulator(dtype: Any) -> Any:
    """The dtype itself, or float32 in place of one of 16 bits: sums overflow there, or stand still.

    Example:
        >>> import jax.numpy as jnp
        >>> accumulator(jnp.bfloat16) == jnp.float32, accumulator(jnp.float64) == jnp.float64
        (True, True)
    """
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
