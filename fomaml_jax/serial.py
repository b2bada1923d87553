"""Reptile one task after another, each from where the last one left the shared parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fomaml_jax import objectives, refusals
from fomaml_jax.adaptation import adapt
from fomaml_jax.learner import MetaLearner, MetaState, StepInfo, initial, norm, of_its_own
from fomaml_jax.manual_axes import varying
from fomaml_jax.meta_gradients import finite_with
from fomaml_jax.types import LossFn, Params, Task, TaskInfo


def serial_reptile(
    loss_fn: LossFn,
    inner_optimizer: optax.GradientTransformation,
    num_steps: int | jax.Array,
    optimizer: optax.GradientTransformation,
    *,
    keep_inner_state: bool = False,
    has_aux: bool = False,
    per_step_support: bool = False,
) -> MetaLearner:
    r"""Reptile as its authors first give it: an outer step after every single task.

    .. math:: \theta \leftarrow \theta + \epsilon\,(\theta_K - \theta), \quad
        \theta_K = \mathrm{adapt}(\theta, support)

    for one task after another, where `meta_learner` with `over_tasks(reptile(...))` takes the mean
    over a meta-batch. A task that diverges changes nothing. Of `reptile`'s options `trainable`,
    `has_state` and `unroll` are not there.

    Args:
        loss_fn: as for `reptile`.
        inner_optimizer: the inner optimizer.
        num_steps: inner steps.
        optimizer: the outer one; `optax.sgd(epsilon)` is the paper's.
        keep_inner_state: whether each task takes up the inner optimizer's state where the last one
            left it, as the authors' code does with Adam, rather than starting afresh.
        has_aux: whether `loss_fn` returns a pair.
        per_step_support: as in `adapt`.

    Returns:
        A `MetaLearner`; its `step` takes a meta-batch, and `MetaState.step` counts tasks;
        `StepInfo.grad_norm` is how far the meta-batch as a whole has moved the parameters.

    Raises:
        TypeError: for an optimizer that is not one.

    Example:
        >>> import jax.numpy as jnp, optax, fomaml_jax as fj
        >>> loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
        >>> learner = fj.serial_reptile(loss, optax.sgd(0.5), 1, optax.sgd(1.0))
        >>> centres = jnp.array([[1.0], [3.0]])
        >>> state, _ = learner.step(learner.init(jnp.zeros(1)), fj.Task(centres, centres))
        >>> state.params, int(state.step)
        (Array([1.75], dtype=float32), 2)

    References:
        Nichol, Achiam, Schulman,
        `On First-Order Meta-Learning Algorithms <https://arxiv.org/abs/1803.02999>`_, 2018,
        algorithm 1.
    """
    refusals.check_optimizer(inner_optimizer)
    refusals.check_optimizer(optimizer)
    refusals.check_num_steps(num_steps)
    loss = objectives.checked_loss(loss_fn, has_aux)
    outer = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> MetaState:
        state = initial(optimizer)(params)
        inner_state = of_its_own(inner_optimizer.init(state.params)) if keep_inner_state else None
        return state._replace(opt_state=(state.opt_state, inner_state))

    def one_task(state: MetaState, task: Task) -> tuple[MetaState, TaskInfo]:
        refusals.check_task(task)
        states: Any = state.opt_state
        outer_state, inner_state = states
        adapted, inner = adapt(
            loss_fn,
            state.params,
            task.support,
            inner_optimizer,
            num_steps,
            has_aux=has_aux,
            per_step_support=per_step_support,
            opt_state=inner_state,
        )
        grads = jax.tree.map(jnp.subtract, state.params, adapted)
        value, (_, aux) = loss(adapted, task.query)
        updates, outer_state = outer.update(
            grads, outer_state, state.params, value=value, grad=grads
        )
        moved = optax.apply_updates(state.params, updates)
        info = finite_with(TaskInfo(value, inner.losses, jnp.isfinite(value), aux), grads)
        after = (moved, (outer_state, inner.opt_state if keep_inner_state else None))
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(info.finite, new, old),
            after,
            (state.params, state.opt_state),
        )
        return MetaState(params, opt_state, state.step + 1), info

    def step(state: MetaState, tasks: Any) -> tuple[MetaState, StepInfo]:
        refusals.check_state(state)
        refusals.check_task_axis(tasks)
        state = varying(state, tasks)
        before = state.params
        state, info = jax.lax.scan(one_task, state, tasks)
        moved = norm(jax.tree.map(jnp.subtract, before, state.params))
        return state, StepInfo.of(info, moved)

    return MetaLearner(init, step)
