"""A classifier adapted to a few labelled pictures, which also knows when a picture is of no class.

How alike a picture is to a class is the cosine of its features, those that the head sees, with the
mean of the class's. Below a threshold it is "none of these". The threshold comes from the support
set alone: what strangers look like is learned by leaving out a class, adapting to the others, and
asking how alike its examples are to these; what relatives look like, by holding out a fifth of the
examples of every class that has two or more.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fomaml_jax import options, refusals
from fomaml_jax.batch_statistics import Beside
from fomaml_jax.classifiers import Classifier, Weighted, as_pictures, predictor
from fomaml_jax.heads import HEAD, with_head, without_head
from fomaml_jax.types import Batch, Params

NONE = "none of these"

Background = Literal["auto", "light", "dark", "as is"]

FOLDS = 5
"""Parts of the support set that are held out in turn."""

MOST_HELD_OUT = 100
"""Examples that are judged for the threshold: each takes a pass over the whole support set."""

ONE_SHOT_SHARE = 0.3
"""Where the threshold is between strangers and a picture itself, with one example a class: best of
0.3, 0.4, ... 0.7 on 200 tasks of Omniglot's validation characters, 5-way, for the network that
comes with the package."""


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


class Predictions(NamedTuple):
    """What an adapted classifier says of pictures.

    Attributes:
        probabilities: `[n, classes]`, given that a picture is of one of the classes.
        similarity: `[n]`, the cosine with the nearest class, at most 1.
        is_known: `[n]` bool, False for "none of these".
    """

    probabilities: jax.Array
    similarity: jax.Array
    is_known: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "support", "means", "calibration"],
    meta_fields=["chosen", "picture", "names", "background"],
)
@dataclasses.dataclass(frozen=True)
class AdaptedClassifier:
    """A classifier of the user's own classes; a pytree, so it goes through `jit` and `vmap`.

    Attributes:
        chosen: the options that the network was trained with.
        picture: the shape of a picture, `(height, width, channels)`.
        names: one a class.
        params: the adapted network's.
        support: the pictures that it was adapted to, `[n, *picture]`, and their labels `[n]`.
        means: `[classes, features]`, the classes' mean features.
        calibration: when a picture is of none of the classes.
        background: how pictures in files are read, as `fj.datasets.few_pictures` has it.
    """

    chosen: options.ImageOptions
    picture: tuple[int, ...]
    names: tuple[str, ...]
    params: Params
    support: Batch
    means: jax.Array
    calibration: Calibration
    background: Background = "auto"

    def predict(
        self,
        x: Any,
        *,
        statistics: Literal["one-at-a-time", "transductive"] = "one-at-a-time",
    ) -> Predictions:
        """What pictures are of.

        Args:
            x: pictures `[n, height, width, channels]`, uint8 or in `[0, 1]`.
            statistics: what a picture is normalised with: the support set alone, so that nothing
                depends on which others are asked about, or with all of `x` together. The threshold
                is made for the former.

        Raises:
            ValueError: for pictures of another shape, or unknown statistics.
        """
        refusals.check_choice("statistics", statistics, ("one-at-a-time", "transductive"))
        queries = _evenly(as_pictures(x, self.picture))
        if statistics == "one-at-a-time":
            queries = Beside(_evenly(as_pictures(self.support[0], self.picture)), queries)
        logits, features = _logits_and_features(self.chosen, self.params, queries)
        similarity = _similarity(features, self.means)
        return Predictions(
            jax.nn.softmax(logits[:, : len(self.names)]),
            similarity,
            similarity >= self.calibration.threshold,
        )


def adapt_classifier(
    classifier: Classifier,
    support: Batch,
    *,
    names: tuple[str, ...] | None = None,
    background: Background | None = None,
) -> AdaptedClassifier:
    """Adapts to labelled pictures, and finds out when a picture is of none of their classes.

    Args:
        classifier: a trained one.
        support: pictures `[n, height, width, channels]`, uint8 or in `[0, 1]`, and labels `[n]`
            from 0; one example a class or more, of two classes or more. A head that is learned
            takes as many classes as it was trained for, or fewer.
        names: one a class; their numbers unless given, which they must be under `jit`.
        background: how pictures in files are read, as `fj.datasets.few_pictures` has it. Unless
            given, drawings as "auto", and those of a `folder` run "as is".

    Returns:
        An `AdaptedClassifier`.

    Raises:
        ValueError: for fewer than two classes, more than a learned head has, a class without an
            example, or pictures and labels that do not fit.
        TypeError: for labels that are no integers; without `names`, under `jit`.

    Example:
        >>> import jax, numpy as np, fomaml_jax as fj
        >>> classifier = fj.load_classifier("pretrained:omniglot")
        >>> pictures = np.random.default_rng(0).random((4, 28, 28, 1), np.float32)
        >>> names = "bee", "cat", "dog"
        >>> adapt = jax.jit(lambda x, y: fj.adapt_classifier(classifier, (x, y), names=names))
        >>> adapted = adapt(pictures[:3], np.arange(3))
        >>> found = jax.jit(fj.AdaptedClassifier.predict)(adapted, pictures)
        >>> found.probabilities.argmax(-1)[:3], found.is_known.shape
        (Array([0, 1, 2], dtype=int32), (4,))

    References:
        Vaze, Han, Vedaldi, Zisserman,
        `Open-Set Recognition <https://arxiv.org/abs/2110.06207>`_, 2022, on scores of strangers.
    """
    y = jnp.asarray(support[1])
    if names is None:
        if isinstance(y, Tracer):
            raise TypeError("labels are traced: pass names, one a class")
        names = tuple(map(str, range(int(np.max(y)) + 1)))
    x = as_pictures(support[0], classifier.picture)
    _check_classes(classifier, x, y, names)
    y = y.astype(jnp.int32)
    weights = jnp.concatenate([jnp.ones((1, len(x))), *_held_out(y, len(names))]).astype(x.dtype)
    # All adaptations in one loop, and so in one compiled body: compilation is what takes time here.
    adaptations = jax.lax.map(lambda w: _adapted(classifier, x, y, w, len(names)), weights)
    params, means = jax.tree.map(lambda leaf: leaf[0], adaptations)
    return AdaptedClassifier(
        classifier.chosen,
        classifier.picture,
        tuple(names),
        params,
        (jnp.asarray(support[0]), y),
        means,
        _calibrated(classifier.chosen, (x, y), weights, adaptations, len(names)),
        background or background_of(classifier),
    )


def background_of(classifier: Classifier) -> Background:
    """How pictures in files are read unless it is said: drawings by their ground, others as is."""
    return "as is" if isinstance(classifier.chosen, options.Folder) else "auto"


def _held_out(y: jax.Array, classes: int) -> tuple[jax.Array, jax.Array]:
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


def _adapted(
    classifier: Classifier, x: jax.Array, y: jax.Array, weights: jax.Array, classes: int
) -> tuple[Params, jax.Array]:
    """Adapted parameters, and the classes' mean features: zero of a class that is held out."""
    ways = None if classifier.chosen.head == "learned" else classes
    params = classifier.adapt((x, y), ways=ways, weights=weights)
    _, features = _logits_and_features(classifier.chosen, params, Weighted(x, weights))
    of_class = jax.nn.one_hot(y, classes) * weights[:, None]
    return params, _unit(of_class.T @ _unit(features))


def _calibrated(
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

    def similarity(of: tuple[jax.Array, jax.Array]) -> jax.Array:
        example, row = of
        (params, means), w = jax.tree.map(lambda leaf: leaf[row], (adaptations, weights))
        inputs = Beside(Weighted(x, w), _evenly(x[example][None]))
        return _similarity(_logits_and_features(chosen, params, inputs)[1], means)[0]

    rows = jnp.concatenate([without_its_class[judged], without_it[judged]])
    found = jax.lax.map(similarity, (np.tile(judged, 2), rows))
    of_strangers, of_relatives = jnp.split(found, 2)
    strangers = of_strangers.mean()
    held_out = of_relatives.mean(where=_count(y)[judged] > 1)
    midway = (strangers + held_out) / 2
    one_shot = strangers + ONE_SHOT_SHARE * (1 - strangers)
    return Calibration(jnp.where(jnp.isnan(held_out), one_shot, midway), strangers, held_out)


def _logits_and_features(
    chosen: options.ImageOptions, params: Params, inputs: Any
) -> tuple[jax.Array, jax.Array]:
    """What the head says and what it sees, in one pass: the identity stands beside it."""
    head = params["params"][HEAD]
    features, ways = head["kernel"].shape
    wide = {
        "kernel": jnp.concatenate([head["kernel"], jnp.eye(features)], 1),
        "bias": jnp.concatenate([head["bias"], jnp.zeros(features)]),
    }
    both = predictor(chosen)(with_head(without_head(params), wide), inputs)
    return both[:, :ways], both[:, ways:]


def _similarity(features: jax.Array, means: jax.Array) -> jax.Array:
    """The cosine with the nearest class; of classes without a mean, none is."""
    cosines = _unit(features) @ means.T
    return jnp.where((means != 0).any(1)[None], cosines, -1.0).max(1)


def _unit(x: jax.Array) -> jax.Array:
    """Each row scaled to norm 1; zero stays zero."""
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)


def _evenly(x: jax.Array) -> Weighted:
    return Weighted(x, jnp.ones(len(x)))


def _check_classes(
    classifier: Classifier, x: jax.Array, y: jax.Array, names: tuple[str, ...]
) -> None:
    classes, chosen = len(names), classifier.chosen
    if classes < 2:
        raise ValueError(f"there must be two classes or more to tell apart, got {classes}")
    if chosen.head == "learned" and classes > chosen.ways:
        raise ValueError(
            f"the network's head was learned for {chosen.ways} classes, got {classes}: leave out "
            f"{classes - chosen.ways}, or train a network with --head zero, which takes any number"
        )
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {y.dtype}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"labels must be [{len(x)}], one a picture, got {list(y.shape)}")
    if isinstance(y, Tracer):
        return
    if missing := sorted(set(range(classes)) - set(np.asarray(y).tolist())):
        raise ValueError(f"every class needs an example, {names[missing[0]]} has none")
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(
            f"labels must be from 0 to {classes - 1} for {classes} names, got {y.min()} to "
            f"{y.max()}"
        )
