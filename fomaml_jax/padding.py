"""Zeros in the place of examples that are padding."""

import jax
import jax.numpy as jnp


def without_padding(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Zeros where the weight of an example is zero: a NaN there would reach every gradient.

    Example:
        >>> import jax.numpy as jnp, fomaml_jax as fj
        >>> fj.models.without_padding(jnp.array([[1.0], [jnp.nan]]), jnp.array([1.0, 0.0]))
        Array([[1.],
               [0.]], dtype=float32)
    """
    if weights is None:
        return x
    real = weights.reshape(-1, *(1 for _ in x.shape[1:])) > 0
    return jnp.where(real, x, jnp.zeros_like(x))
