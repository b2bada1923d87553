"""Outer steps compiled together, and the sums on them that go from step to step."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fomaml_jax.dtypes import accumulator
from fomaml_jax.learner import MetaLearner, MetaState
from fomaml_jax.tasks import task_keys
from fomaml_jax.types import TaskInfo

CALL_SECONDS = 1.0
"""How long one compiled call should take: only between calls is a run reported, saved, stopped."""

DIVERGED_STEPS = 10
"""After so many steps in a row that left out too many tasks, a run has diverged."""


class Carry(NamedTuple):
    """What goes from step to step: the learner's state, and sums since the last report."""

    meta: MetaState
    step: jax.Array
    counted: jax.Array
    """Steps with a task that was finite: those that the means are over."""
    loss: jax.Array
    support_losses: jax.Array
    """Before the first and before the last inner step, and in how many steps there were any."""
    grad_norm: jax.Array
    left_out: jax.Array
    streak: jax.Array
    """Steps in a row, up to now, that left out too many tasks."""


SUMS = ("counted", "loss", "support_losses", "grad_norm", "left_out")


def start(meta: MetaState) -> Carry:
    """Before the first step."""
    none = jnp.zeros((), jnp.int32)
    return Carry(meta, none, none, jnp.zeros(()), jnp.zeros(3), jnp.zeros(()), none, none)


def _support_losses(tasks: TaskInfo) -> jax.Array:
    """The mean over finite tasks before the first and before the last inner step, and 1; or 0."""
    losses = tasks.support_losses
    if np.ndim(losses) != 2 or losses.shape[1] == 0:
        return jnp.zeros(3)
    ends = jnp.stack([losses[:, 0], losses[:, -1], jnp.ones_like(losses[:, 0])], axis=1)
    counted = tasks.finite & ~jnp.isnan(losses[:, 0])  # NaN where a traced number of steps is zero
    total = jnp.where(counted[:, None], ends, 0).sum(0, dtype=accumulator(ends.dtype))
    return total / jnp.maximum(counted.sum(), 1).astype(total.dtype)


def compiled(
    learner: MetaLearner,
    sample_task: Callable[[jax.Array], Any],
    key: jax.Array,
    tasks_per_step: int,
    max_left_out: float,
) -> Callable[[Carry, jax.Array, jax.Array], Carry]:
    """`(carry, until, reported)`: steps until that many are done, or the run has diverged.

    However many steps a call takes, the numbers are the same: the sums go from call to call.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(carry: Carry, until: jax.Array, reported: jax.Array) -> Carry:
        sums = {name: getattr(carry, name) for name in SUMS}
        begin = {name: jnp.where(reported, jnp.zeros_like(x), x) for name, x in sums.items()}

        def unfinished(carry: Carry) -> jax.Array:
            return (carry.step < until) & (carry.streak < DIVERGED_STEPS)

        def body(carry: Carry) -> Carry:
            sampled = jax.vmap(sample_task)(task_keys(key, carry.step, tasks_per_step))
            meta, info = learner.step(carry.meta, sampled)
            left_out = tasks_per_step - info.num_finite
            too_many = left_out > math.floor(max_left_out * tasks_per_step + 1e-6)
            return Carry(
                meta,
                carry.step + 1,
                carry.counted + (info.num_finite > 0).astype(jnp.int32),
                carry.loss + info.loss.astype(carry.loss.dtype),
                carry.support_losses + _support_losses(info.tasks).astype(carry.loss.dtype),
                carry.grad_norm + info.grad_norm.astype(carry.grad_norm.dtype),
                carry.left_out + left_out,
                jnp.where(too_many, carry.streak + 1, 0),
            )

        return jax.lax.while_loop(unfinished, body, carry._replace(**begin))

    return advance


def placed(carry: Carry, mesh: Mesh | None) -> Carry:
    """A copy, because every call takes its buffers; where it will come back, to compile once."""
    carry = jax.tree.map(jnp.copy, carry)
    return carry if mesh is None else jax.device_put(carry, NamedSharding(mesh, PartitionSpec()))


def next_stride(taken: int, seconds: float) -> int:
    """How many steps the next call may take, after one that took so many in so long."""
    return max(1, min(10 * taken, int(taken * CALL_SECONDS / max(seconds, 1e-6))))
