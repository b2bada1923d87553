"""The words of the library as types: a task, what adaptation reports, and the aliases."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core

Params = Any
"""Any pytree of floating-point arrays."""

Batch = Any
"""Any pytree of arrays whose leaves lead with the example axis."""

ClosedJaxpr: TypeAlias = core.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]
"""A traced program; from jax 0.12 on another name of Jaxpr, which type checkers do not see."""

LossFn = Callable[[Params, Batch], Any]
"""`(params, batch) -> loss []`, or `-> (loss [], aux)` where `has_aux=True`."""


Objective = Callable[..., tuple[Any, tuple[Any, Any]]]
"""`(params, batch, state, key) -> (loss [], (state, aux))`: the form of a loss with `has_state`."""


class Task(NamedTuple):
    """A batch to adapt on and a batch to be judged on.

    For one task the leaves are `[examples, ...]`; a meta-batch has leaves `[tasks, examples, ...]`.
    The two batches may differ in structure and in their number of examples.
    """

    support: Batch
    query: Batch


class KeyedTask(NamedTuple):
    """A task with a PRNG key of its own, for losses that draw random numbers."""

    support: Batch
    query: Batch
    key: jax.Array


class WithState(NamedTuple):
    """Shared parameters and the state that goes with them, such as running statistics.

    As a gradient, `state` is the way back from where a task left the state to the shared one: an
    outer `optax.sgd(1.0)` for it (see `with_state`) moves it to the mean over tasks. Its leaves are
    floating-point arrays. A counter stays in a closure, where it stands still: that of Haiku's
    moving averages has to be a large number there, as they are divided by `1 - decay ** counter`.
    Random numbers are drawn from the key that a loss is given, in NNX by `nnx.Rngs(key)`: a stream
    in a closure gives the same ones every time. NNX puts a model together for it by
    `nnx.merge(..., copy=True)`.
    """

    params: Params
    state: Any


class WithRates(NamedTuple):
    """What is meta-learned: the parameters that every task starts from, and the inner rates.

    Attributes:
        params: the shared parameters.
        rates: any pytree of floating-point arrays that an inner optimizer is made from.
    """

    params: Params
    rates: Any


class PerStep(NamedTuple):
    """State of which every inner step has its own, such as the running statistics of MAML++.

    The loss of step k is given, and gives back, the state of step k alone. The query loss after it
    is given that too; of the query losses of a multi-step loss, the last alone gives it back. Steps
    beyond the last share that of the last.

    Attributes:
        steps: the states, leaves `[num_steps, ...]`.
    """

    steps: Any

    @classmethod
    def like(cls, state: Any, num_steps: int) -> "PerStep":
        """The same state for every step.

        Example:
            >>> import jax.numpy as jnp, fomaml_jax as fj
            >>> fj.PerStep.like({"mean": jnp.zeros(8)}, num_steps=5).steps["mean"].shape
            (5, 8)
        """
        return cls(jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], num_steps, 0), state))


class AdaptInfo(NamedTuple):
    """What the inner loop saw.

    Attributes:
        losses: `[num_steps]`, the support loss before each step. Where `num_steps` is a JAX
            array, which no shape can hold, `[2]`: before the first and before the last step (NaN if
            there was none).
        aux: the loss function's aux output, stacked in the same way; `None` without `has_aux`.
        opt_state: the optimizer's state after the last step.
        state: the loss function's state after the last step; `None` without `has_state`.
    """

    losses: jax.Array
    aux: Any
    opt_state: Any = None
    state: Any = None


class TaskInfo(NamedTuple):
    """What one task saw; `over_tasks` returns it with a leading `[tasks]` axis.

    Attributes:
        query_loss: `[]`, the query loss at the adapted parameters.
        support_losses: `[num_steps]`, as `AdaptInfo.losses`.
        finite: `[]` bool, whether the query loss and every element of the meta-gradient are finite,
            those for a state or for learned rates included.
        aux: the loss function's aux output on the query batch; `None` without `has_aux`.
    """

    query_loss: jax.Array
    support_losses: jax.Array
    finite: jax.Array
    aux: Any


MetaGradient = Callable[[Params, Any], tuple[Params, TaskInfo]]
"""`(params, task) -> (grads, TaskInfo)`: what an algorithm is."""
