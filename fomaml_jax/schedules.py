"""What changes over the outer steps: the weights of inner steps, the order of the gradient."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fomaml_jax import refusals
from fomaml_jax.parallel import OverTasks
from fomaml_jax.types import MetaGradient


def multi_step_weights(num_steps: int, step: jax.Array | int, until: int) -> jax.Array:
    r"""MAML++'s weights of the query losses after each inner step, annealed to the last one alone.

    At first all are :math:`1 / K`; up to outer step `until` all but the last sink linearly, though
    not below :math:`0.03 / K`, and the last has what they lose; from then on it is alone.

    Args:
        num_steps: inner steps, `K`.
        step: the outer step, traced if you like.
        until: the outer step from which on the last is alone.

    Returns:
        `[num_steps]` float32, with sum 1, for `step_weights`.

    Raises:
        ValueError: for fewer than one step.

    Example:
        >>> import fomaml_jax as fj
        >>> fj.schedules.multi_step_weights(2, 0, until=100)
        Array([0.5, 0.5], dtype=float32)
        >>> fj.schedules.multi_step_weights(2, 99, until=100)
        Array([0.015, 0.985], dtype=float32)
        >>> fj.schedules.multi_step_weights(2, 100, until=100)
        Array([0., 1.], dtype=float32)

    References:
        Antoniou, Edwards, Storkey, `How to train your MAML <https://arxiv.org/abs/1810.09502>`_,
        2019, and its authors' code.
    """
    refusals.check_at_least("num_steps", num_steps, 1)
    refusals.check_at_least("until", until, 1)
    remaining = 1 - jnp.asarray(step, jnp.float32) / until
    others = jnp.where(remaining > 0, jnp.maximum(remaining, 0.03), 0.0) / num_steps
    return jnp.full(num_steps, others).at[-1].set(1 - (num_steps - 1) * others)


def first_then_second_order(
    first: MetaGradient, second: MetaGradient, num_first_order: int
) -> Callable[[jax.Array], MetaGradient]:
    """MAML++'s derivative-order annealing: first order for the first outer steps, then second.

    Args:
        first: a meta-gradient, such as `over_tasks(fomaml(...))`.
        second: one of the same structure, such as `over_tasks(maml(...))`.
        num_first_order: for how many outer steps the first is taken.

    Returns:
        `step -> meta_gradient`, for `scheduled_learner`. Both are compiled into one program and one
        of them is run; under a `jax.vmap` over states both are.

    Raises:
        ValueError: for a negative number of steps.

    Example:
        >>> import jax.numpy as jnp, optax, fomaml_jax as fj
        >>> loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
        >>> first, second = (
        ...     fj.over_tasks(order(loss, optax.sgd(0.5), 1)) for order in (fj.fomaml, fj.maml)
        ... )
        >>> learner = fj.scheduled_learner(
        ...     fj.schedules.first_then_second_order(first, second, 1), optax.sgd(1.0)
        ... )

    References:
        Antoniou, Edwards, Storkey, `How to train your MAML <https://arxiv.org/abs/1810.09502>`_,
        2019.
    """
    refusals.check_at_least("num_first_order", num_first_order, 0)

    def at(step: jax.Array) -> MetaGradient:
        def chosen(first, second):
            return lambda *args: jax.lax.cond(step < num_first_order, first, second, *args)

        if not isinstance(first, OverTasks) or not isinstance(second, OverTasks):
            return chosen(first, second)
        both = first.seeing, second.seeing

        def seeing(params, tasks, see):
            return chosen(*(lambda *args, of=of: of(*args, see) for of in both))(params, tasks)

        devices = math.lcm(first.devices, second.devices)
        return OverTasks(seeing, devices, first.skips and second.skips)

    return at
