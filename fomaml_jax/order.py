"""Is a meta-gradient first order? By comparison with both, and by how far the two are apart."""

import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fomaml_jax import inner_updates, objectives, refusals
from fomaml_jax.adaptation import adapt
from fomaml_jax.dtypes import widened
from fomaml_jax.meta_gradients import fomaml, maml
from fomaml_jax.parallel import together
from fomaml_jax.trainable import Trainable, merge, split
from fomaml_jax.types import LossFn, Params, Task, WithState


class Order(NamedTuple):
    """What a meta-gradient was found to be.

    Attributes:
        verdict: `"first"`, `"second"`, `"neither"`, or `"either"` where the two references agree
            (no inner step, or a loss without curvature).
        to_first: the relative distance from the first-order reference, `|g - f| / |f|`.
        to_second: the relative distance from the second-order reference.
    """

    verdict: str
    to_first: float
    to_second: float

    def __str__(self) -> str:
        """One line to read."""
        return (
            f"{self.verdict} order: {self.to_first:.1e} from first-order MAML, "
            f"{self.to_second:.1e} from second-order MAML"
        )


def check_order(
    loss_fn: LossFn,
    params: Params,
    task: Task,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    meta_gradient: Any = None,
    *,
    has_aux: bool = False,
    trainable: Trainable | None = None,
    tolerance: float = 1e-3,
) -> Order:
    """Says whether a meta-gradient is first order, second order or neither.

    Both references are written out step by step, with and without `stop_gradient`, by means of
    `jax.grad` alone: nothing of the library's own loops is in them.

    Args:
        loss_fn: `(params, batch) -> loss []`, or a pair with `has_aux`.
        params: the shared parameters.
        task: one task.
        optimizer: the inner optimizer.
        num_steps: inner steps, a Python int.
        meta_gradient: what is to be judged: a function `(params, task)` that returns gradients, or
            `(grads, info)`; gradients of the structure of `params`, from anywhere; or nothing, for
            `fomaml` of these arguments.
        has_aux: whether `loss_fn` returns a pair.
        trainable: which leaves the inner loop adapts, as for `fomaml`.
        tolerance: the largest relative distance that counts as agreement. In float32, sums in
            another order differ by about 1e-6 and a different algorithm by about 1e-2.

    Returns:
        An `Order`; print it.

    Raises:
        TypeError: for an optimizer that is not one, a `WithState`.
        ValueError: for gradients of another structure, a negative number of steps, a task whose
            gradients are not finite, an optimizer that has no second derivative.

    Example:
        >>> import jax.numpy as jnp, optax, fomaml_jax as fj
        >>> loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
        >>> task = fj.Task(jnp.ones(1), -jnp.ones(1))
        >>> mine = lambda theta, task: theta - 0.5 * (theta - task.support) - task.query
        >>> fj.check_order(loss, jnp.zeros(1), task, optax.sgd(0.5), 1, mine).verdict
        'first'
        >>> maml = fj.maml(loss, optax.sgd(0.5), 1)
        >>> fj.check_order(loss, jnp.zeros(1), task, optax.sgd(0.5), 1, maml).verdict
        'second'
    """
    _check_stateless(params)
    refusals.check_params(params)
    refusals.check_optimizer(optimizer)
    num_steps = operator.index(refusals.check_num_steps(num_steps))
    loss = objectives.checked_loss(loss_fn, has_aux)
    params = jax.tree.map(jnp.asarray, params)
    if meta_gradient is None:
        meta_gradient = fomaml(loss_fn, optimizer, num_steps, has_aux=has_aux, trainable=trainable)
    given = meta_gradient(params, task) if callable(meta_gradient) else meta_gradient
    # `(grads, info)`, as algorithms here return, is told from gradients by their structure.
    if jax.tree.structure(given) != jax.tree.structure(params) and isinstance(given, tuple):
        given = given[0]
    refusals.check_like_params("meta_gradient", given, params)

    by_hand = _after_adaptation(loss, optimizer, num_steps, trainable)

    @jax.jit
    def references(params, task):
        stops = jax.lax.stop_gradient, lambda x: x
        return [jax.grad(by_hand)(params, task, stop) for stop in stops]

    with inner_updates.explaining_loops():
        first, second = references(params, task)
    to_first, to_second = (float(_distance(given, other)) for other in (first, second))
    if not (math.isfinite(to_first) and math.isfinite(to_second)):
        raise ValueError(
            "task has a loss or gradients that are not finite, which are of no order; pass another "
            "task, or clip the inner gradients"
        )
    agrees = (to_first <= tolerance, to_second <= tolerance)
    verdict = {
        (True, True): "either",
        (True, False): "first",
        (False, True): "second",
        (False, False): "neither",
    }[agrees]
    return Order(verdict, to_first, to_second)


def _after_adaptation(loss, optimizer, num_steps, trainable):
    """The query loss by an inner loop written out, `stop` on what first order takes as constant."""

    def query_loss(params, task, stop):
        theta, frozen = split(trainable, params)

        def of_support(theta):
            return loss(merge(theta, frozen), task.support)[0]

        extra = optax.with_extra_args_support(optimizer)
        state = extra.init(stop(theta))
        for _ in range(num_steps):
            value, grads = jax.value_and_grad(of_support)(theta)
            updates, state = extra.update(
                stop(grads),
                state,
                stop(theta),
                value=stop(value),
                grad=stop(grads),
                value_fn=of_support,
            )
            theta = optax.apply_updates(theta, updates)
        return loss(merge(theta, frozen), task.query)[0]

    return query_loss


class Diagnosis(NamedTuple):
    """How first- and second-order meta-gradients compare over a meta-batch.

    Attributes:
        cosine: `[tasks]`, of the angle between the two gradients of each task.
        mean_cosine: `[]`, of the angle between their means over tasks.
        norm_ratio: `[tasks]`, the norm of the first-order gradient over that of the second-order
            one.
        support_drop: `[num_steps]`, by how much each inner step lowered the support loss, in the
            mean over tasks.
    """

    cosine: jax.Array
    mean_cosine: jax.Array
    norm_ratio: jax.Array
    support_drop: jax.Array


def diagnose(
    loss_fn: LossFn,
    params: Params,
    tasks: Task,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    has_aux: bool = False,
    trainable: Trainable | None = None,
) -> Diagnosis:
    """Compares first- and second-order meta-gradients on a meta-batch.

    Where the cosine is near one, second order has nothing to add. Of a gradient of zero both cosine
    and ratio are NaN.

    Args:
        loss_fn: as for `fomaml`.
        params: the shared parameters.
        tasks: a meta-batch, leaves `[tasks, examples, ...]`.
        optimizer: the inner optimizer.
        num_steps: inner steps, a Python int of at least 1.
        has_aux: whether `loss_fn` returns a pair.
        trainable: as for `fomaml`.

    Returns:
        A `Diagnosis`. Wrap the call in `jax.jit` for speed.

    Raises:
        TypeError: for a `WithState`.

    Example:
        >>> import jax.numpy as jnp, optax, fomaml_jax as fj
        >>> loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
        >>> centres = jnp.array([[1.0], [3.0]])
        >>> report = fj.diagnose(
        ...     loss, jnp.zeros(1), fj.Task(centres, centres), optax.sgd(0.5), num_steps=1)
        >>> report.cosine
        Array([1., 1.], dtype=float32)
    """
    _check_stateless(params)
    refusals.check_task_axis(tasks)
    refusals.check_at_least("num_steps", num_steps, 1)
    loss = objectives.checked_loss(loss_fn, has_aux)
    options = {"has_aux": has_aux, "trainable": trainable}
    second_order = maml(loss_fn, optimizer, num_steps, **options)

    def one_task(task):
        adapted, info = adapt(loss_fn, params, task.support, optimizer, num_steps, **options)
        first, _ = jax.grad(loss, has_aux=True)(adapted, task.query)
        second, _ = second_order(params, task)
        after, _ = loss(adapted, task.support)
        return first, second, jnp.append(info.losses, after)

    firsts, seconds, losses = together(one_task, tasks)
    firsts, seconds = widened(firsts), widened(seconds)
    norms = [jax.vmap(optax.tree.norm)(grads) for grads in (firsts, seconds)]
    cosine = jax.vmap(optax.tree.vdot)(firsts, seconds) / (norms[0] * norms[1])
    means = [jax.tree.map(lambda g: g.mean(0), grads) for grads in (firsts, seconds)]
    mean_norms = [optax.tree.norm(grads) for grads in means]
    mean_cosine = optax.tree.vdot(*means) / (mean_norms[0] * mean_norms[1])
    drop = -jnp.diff(losses.mean(0))
    return Diagnosis(jnp.asarray(cosine), jnp.asarray(mean_cosine), norms[0] / norms[1], drop)


def _check_stateless(params: Params) -> None:
    if isinstance(params, WithState):
        raise TypeError(
            "the order is judged without state: pass the params of the WithState, and a loss with "
            "its state fixed, `lambda params, batch: loss(params, state, batch)[0]`"
        )


def _distance(given: Params, reference: Params) -> jax.Array:
    given, reference = widened(jax.tree.map(jnp.asarray, given)), widened(reference)
    apart = optax.tree.norm(jax.tree.map(jnp.subtract, given, reference))
    return apart / jnp.maximum(optax.tree.norm(reference), jnp.finfo(jnp.float32).tiny)
