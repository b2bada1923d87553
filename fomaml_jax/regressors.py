"""A few-row regressor of groups: its network, its loss on padded rows, its error in real units."""

from typing import cast

import jax
import jax.numpy as jnp

from fomaml_jax import models, options, uneven
from fomaml_jax.datasets import Table
from fomaml_jax.tasks import TaskDistribution, each_group, from_groups
from fomaml_jax.types import Batch, Params, Task

NET = models.mlp(hidden=(40, 40))


def initial_params(chosen: options.Table) -> Params:
    """The network's parameters before training."""
    return NET.init(jax.random.key(chosen.seed), jnp.zeros((1, len(chosen.features))))


def predict(params: Params, x: jax.Array) -> jax.Array:
    """Standardised features `[rows, features]` to standardised targets `[rows]`."""
    return cast(jax.Array, NET.apply(params, x))[..., 0]


def squared_error(params: Params, batch: Batch) -> jax.Array:
    """The mean over the rows that are no padding."""
    (x, y), weights = batch
    return uneven.weighted_mean((predict(params, x) - y) ** 2, weights)


def absolute_error(params: Params, batch: Batch, unit: float) -> jax.Array:
    """The mean over the rows that are no padding, in the target's unit."""
    (x, y), weights = batch
    return unit * uneven.weighted_mean(jnp.abs(predict(params, x) - y), weights)


def training_tasks(chosen: options.Table, table: Table) -> TaskDistribution:
    """Training groups at random, with some of their later rows."""
    train = table.splits.train
    rows = (train.features, train.targets)
    return from_groups(rows, train.counts, shots=chosen.shots, queries=chosen.queries)


def unseen_tasks(chosen: options.Table, table: Table, name: str) -> Task:
    """Every group of a split once, with all its later rows."""
    groups = getattr(table.splits, name)
    return each_group((groups.features, groups.targets), groups.counts, shots=chosen.shots)
