"""Inner rates learned along with the parameters, at first-order cost."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from fomaml_jax import objectives, rates, refusals
from fomaml_jax.manual_axes import varying
from fomaml_jax.meta_gradients import (
    checked_weights,
    closed,
    finite_with,
    in_its_forms,
    opened,
    query_gradients,
)
from fomaml_jax.trainable import Trainable
from fomaml_jax.types import LossFn, MetaGradient, Task, TaskInfo, WithRates


def learned_rates(
    loss_fn: LossFn,
    make_optimizer: Callable[[Any], optax.GradientTransformation],
    num_steps: int,
    *,
    has_aux: bool = False,
    unroll: int | bool = 1,
    trainable: Trainable | None = None,
    step_weights: Any = None,
    has_state: bool = False,
) -> MetaGradient:
    r"""`fomaml` for the parameters and the numbers of the inner optimizer together.

    .. math:: \theta_{k+1} = \theta_k + \mathrm{update}_\alpha(\mathrm{sg}(g_k), s_k,
        \mathrm{sg}(\theta_k)), \quad
        \frac{d}{d\alpha} L_{query}(\theta_K) = \sum_k \Big\langle
        \frac{\partial\,\mathrm{update}_\alpha}{\partial \alpha}, \nabla L_{query}(\theta_K)
        \Big\rangle,

    which for a rate of SGD in step k is :math:`-g_k \nabla L_{query}(\theta_K)`. The losses are not
    differentiated through the loop: what is kept of it is its gradients, one copy of the parameters
    a step.

    Args:
        loss_fn: as for `fomaml`.
        make_optimizer: `rates -> optimizer`, such as `fj.rates.scale_by_rates`. For rates that stay
            positive learn their logarithms: `lambda logs: scale_by_rates(jax.tree.map(jnp.exp,
            logs))`.
        num_steps: inner steps, a Python int.
        has_aux: whether `loss_fn` returns a pair.
        unroll: as in `jax.lax.scan`.
        trainable: as for `fomaml`.
        step_weights: as for `fomaml`.
        has_state: as for `fomaml`; `WithRates.params` is then a `WithState`, and `with_state` takes
            such trees too.

    Returns:
        A function `(WithRates, task) -> (WithRates of gradients, TaskInfo)`. These gradients are
        not to be differentiated in turn: they have no derivative in the shared parameters.

    Raises:
        TypeError: as `adapt`, and for parameters that are not a `WithRates`.

    Example:
        >>> import jax.numpy as jnp, optax, fomaml_jax as fj
        >>> loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
        >>> meta_gradient = fj.learned_rates(loss, optax.sgd, num_steps=1)
        >>> start = fj.WithRates(jnp.zeros(1), jnp.array(0.5))
        >>> grads, info = meta_gradient(start, fj.Task(jnp.ones(1), -jnp.ones(1)))
        >>> grads.params, grads.rates.item()
        (Array([1.5], dtype=float32), 1.5)

    References:
        Li, Zhou, Chen, Li, `Meta-SGD <https://arxiv.org/abs/1707.09835>`_, 2017; Antoniou, Edwards,
        Storkey, `How to train your MAML <https://arxiv.org/abs/1810.09502>`_ (LSLR), 2019.
    """
    objectives.checked_loss(loss_fn, has_aux, has_state)
    refusals.check_function("make_optimizer", make_optimizer, "rates -> optimizer")
    if isinstance(refusals.check_num_steps(num_steps), jax.Array):
        raise TypeError("learned rates need num_steps to be a Python int, not an array")
    weights = checked_weights(step_weights, num_steps)

    def form(loss_fn: LossFn, unroll: int | bool) -> MetaGradient:
        def meta_gradient(shared: WithRates, task: Task) -> tuple[WithRates, TaskInfo]:
            refusals.check_shared(shared, WithRates)
            refusals.check_rates(shared.rates)
            shared = varying(shared, task)
            params, of_task = opened(shared.params, task, has_state)

            def query_loss(rates):
                value, (grads, state, info) = query_gradients(
                    loss_fn,
                    params,
                    task,
                    make_optimizer(rates),
                    num_steps,
                    weights=weights,
                    has_aux=has_aux,
                    unroll=unroll,
                    trainable=trainable,
                    grads_serve_twice=True,
                    **of_task,
                )
                return value, closed(grads, info, state, shared.params, has_state)

            of_rates, (of_params, info) = jax.grad(query_loss, has_aux=True)(shared.rates)
            return WithRates(of_params, of_rates), finite_with(info, of_rates)

        return meta_gradient

    return in_its_forms(form, loss_fn, num_steps, unroll)


def meta_sgd(
    loss_fn: LossFn, num_steps: int, *, per_step: bool = False, **options: Any
) -> MetaGradient:
    r"""SGD with a learned rate for every tensor or element, and for every step if wanted.

    .. math:: \theta_{k+1} = \theta_k - \alpha_k \odot g_k

    `learned_rates` with `fj.rates.scale_by_rates`: Meta-SGD with rates from
    `fj.rates.like(params, rate, per="element")`, the per-layer per-step rates (LSLR) of MAML++ with
    `fj.rates.like(params, rate, num_steps=num_steps)` and `per_step=True`.

    Args:
        loss_fn: as for `fomaml`.
        num_steps: inner steps, a Python int.
        per_step: whether the rates lead with the step.
        **options: those of `learned_rates`.

    Returns:
        A function `(WithRates, task) -> (WithRates of gradients, TaskInfo)`. What it has learned is
        adapted to a task by `fj.adapt(loss_fn, shared.params, support,
        fj.rates.scale_by_rates(shared.rates, per_step=per_step), num_steps)`.

    Raises:
        ValueError: for rates that do not fit the parameters, when it is used; else as
            `learned_rates`.

    Example:
        >>> import jax.numpy as jnp, fomaml_jax as fj
        >>> loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
        >>> params = jnp.zeros(1)
        >>> start = fj.WithRates(params, fj.rates.like(params, 0.5, per="element"))
        >>> grads, _ = fj.meta_sgd(loss, 1)(start, fj.Task(jnp.ones(1), -jnp.ones(1)))
        >>> grads.rates
        Array([1.5], dtype=float32)

    References:
        Li, Zhou, Chen, Li, `Meta-SGD <https://arxiv.org/abs/1707.09835>`_, 2017; Antoniou, Edwards,
        Storkey, `How to train your MAML <https://arxiv.org/abs/1810.09502>`_, 2019.
    """

    def make_optimizer(tree: Any) -> optax.GradientTransformation:
        return rates.scale_by_rates(tree, per_step=per_step)

    return learned_rates(loss_fn, make_optimizer, num_steps, **options)
