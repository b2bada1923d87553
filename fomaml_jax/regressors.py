"""A few-row regressor of groups: its network, loss and error on padded rows, and trained ones."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fomaml_jax import models, options, refusals, runs, uneven
from fomaml_jax.adaptation import adapt
from fomaml_jax.datasets import Table
from fomaml_jax.tasks import TaskDistribution, each_group, from_groups
from fomaml_jax.types import Batch, Params, Task

NET = models.mlp(hidden=(40, 40))

BELIEVED = 2.0
"""Of the known rows' level 88 % before training: a logit."""


def initial_params(chosen: options.Table) -> Params:
    """The network's parameters before training, and how far a group's level is believed."""
    network = NET.init(jax.random.key(chosen.seed), jnp.zeros((1, len(chosen.features))))
    return {"network": network, "level": jnp.zeros(()), "believed": jnp.full((), BELIEVED)}


def predict(params: Params, x: jax.Array) -> jax.Array:
    """Standardised features `[rows, features]` to standardised targets `[rows]`."""
    return cast(jax.Array, NET.apply(params["network"], x))[..., 0] + params["level"]


def at_level(params: Params, support: Batch) -> Params:
    """The start for a group: at its own level, as far as known rows are to be believed.

    Groups differ in level first of all, which a few steps of descent on the whole network find less
    well than a mean does. It is the mean of what the known rows are above the network's
    predictions, shrunk by a share that is learned: a random intercept.
    """
    (x, y), weights = support
    above = uneven.weighted_mean(y - predict(params, x), weights)
    return params | {"level": params["level"] + jax.nn.sigmoid(params["believed"]) * above}


def squared_error(params: Params, batch: Batch) -> jax.Array:
    """The mean over the rows that are no padding."""
    (x, y), weights = batch
    return uneven.weighted_mean((predict(params, x) - y) ** 2, weights)


def absolute_error(params: Params, batch: Batch, unit: float) -> jax.Array:
    """The mean over the rows that are no padding, in the target's unit."""
    (x, y), weights = batch
    return unit * uneven.weighted_mean(jnp.abs(predict(params, x) - y), weights)


def inner_of(chosen: options.Table) -> optax.GradientTransformation:
    """The optimizer that adapts to a group."""
    return optax.chain(optax.clip_by_global_norm(chosen.inner_clip), optax.sgd(chosen.inner_rate))


def training_tasks(chosen: options.Table, table: Table) -> TaskDistribution:
    """Training groups at random, with some of their later rows."""
    train = table.splits.train
    rows = (train.features, train.targets)
    return from_groups(rows, train.counts, shots=chosen.shots, queries=chosen.queries)


def unseen_tasks(chosen: options.Table, table: Table, name: str) -> Task:
    """Every group of a split once, with all its later rows."""
    groups = getattr(table.splits, name)
    return each_group((groups.features, groups.targets), groups.counts, shots=chosen.shots)


@dataclasses.dataclass(frozen=True)
class Regressor:
    """A trained few-row regressor; its method is pure, and works under `jit` and `vmap`.

    Attributes:
        chosen: the options that it was trained with; `chosen.features` are the columns of a row.
        params: what was meta-learned.
        mean: `[1 + features]` float32: of the target, then the features, in training.
        scale: `[1 + features]` float32: their standard deviation; zero for a feature that was the
            same everywhere, which counts for nothing.

    Example:
        >>> import jax.numpy as jnp, fomaml_jax as fj
        >>> from fomaml_jax import options, regressors
        >>> chosen = options.Table(file="visits.csv", group="who", target="y", features=("day",))
        >>> params = regressors.initial_params(chosen)
        >>> regressor = fj.Regressor(chosen, params, jnp.array([50.0, 3.0]), jnp.array([9.0, 2.0]))
        >>> known = jnp.array([[0.0], [1.0]]), jnp.array([60.0, 62.0])
        >>> regressor.predict(known, jnp.array([[2.0], [3.0], [4.0]])).shape
        (3,)
    """

    chosen: options.Table
    params: Params
    mean: jax.Array
    scale: jax.Array

    def predict(
        self, support: Batch, x: Any, *, weights: Any = None, steps: int | None = None
    ) -> jax.Array:
        """The targets of further rows of a group, once adapted to those that are known.

        Everything is in the units of the table. A missing feature is NaN, and counts as the mean of
        the training groups.

        Args:
            support: features `[n, features]` and targets `[n]` of the group's known rows, of which
                there may be none.
            x: features `[m, features]` of the rows to predict.
            weights: of the known rows, `[n]`; all alike unless given. A row of weight zero is as if
                it were not there.
            steps: of adaptation, from the level of the known rows on; as in the options unless
                given.

        Returns:
            `[m]` targets.

        Raises:
            ValueError: for rows of another number of features, or targets of another number than
                the known rows.
        """
        known, y, asked = (jnp.asarray(part, jnp.float32) for part in (*support, x))
        for rows in (known, asked):
            if rows.shape[1:] != (len(self.chosen.features),):
                raise ValueError(
                    f"rows must be [n, {len(self.chosen.features)}], for "
                    f"{', '.join(self.chosen.features)}, got {list(rows.shape)}"
                )
        if y.shape != known.shape[:1]:
            raise ValueError(f"targets must be [{len(known)}], one a row, got {list(y.shape)}")
        steps = self.chosen.adaptation_steps if steps is None else steps
        refusals.check_at_least("steps", steps, 0)
        weights = jnp.ones_like(y) if weights is None else jnp.asarray(weights, jnp.float32)
        targets = (y - self.mean[0]) / self.scale[0]
        batch = (self._standardised(known), jnp.where(weights > 0, targets, 0.0)), weights
        adapted = self.params
        if len(known):
            start = at_level(self.params, batch)
            adapted, _ = adapt(squared_error, start, batch, inner_of(self.chosen), steps)
        return self.mean[0] + self.scale[0] * predict(adapted, self._standardised(asked))

    def _standardised(self, x: jax.Array) -> jax.Array:
        mean, scale = self.mean[None, 1:], self.scale[None, 1:]
        # The mean, which is zero here, stands for what is missing and for what says nothing.
        meaningful = jnp.isfinite(x) & (scale > 0)
        return jnp.where(meaningful, (x - mean) / jnp.where(scale > 0, scale, 1.0), 0.0)


def load_regressor(run: str | Path) -> Regressor:
    """The regressor that `fomaml-jax train table` left in a folder.

    Args:
        run: the folder.

    Returns:
        A `Regressor`.

    Raises:
        ValueError: for a folder that holds none, or a damaged one.

    Example:
        >>> regressor = load_regressor("runs/table-20261129-101500")  # doctest: +SKIP
        >>> regressor.predict((known_features, known_scores), later_features)  # doctest: +SKIP
    """
    folder = Path(run)
    chosen = options.from_json(runs.read_config(folder))
    if not isinstance(chosen, options.Table):
        raise ValueError(f"{folder} is a run of {options.name_of(chosen)}, not of a table")
    params = runs.load_parameters(folder, jax.eval_shape(lambda: initial_params(chosen)))
    mean, scale = np.transpose(_standards(folder, (chosen.target, *chosen.features)))
    return Regressor(chosen, params, jnp.asarray(mean), jnp.asarray(scale))


def _standards(folder: Path, columns: tuple[str, ...]) -> np.ndarray:
    """Mean and standard deviation of each column, `[columns, 2]` float32."""
    try:
        there = json.loads((folder / runs.DATA).read_text())["columns"]
        found = np.array([there[name] for name in columns], np.float32)
    except (OSError, ValueError, KeyError, TypeError):
        found = np.zeros(())
    if found.shape != (len(columns), 2) or not np.isfinite(found).all():
        raise ValueError(
            f"{folder / runs.DATA} does not say how {', '.join(columns)} were standardised; train "
            "again"
        )
    return found
