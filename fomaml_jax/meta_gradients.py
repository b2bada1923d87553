"""The algorithms: what one task has to say about the shared parameters."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fomaml_jax import inner_updates, objectives, refusals
from fomaml_jax.adaptation import context, inner_loop, kept, repeat, takes_steps
from fomaml_jax.convolutions import matmul_convolutions
from fomaml_jax.manual_axes import varying
from fomaml_jax.trainable import Trainable, split
from fomaml_jax.types import AdaptInfo, LossFn, MetaGradient, Params, Task, TaskInfo, WithState
from fomaml_jax.variants import with_variants


def fomaml(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_steps: int | jax.Array,
    *,
    has_aux: bool = False,
    unroll: int | bool = 1,
    trainable: Trainable | None = None,
    step_weights: Any = None,
    has_state: bool = False,
) -> MetaGradient:
    r"""First-order MAML for one task: the query gradient at the adapted parameters.

    .. math:: g = \nabla L_{query}(\theta_K), \quad \theta_K = \mathrm{adapt}(\theta, support)

    This is what differentiating `adapt` with `first_order=True` gives, but the loop is not
    differentiated: nothing of it is kept, and memory does not grow with `num_steps`. What it gives
    may be differentiated in turn (learned outer rates, say): of the loop as `adapt` has it, of the
    query gradient in full.

    Args:
        loss_fn: `(params, batch) -> loss []`, or `-> (loss [], aux)` with `has_aux`; used on the
            support batch to adapt and on the query batch to judge.
        optimizer: the inner optimizer, any optax transformation; its state is fresh in every task.
        num_steps: inner steps, at least 0; may be traced.
        has_aux: whether `loss_fn` returns a pair.
        unroll: as in `jax.lax.scan`.
        trainable: which leaves the inner loop adapts, as in `adapt`; all of them have their
            meta-gradient. The head alone is ANIL, all but the head BOIL.
        step_weights: `[num_steps]`, traced if you like; the meta-gradient is then
            :math:`\sum_k w_k \nabla L_{query}(\theta_k)` over the parameters after each step
            (the multi-step loss of MAML++), at one query gradient a step. `TaskInfo.query_loss`
            stays the one after the last step.
        has_state: whether the loss keeps state or draws random numbers; it is then
            `(params, batch, state, key) -> (loss, (state, aux))` as in `adapt`, the shared
            parameters are a `WithState`, a `KeyedTask` gives the task its key (`None` without),
            and the outer optimizer has to be a `with_state`.

    Returns:
        A function `(params, task) -> (grads, TaskInfo)` for one task; `over_tasks` makes it one
        for a meta-batch. It raises as `adapt` does.

    Example:
        >>> import jax.numpy as jnp, optax, fomaml_jax as fj
        >>> loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
        >>> meta_gradient = fj.fomaml(loss, optax.sgd(0.5), num_steps=1)
        >>> grads, info = meta_gradient(jnp.zeros(1), fj.Task(jnp.ones(1), -jnp.ones(1)))
        >>> grads
        Array([1.5], dtype=float32)

    References:
        Finn, Abbeel, Levine, `Model-Agnostic Meta-Learning <https://arxiv.org/abs/1703.03400>`_,
        2017; Nichol, Achiam, Schulman,
        `On First-Order Meta-Learning Algorithms <https://arxiv.org/abs/1803.02999>`_, 2018; Raghu
        et al., `Rapid Learning or Feature Reuse? <https://arxiv.org/abs/1909.09157>`_ (ANIL), 2020;
        Oh et al., `BOIL <https://arxiv.org/abs/2008.08882>`_, 2021; Antoniou, Edwards, Storkey,
        `How to train your MAML <https://arxiv.org/abs/1810.09502>`_ (MAML++), 2019.
    """
    _check(loss_fn, optimizer, num_steps, has_aux, has_state)
    weights = checked_weights(step_weights, num_steps)

    def form(loss_fn: LossFn, unroll: int | bool) -> MetaGradient:
        def meta_gradient(shared: Any, task: Any) -> tuple[Any, TaskInfo]:
            params, of_task = opened(shared, task, has_state)
            _, (grads, state, info) = query_gradients(
                loss_fn,
                params,
                task,
                optimizer,
                num_steps,
                weights=weights,
                has_aux=has_aux,
                unroll=unroll,
                trainable=trainable,
                **of_task,
            )
            return closed(grads, info, state, shared, has_state)

        return meta_gradient

    return in_its_forms(form, loss_fn, num_steps, unroll)


def query_gradients(
    loss_fn: LossFn,
    params: Params,
    task: Task,
    optimizer: optax.GradientTransformation,
    num_steps: int | jax.Array,
    *,
    weights: jax.Array | None,
    has_aux: bool,
    unroll: int | bool,
    trainable: Trainable | None,
    has_state: bool = False,
    state: Any = None,
    key: jax.Array | None = None,
    grads_serve_twice: bool = False,
) -> tuple[jax.Array, tuple[Params, Any, TaskInfo]]:
    """The weighted query loss; the meta-gradient of `fomaml`, the last state, the `TaskInfo`.

    With `grads_serve_twice` the loss can be differentiated with respect to what the optimizer was
    made from, such as learned rates, at no backward pass more: the gradients are its derivative
    too, and have none of their own.
    """
    refusals.check_task(task)
    start, step, merged = inner_loop(
        loss_fn,
        params,
        task.support,
        optimizer,
        num_steps,
        has_aux=has_aux,
        trainable=trainable,
        has_state=has_state,
        state=state,
        key=key,
    )
    objective = objectives.checked_loss(loss_fn, has_aux, has_state)
    query_gradient = jax.value_and_grad(objective, has_aux=True)

    def judge(inner):
        theta = merged(inner)
        at = jax.lax.stop_gradient(theta) if grads_serve_twice else theta
        (value, (state, aux)), grads = query_gradient(
            at, task.query, *context(inner, key, query=True)
        )
        if grads_serve_twice:
            value = _with_derivative(value, grads, theta)
        return (value, grads), kept(inner, state, query=True), aux

    if weights is None:
        end, seen = repeat(step, start, num_steps, unroll)
        (value, grads), state, aux = judge(end)
        return value, (grads, state, _task_info(value, seen, grads, aux))

    def judged_step(carry):
        total, _, inner = carry
        weight = weights[inner.step]
        inner, info = step(inner)
        more, state, aux = judge(inner)
        total = jax.tree.map(lambda t, m: t + weight.astype(m.dtype) * m, total, more)
        return (total, (more[0], state, aux), inner), info

    # The last ones are carried: stacked, they would take memory for every step.
    (value, grads), state, aux = _zeros_of(judge, start)
    carry = (value, grads), (value, state, aux), start
    ((value, grads), last, _), seen = repeat(judged_step, carry, num_steps, unroll)
    last_value, state, aux = last
    return value, (grads, state, _task_info(last_value, seen, grads, aux))


@jax.custom_jvp
def _with_derivative(value: jax.Array, grads: Params, theta: Params) -> jax.Array:
    """The value, with `grads` for its derivative with respect to `theta`, beside its own."""
    del grads, theta
    return value


@_with_derivative.defjvp
def _derivative(primals, tangents):
    value, grads, _ = primals
    along = optax.tree.vdot(grads, tangents[2])
    return value, tangents[0] + jnp.asarray(along, value.dtype)


def maml(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    has_aux: bool = False,
    unroll: int | bool = 1,
    trainable: Trainable | None = None,
    step_weights: Any = None,
    remat: bool = False,
    has_state: bool = False,
) -> MetaGradient:
    r"""Second-order MAML for one task: the derivative of the query loss through the inner loop.

    .. math:: g = \frac{d}{d\theta} L_{query}(\mathrm{adapt}(\theta, support))

    Exact, and dearer than `fomaml`: second derivatives are taken and every inner step is kept for
    the backward pass, so memory grows with `num_steps`.

    Adam-like optimizers divide by a square root whose derivative at zero is infinite: one
    parameter with a gradient of exactly zero (a dead ReLU) makes the meta-gradient NaN. Pass
    `eps_root=1e-8` or so to them; a warning says where this is seen to be missing.

    Args:
        loss_fn: as for `fomaml`; must be twice differentiable.
        optimizer: the inner optimizer.
        num_steps: inner steps, a Python int of at least 0.
        has_aux: whether `loss_fn` returns a pair.
        unroll: as in `jax.lax.scan`.
        trainable: as for `fomaml`.
        step_weights: as for `fomaml`: the meta-gradient of the weighted sum of query losses.
        remat: whether to compute every inner step again for the backward pass instead of keeping
            what it computed: parameters and optimizer state alone are kept for each step.
        has_state: as for `fomaml`; what a state was computed from is differentiated, too.

    Returns:
        A function `(params, task) -> (grads, TaskInfo)`; it raises as `adapt` does, and a
        `ValueError` for an optimizer that searches along a line, which has no second derivative.

    Example:
        >>> import jax.numpy as jnp, optax, fomaml_jax as fj
        >>> loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
        >>> meta_gradient = fj.maml(loss, optax.sgd(0.5), num_steps=1)
        >>> grads, info = meta_gradient(jnp.zeros(1), fj.Task(jnp.ones(1), -jnp.ones(1)))
        >>> grads
        Array([0.75], dtype=float32)

    References:
        Finn, Abbeel, Levine, `Model-Agnostic Meta-Learning <https://arxiv.org/abs/1703.03400>`_,
        2017.
    """
    _check(loss_fn, optimizer, num_steps, has_aux, has_state)
    if isinstance(num_steps, jax.Array):
        raise TypeError(
            "maml differentiates through the inner loop, so num_steps must be a Python int; mark "
            "it static, or use fomaml, which takes an array"
        )
    weights = checked_weights(step_weights, num_steps)

    def form(loss_fn: LossFn, unroll: int | bool) -> MetaGradient:
        objective = objectives.checked_loss(loss_fn, has_aux, has_state)

        def after_adaptation(params: Params, task: Any, of_task: dict[str, Any]) -> Any:
            start, step, merged = inner_loop(
                loss_fn,
                params,
                task.support,
                optimizer,
                num_steps,
                first_order=False,
                has_aux=has_aux,
                trainable=trainable,
                **of_task,
            )
            saved = jax.checkpoint if remat else lambda step: step

            def judge(inner):
                state_and_key = context(inner, of_task.get("key"), query=True)
                value, (state, aux) = objective(merged(inner), task.query, *state_and_key)
                return value, (kept(inner, state, query=True), aux)

            if weights is None:
                end, seen = repeat(saved(step), start, num_steps, unroll)
                value, (state, aux) = judge(end)
                return value, (value, seen, state, aux)

            def judged_step(carry):
                inner, _ = carry
                inner, info = step(inner)
                value, last = judge(inner)
                return (inner, last), (info, value)

            # The last ones are carried: stacked, they would take memory for every step.
            _, last = _zeros_of(judge, start)
            judged = repeat(saved(judged_step), (start, last), num_steps, unroll)
            (_, (state, aux)), (seen, values) = judged
            total = (weights.astype(values.dtype) * values).sum()
            return total, (values[-1], seen, state, aux)

        def meta_gradient(shared: Any, task: Any) -> tuple[Any, TaskInfo]:
            refusals.check_task(task)
            params, of_task = opened(shared, task, has_state)
            refusals.check_params(params)
            if takes_steps(num_steps):
                inner_updates.warn_of_infinite_curvature(optimizer, split(trainable, params)[0])
            through = jax.value_and_grad(after_adaptation, has_aux=True)
            with inner_updates.explaining_loops():
                (_, (value, seen, state, aux)), grads = through(params, task, of_task)
            info = _task_info(value, seen, grads, aux)
            return closed(grads, info, state, shared, has_state)

        return meta_gradient

    return in_its_forms(form, loss_fn, num_steps, unroll)


def reptile(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_steps: int | jax.Array,
    *,
    has_aux: bool = False,
    unroll: int | bool = 1,
    trainable: Trainable | None = None,
    per_step_support: bool = False,
    has_state: bool = False,
) -> MetaGradient:
    r"""Reptile for one task: the way from the adapted parameters back to the shared ones.

    .. math:: g = \theta - \theta_K, \quad \theta_K = \mathrm{adapt}(\theta, support)

    No derivative at all of the query loss, which is computed for the report alone; a task whose
    query loss is not finite counts as not finite all the same. With `optax.sgd(epsilon)` outside
    this is the paper's batched update :math:`\theta \leftarrow \theta +
    \epsilon\,\overline{(\theta_K - \theta)}`.

    Args:
        loss_fn: as for `fomaml`.
        optimizer: the inner optimizer; its state is fresh in every task.
        num_steps: inner steps, at least 0; with 0 the meta-gradient is zero. May be traced.
        has_aux: whether `loss_fn` returns a pair.
        unroll: as in `jax.lax.scan`.
        trainable: as for `fomaml`; leaves that are not adapted have a meta-gradient of zero.
        per_step_support: whether the leaves of `task.support` lead with an axis of `num_steps`, a
            minibatch for each step, as in the authors' code.
        has_state: as for `fomaml`; the state's gradient is the way back from where adaptation left
            it.

    Returns:
        A function `(params, task) -> (grads, TaskInfo)`; it raises as `adapt` does.

    Example:
        >>> import jax.numpy as jnp, optax, fomaml_jax as fj
        >>> loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
        >>> meta_gradient = fj.reptile(loss, optax.sgd(0.5), num_steps=1)
        >>> grads, info = meta_gradient(jnp.zeros(1), fj.Task(jnp.ones(1), -jnp.ones(1)))
        >>> grads
        Array([-0.5], dtype=float32)

    References:
        Nichol, Achiam, Schulman,
        `On First-Order Meta-Learning Algorithms <https://arxiv.org/abs/1803.02999>`_, 2018.
    """
    _check(loss_fn, optimizer, num_steps, has_aux, has_state)

    def form(loss_fn: LossFn, unroll: int | bool) -> MetaGradient:
        objective = objectives.checked_loss(loss_fn, has_aux, has_state)

        def meta_gradient(shared: Any, task: Any) -> tuple[Any, TaskInfo]:
            refusals.check_task(task)
            params, of_task = opened(shared, task, has_state)
            start, step, merged = inner_loop(
                loss_fn,
                params,
                task.support,
                optimizer,
                num_steps,
                has_aux=has_aux,
                trainable=trainable,
                per_step_support=per_step_support,
                **of_task,
            )
            end, seen = repeat(step, start, num_steps, unroll)
            adapted, state_and_key = merged(end), context(end, of_task.get("key"), query=True)
            # The state is the one after adaptation: like the parameters, it has not seen the query.
            value, (_, aux) = objective(adapted, task.query, *state_and_key)
            grads = jax.tree.map(jnp.subtract, params, adapted)
            info = _task_info(value, seen, grads, aux)
            return closed(grads, info, end.state, shared, has_state)

        return meta_gradient

    return in_its_forms(form, loss_fn, num_steps, unroll)


def opened(shared: Any, task: Any, has_state: bool) -> tuple[Params, dict[str, Any]]:
    """The parameters, and what the inner loop needs to know of state and randomness."""
    shared = varying(shared, task)  # each task has a gradient of its own, on its own device
    if not has_state:
        return shared, {}
    refusals.check_shared(shared, WithState)
    key = getattr(task, "key", None)
    return shared.params, {"has_state": True, "state": shared.state, "key": key}


def closed(
    grads: Params, info: TaskInfo, state: Any, shared: Any, has_state: bool
) -> tuple[Any, TaskInfo]:
    """The gradients, beside them the way back from the last state to the shared one."""
    if not has_state:
        return grads, info
    back = jax.tree.map(jnp.subtract, shared.state, state)
    return WithState(grads, back), finite_with(info, back)


def finite_with(info: TaskInfo, grads: Any) -> TaskInfo:
    """The info, of which `finite` now says that these gradients are finite too."""
    finite = jnp.stack([info.finite, *map(_all_finite, jax.tree.leaves(grads))]).all()
    return info._replace(finite=finite)


# Longer loops are not unrolled: compile time grows with them, and nothing else is gained.
_MAX_UNROLLED = 10


def in_its_forms(
    form: Callable[[LossFn, int | bool], MetaGradient],
    loss_fn: LossFn,
    num_steps: int | jax.Array,
    unroll: int | bool,
) -> MetaGradient:
    """Lets `tune` try the algorithm with its convolutions and its loop in their other forms."""

    def variants() -> dict[str, MetaGradient]:
        losses = {"": loss_fn, "matmul_convolutions": matmul_convolutions(loss_fn)}
        loops = {"": unroll}
        if not isinstance(num_steps, jax.Array) and 1 < num_steps <= _MAX_UNROLLED:
            rolled = unroll is not True and unroll <= 1
            loops |= {"unrolled": True} if rolled else {"not unrolled": 1}
        return {
            ", ".join(filter(None, names)) or "as given": form(losses[names[0]], loops[names[1]])
            for names in itertools.product(losses, loops)
        }

    return with_variants(form(loss_fn, unroll), variants)


def _check(loss_fn, optimizer, num_steps, has_aux, has_state) -> None:
    """Refuses at once what would otherwise be refused at the first call."""
    objectives.checked_loss(loss_fn, has_aux, has_state)
    refusals.check_optimizer(optimizer)
    refusals.check_num_steps(num_steps)


def checked_weights(step_weights: Any, num_steps: int | jax.Array) -> jax.Array | None:
    """The weights as an array, where there are any."""
    return None if step_weights is None else refusals.check_step_weights(step_weights, num_steps)


def _zeros_of(fn: Callable[[Any], Any], argument: Any) -> Any:
    """Like what a function returns, without computing it."""
    shapes = jax.eval_shape(fn, argument)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _task_info(value: jax.Array, inner: AdaptInfo, grads: Params, aux: Any) -> TaskInfo:
    return finite_with(TaskInfo(value, inner.losses, jnp.isfinite(value), aux), grads)


def _all_finite(x: jax.Array) -> jax.Array:
    # By the extremes, which NaN passes through: `isfinite(x).all()` is a seventh of a small task's
    # time on CPU, where it writes a boolean for every element first.
    return jnp.isfinite(x.max(initial=0)) & jnp.isfinite(x.min(initial=0))
