"""A classifier adapted to a few labelled pictures, which knows when one is of no class."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fomaml_jax import options, refusals
from fomaml_jax.batch_statistics import ONE_AT_A_TIME, Beside, Statistics
from fomaml_jax.classifiers import Classifier, as_pictures, check_labels, check_range_of_labels
from fomaml_jax.thresholds import (
    Calibration,
    adapted_with_means,
    calibrated,
    evenly,
    folds,
    logits_and_features,
    similarity,
)
from fomaml_jax.types import Batch, Params

NONE = "none of these"

Background = Literal["auto", "light", "dark", "as is"]
"""How a picture in a file is read: a drawing by its ground, found or known, or as it is."""


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

    def predict(self, x: Any, *, statistics: Statistics = ONE_AT_A_TIME) -> Predictions:
        """What pictures are of.

        Args:
            x: pictures `[n, height, width, channels]`, uint8 or in `[0, 1]`.
            statistics: what a picture is normalised with: the support set alone, so that nothing
                depends on which others are asked about, or with all of `x` together. The threshold
                is made for the former.

        Raises:
            ValueError: for pictures of another shape, or unknown statistics.
        """
        refusals.check_choice("statistics", statistics, get_args(Statistics))
        queries = evenly(as_pictures(x, self.picture))
        if statistics == ONE_AT_A_TIME:
            queries = Beside(evenly(as_pictures(self.support[0], self.picture)), queries)
        logits, features = logits_and_features(self.chosen, self.params, queries)
        nearest = similarity(features, self.means)
        return Predictions(
            jax.nn.softmax(logits[:, : len(self.names)]),
            nearest,
            nearest >= self.calibration.threshold,
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
    background = background_of(classifier) if background is None else background
    refusals.check_choice("background", background, get_args(Background))
    y = jnp.asarray(support[1])
    if names is None:
        if isinstance(y, Tracer):
            raise TypeError("labels are traced: pass names, one a class")
        names = tuple(map(str, range(int(np.max(y, initial=0)) + 1)))
    x = as_pictures(support[0], classifier.picture)
    _check_classes(classifier, x, y, names)
    y = y.astype(jnp.int32)
    kept = [jnp.ones((1, len(x)), bool), *folds(y, len(names))]
    weights = jnp.concatenate(kept).astype(x.dtype)
    params, means, calibration = _adapted(
        classifier.chosen, tuple(classifier.picture), len(names), classifier.params, (x, y), weights
    )
    return AdaptedClassifier(
        classifier.chosen,
        classifier.picture,
        tuple(names),
        params,
        (jnp.asarray(support[0]), y),
        means,
        calibration,
        background,
    )


# Compiled once for each number of pictures, and not in every call.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _adapted(
    chosen: options.ImageOptions,
    picture: tuple[int, ...],
    ways: int,
    shared: Any,
    support: Batch,
    weights: jax.Array,
) -> tuple[Params, jax.Array, Calibration]:
    """The parameters, the classes' means and the threshold; the first of the weights are of all."""
    classifier, (x, y) = Classifier(chosen, shared, picture), support
    # All adaptations in one loop, and so in one compiled body: compilation is what takes time here.
    adaptations = jax.lax.map(lambda w: adapted_with_means(classifier, x, y, w, ways), weights)
    params, means = jax.tree.map(lambda leaf: leaf[0], adaptations)
    return params, means, calibrated(chosen, support, weights, adaptations, ways)


def background_of(classifier: Classifier) -> Background:
    """How pictures in files are read unless it is said: drawings by their ground, others as is."""
    return "as is" if isinstance(classifier.chosen, options.Folder) else "auto"


def _check_classes(
    classifier: Classifier, x: jax.Array, y: jax.Array, names: tuple[str, ...]
) -> None:
    classes, chosen = len(names), classifier.chosen
    if classes < 2:
        raise ValueError(f"there must be two classes or more to tell apart, got {classes}")
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise ValueError(f"names must differ, {twice[0]!r} is there twice")
    if chosen.head == "learned" and classes > chosen.ways:
        raise ValueError(
            f"the network's head was learned for {chosen.ways} classes, got {classes}: leave out "
            f"{classes - chosen.ways}, or train a network with --head zero, which takes any number"
        )
    check_labels(y, len(x))
    if isinstance(y, Tracer):
        return
    if missing := sorted(set(range(classes)) - set(np.asarray(y).tolist())):
        raise ValueError(f"every class needs an example, {names[missing[0]]} has none")
    check_range_of_labels(y, classes, "names")
