"""A loss of the caller's in the one form that all have inside, and refusals of what is none."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fomaml_jax import refusals
from fomaml_jax.types import Batch, LossFn, Objective, Params


def checked_loss(loss_fn: LossFn, has_aux: bool, has_state: bool = False) -> Objective:
    """The loss function in the form that all have inside, refusing what is not a scalar.

    That form is `(params, batch, state, key) -> (loss, (state, aux))`; a loss without state hands
    on what it is given. Batches of NumPy are those of JAX, whether or not a loop has made them so.
    """
    form = "(params, batch, state, key)" if has_state else "(params, batch)"
    refusals.check_function("loss_fn", loss_fn, f"{form} -> loss")

    call: Any = loss_fn

    def objective(params: Params, batch: Batch, state: Any = None, key: Any = None):
        loss: Any
        batch = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, batch)
        if has_state:
            loss, state, aux = _stateful(call(params, batch, state, key), state)
        else:
            loss, aux = _stateless(call(params, batch), has_aux)
        if not _is_real_scalar(loss):
            raise ValueError(
                f"loss_fn must return a real scalar, got {refusals.describe(loss)}; "
                "take the mean over the examples"
            )
        return loss, (state, aux)

    return objective


def _is_real_scalar(x: Any) -> bool:
    is_number = isinstance(x, float) or refusals.is_array(x)
    return is_number and np.shape(x) == () and jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _stateless(out: Any, has_aux: bool) -> tuple[Any, Any]:
    is_pair = isinstance(out, tuple) and len(out) == 2
    if has_aux != is_pair:
        raise TypeError(
            f"loss_fn returned {refusals.describe(out)} with has_aux={has_aux}; return a scalar, "
            "or (scalar, aux) with has_aux=True"
        )
    return out if has_aux else (out, None)


def _stateful(out: Any, state: Any) -> tuple[Any, Any, Any]:
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], tuple)) or (
        len(out[1]) != 2
    ):
        raise TypeError(
            "with has_state=True loss_fn must return (loss, (state, aux)), got "
            f"{refusals.describe(out)}"
        )
    loss, (after, aux) = out
    refusals.check_like_params("loss_fn's state", after, state)
    return loss, after, aux
