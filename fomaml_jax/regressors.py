"""A few-row regressor of groups: its network, loss and error on padded rows, and trained ones."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from fomaml_jax import models, options, refusals, runs, uneven
from fomaml_jax.adaptation import adapt
from fomaml_jax.datasets import Table
from fomaml_jax.tasks import TaskDistribution, each_group, from_groups
from fomaml_jax.types import Batch, Params, Task

NET = models.mlp(hidden=(40, 40))

DOUBT = 0.5
"""Rows that the common level counts for beside a group's known ones, before training."""


def initial_params(chosen: options.Table) -> Params:
    """The network's parameters before training, and how far a group's level is doubted."""
    features = jnp.zeros((1, len(chosen.features)), jnp.float32)
    return {
        "network": jax.jit(NET.init)(jax.random.key(chosen.seed), features),
        "level": jnp.zeros((), jnp.float32),
        "log_doubt": jnp.log(jnp.full((), DOUBT, jnp.float32)),
    }


def predict(params: Params, x: jax.Array) -> jax.Array:
    """Standardised features `[rows, features]` to standardised targets `[rows]`."""
    return cast(jax.Array, NET.apply(params["network"], x))[..., 0] + params["level"]


def at_level(params: Params, support: Batch) -> Params:
    """The start for a group: at its own level, as far as known rows are to be believed.

    Groups differ in level first of all, which a few steps of descent on the whole network find less
    well than a mean does. It is the mean of what the known rows are above the network's
    predictions, shrunk as a random intercept is: by n / (n + doubt) for n rows, the doubt learned.
    """
    (x, y), weights = support
    above = uneven.weighted_mean(y - predict(params, x), weights)
    count = weights.sum()
    believed = count / (count + jnp.exp(params["log_doubt"]))
    return params | {"level": params["level"] + believed * above}


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
        mean: `[1 + features]` float64: of the target, then the features, in training.
        scale: `[1 + features]` float64: their standard deviation; zero for a feature that was the
            same everywhere, which counts for nothing.

    Example:
        >>> import numpy as np, fomaml_jax as fj
        >>> from fomaml_jax import options, regressors
        >>> chosen = options.Table(file="visits.csv", group="who", target="y", features=("day",))
        >>> params = regressors.initial_params(chosen)
        >>> regressor = fj.Regressor(chosen, params, np.array([50.0, 3.0]), np.array([9.0, 2.0]))
        >>> known = [[0.0], [1.0]], [60.0, 62.0]
        >>> regressor.predict(known, [[2.0], [3.0], [4.0]]).shape
        (3,)
    """

    chosen: options.Table
    params: Params
    mean: np.ndarray
    scale: np.ndarray

    def predict(
        self, support: Batch, x: Any, *, weights: Any = None, steps: int | None = None
    ) -> jax.Array:
        """The targets of further rows of a group, once adapted to those that are known.

        Everything is in the units of the table. A missing feature is NaN, and counts as the mean of
        the training groups. NumPy arrays and lists are standardised in float64, JAX arrays in
        float32, where a time in seconds since 1970 has no more seconds.

        Args:
            support: features `[n, features]` and targets `[n]` of the group's known rows, of which
                there may be none.
            x: features `[m, features]` of the rows to predict.
            weights: of the known rows, `[n]`, in rows: 2 is as if it were there twice, 0 as if it
                were not; 1 unless given.
            steps: of adaptation, from the level of the known rows on; as in the options unless
                given.

        Returns:
            `[m]` float32 targets.

        Raises:
            ValueError: for rows of another number of features, or with an infinite one, targets or
                weights of another number than the known rows, targets that are not finite in rows
                of a weight, or weights that are not finite or below zero.
        """
        (known, y), asked = (_as_array(part) for part in support), _as_array(x)
        if not known.size:
            known = known.reshape(0, len(self.chosen.features))  # as of an empty list
        for rows in (known, asked):
            if rows.shape[1:] != (len(self.chosen.features),):
                raise ValueError(
                    f"rows must be [n, {len(self.chosen.features)}], for "
                    f"{', '.join(self.chosen.features)}, got {list(rows.shape)}"
                )
            _check_no_infinity(rows)
        weights = jnp.ones(len(known), jnp.float32) if weights is None else _as_array(weights)
        refusals.check_one_each("targets", y, len(known), "a known row")
        refusals.check_weights(weights, len(known), "a known row")
        _check_targets(y, weights)
        found = self.standardised_targets(
            (self.standardised(known), self.standardised(y, of_target=True)),
            self.standardised(asked),
            weights=jnp.asarray(weights, jnp.float32),
            steps=steps,
        )
        return float(self.mean[0]) + float(self.scale[0]) * found

    def standardised_targets(
        self, support: Batch, x: jax.Array, *, weights: jax.Array, steps: int | None = None
    ) -> jax.Array:
        """`predict`, of what is standardised already."""
        steps = self.chosen.adaptation_steps if steps is None else steps
        refusals.check_at_least("steps", steps, 0)
        chosen = dataclasses.replace(self.chosen, features=())  # a list would be no key
        return _predicted(chosen, int(steps), self.params, (support, weights), x)

    def standardised(self, values: Any, *, of_target: bool = False) -> jax.Array:
        """Features `[..., features]`, or targets `[...]`, in standard deviations from the mean.

        In the precision that they come in; the result is float32.
        """
        values = _as_array(values)
        columns = 0 if of_target else slice(1, None)
        mean, scale = (
            np.broadcast_to(np.asarray(part[columns], values.dtype), values.shape)
            for part in (self.mean, self.scale)
        )
        space = jnp if isinstance(values, jax.Array) else np
        apart = (values - mean) / np.where(scale > 0, scale, np.ones_like(scale))
        # The mean, which is zero here, stands for what is missing and for what says nothing.
        meaningful = space.isfinite(apart) & (scale > 0)
        return jnp.asarray(space.where(meaningful | of_target, apart, 0.0), jnp.float32)


# Compiled once for each number of rows, and not in every call.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _predicted(
    chosen: options.Table, steps: int, params: Params, support: Batch, x: jax.Array
) -> jax.Array:
    (known, targets), weights = support
    if len(known):
        batch = (known, jnp.where(weights > 0, targets, 0.0)), weights
        start = at_level(params, batch)
        params, _ = adapt(squared_error, start, batch, inner_of(chosen), steps)
    return predict(params, x)


def _check_no_infinity(rows: Any) -> None:
    if not isinstance(rows, Tracer) and np.isinf(np.asarray(rows)).any():
        raise ValueError("rows hold an infinite feature; pass NaN for one that is missing")


def _check_targets(targets: Any, weights: Any) -> None:
    if isinstance(targets, Tracer) or isinstance(weights, Tracer):
        return
    if not np.isfinite(np.asarray(targets)[np.asarray(weights) > 0]).all():
        raise ValueError(
            "targets must be finite; leave such rows out, or give them a weight of zero"
        )


def _as_array(values: Any) -> Any:
    """A JAX array of floats as it is, anything else as NumPy's float64."""
    if isinstance(values, jax.Array):
        return values if jnp.issubdtype(values.dtype, jnp.floating) else values.astype(jnp.float32)
    return np.asarray(values, np.float64)


def load_regressor(run: str | Path) -> Regressor:
    """The regressor that `fomaml-jax train table` left in a folder.

    Args:
        run: the folder.

    Returns:
        A `Regressor`.

    Raises:
        ValueError: for a folder that holds none, or a damaged one.

    Warns:
        UserWarning: for a run that has not come to its end.

    Example:
        >>> regressor = load_regressor("runs/table-20261129-101500")  # doctest: +SKIP
        >>> regressor.predict((known_features, known_scores), later_features)  # doctest: +SKIP
    """
    folder = Path(run).expanduser()
    chosen = options.from_json(runs.read_config(folder))
    if not isinstance(chosen, options.Table):
        raise ValueError(f"{folder} is a run of {options.name_of(chosen)}, not of a table")
    runs.warn_if_begun(folder)
    params = runs.load_parameters(folder, jax.eval_shape(lambda: initial_params(chosen)))
    mean, scale = np.transpose(_standards(folder, (chosen.target, *chosen.features)))
    return Regressor(chosen, params, mean, scale)


def _standards(folder: Path, columns: tuple[str, ...]) -> np.ndarray:
    """Mean and standard deviation of each column, `[columns, 2]` float64."""
    try:
        there = json.loads((folder / runs.DATA).read_text())["columns"]
        found = np.array([there[name] for name in columns], np.float64)
    except (OSError, ValueError, KeyError, TypeError):
        found = np.zeros(())
    if found.shape != (len(columns), 2) or not np.isfinite(found).all():
        raise ValueError(
            f"{folder / runs.DATA} does not say how {', '.join(columns)} were standardised; train "
            "again"
        )
    return found
