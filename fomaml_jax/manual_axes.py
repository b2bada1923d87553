"""Inside of `jax.shard_map`: what may differ from device to device, and is said to."""

from typing import Any

import jax


def varying_axes(*trees: Any) -> frozenset[str]:
    """The mesh axes over which a leaf of the trees may differ; none outside of `jax.shard_map`.

    None either inside of one with `check_vma=False`, which does not keep count.
    """
    arrays = (leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.Array))
    kinds = (jax.typeof(array).manual_axis_type.varying for array in arrays)
    return frozenset().union(*kinds)


def varying(tree: Any, *others: Any) -> Any:
    """`tree`, every array of it said to vary over whatever one of it, or of `others`, does.

    JAX takes an array that does not vary for one that all devices share: it sums its gradient over
    them, and a loop whose carry starts with such an array may not end with one that varies.
    """
    axes = varying_axes(tree, *others)

    def vary(leaf):
        missing = tuple(sorted(axes - varying_axes(leaf)))
        is_array = hasattr(leaf, "dtype")
        return jax.lax.pcast(leaf, missing, to="varying") if missing and is_array else leaf

    return jax.tree.map(vary, tree)
