"""The outer step: one optimizer step on the shared parameters, as an optax-like pair."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fomaml_jax import inner_updates, refusals
from fomaml_jax.dtypes import accumulator, widened
from fomaml_jax.parallel import OverTasks
from fomaml_jax.types import MetaGradient, Params, TaskInfo, WithRates, WithState


class MetaState(NamedTuple):
    """What the outer loop carries from step to step.

    A pytree of arrays, and all there is to keep: any library that saves such trees (Orbax,
    `flax.serialization`) saves a loop of one's own between two steps. `fj.train` does so by itself.

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
        loss: `[]`, the plain mean query loss over finite tasks (zero if there is none), whatever
            `task_weight` says.
        num_finite: `[]` int32, how many tasks were finite.
        grad_norm: `[]`, the global norm of the mean meta-gradient.
        tasks: `TaskInfo` with a leading `[tasks]` axis.
    """

    loss: jax.Array
    num_finite: jax.Array
    grad_norm: jax.Array
    tasks: TaskInfo

    @classmethod
    def of(
        cls, tasks: TaskInfo, grad_norm: jax.Array, totals: "Totals | None" = None
    ) -> "StepInfo":
        """From what each task saw, and the totals over all devices unless these are all tasks."""
        total, number = totals or Totals.of(tasks)
        loss = (total / jnp.maximum(number, 1)).astype(tasks.query_loss.dtype)
        return cls(loss, number.astype(jnp.int32), grad_norm, tasks)


class Totals(NamedTuple):
    """The sum of the finite query losses, and their number: in one dtype, to be sent together."""

    loss: jax.Array
    number: jax.Array

    @classmethod
    def of(cls, tasks: TaskInfo) -> "Totals":
        """Of these tasks."""
        dtype = accumulator(tasks.query_loss.dtype)
        finite_losses = jnp.where(tasks.finite, tasks.query_loss, 0)
        return cls(finite_losses.sum(dtype=dtype), tasks.finite.sum(dtype=dtype))


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
        meta_gradient: `(params, tasks) -> (mean grads, TaskInfo)`: the result of `over_tasks`, or a
            function around it that clips the mean, say. (Under `axis_name` such a function hides
            the other devices' losses from `StepInfo` and from an optimizer that needs the loss.)
        optimizer: any optax transformation. One that needs the loss (a plateau schedule, Polyak
            steps) is given `value` and `grad`; a line search, which asks for new values of the
            loss, can be an inner optimizer only. For a `WithState` wrap it in `with_state`: a plain
            one would take the state for parameters, which is warned of.

    Returns:
        A `MetaLearner`. A step whose tasks are all left out counts, and moves nothing: neither
        parameters nor the optimizer's state.

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
    refusals.check_function("meta_gradient", meta_gradient, "(params, tasks) -> (grads, TaskInfo)")
    refusals.check_optimizer(optimizer)

    def step(state: MetaState, tasks: Any) -> tuple[MetaState, StepInfo]:
        refusals.check_state(state)
        totals = None
        if isinstance(meta_gradient, OverTasks):
            grads, info, totals = meta_gradient.seeing(state.params, tasks, Totals.of)
        else:
            grads, info = refusals.checked_pair(meta_gradient(state.params, tasks))
        refusals.check_over_tasks(info)
        seen = StepInfo.of(info, norm(grads), totals)
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            grads, state.opt_state, state.params, value=seen.loss, grad=grads
        )
        params = optax.apply_updates(state.params, updates)
        if not isinstance(meta_gradient, OverTasks) or meta_gradient.skips:
            # Momentum and weight decay would move what no task has asked for. Of a function around
            # `over_tasks` the tasks seen are one device's, the gradient is that of all devices.
            asked = seen.num_finite > 0
            if totals is None:
                asked |= seen.grad_norm != 0  # NaN too
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(asked, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
        return MetaState(params, opt_state, state.step + 1), seen

    return MetaLearner(initial(optimizer), step)


def scheduled_learner(
    make_meta_gradient: Callable[[jax.Array], MetaGradient],
    optimizer: optax.GradientTransformation,
) -> MetaLearner:
    """A `meta_learner` whose meta-gradient depends on the outer step.

    Args:
        make_meta_gradient: `step -> meta_gradient`, where `step` is an int32 scalar, traced under
            `jax.jit`: for step weights that are annealed, inner rates that decay, a number of
            inner steps that grows, or `fj.schedules.first_then_second_order`.
        optimizer: any optax transformation.

    Returns:
        A `MetaLearner`.

    Raises:
        TypeError: for an optimizer that is not one.

    Example:
        >>> import jax, jax.numpy as jnp, optax, fomaml_jax as fj
        >>> loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
        >>> def at(step):
        ...     weights = fj.schedules.multi_step_weights(3, step, until=100)
        ...     return fj.over_tasks(fj.fomaml(loss, optax.sgd(0.5), 3, step_weights=weights))
        >>> learner = fj.scheduled_learner(at, optax.sgd(1.0))
        >>> centres = jnp.array([[1.0], [3.0]])
        >>> state, _ = learner.step(learner.init(jnp.zeros(1)), fj.Task(centres, centres))
    """
    refusals.check_function("make_meta_gradient", make_meta_gradient, "step -> meta_gradient")
    refusals.check_optimizer(optimizer)

    def step(state: MetaState, tasks: Any) -> tuple[MetaState, StepInfo]:
        refusals.check_state(state)
        return meta_learner(make_meta_gradient(state.step), optimizer).step(state, tasks)

    return MetaLearner(initial(optimizer), step)


def norm(tree: Params) -> jax.Array:
    """The global norm, in 32 bits at least: in 16 that of finite gradients may overflow."""
    return optax.tree.norm(widened(tree))


def initial(optimizer: optax.GradientTransformation) -> Callable[[Params], MetaState]:
    """A learner's `init`."""

    def init(params: Params) -> MetaState:
        refusals.check_params(params)
        # Weak types made strong: a step returns strong ones, and would be compiled a second time.
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), params)
        _refuse_bad_rates(optimizer, params)
        opt_state = of_its_own(optimizer.init(params))
        shared = params.params if isinstance(params, WithRates) else params
        if isinstance(shared, WithState) and not _tells_apart(opt_state):
            warnings.warn(
                "this outer optimizer takes the state of a WithState for parameters: wrap it in "
                "fj.with_state",
                stacklevel=2,
            )
        return MetaState(params, opt_state, jnp.zeros((), jnp.int32))

    return init


def _refuse_bad_rates(optimizer: optax.GradientTransformation, params: Params) -> None:
    """Refuses an outer optimizer like `optax.sgd(nan)`, as far as that is seen without a step."""
    try:
        traced = inner_updates.update_jaxpr(optimizer, params)
    except Exception:  # the step will say what is wrong
        return
    inner_updates.check_factors(traced)


def of_its_own(opt_state: optax.OptState) -> optax.OptState:
    """Copied: some keep the parameters themselves, and a buffer cannot be donated twice."""
    return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, opt_state)


def _tells_apart(opt_state: optax.OptState) -> bool:
    """Whether it is of `with_state`, or of parts of one's own among which no part takes both."""
    parted = _inside([opt_state], optax.PartitionState | optax.MaskedState)
    labels = set(WithState._fields)  # those of `with_state`
    if any(getattr(node, "inner_states", {}).keys() == labels for node in parted):
        return True
    # Momentum, say, for both: what is left out of a part has no leaves there.
    takes_both = any(
        jax.tree.leaves(node.params) and jax.tree.leaves(node.state)
        for node in _inside([opt_state], WithState)
    )
    return bool(parted) and not takes_both


def _inside(tree: Any, kind: Any) -> list[Any]:
    """All nodes of a kind below this one, those inside of others included."""

    def is_inner(node: Any) -> bool:
        return node is not tree and isinstance(node, kind)

    found = [node for node in jax.tree.leaves(tree, is_leaf=is_inner) if is_inner(node)]
    return found + [inner for node in found for inner in _inside(node, kind)]


def with_state(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An outer optimizer for `WithState`: the parameters by `optimizer`, the state to its mean.

    Args:
        optimizer: for the parameters. Of a `WithRates` whose parameters are a `WithState` it gets
            the rates too, and may tell them apart: `optax.partition({"network": optax.adam(1e-3),
            "rates": optax.adam(1e-2)}, fj.WithRates("network", "rates"))`.

    Returns:
        An optax transformation of such trees.

    Raises:
        TypeError: for an optimizer that is not one; when it is used, for a tree without a state.

    Example:
        >>> import jax.numpy as jnp, optax, fomaml_jax as fj
        >>> def loss(params, batch, state, key):  # keeps the mean of what it has seen
        ...     return jnp.mean((params - batch) ** 2), (batch.mean(), None)
        >>> meta_gradient = fj.over_tasks(fj.fomaml(loss, optax.sgd(0.1), 1, has_state=True))
        >>> learner = fj.meta_learner(meta_gradient, fj.with_state(optax.sgd(0.1)))
        >>> state = learner.init(fj.WithState(params=jnp.zeros(()), state=jnp.zeros(())))
        >>> batches = jnp.array([[1.0, 1.0], [3.0, 3.0]])
        >>> learner.step(state, fj.Task(batches, batches))[0].params.state
        Array(2., dtype=float32)
    """
    refusals.check_optimizer(optimizer)

    def labels(shared: Any) -> Any:
        with_rates = isinstance(shared, WithRates)
        refusals.check_shared(shared.params if with_rates else shared, WithState)
        of_both = WithState(*WithState._fields)
        return WithRates(of_both, "params") if with_rates else of_both

    return optax.partition({"params": optimizer, "state": optax.sgd(1.0)}, labels)
