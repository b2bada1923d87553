"""The outer step: one optimizer step on the shared parameters, as an optax-like pair."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fomaml_jax import refusals
from fomaml_jax.types import MetaGradient, Params, TaskInfo


class MetaState(NamedTuple):
    """What the outer loop carries from step to step.

    Attributes:
        params: the shared parameters, from which every task starts.
        opt_state: the outer optimizer's state.
        step: `[]` int32, outer steps taken.
    """

    params: Params
    opt_state: optax.OptState
    step: jax.Array


class StepInfo(NamedTuple):
    """What one outer step saw.

    Attributes:
        loss: `[]`, the mean query loss over the finite tasks (zero if there is none).
        num_finite: `[]` int32, how many tasks were finite.
        grad_norm: `[]`, the global norm of the mean meta-gradient.
        tasks: `TaskInfo` with a leading `[tasks]` axis.
    """

    loss: jax.Array
    num_finite: jax.Array
    grad_norm: jax.Array
    tasks: TaskInfo


class MetaLearner(NamedTuple):
    """The outer loop as two pure functions.

    Attributes:
        init: `(params) -> MetaState`.
        step: `(state, tasks) -> (MetaState, StepInfo)`; wrap it in `jax.jit`, `jax.lax.scan`, or
            `jax.vmap` over states for a population of learners.
    """

    init: Callable[[Params], MetaState]
    step: Callable[[MetaState, Any], tuple[MetaState, StepInfo]]


def meta_learner(
    meta_gradient: MetaGradient, optimizer: optax.GradientTransformation
) -> MetaLearner:
    """Joins a meta-gradient over many tasks and an outer optimizer.

    Args:
        meta_gradient: `(params, tasks) -> (mean grads, TaskInfo)`: the result of `over_tasks`.
        optimizer: any optax transformation. One that needs the loss (a plateau schedule, Polyak
            steps) is given `value` and `grad`; a line search, which needs new values of the loss,
            has none to ask for here.

    Returns:
        A `MetaLearner`.

    Raises:
        TypeError: for an optimizer that is not one.
        ValueError: where the meta-gradient is one for a single task, not wrapped in `over_tasks`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, fomaml_jax as fj
        >>> loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
        >>> learner = fj.meta_learner(
        ...     fj.over_tasks(fj.fomaml(loss, optax.sgd(0.5), num_steps=1)), optax.sgd(1.0)
        ... )
        >>> state = learner.init(jnp.zeros(1))
        >>> centres = jnp.array([[1.0], [3.0]])
        >>> state, info = jax.jit(learner.step)(state, fj.Task(centres, centres))
        >>> state.params, int(state.step)
        (Array([1.], dtype=float32), 1)
    """
    refusals.check_optimizer(optimizer)

    def init(params: Params) -> MetaState:
        refusals.check_params(params)
        params = jax.tree.map(jnp.asarray, params)
        return MetaState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def step(state: MetaState, tasks: Any) -> tuple[MetaState, StepInfo]:
        grads, info = meta_gradient(state.params, tasks)
        if info.query_loss.ndim != 1:
            raise ValueError(
                "meta_gradient is one for a single task (its query_loss has shape "
                f"{info.query_loss.shape}, not [tasks]); wrap it: over_tasks(meta_gradient)"
            )
        seen = _step_info(grads, info)
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            grads, state.opt_state, state.params, value=seen.loss, grad=grads
        )
        params = optax.apply_updates(state.params, updates)
        return MetaState(params, opt_state, state.step + 1), seen

    return MetaLearner(init, step)


def _step_info(grads: Params, info: TaskInfo) -> StepInfo:
    num_finite = info.finite.sum(dtype=jnp.int32)
    total = jnp.where(info.finite, info.query_loss, 0).sum()
    loss = total / jnp.maximum(num_finite, 1).astype(total.dtype)
    return StepInfo(loss, num_finite, optax.tree.norm(grads), info)
