"""A few-shot classifier: its network, how it adapts to labelled pictures, and trained ones."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.core import Tracer

from fomaml_jax import models, options, refusals, runs
from fomaml_jax.adaptation import adapt
from fomaml_jax.augmentation import float_pixels
from fomaml_jax.batch_statistics import one_at_a_time
from fomaml_jax.convolutions import matmul_convolutions
from fomaml_jax.dtypes import accumulator
from fomaml_jax.heads import (
    HEAD,
    descent_at,
    first_rates,
    inner_optimizer,
    parameters_of,
    with_head,
    without_head,
)
from fomaml_jax.trainable import Trainable
from fomaml_jax.types import Batch, LossFn, Params, WithRates
from fomaml_jax.uneven import weighted_mean

Predict = Callable[[Params, Any], jax.Array]

QUERIES_AT_ONCE = 16
"""How many queries are judged together, where each is normalised in a batch of its own."""

BRIGHTEST = 16
"""A pixel beyond this is of a picture never brought to [0, 1]; noise may exceed 1 a little."""

READY = Path(__file__).with_name("pretrained")
"""The folder of trained networks that come with the package, each a run's."""

PRETRAINED = "pretrained:"
"""What names one of them in place of a folder."""


class Weighted(NamedTuple):
    """Pictures that count by their weights, in batch statistics and losses: some not at all.

    Attributes:
        pictures: `[n, height, width, channels]`.
        weights: `[n]`, of which not all are zero.
    """

    pictures: Any
    weights: Any


def network(chosen: options.ImageOptions, outputs: int) -> nn.Module:
    """The network for pictures, with a linear head of `outputs`."""
    factors = (1, 1, 2, 4) if chosen.widening else (1, 1, 1, 1)
    return models.conv4(
        outputs,
        width=[factor * chosen.width for factor in factors],
        pooling=chosen.pooling,
        features=chosen.features,
    )


def native_predictor(chosen: options.ImageOptions) -> Predict:
    """The network as a function, for whatever number of classes its head has."""

    def predict(params: Params, x: jax.Array) -> jax.Array:
        outputs = params["params"][HEAD]["kernel"].shape[-1]
        inputs = x if isinstance(x, Weighted) else (x,)
        return cast(jax.Array, network(chosen, outputs).apply(params, *inputs))

    return predict


def predictor(chosen: options.ImageOptions) -> Predict:
    """The same, fast for the kernels of many tasks; queries `Beside` a support set, one by one."""
    fast = matmul_convolutions(native_predictor(chosen))
    return one_at_a_time(fast, queries_at_once=QUERIES_AT_ONCE)


def cross_entropy(predict: Predict, *, balanced: bool = False) -> LossFn:
    """The mean cross-entropy of predicted logits, as a loss function of `(x, labels)`.

    Balanced, it is the mean over the classes there are of the mean of each class's examples: where
    they have uneven numbers, none outweighs the others.
    """

    def loss_fn(params: Params, batch: Batch) -> jax.Array:
        x, y = batch
        losses = optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y)
        weights = x.weights if isinstance(x, Weighted) else jnp.ones_like(losses)
        if balanced:
            weights = weights.astype(accumulator(losses.dtype))
            of_class = (y[:, None] == y[None, :]).astype(weights.dtype) @ weights
            weights = weights / jnp.where(of_class > 0, of_class, jnp.ones_like(of_class))
        return weighted_mean(losses, weights)

    return loss_fn


def initial_params(chosen: options.ImageOptions, outputs: int, picture: tuple[int, ...]) -> Params:
    """Parameters of the network, for pictures of this shape."""
    init = jax.jit(network(chosen, outputs).init)
    return init(jax.random.key(chosen.seed), jnp.zeros((1, *picture), jnp.float32))


def shared_of(chosen: options.ImageOptions, params: Params) -> Any:
    """What is meta-learned of a network's parameters, with the inner rates where they are learned.

    Those of the head are for each way, so that they fit any number of classes.
    """
    shared = without_head(params) if chosen.head == "zero" else params
    if not chosen.learned_rates:
        return shared
    rates = chosen.inner_rate, chosen.head_rate
    return WithRates(shared, first_rates(params, *rates, chosen.inner_steps))


def start_of(chosen: options.ImageOptions, shared: Any, head: Params, ways: int) -> Params:
    """Parameters to adapt to a task from: with a head of zeros, unless it is learned."""
    if chosen.head == "learned":
        return parameters_of(shared)
    zeros = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], ways), x.dtype), head)
    return with_head(parameters_of(shared), zeros)


def inner_of(chosen: options.ImageOptions, shared: Any, ways: int) -> optax.GradientTransformation:
    """The optimizer that adapts to so many classes."""
    if isinstance(shared, WithRates):
        descent = descent_at(shared.rates, ways)
    else:
        descent = inner_optimizer(chosen.inner_rate, chosen.head_rate * ways)
    if chosen.inner_clip is None:
        return descent
    return optax.chain(optax.clip_by_global_norm(chosen.inner_clip), descent)


def moved_of(chosen: options.ImageOptions, num_steps: int) -> Trainable | None:
    """Which parameters so many steps of adaptation move, `None` for all.

    One step from a head of zeros moves the head alone: no other layer has a gradient but zero
    there, so none is taken.
    """
    if chosen.head == "learned" or num_steps != 1:
        return None
    return lambda path: HEAD in path.split("/")


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained few-shot classifier; its methods are pure, and work under `jit` and `vmap`.

    Attributes:
        chosen: the options that it was trained with.
        params: what was meta-learned.
        picture: the shape of a picture, `(height, width, channels)`.
    """

    chosen: options.ImageOptions
    params: Any
    picture: tuple[int, ...]

    def adapt(
        self,
        support: Batch,
        *,
        ways: int | None = None,
        steps: int | None = None,
        weights: Any = None,
    ) -> Params:
        """Parameters adapted to labelled pictures.

        Each class counts the same, however many pictures it has.

        Args:
            support: pictures `[n, height, width, channels]`, uint8 or in `[0, 1]`, and labels
                `[n]` from 0 to `ways - 1`.
            ways: number of classes; one more than the greatest label unless given, which it must
                be under `jit`. A head that is learned has its own, and no others.
            steps: of adaptation; as in the options unless given.
            weights: of the pictures, `[n]`, at least zero; all alike unless given. A picture of
                weight zero, or `False`, is as if it were not there.

        Returns:
            The parameters of a network for these classes.

        Raises:
            ValueError: for no pictures, or of another shape; labels or weights of another number
                than they; weights that are negative, not finite or all zero; labels beyond the
                ways, or other ways than a learned head's.
            TypeError: for labels that are no integers, pictures of integers other than uint8;
                without `ways`, under `jit`.
        """
        x, y = as_pictures(support[0], self.picture), support[1]
        ways = self._ways(x, y, ways)
        if weights is not None:
            refusals.check_weights(weights, len(x), "a picture", some=True)
            x = Weighted(x, jnp.asarray(weights, x.dtype))  # masks of booleans too
        steps = self.chosen.adaptation_steps if steps is None else steps
        refusals.check_at_least("steps", steps, 0)
        return _adapted(
            self.chosen, tuple(self.picture), ways, int(steps), self.params, (x, jnp.asarray(y))
        )

    def predict(self, adapted: Params, x: Any) -> jax.Array:
        """Logits `[n, ways]` of pictures.

        Args:
            adapted: what `adapt` returned.
            x: pictures `[n, height, width, channels]`, which are normalised together whatever the
                classifier was trained for, or a `fj.batch_statistics.Beside` of support and query
                pictures, each of which is then normalised beside the support set alone, as
                `AdaptedClassifier.predict` does unless told.
        """
        x = jax.tree.map(lambda pictures: as_pictures(pictures, self.picture), x)
        return _logits(self.chosen, adapted, x)

    def features(self, x: Any) -> jax.Array:
        """What the network makes of pictures without adaptation, `[n, features]`.

        Args:
            x: as for `predict`.
        """
        params = jax.eval_shape(lambda: initial_params(self.chosen, 1, self.picture))
        size = params["params"][HEAD]["kernel"].shape[0]
        # As logits of a head that gives on what it sees.
        identity = {"kernel": jnp.eye(size), "bias": jnp.zeros(size)}
        return self.predict(with_head(parameters_of(self.params), identity), x)

    def _ways(self, x: jax.Array, y: Any, ways: int | None) -> int:
        """The number of classes, once the labels are known to be of these."""
        check_labels(y, len(x))
        if not len(x):
            raise ValueError("there are no pictures to adapt to; pass at least one")
        traced = isinstance(y, Tracer)
        # A jax.Array would be traced in a loop that closes over it.
        y = y if traced else np.asarray(y)
        if self.chosen.head == "learned":
            if ways not in (None, self.chosen.ways):
                raise ValueError(f"the head is learned for {self.chosen.ways} ways, got {ways}")
            ways = self.chosen.ways
        if ways is None:
            if traced:
                raise TypeError("labels are traced: pass ways, the number of classes")
            ways = int(np.max(y)) + 1
        refusals.check_at_least("ways", ways, 1)
        if not traced:
            check_range_of_labels(y, ways, "ways")
        return ways


# Both are compiled once for each number of pictures, and not in every call.
@functools.partial(jax.jit, static_argnums=0)
def _logits(chosen: options.ImageOptions, adapted: Params, x: Any) -> jax.Array:
    return predictor(chosen)(adapted, x)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _adapted(
    chosen: options.ImageOptions,
    picture: tuple[int, ...],
    ways: int,
    steps: int,
    shared: Any,
    support: Batch,
) -> Params:
    head = jax.eval_shape(lambda: initial_params(chosen, ways, picture))["params"][HEAD]
    return adapt(
        cross_entropy(predictor(chosen), balanced=True),
        start_of(chosen, shared, head, ways),
        support,
        inner_of(chosen, shared, ways),
        steps,
        trainable=moved_of(chosen, steps),
    )[0]


def check_labels(y: Any, count: int) -> None:
    """Refuses what is not one integer a picture."""
    if not jnp.issubdtype(jnp.asarray(y).dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {jnp.asarray(y).dtype}")
    refusals.check_one_each("labels", y, count, "a picture")


def check_range_of_labels(y: Any, count: int, of: str) -> None:
    """Refuses labels that are of none of the classes."""
    if (least := np.min(y)) < 0 or np.max(y) >= count:
        raise ValueError(
            f"labels must be from 0 to {count - 1} for {count} {of}, got {least} to {np.max(y)}"
        )


def as_pictures(x: Any, picture: tuple[int, ...]) -> jax.Array:
    """Pictures of the shape `picture` in `[0, 1]`, from uint8 or as they are.

    Raises:
        TypeError: for other integers, of which nobody knows what white is.
        ValueError: for any of another shape; for floats that are not finite, or far beyond 1.
    """
    _check_brightness(x)
    x = float_pixels(x)
    if x.shape[1:] != picture:
        shape = ", ".join(map(str, picture))
        raise ValueError(f"pictures must be [n, {shape}], got {list(x.shape)}")
    return x


def _check_brightness(x: Any) -> None:
    """Refuses pictures of floats that are not finite, or were never divided by 255."""
    if isinstance(x, Tracer):
        return
    x = np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return
    least, most = (float(of(x, initial=0)) for of in (np.min, np.max))
    if not (np.isfinite(least) and np.isfinite(most)):
        raise ValueError("pictures hold pixels that are not finite; leave such pictures out")
    if most > BRIGHTEST:
        raise ValueError(
            f"pictures must be uint8, or floats in [0, 1], got floats up to {most:g}; divide them "
            "by their white, 255 for 8 bits"
        )


def load_classifier(run: str | Path) -> Classifier:
    """The classifier that `fomaml-jax train` left in a folder, or one that comes with the package.

    Args:
        run: the folder, or `"pretrained:omniglot"`: trained on Omniglot's training characters
            (Vinyals et al. 2016), 28 x 28 x 1, ink 1 on 0. `pretrained/omniglot/MODEL.md` in the
            package says how, and how good it is.

    Returns:
        A `Classifier`.

    Raises:
        ValueError: for a folder that holds no classifier, or a damaged one.

    Example:
        >>> import jax, numpy as np, fomaml_jax as fj
        >>> classifier = fj.load_classifier("pretrained:omniglot")
        >>> support = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)
        >>> adapted = classifier.adapt((support, np.arange(3)))
        >>> classifier.predict(adapted, support).argmax(-1)
        Array([0, 1, 2], dtype=int32)
    """
    folder = folder_of(run)
    chosen = options.from_json(runs.read_config(folder))
    if not isinstance(chosen, options.ImageOptions):
        raise ValueError(f"{folder} is a run of {options.name_of(chosen)}, which has no classes")
    ways = chosen.ways  # of the head, where it is learned
    like = jax.eval_shape(lambda: shared_of(chosen, initial_params(chosen, ways, chosen.picture)))
    runs.warn_if_begun(folder)
    return Classifier(chosen, runs.load_parameters(folder, like), chosen.picture)


def folder_of(run: str | Path) -> Path:
    """The folder of a run, or of a trained network that comes with the package.

    Raises:
        ValueError: for the name of none.
    """
    name = str(run)
    if not name.startswith(PRETRAINED):
        return Path(run).expanduser()
    there = sorted(path.name for path in READY.iterdir() if path.is_dir())
    name = name.removeprefix(PRETRAINED)
    if name not in there:
        names = ", ".join(PRETRAINED + one for one in there)
        raise ValueError(f"there is no {PRETRAINED}{name}; there are {names}")
    return READY / name
