"""The same function computed in fewer bits, its parameters kept in full."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


def compute_in(dtype: Any, fn: Callable[P, R]) -> Callable[P, R]:
    """Computes a loss or a network in a lower precision, with everything outside in full.

    Float32 arrays in the first two arguments (parameters and batch), and in those given by name,
    are cast to `dtype` on the way in, results of that `dtype` to float32 on the way out. What else
    is given, such as the state of a `has_state` loss, stays as it is: running averages would stand
    still in few bits. So the gradients that reach the inner
    and the outer optimizer are float32, and so are the parameters that they move: small updates
    would vanish in bfloat16 sums. Inside, products accumulate in float32 on every backend, and so
    do JAX's own sums and means; keep the loss itself in float32 by wrapping the network alone.

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
    if not callable(fn):
        raise TypeError(f"compute_in takes a dtype and a function, but got {fn!r}.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point dtype, such as jnp.bfloat16, got {dtype}")

    @functools.wraps(fn)
    def computed(*args: P.args, **kwargs: P.kwargs) -> R:
        cast, kwargs = _cast((args[:2], kwargs), lambda x: x == jnp.float32, dtype)
        return _cast(fn(*cast, *args[2:], **kwargs), lambda x: x == dtype, jnp.float32)

    return computed


def _cast(tree: Any, is_cast: Callable[[Any], bool], dtype: Any) -> Any:
    def cast(x):
        return (
            jnp.asarray(x, dtype)
            if isinstance(x, jax.Array | np.ndarray) and is_cast(x.dtype)
            else x
        )

    return jax.tree.map(cast, tree)
