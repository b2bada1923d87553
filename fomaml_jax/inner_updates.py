"""What the traced update of an optimizer shows: bad rates, a derivative that is missing."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.extend import core as jex_core

from fomaml_jax.types import ClosedJaxpr, Params


def check_rates(optimizer: optax.GradientTransformation, params: Params) -> None:
    """Refuses an optimizer that multiplies by a NaN or an infinity, such as `optax.sgd(nan)`."""
    check_factors(update_jaxpr(optimizer, params))


def check_factors(update: ClosedJaxpr) -> None:
    """Refuses an update that multiplies by a NaN or an infinity."""
    for factor in _factors(update):
        if not np.all(np.isfinite(factor)):
            raise ValueError(
                "optimizer scales its updates by a number that is not finite "
                f"({np.asarray(factor).reshape(-1)[0]:g}); pass finite rates"
            )


def warn_of_infinite_curvature(optimizer: optax.GradientTransformation, params: Params) -> None:
    """Warns if the update has no derivative where one element of the gradient is exactly zero."""
    if "sqrt" not in str(update_jaxpr(optimizer, params)):
        return

    # One element of two is zero, so that element-wise roots are at fault and global norms are not.
    def zero_and_one(x):
        return jnp.arange(2, dtype=x.dtype).reshape((2,) + (1,) * (x.ndim - 1))

    def total_update(grads):
        updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
        return optax.tree.sum(updates)

    try:
        with jax.ensure_compile_time_eval():
            curvature = jax.jit(jax.grad(total_update))(jax.tree.map(zero_and_one, params))
    except Exception:  # an optimizer made for these very shapes, or that needs the loss: no verdict
        return
    known = [x for x in jax.tree.leaves(curvature) if not isinstance(x, Tracer)]
    if any(np.isnan(x).any() for x in known):
        warnings.warn(
            "this inner optimizer has an infinite derivative where a gradient is exactly zero, "
            "which makes second-order meta-gradients NaN: pass eps_root (optax.adam(rate, "
            "eps_root=1e-8)), use optax.sgd inside, or use fomaml",
            stacklevel=3,
        )


@contextlib.contextmanager
def explaining_loops() -> Iterator[None]:
    """Says what to do about an inner loop that JAX cannot differentiate."""
    try:
        yield
    except ValueError as error:
        if "Reverse-mode differentiation does not work" not in str(error):
            raise
        raise ValueError(
            "second order differentiates through the inner loop, and the optimizer or the loss "
            "holds a loop of no known length (lax.while_loop), such as the line search of "
            "optax.lbfgs: use fomaml, or another optimizer"
        ) from error


def update_jaxpr(optimizer: optax.GradientTransformation, params: Params) -> ClosedJaxpr:
    """The optimizer's first update, traced on shapes alone."""

    def update(params):
        zero = jnp.zeros(())
        extra = optax.with_extra_args_support(optimizer)
        return extra.update(
            params, extra.init(params), params, value=zero, grad=params, value_fn=lambda _: zero
        )[0]

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return jax.make_jaxpr(update)(shapes)


def _factors(closed: ClosedJaxpr):
    """The numbers known while tracing that a product in the jaxpr multiplies by."""
    known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    # What may not be taken says nothing: a norm clipped to infinity, or a line search's first rate.
    selects = (eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name in ("select_n", "min"))
    optional = {id(x) for eqn in selects for x in eqn.invars}
    for eqn in closed.jaxpr.eqns:
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_closed_jaxpr):
            if _is_closed_jaxpr(sub):
                yield from _factors(sub)
        if eqn.primitive.name == "mul" and id(eqn.outvars[0]) not in optional:
            for x in eqn.invars:
                value = x.val if isinstance(x, jex_core.Literal) else known.get(x)
                if value is not None and not isinstance(value, Tracer):
                    yield value


def _is_closed_jaxpr(x: Any) -> bool:
    return isinstance(x, ClosedJaxpr)
