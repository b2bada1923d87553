"""The same function computed in fewer bits, its parameters kept in full."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from fomaml_jax import refusals

P = ParamSpec("P")
R = TypeVar("R")


def compute_in(dtype: Any, fn: Callable[P, R]) -> Callable[P, R]:
    """Computes a loss or a network in a lower precision, with everything outside in full.

    Float32 arrays in the first two arguments (parameters and batch), given by place or by name,
    are cast to `dtype` on the way in, results of that `dtype` to float32 on the way out. Arguments
    after these, such as the state of a `has_state` loss, stay as they are: running averages would
    stand still in few bits. So the gradients that reach the inner and the outer optimizer are
    float32, and so are the parameters that they move: small updates would vanish in bfloat16 sums.
    Inside, products accumulate in float32 on every backend, and so do JAX's own sums and means;
    keep the loss itself in float32 by wrapping the network alone.

    Worth it where the device multiplies bfloat16 fast (TPU, recent GPUs). On CPU it is slower.

    Args:
        dtype: a floating-point dtype, such as `jnp.bfloat16`; `jnp.float32` changes nothing.
        fn: a loss `(params, batch) -> loss`, or a network `(params, x) -> outputs`.

    Returns:
        A function with the arguments and the structure of results of `fn`.

    Raises:
        TypeError: for a dtype that is not a floating-point one, or something not callable.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> net = fj.models.mlp()
        >>> params = net.init(jax.random.key(0), jnp.zeros((5, 1)))
        >>> predict = fj.compute_in(jnp.bfloat16, net.apply)
        >>> loss = lambda params, batch: jnp.mean((predict(params, batch[0]) - batch[1]) ** 2)
        >>> grads = jax.grad(loss)(params, (jnp.ones((5, 1)), jnp.ones((5, 1))))
        >>> {leaf.dtype.name for leaf in jax.tree.leaves(grads)}
        {'float32'}

    References:
        Micikevicius et al., `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, 2018.
    """
    refusals.check_function("fn", fn, "(params, batch) -> loss, or (params, x) -> outputs")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point dtype, such as jnp.bfloat16, got {dtype}")

    names, call = _names(fn), cast(Any, fn)

    @functools.wraps(fn)
    def computed(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[:2], {k: x for k, x in kwargs.items() if not names or k in names[:2]}
        args_in, kwargs_in = _cast(first, jnp.float32, dtype)
        out = call(*args_in, *args[2:], **(kwargs | kwargs_in))
        return _cast(out, dtype, jnp.float32)

    return computed


def _names(fn: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(fn).parameters)
    except (TypeError, ValueError):  # of some built-in functions
        return []


def _cast(tree: Any, dtype: Any, to: Any) -> Any:
    def leaf(x):
        is_cast = isinstance(x, jax.Array | np.ndarray) and x.dtype == dtype
        return jnp.asarray(x, to) if is_cast else x

    return jax.tree.map(leaf, tree)
