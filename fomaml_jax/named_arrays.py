"""Pytrees as NumPy arrays by name, as files hold them, and back: the names are the key paths."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their key paths, PRNG keys as the numbers they are made of."""
    numbers = jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)
    leaves = jax.tree.leaves_with_path(jax.device_get(numbers))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def check_like(found: Mapping[str, Any], like: Any) -> None:
    """Refuses arrays of other names, shapes or dtypes than the leaves of `like`.

    Raises:
        ValueError: naming the first that differs.
    """
    leaves = jax.tree.leaves_with_path(like)
    expected = {jax.tree_util.keystr(path): _kind(leaf) for path, leaf in leaves}
    kinds = {name: _kind(array) for name, array in found.items()}
    for name in [*expected, *kinds]:
        one, other = (kind.get(name, "nothing") for kind in (expected, kinds))
        if one != other:
            raise ValueError(f"{name} should be {one}, found {other}")


def in_structure(found: Mapping[str, np.ndarray], like: Any) -> Any:
    """Arrays that `check_like` lets pass as a pytree of JAX's, keys as keys again."""

    def restored(path, leaf):
        array = jax.device_put(found[jax.tree_util.keystr(path)])
        if not _is_key(leaf):
            return array
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))

    return jax.tree.map_with_path(restored, like)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _kind(leaf: Any) -> str:
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    plain = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{plain.dtype}{list(plain.shape)}"
