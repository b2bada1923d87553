"""The inner loop: a few optimizer steps on one task's support batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fomaml_jax import inner_updates, objectives, refusals
from fomaml_jax.hoisting import hoisted
from fomaml_jax.manual_axes import varying
from fomaml_jax.trainable import Trainable, merge, split
from fomaml_jax.types import AdaptInfo, Batch, LossFn, Params, PerStep


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
    trainable: Trainable | None = None,
    per_step_support: bool = False,
    opt_state: optax.OptState | None = None,
    has_state: bool = False,
    state: Any = None,
    key: jax.Array | None = None,
) -> tuple[Params, AdaptInfo]:
    r"""Adapts the parameters to one task by `num_steps` optimizer steps on its support batch.

    With :math:`g_k = \nabla L_{support}(\theta_k)` and :math:`\mathrm{sg}` for `stop_gradient`,

    .. math::
        \theta_{k+1} = \theta_k + \mathrm{update}(\mathrm{sg}(g_k), s_k, \mathrm{sg}(\theta_k)),

    so that for every optimizer, with momentum, weight decay or Adam, the derivative of the adapted
    parameters with respect to `params` is the identity. Numbers that the optimizer itself was made
    from (a learned rate) keep their gradient. With `first_order=False` nothing is stopped.

    Inside of a `jax.shard_map` each device adapts to its own task, with inner gradients of its own.
    A loop inside of the loss must then start from values that vary as its inputs do
    (`jax.lax.pcast`), or the `shard_map` be given `check_vma=False`: else JAX refuses it. An
    optimizer with loops or conditions of its own (a line search, `reduce_on_plateau`) needs the
    latter.

    Keep parameters in float32 even where the loss computes in bfloat16: small updates vanish in
    bfloat16 sums.

    Args:
        loss_fn: `(params, support) -> loss []`, or `-> (loss [], aux)` with `has_aux`.
        params: any pytree of floating-point arrays.
        support: any pytree whose leaves lead with the example axis.
        optimizer: any optax transformation. One that needs the loss (Polyak steps, line searches)
            is given `value`, `grad` and `value_fn`; those of `optax.contrib` that want other
            functions of the loss (`sam`, `sophia`) cannot be used, inside or outside.
        num_steps: at least 0. May be a JAX integer, traced or not, and one per task under `vmap`;
            the result can then not be differentiated in reverse.
        first_order: whether to treat the inner gradients as constants. Without, roots that are zero
            make derivatives NaN, as in Adam without `eps_root`; where that is seen it is warned of.
        has_aux: whether `loss_fn` returns a pair.
        unroll: how many steps to unroll in the compiled loop, as in `jax.lax.scan`.
        trainable: which leaves to adapt: `path -> bool`, with paths such as `"params/head/kernel"`,
            or a pytree of booleans like `params`, of which one may stand for all that is below it.
            The others cost neither gradient nor optimizer state, and what they alone make of the
            support set is computed once, not in every step (but for `per_step_support`,
            `has_state`, and inside of a `jax.checkpoint` or a function with derivatives of its own
            that takes adapted leaves too).
        per_step_support: whether the leaves of `support` lead with an axis of `num_steps`, a batch
            for each step (of a traced number, steps beyond the last batch take that again).
        opt_state: the optimizer state to start from, such as `AdaptInfo.opt_state` of the task
            before; afresh unless given.
        has_state: whether `loss_fn` keeps state or draws random numbers. It is then
            `(params, batch, state, key) -> (loss, (state, aux))`, where the state goes from step to
            step (Flax `batch_stats`, Haiku state, what NNX splits off beside its parameters) and
            the key is another one in every step.
        state: with `has_state`, the state to start from; any pytree of arrays. In a `PerStep` every
            step has its own.
        key: with `has_state`, the task's PRNG key, where the loss draws random numbers.

    Returns:
        The adapted parameters, with the structure and dtypes of `params`, and an `AdaptInfo`.
        Outside of `jax.jit` every call compiles its loop anew.

    Raises:
        TypeError: for parameters that are not floating-point arrays, an optimizer that is not one,
            a number of steps that is not an integer, a loss that is not what `has_aux` says, a
            state or a key without `has_state`.
        ValueError: for a negative number of steps, an empty batch, a rate that is a Python number
            but not a finite one, a loss that is not a scalar.

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
    refusals.check_stateless(has_state, state=state, key=key)
    start, step, merged = inner_loop(
        loss_fn,
        params,
        support,
        optimizer,
        num_steps,
        first_order=first_order,
        has_aux=has_aux,
        trainable=trainable,
        per_step_support=per_step_support,
        has_state=has_state,
        state=state,
        key=key,
    )
    if not first_order and takes_steps(num_steps):
        inner_updates.warn_of_infinite_curvature(optimizer, start.adapted)
    if opt_state is not None:
        start = start._replace(opt_state=opt_state)
    end, info = repeat(step, start, num_steps, unroll)
    return merged(end), info._replace(opt_state=end.opt_state, state=end.state)


def takes_steps(num_steps: int | jax.Array) -> bool:
    """Whether there may be any: a number that is traced is not known."""
    return isinstance(num_steps, jax.Array) or num_steps > 0


class InnerState(NamedTuple):
    """What goes from step to step: adapted leaves, two states, and the count of steps."""

    adapted: Params
    opt_state: optax.OptState
    state: Any
    step: jax.Array


def inner_loop(
    loss_fn: LossFn,
    params: Params,
    support: Batch,
    optimizer: optax.GradientTransformation,
    num_steps: int | jax.Array,
    *,
    first_order: bool = True,
    has_aux: bool = False,
    trainable: Trainable | None = None,
    per_step_support: bool = False,
    has_state: bool = False,
    state: Any = None,
    key: jax.Array | None = None,
) -> tuple[InnerState, Callable[[InnerState], tuple[InnerState, AdaptInfo]], Callable[..., Params]]:
    """The loop of `adapt` in its parts: where it starts, a step, and a state's whole parameters."""
    num_steps = refusals.check_num_steps(num_steps)
    refusals.check_optimizer(optimizer)
    refusals.check_bare(params)
    refusals.check_params(params)
    refusals.check_batch("support", support, axis=1 if per_step_support else 0)
    if per_step_support:
        refusals.check_per_step(support, num_steps)

    stop = jax.lax.stop_gradient if first_order else lambda x: x
    optimizer = optax.with_extra_args_support(optimizer)
    objective = objectives.checked_loss(loss_fn, has_aux, has_state)
    params = varying(jax.tree.map(jnp.asarray, params), support, state, key)
    adapted, frozen = split(trainable, params)
    inner_updates.check_rates(optimizer, adapted)

    def merged(inner: InnerState) -> Params:
        return merge(inner.adapted, frozen)

    def loss_on(support, inner):
        def loss(adapted):
            return objective(merge(adapted, stop(frozen)), support, *context(inner, key))

        return loss

    start = InnerState(adapted, optimizer.init(stop(adapted)), state, step=jnp.zeros((), jnp.int32))
    constant = None
    if trainable is not None and not (per_step_support or has_state):
        # What frozen leaves alone make of the support set is the same in every step.
        constant = hoisted(loss_on(support, start), stop(adapted))

    def step(inner):
        loss = constant or loss_on(batch_at(inner.step), inner)
        theta = stop(inner.adapted)
        (value, (after, aux)), grads = jax.value_and_grad(loss, has_aux=True)(theta)
        # Of themselves too: the loss may close over what is differentiated outside.
        grads = stop(grads)
        updates, opt_state = optimizer.update(
            grads,
            inner.opt_state,
            theta,
            value=stop(value),
            grad=grads,
            value_fn=lambda adapted: loss(adapted)[0],
        )
        moved = optax.apply_updates(inner.adapted, updates)
        after = kept(inner, stop(after))
        return InnerState(moved, opt_state, after, inner.step + 1), AdaptInfo(value, aux)

    def batch_at(step):
        if not per_step_support:
            return support
        return jax.tree.map(lambda x: jnp.asarray(x)[step], support)

    return start, step, merged


def context(inner: InnerState, key: jax.Array | None, *, query: bool = False) -> tuple[Any, Any]:
    """The state and the key for the next loss: no two of a task, support or query, share a key."""
    if key is not None:
        key = jax.random.fold_in(key, 2 * inner.step + int(query))
    if not isinstance(inner.state, PerStep):
        return inner.state, key
    slot = _slot(inner, query)
    return jax.tree.map(lambda x: x[slot], inner.state.steps), key


def kept(inner: InnerState, state: Any, *, query: bool = False) -> Any:
    """What goes on from the state that a loss returned."""
    if not isinstance(inner.state, PerStep):
        return state
    slot = _slot(inner, query)
    return PerStep(jax.tree.map(lambda old, new: old.at[slot].set(new), inner.state.steps, state))


def _slot(inner: InnerState, query: bool) -> jax.Array:
    """The step whose state counts: the query has that of the step before it."""
    leaves = jax.tree.leaves(inner.state)
    last = leaves[0].shape[0] - 1 if leaves else 0
    return jnp.clip(inner.step - int(query), 0, last)


def repeat(step, start, num_steps, unroll):
    """`num_steps` times `step`, from `start`."""
    loop = _traced_loop if isinstance(num_steps, jax.Array) else _scan
    return loop(step, varying(start), refusals.check_num_steps(num_steps), unroll)


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

    return jax.lax.fori_loop(0, num_steps, body, varying((start, nothing)))


def _missing(dtype: Any) -> Any:
    return jnp.nan if jnp.issubdtype(dtype, jnp.inexact) else 0
