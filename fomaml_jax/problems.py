"""From options to a problem: tasks to train and be judged on, a network, its loss and metric."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from fomaml_jax import datasets, models, options
from fomaml_jax.adaptation import adapt
from fomaml_jax.convolutions import matmul_convolutions
from fomaml_jax.datasets import ImageClasses, Splits
from fomaml_jax.evaluation import Evaluation, evaluate
from fomaml_jax.parallel import TasksAtOnce
from fomaml_jax.tasks import TaskDistribution, episodes, rotated_classes, sinusoid
from fomaml_jax.types import Batch, LossFn, Params

MetricFn = Callable[[Params, Batch], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything that meta-training and its evaluation need to know.

    Attributes:
        params: where training starts.
        predict: `(params, x) -> outputs`.
        loss_fn: `(params, batch) -> loss`.
        metric_fn: `(params, batch) -> metric`, what is reported.
        metric: its name.
        inner: the optimizer of adaptation.
        outer: the optimizer of the shared parameters, for a number of steps.
        train: the distribution of training tasks.
        validation: of tasks to follow training with.
        test: of tasks never seen.
        tasks_at_once: as in `over_tasks`.
        splits: the pictures behind the tasks, or `None`.
    """

    params: Params
    predict: Callable[[Params, jax.Array], jax.Array]
    loss_fn: LossFn
    metric_fn: MetricFn
    metric: str
    inner: optax.GradientTransformation
    outer: Callable[[int], optax.GradientTransformation]
    train: TaskDistribution
    validation: TaskDistribution
    test: TaskDistribution
    tasks_at_once: TasksAtOnce = "auto"
    splits: Splits | None = None


def build(chosen: options.Options) -> Problem:
    """The problem that the options describe; reads the data.

    Raises:
        ValueError, OSError, ImportError: for data that are missing, damaged or too few, in one
            line.
    """
    options.check(chosen)
    if isinstance(chosen, options.Sinusoid):
        return _regression(chosen)
    assert isinstance(chosen, options.ImageOptions)
    return _classification(chosen, _load(chosen))


def adapt_path(problem: Problem, num_steps: int) -> Callable[[Params, Batch], Params]:
    """Adaptation that returns the parameters after 0, 1, ... `num_steps` steps, stacked."""

    def adapt_fn(params: Params, support: Batch) -> Params:
        last, info = adapt(
            lambda params, batch: (problem.loss_fn(params, batch), params),
            params,
            support,
            problem.inner,
            num_steps,
            has_aux=True,
        )
        return jax.tree.map(lambda path, end: jnp.concatenate([path, end[None]]), info.aux, last)

    return adapt_fn


def judge_of(
    problem: Problem, tasks: TaskDistribution, *, num_steps: int, num_tasks: int
) -> Callable[[Params, jax.Array], Evaluation]:
    """A compiled `(params, key) -> Evaluation` of the metric after 0, 1, ... `num_steps` steps."""
    adapt_fn = adapt_path(problem, num_steps)

    def metric_fn(path: Params, query: Batch) -> list[jax.Array]:
        return list(jax.lax.map(lambda params: problem.metric_fn(params, query), path))

    @jax.jit
    def judge(params: Params, key: jax.Array) -> Evaluation:
        return evaluate(
            adapt_fn,
            metric_fn,
            params,
            tasks,
            key,
            num_tasks=num_tasks,
            tasks_at_once=problem.tasks_at_once,
        )

    return judge


def cross_entropy(predict: Callable[[Params, jax.Array], jax.Array]) -> LossFn:
    """The mean cross-entropy of predicted logits, as a loss function of `(x, labels)`."""

    def loss_fn(params: Params, batch: Batch) -> jax.Array:
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y).mean()

    return loss_fn


def network(chosen: options.ImageOptions, outputs: int) -> nn.Module:
    """The network for pictures, with a linear head of `outputs`."""
    return models.conv4(outputs, width=chosen.width, pooling=chosen.pooling, features="scaled")


def initial_params(net: nn.Module, classes: ImageClasses, seed: int) -> Params:
    """Parameters for pictures of this size."""
    return net.init(jax.random.key(seed), jnp.zeros((1, *classes.images.shape[2:])))


def is_head(path: Any) -> bool:
    """Whether a parameter's key path lies in the linear head."""
    return any(getattr(key, "key", None) == "head" for key in path)


def inner_optimizer(rate: float, head_rate: float) -> optax.GradientTransformation:
    """Gradient descent on every layer, at a rate of its own for the head."""

    def labels(params):
        return jax.tree.map_with_path(lambda p, _: "head" if is_head(p) else "body", params)

    return optax.partition({"body": optax.sgd(rate), "head": optax.sgd(head_rate)}, labels)


def outer_optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with a cosine decay to a hundredth of the rate."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps, alpha=0.01))


def _keep_head() -> optax.GradientTransformation:
    """Leaves the head at zero, where every task begins: it is adapted, not meta-learned."""
    return optax.masked(
        optax.set_to_zero(),
        lambda params: jax.tree.map_with_path(lambda path, _: is_head(path), params),
    )


def _load(chosen: options.ImageOptions) -> Splits:
    match chosen:
        case options.Glyphs():
            return datasets.glyphs()
        case options.Omniglot():
            return datasets.omniglot(chosen.path, split=chosen.split)
        case options.Folder():
            return datasets.image_folder(chosen.path, size=chosen.size, channels=chosen.channels)
    raise TypeError(f"no pictures for {chosen}")


def _classification(chosen: options.ImageOptions, splits: Splits) -> Problem:
    turned = isinstance(chosen, options.Omniglot)
    if turned:
        splits = splits._replace(train=_turned_classes(splits.train))
    net = network(chosen, chosen.ways)
    predict = matmul_convolutions(net.apply)

    def accuracy(params: Params, batch: Batch) -> jax.Array:
        x, y = batch
        return jnp.mean(predict(params, x).argmax(-1) == y)

    def distribution(name: str, *, rotations: bool = False) -> TaskDistribution:
        classes: ImageClasses = getattr(splits, name)
        try:
            return episodes(
                classes.images,
                counts=classes.counts,
                ways=chosen.ways,
                shots=chosen.shots,
                queries=chosen.queries,
                rotations=rotations,
            )
        except ValueError as error:
            raise ValueError(f"{name} split: {error}") from None

    return Problem(
        params=initial_params(net, splits.train, chosen.seed),
        predict=predict,
        loss_fn=cross_entropy(predict),
        metric_fn=accuracy,
        metric="accuracy",
        inner=inner_optimizer(chosen.inner_rate, chosen.head_rate),
        outer=lambda steps: optax.chain(outer_optimizer(chosen.rate, steps), _keep_head()),
        train=distribution("train"),
        validation=distribution("validation", rotations=turned),
        test=distribution("test", rotations=turned),
        splits=splits,
    )


def _turned_classes(classes: ImageClasses) -> ImageClasses:
    """Rotations by 90 degrees as classes of their own: four times as many to train on."""
    return ImageClasses(
        images=rotated_classes(classes.images),
        counts=jnp.tile(classes.counts, 4),
        names=tuple(f"{name} turned {90 * k}" for k in range(4) for name in classes.names),
    )


def _regression(chosen: options.Sinusoid) -> Problem:
    net = models.mlp()

    def loss_fn(params: Params, batch: Batch) -> jax.Array:
        x, y = batch
        return jnp.mean((net.apply(params, x) - y) ** 2)

    unseen = sinusoid(shots=chosen.shots, queries=100)
    return Problem(
        params=net.init(jax.random.key(chosen.seed), jnp.zeros((1, 1))),
        predict=net.apply,
        loss_fn=loss_fn,
        metric_fn=loss_fn,
        metric="mean squared error",
        inner=optax.chain(
            optax.clip_by_global_norm(chosen.inner_clip), optax.sgd(chosen.inner_rate)
        ),
        outer=lambda steps: optax.chain(
            optax.clip_by_global_norm(10.0), outer_optimizer(chosen.rate, steps)
        ),
        train=sinusoid(shots=chosen.shots, queries=chosen.queries),
        validation=unseen,
        test=unseen,
        tasks_at_once=None,  # so small a network gains nothing from tasks in turn
    )
