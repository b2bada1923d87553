"""When a picture is of none of the classes: a threshold from what is held out of the support set.

How alike a picture is to a class is the cosine of its features, those that the head sees, with the
mean of the class's. What strangers look like is learned by leaving out a class, adapting to the
others, and asking how alike its examples are to these; what relatives look like, by holding out a
fifth of the examples of every class that has two or more.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fomaml_jax import options
from fomaml_jax.batch_statistics import Beside
from fomaml_jax.classifiers import Classifier, Weighted, predictor
from fomaml_jax.heads import HEAD, with_head, without_head
from fomaml_jax.types import Batch, Params

FOLDS = 5
"""Parts of the support set that are held out in turn."""

MOST_HELD_OUT = 100
"""Examples that are judged for the threshold: each takes a pass over the whole support set."""

ONE_SHOT_SHARE = 0.3
"""Where the threshold is between strangers and a picture itself, with one example a class: chosen
on Omniglot's validation characters, for the network that comes with the package (`python
benchmarks/rare_objects.py --parts share` tries others)."""


class Calibration(NamedTuple):
    """Where a picture begins to be one of the classes, and why.

    Attributes:
        threshold: `[]`, the least similarity of a picture of one of the classes: midway between the
            other two, or, without `held_out`, 0.3 of the way from `strangers` to 1.
        strangers: `[]`, mean similarity of examples to the nearest class other than theirs, the
            network having been adapted without theirs.
        held_out: `[]`, mean similarity to the nearest class of examples that were held out; NaN
            where every class has but one example.
    """

    threshold: jax.Array
    strangers: jax.Array
    held_out: jax.Array


def folds(y: jax.Array, classes: int) -> tuple[jax.Array, jax.Array]:
    """Which examples stay where a class is held out, and where a part of every class is.

    Both are bool, `[classes, n]` and `[FOLDS, n]`. The only example of a class always stays in the
    latter.
    """
    without_class = y[None] != jnp.arange(classes)[:, None]
    part = _rank(y) % FOLDS
    return without_class, (part[None] != jnp.arange(FOLDS)[:, None]) | (_count(y) == 1)[None]


def _rank(y: jax.Array) -> jax.Array:
    """Of each example in its class, from 0."""
    return jnp.tril(y[:, None] == y[None], -1).sum(1)


def _count(y: jax.Array) -> jax.Array:
    """How many examples each one's class has."""
    return (y[:, None] == y[None]).sum(1)


def adapted_with_means(
    classifier: Classifier, x: jax.Array, y: jax.Array, weights: jax.Array, classes: int
) -> tuple[Params, jax.Array]:
    """Adapted parameters, and the classes' mean features: zero of a class that is held out."""
    ways = None if classifier.chosen.head == "learned" else classes
    params = classifier.adapt((x, y), ways=ways, weights=weights)
    _, features = logits_and_features(classifier.chosen, params, Weighted(x, weights))
    of_class = jax.nn.one_hot(y, classes, dtype=weights.dtype) * weights[:, None]
    return params, _unit(of_class.T @ _unit(features))


def calibrated(
    chosen: options.ImageOptions,
    support: Batch,
    weights: jax.Array,
    adaptations: tuple[Params, jax.Array],
    classes: int,
) -> Calibration:
    """How alike the examples are to the classes where they were held out, and what lies between."""
    x, y = support
    judged = np.linspace(0, len(x) - 1, min(len(x), MOST_HELD_OUT)).round().astype(np.int32)
    without_its_class = 1 + y
    without_it = 1 + classes + _rank(y) % FOLDS

    def judge(of: tuple[jax.Array, jax.Array]) -> jax.Array:
        example, row = of
        (params, means), w = jax.tree.map(lambda leaf: leaf[row], (adaptations, weights))
        inputs = Beside(Weighted(x, w), evenly(x[example][None]))
        return similarity(logits_and_features(chosen, params, inputs)[1], means)[0]

    rows = jnp.concatenate([without_its_class[judged], without_it[judged]])
    found = jax.lax.map(judge, (np.tile(judged, 2), rows))
    of_strangers, of_relatives = jnp.split(found, 2)
    strangers = of_strangers.mean()
    several = _count(y)[judged] > 1
    held_out = of_relatives.mean(where=several)
    midway = (strangers + held_out) / 2
    one_shot = strangers + ONE_SHOT_SHARE * (1 - strangers)
    return Calibration(jnp.where(several.any(), midway, one_shot), strangers, held_out)


@functools.partial(jax.jit, static_argnums=0)
def logits_and_features(
    chosen: options.ImageOptions, params: Params, inputs: Any
) -> tuple[jax.Array, jax.Array]:
    """What the head says and what it sees, in one pass: the identity stands beside it."""
    head = params["params"][HEAD]
    (features, ways), dtype = head["kernel"].shape, head["kernel"].dtype
    wide = {
        "kernel": jnp.concatenate([head["kernel"], jnp.eye(features, dtype=dtype)], 1),
        "bias": jnp.concatenate([head["bias"], jnp.zeros(features, dtype)]),
    }
    both = predictor(chosen)(with_head(without_head(params), wide), inputs)
    return both[:, :ways], both[:, ways:]


def similarity(features: jax.Array, means: jax.Array) -> jax.Array:
    """The cosine with the nearest class; of classes without a mean, none is."""
    cosines = _unit(features) @ means.T
    return jnp.where((means != 0).any(1)[None], cosines, -1.0).max(1)


def _unit(x: jax.Array) -> jax.Array:
    """Each row scaled to norm 1; zero stays zero."""
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)


def evenly(x: jax.Array) -> Weighted:
    """Pictures that all count alike."""
    return Weighted(x, jnp.ones(len(x), x.dtype))
