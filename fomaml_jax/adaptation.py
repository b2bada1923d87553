"""The inner loop: a few optimizer steps on one task's support batch."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fomaml_jax import refusals
from fomaml_jax.types import AdaptInfo, Batch, LossFn, Params


def adapt(
    loss_fn: LossFn,
    params: Params,
    support: Batch,
    optimizer: optax.GradientTransformation,
    num_steps: int | jax.Array,
    *,
    first_order: bool = True,
    has_aux: bool = False,
    unroll: int | bool = 1,
) -> tuple[Params, AdaptInfo]:
    r"""Adapts the parameters to one task by `num_steps` optimizer steps on its support batch.

    With :math:`g_k = \nabla L_{support}(\theta_k)` and :math:`\mathrm{sg}` for `stop_gradient`,

    .. math::
        \theta_{k+1} = \theta_k + \mathrm{update}(\mathrm{sg}(g_k), s_k, \mathrm{sg}(\theta_k)),

    so that for every optimizer, with momentum, weight decay or Adam, the derivative of the adapted
    parameters with respect to `params` is the identity. Numbers that the optimizer itself was made
    from (a learned rate) keep their gradient. With `first_order=False` nothing is stopped.

    Inside a `jax.shard_map` of your own pass it `check_vma=False`: with its default, `jax.grad`
    takes replicated parameters for shared ones and sums inner gradients over the devices.

    The optimizer state starts afresh. Keep parameters in float32 even where the loss computes in
    bfloat16: small updates vanish in bfloat16 sums.

    Args:
        loss_fn: `(params, support) -> loss []`, or `-> (loss [], aux)` with `has_aux`.
        params: any pytree of floating-point arrays.
        support: any pytree whose leaves lead with the example axis.
        optimizer: any optax transformation. One that needs the loss (Polyak steps, line searches)
            is given `value`, `grad` and `value_fn`.
        num_steps: at least 0. May be a JAX integer, traced or not, and one per task under `vmap`;
            the result can then not be differentiated in reverse.
        first_order: whether to treat the inner gradients as constants.
        has_aux: whether `loss_fn` returns a pair.
        unroll: how many steps to unroll in the compiled loop, as in `jax.lax.scan`.

    Returns:
        The adapted parameters, with the structure and dtypes of `params`, and an `AdaptInfo`.

    Raises:
        TypeError: for parameters that are not floating-point arrays, an optimizer that is not one,
            a number of steps that is not an integer, a loss that is not what `has_aux` says.
        ValueError: for a negative number of steps, an empty batch, a rate that is not finite, a
            loss that is not a scalar.

    Example:
        >>> import jax.numpy as jnp, optax, fomaml_jax as fj
        >>> loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
        >>> adapted, info = fj.adapt(loss, jnp.zeros(2), jnp.ones(2), optax.sgd(0.5), 3)
        >>> adapted
        Array([0.875, 0.875], dtype=float32)
        >>> info.losses
        Array([1.    , 0.25  , 0.0625], dtype=float32)

    References:
        Finn, Abbeel, Levine, `Model-Agnostic Meta-Learning <https://arxiv.org/abs/1703.03400>`_,
        2017, section 5.2.
    """
    num_steps = refusals.check_num_steps(num_steps)
    refusals.check_optimizer(optimizer)
    refusals.check_params(params)
    refusals.check_batch("support", support)
    refusals.check_rates(optimizer, params)

    stop = jax.lax.stop_gradient if first_order else lambda x: x
    optimizer = optax.with_extra_args_support(optimizer)
    loss = refusals.checked_loss(loss_fn, has_aux)

    def step(carry):
        theta, state = carry
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(theta, support)
        updates, state = optimizer.update(
            stop(grads),
            state,
            stop(theta),
            value=stop(value),
            grad=stop(grads),
            value_fn=lambda theta: loss(theta, support)[0],
        )
        return (optax.apply_updates(theta, updates), state), AdaptInfo(value, aux)

    start = (jax.tree.map(jnp.asarray, params), optimizer.init(stop(params)))
    loop = _traced_loop if isinstance(num_steps, jax.Array) else _scan
    (adapted, _), info = loop(step, start, num_steps, unroll)
    return adapted, info


def _scan(step, start, num_steps, unroll):
    return jax.lax.scan(lambda carry, _: step(carry), start, length=num_steps, unroll=unroll)


def _traced_loop(step, start, num_steps, unroll):
    """As `_scan` for a number of steps that no shape can hold: keeps the first and last info."""
    del unroll  # a loop of unknown length cannot be unrolled
    _, shapes = jax.eval_shape(step, start)
    nothing = jax.tree.map(lambda s: jnp.full((2, *s.shape), _missing(s.dtype), s.dtype), shapes)

    def body(k, state):
        carry, seen = state
        carry, info = step(carry)

        def keep(old, new):
            return jnp.stack([jnp.where(k == 0, new, old[0]), new])

        return carry, jax.tree.map(keep, seen, info)

    return jax.lax.fori_loop(0, num_steps, body, (start, nothing))


def _missing(dtype: Any) -> Any:
    return jnp.nan if jnp.issubdtype(dtype, jnp.inexact) else 0
