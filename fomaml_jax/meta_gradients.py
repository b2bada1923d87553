"""The algorithms: what one task has to say about the shared parameters."""

import itertools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from fomaml_jax import refusals
from fomaml_jax.adaptation import adapt
from fomaml_jax.convolutions import matmul_convolutions
from fomaml_jax.types import AdaptInfo, Batch, LossFn, MetaGradient, Params, Task, TaskInfo
from fomaml_jax.variants import with_variants


def fomaml(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_steps: int | jax.Array,
    *,
    has_aux: bool = False,
    unroll: int | bool = 1,
) -> MetaGradient:
    r"""First-order MAML for one task: the query gradient at the adapted parameters.

    .. math:: g = \nabla L_{query}(\theta_K), \quad \theta_K = \mathrm{adapt}(\theta, support)

    This is what differentiating `adapt` with `first_order=True` gives, but the loop is not
    differentiated: nothing of it is kept, and memory does not grow with `num_steps`.

    Args:
        loss_fn: `(params, batch) -> loss []`, or `-> (loss [], aux)` with `has_aux`; used on the
            support batch to adapt and on the query batch to judge.
        optimizer: the inner optimizer, any optax transformation; its state is fresh in every task.
        num_steps: inner steps, at least 0; may be traced.
        has_aux: whether `loss_fn` returns a pair.
        unroll: as in `jax.lax.scan`.

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
        `On First-Order Meta-Learning Algorithms <https://arxiv.org/abs/1803.02999>`_, 2018.
    """
    loss, adapt_to = _inner_loop(loss_fn, optimizer, num_steps, has_aux, unroll)

    def meta_gradient(params: Params, task: Task) -> tuple[Params, TaskInfo]:
        _check_task(task)
        adapted, inner = adapt_to(params, task.support)
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(adapted, task.query)
        return grads, _task_info(value, inner, grads, aux)

    return _variable(fomaml, meta_gradient, loss_fn, optimizer, num_steps, has_aux, unroll)


def maml(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    has_aux: bool = False,
    unroll: int | bool = 1,
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

    Returns:
        A function `(params, task) -> (grads, TaskInfo)`; it raises as `adapt` does.

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
    loss, adapt_to = _inner_loop(loss_fn, optimizer, num_steps, has_aux, unroll, first_order=False)

    def meta_gradient(params: Params, task: Task) -> tuple[Params, TaskInfo]:
        _check_task(task)
        if isinstance(num_steps, jax.Array):
            raise TypeError(
                "maml differentiates through the inner loop, so num_steps must be a Python int; "
                "mark it static, or use fomaml, which takes an array"
            )
        _warn_of_infinite_curvature(optimizer, params)

        def after_adaptation(params):
            adapted, inner = adapt_to(params, task.support)
            value, aux = loss(adapted, task.query)
            return value, (inner, aux)

        (value, (inner, aux)), grads = jax.value_and_grad(after_adaptation, has_aux=True)(params)
        return grads, _task_info(value, inner, grads, aux)

    return _variable(maml, meta_gradient, loss_fn, optimizer, num_steps, has_aux, unroll)


def reptile(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_steps: int | jax.Array,
    *,
    has_aux: bool = False,
    unroll: int | bool = 1,
) -> MetaGradient:
    r"""Reptile for one task: the way from the adapted parameters back to the shared ones.

    .. math:: g = \theta - \theta_K, \quad \theta_K = \mathrm{adapt}(\theta, support)

    No derivative at all of the query loss, which is computed for the report alone (and removed by
    the compiler where the report is not used). With `optax.sgd(epsilon)` outside this is the
    paper's batched update :math:`\theta \leftarrow \theta + \epsilon\,\overline{(\theta_K -
    \theta)}`.

    Args:
        loss_fn: as for `fomaml`.
        optimizer: the inner optimizer; its state is fresh in every task.
        num_steps: inner steps, at least 0; with 0 the meta-gradient is zero. May be traced.
        has_aux: whether `loss_fn` returns a pair.
        unroll: as in `jax.lax.scan`.

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
    loss, adapt_to = _inner_loop(loss_fn, optimizer, num_steps, has_aux, unroll)

    def meta_gradient(params: Params, task: Task) -> tuple[Params, TaskInfo]:
        _check_task(task)
        adapted, inner = adapt_to(params, task.support)
        value, aux = loss(adapted, task.query)
        grads = jax.tree.map(jnp.subtract, params, adapted)
        return grads, _task_info(value, inner, grads, aux)

    return _variable(reptile, meta_gradient, loss_fn, optimizer, num_steps, has_aux, unroll)


# Longer loops are not unrolled: compile time grows with them, and nothing else is gained.
_MAX_UNROLLED = 10


def _variable(algorithm, meta_gradient, loss_fn, optimizer, num_steps, has_aux, unroll):
    """Lets `tune` try the algorithm with its convolutions and its loop in their other forms."""

    def variants() -> dict[str, MetaGradient]:
        losses = {"": loss_fn, "matmul_convolutions": matmul_convolutions(loss_fn)}
        loops = {"": unroll}
        if not isinstance(num_steps, jax.Array) and 1 < num_steps <= _MAX_UNROLLED:
            rolled = unroll is not True and unroll <= 1
            loops |= {"unrolled": True} if rolled else {"not unrolled": 1}

        def made(loss, unroll):
            return algorithm(loss, optimizer, num_steps, has_aux=has_aux, unroll=unroll)

        return {
            ", ".join(filter(None, names)) or "as given": made(losses[names[0]], loops[names[1]])
            for names in itertools.product(losses, loops)
        }

    return with_variants(meta_gradient, variants)


def _inner_loop(loss_fn, optimizer, num_steps, has_aux, unroll, *, first_order=True):
    """The checked loss, and the inner loop as `(params, support) -> (adapted, AdaptInfo)`."""
    loss = refusals.checked_loss(loss_fn, has_aux)
    refusals.check_optimizer(optimizer)
    refusals.check_num_steps(num_steps)

    def adapt_to(params: Params, support: Batch) -> tuple[Params, AdaptInfo]:
        return adapt(
            loss_fn,
            params,
            support,
            optimizer,
            num_steps,
            first_order=first_order,
            has_aux=has_aux,
            unroll=unroll,
        )

    return loss, adapt_to


def _task_info(value: jax.Array, inner: AdaptInfo, grads: Params, aux: Any) -> TaskInfo:
    finite = jnp.stack([jnp.isfinite(value), *map(_all_finite, jax.tree.leaves(grads))]).all()
    return TaskInfo(value, inner.losses, finite, aux)


def _all_finite(x: jax.Array) -> jax.Array:
    # By the extremes, which NaN passes through: `isfinite(x).all()` is a seventh of a small task's
    # time on CPU, where it writes a boolean for every element first.
    return jnp.isfinite(x.max(initial=0)) & jnp.isfinite(x.min(initial=0))


def _check_task(task: Task) -> None:
    if not (hasattr(task, "support") and hasattr(task, "query")):
        raise TypeError(
            f"task must be a fomaml_jax.Task(support, query), got a {type(task).__name__}"
        )
    refusals.check_batch("query", task.query)


def _warn_of_infinite_curvature(optimizer: optax.GradientTransformation, params: Params) -> None:
    """Warns if the update has no derivative where one element of the gradient is exactly zero."""
    if "sqrt" not in str(refusals.update_jaxpr(optimizer, params)):
        return

    # One element of two is zero, so that element-wise roots are at fault and global norms are not.
    def zero_and_one(x):
        return jnp.arange(2, dtype=x.dtype).reshape((2,) + (1,) * (x.ndim - 1))

    def total_update(grads):
        updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
        return optax.tree.sum(updates)

    try:
        with jax.ensure_compile_time_eval():
            curvature = jax.grad(total_update)(jax.tree.map(zero_and_one, params))
    except Exception:  # an optimizer made for these very shapes, or that needs the loss: no verdict
        return
    known = [x for x in jax.tree.leaves(curvature) if not isinstance(x, Tracer)]
    if any(np.isnan(x).any() for x in known):
        warnings.warn(
            "this inner optimizer has an infinite derivative where a gradient is exactly zero, "
            "which makes second-order meta-gradients NaN: pass eps_root (optax.adam(rate, "
            "eps_root=1e-8)), use optax.sgd inside, or use fomaml",
            stacklevel=4,
        )
