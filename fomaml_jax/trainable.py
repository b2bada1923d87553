"""Which leaves of the parameters the inner loop moves, and which it leaves alone."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fomaml_jax.types import Params

Trainable = Callable[[str], bool] | Any
"""`path -> bool`, the path as in `"params/head/kernel"`; or a pytree of booleans, of which one may
stand for all that is below it."""


def split(trainable: Trainable | None, params: Params) -> tuple[Params, Params]:
    """The adapted leaves, all unless told, and the frozen ones: `None` in the place of the others.

    `None` is a pytree without leaves: an optimizer keeps no state for it, and `jax.grad` takes no
    derivative.
    """
    chosen = jax.tree.leaves(_mask(True if trainable is None else trainable, params))
    leaves, structure = jax.tree.flatten(params)

    def kept(choice):
        pairs = zip(leaves, chosen, strict=True)
        return structure.unflatten([leaf if c == choice else None for leaf, c in pairs])

    return kept(True), kept(False)


def merge(adapted: Params, frozen: Params) -> Params:
    """What `split` took apart."""
    return jax.tree.map(
        lambda a, f: f if a is None else a, adapted, frozen, is_leaf=lambda x: x is None
    )


def _mask(trainable: Trainable, params: Params) -> Any:
    # Equinox's masks are modules, of booleans, that can be called too.
    leaves = jax.tree.leaves(trainable)
    is_mask = leaves and all(isinstance(leaf, bool | np.bool_) for leaf in leaves)
    if callable(trainable) and not is_mask:
        mask = jax.tree.map_with_path(
            lambda path, _: trainable(jax.tree_util.keystr(path, simple=True, separator="/")),
            params,
        )
    else:
        mask = _broadcast(trainable, params)
    _check(mask, params)
    return mask


def _broadcast(trainable: Any, params: Params) -> Any:
    """A tree of booleans for every leaf, from one that may stop earlier."""
    try:
        return jax.tree.map(
            lambda choice, below: jax.tree.map(lambda _: choice, below), trainable, params
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "trainable does not fit the structure of params; pass a pytree of booleans of that "
            f"structure (one may stand for all below it), or a function of the path: {error}"
        ) from None


def _check(mask: Any, params: Params) -> None:
    """Refuses choices that are not booleans, and a choice of nothing."""
    choices = jax.tree.leaves_with_path(mask)
    for path, choice in choices:
        if not isinstance(choice, bool | np.bool_):
            raise TypeError(
                f"trainable says {choice!r} of params{jax.tree_util.keystr(path)}; say True for "
                "what the inner loop adapts and False for what it leaves alone"
            )
    if not any(choice for _, choice in choices):
        names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in choices]
        raise ValueError(
            f"trainable chooses no parameter; choose at least one of {', '.join(names[:20])}"
        )
