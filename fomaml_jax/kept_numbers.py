"""Which numbers JAX keeps: those that are finite, and no integers that would wrap around."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def kept_by_jax(values: np.ndarray) -> np.ndarray:
    """Which numbers are finite in the dtype that JAX keeps, where large integers wrap around."""
    dtype = jax.dtypes.canonicalize_dtype(values.dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        return (values >= limits.min) & (values <= limits.max)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return np.ones(values.shape, bool)
    with np.errstate(over="ignore"):
        return np.isfinite(values.astype(dtype, copy=False))


def not_kept(dtype: Any) -> str:
    """What is wrong with numbers that are not `kept_by_jax`."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return "not finite"
    return f"beyond {jax.dtypes.canonicalize_dtype(dtype)}, so shift or scale all of them first"


def check_kept(name: str, values: np.ndarray) -> None:
    """Refuses numbers that JAX does not keep as they are."""
    if not kept_by_jax(values).all():
        raise ValueError(f"{name} holds numbers that are {not_kept(values.dtype)}")
