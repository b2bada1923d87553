"""From options to a problem: tasks to train and be judged on, a network, its loss and metric."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from fomaml_jax import datasets, models, options
from fomaml_jax.adaptation import adapt
from fomaml_jax.batch_statistics import ONE_AT_A_TIME, TRANSDUCTIVE, beside_support, one_at_a_time
from fomaml_jax.convolutions import matmul_convolutions
from fomaml_jax.datasets import ImageClasses, Splits
from fomaml_jax.devices import every_device
from fomaml_jax.evaluation import Evaluation, evaluate
from fomaml_jax.heads import (
    HEAD,
    descent_at,
    first_rates,
    fresh_head,
    inner_optimizer,
    parameters_of,
    with_head,
    without_head,
)
from fomaml_jax.learned_rates import WithRates, learned_rates
from fomaml_jax.meta_gradients import fomaml
from fomaml_jax.parallel import TasksAtOnce
from fomaml_jax.precision import compute_in
from fomaml_jax.tasks import (
    Augmentation,
    TaskDistribution,
    episodes,
    random_affine,
    random_shift,
    rotated_classes,
    sinusoid,
)
from fomaml_jax.types import Batch, LossFn, MetaGradient, Params
from fomaml_jax.variants import in_every_form, preferring

RATES_RATE = 1e-2
"""The outer rate of the logarithms of learned inner rates."""

QUERIES_AT_ONCE = 16
"""Of queries that are normalised one at a time, each in a batch of its own."""

Predict = Callable[[Params, jax.Array], jax.Array]

MetricFn = Callable[[Params, Batch], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything that meta-training and its evaluation need to know.

    Attributes:
        params: the shared parameters, before training.
        start: `(shared params) -> params` to adapt to an unseen task from, its new head included.
        predict: `(params, x) -> outputs`.
        loss_fn: `(params, batch) -> loss`.
        metric_fn: `(params, batch) -> metric`, what is reported.
        metric: its name.
        inner: `(shared params) -> optimizer` of adaptation to unseen tasks.
        meta_gradient: `(shared params, task) -> (grads, TaskInfo)` for one training task.
        outer: the optimizer of the shared parameters, for a number of steps.
        train: the distribution of training tasks.
        validation: of tasks to follow training with.
        test: of tasks never seen.
        statistics: what their query examples are normalised with, where that matters.
        otherwise: the same tasks, by the name of the other statistics.
        tasks_at_once: as in `over_tasks`.
        splits: the pictures behind the tasks, or `None`.
    """

    params: Params
    start: Callable[[Params], Params]
    predict: Predict
    loss_fn: LossFn
    metric_fn: MetricFn
    metric: str
    inner: Callable[[Params], optax.GradientTransformation]
    meta_gradient: MetaGradient
    outer: Callable[[int], optax.GradientTransformation]
    train: TaskDistribution
    validation: TaskDistribution
    test: TaskDistribution
    statistics: str | None = None
    otherwise: Mapping[str, TaskDistribution] = dataclasses.field(default_factory=dict)
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
        problem = _regression(chosen)
    else:
        assert isinstance(chosen, options.ImageOptions)
        problem = _classification(chosen, _load(chosen))
    if chosen.apply_if_finite is None:
        return problem
    outer, most = problem.outer, chosen.apply_if_finite
    return dataclasses.replace(problem, outer=lambda n: optax.apply_if_finite(outer(n), most))


def adapt_path(problem: Problem, num_steps: int) -> Callable[[Params, Batch], Params]:
    """Adaptation that returns the parameters after 0, 1, ... `num_steps` steps, stacked."""

    def adapt_fn(params: Params, support: Batch) -> Params:
        last, info = adapt(
            lambda params, batch: (problem.loss_fn(params, batch), params),
            problem.start(params),
            support,
            problem.inner(params),
            num_steps,
            has_aux=True,
        )
        return jax.tree.map(lambda path, end: jnp.concatenate([path, end[None]]), info.aux, last)

    return adapt_fn


def judge_of(
    problem: Problem,
    tasks: TaskDistribution,
    *,
    num_steps: int,
    num_tasks: int,
    every_step: bool = True,
) -> Callable[[Params, jax.Array], Evaluation]:
    """A compiled `(params, key) -> Evaluation` of the metric after 0, 1, ... `num_steps` steps.

    Or, without `every_step`, after the last alone.
    """
    adapt_fn, mesh = adapt_path(problem, num_steps), every_device()

    def metric_fn(path: Params, query: Batch) -> list[jax.Array]:
        if not every_step:
            path = jax.tree.map(lambda x: x[-1:], path)
        return list(jax.lax.map(lambda params: problem.metric_fn(params, query), path))

    @jax.jit
    def judged(params: Params, key: jax.Array) -> Evaluation:
        return evaluate(
            adapt_fn,
            metric_fn,
            params,
            tasks,
            key,
            num_tasks=num_tasks,
            tasks_at_once=problem.tasks_at_once,
            mesh=mesh,
        )

    def judge(params: Params, key: jax.Array) -> Evaluation:
        # They may come from training on fewer devices, where several processes took all the tasks:
        # JAX does not move arrays of one process to the devices of another.
        params = jax.device_get(params) if jax.process_count() > 1 else params
        return judged(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), key)

    return judge


def cross_entropy(predict: Predict) -> LossFn:
    """The mean cross-entropy of predicted logits, as a loss function of `(x, labels)`."""

    def loss_fn(params: Params, batch: Batch) -> jax.Array:
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y).mean()

    return loss_fn


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
        return cast(jax.Array, network(chosen, outputs).apply(params, x))

    return predict


def predictor(chosen: options.ImageOptions) -> Predict:
    """The same, fast for the kernels of many tasks."""
    return matmul_convolutions(native_predictor(chosen))


def training_ways(chosen: options.ImageOptions, classes: ImageClasses) -> int:
    """Classes in a training episode."""
    unless_given = chosen.ways if chosen.head == "learned" else min(20, len(classes.images))
    return chosen.train_ways or unless_given


def initial_params(chosen: options.ImageOptions, outputs: int, classes: ImageClasses) -> Params:
    """Parameters for pictures of this size."""
    example = jnp.zeros((1, *classes.images.shape[2:]))
    return network(chosen, outputs).init(jax.random.key(chosen.seed), example)


def augmentation(chosen: options.ImageOptions) -> Augmentation | None:
    """What training does to every picture."""
    shift = random_shift(chosen.shift) if chosen.shift else None
    if chosen.affine is None:
        return shift
    affine = random_affine(chosen.affine)
    if shift is None:
        return affine

    def both(key: jax.Array, image: jax.Array) -> jax.Array:
        affine_key, shift_key = jax.random.split(key)
        return shift(shift_key, affine(affine_key, image))

    return both


def outer_optimizer(
    rate: float, steps: int, schedule: str = "cosine"
) -> optax.GradientTransformation:
    """Adam, with a cosine decay to a hundredth of the rate or without."""
    decayed = optax.cosine_decay_schedule(rate, steps, alpha=0.01)
    return optax.adam(decayed if schedule == "cosine" else rate)


def _load(chosen: options.ImageOptions) -> Splits:
    match chosen:
        case options.Glyphs():
            return datasets.glyphs()
        case options.Omniglot():
            return datasets.omniglot(
                chosen.path,
                split=chosen.split,
                resample=chosen.resample,
                download=not chosen.offline,
            )
        case options.Folder():
            return datasets.image_folder(
                chosen.path,
                size=chosen.size,
                channels=chosen.channels,
                unreadable=chosen.unreadable,
                duplicates=chosen.duplicates,
            )
    raise TypeError(f"no pictures for {chosen}")


def _classification(chosen: options.ImageOptions, splits: Splits) -> Problem:
    omniglot = isinstance(chosen, options.Omniglot)
    drawn = isinstance(chosen, options.Omniglot) and chosen.turns == "drawn"
    splits = splits._replace(
        train=_training_classes(splits.train, mirror=chosen.mirror, turn=omniglot and not drawn)
    )
    train_ways = training_ways(chosen, splits.train)
    params = initial_params(chosen, train_ways, splits.train)
    head = params["params"][HEAD]
    predict = one_at_a_time(predictor(chosen), queries_at_once=QUERIES_AT_ONCE)
    loss_fn = cross_entropy(predict)

    def inner(shared: Any, ways: int) -> optax.GradientTransformation:
        if isinstance(shared, WithRates):
            descent = descent_at(shared.rates, ways / train_ways)
        else:
            descent = inner_optimizer(chosen.inner_rate, chosen.head_rate * ways)
        if chosen.inner_clip is None:
            return descent
        return optax.chain(optax.clip_by_global_norm(chosen.inner_clip), descent)

    network_in_bits = compute_in(jnp.dtype(chosen.compute), native_predictor(chosen))
    in_training = one_at_a_time(network_in_bits, queries_at_once=QUERIES_AT_ONCE)
    native = _algorithm(
        chosen, cross_entropy(in_training), lambda shared: inner(shared, train_ways)
    )
    meta_gradient = preferring("matmul_convolutions", native)
    shared = params
    if chosen.head == "zero":
        meta_gradient = in_every_form(meta_gradient, functools.partial(fresh_head, head=head))
        shared = without_head(params)
    if chosen.learned_rates:
        rates = chosen.inner_rate, chosen.head_rate * train_ways
        shared = WithRates(shared, first_rates(params, *rates, chosen.inner_steps))

    def start(shared: Any) -> Params:
        if chosen.head == "learned":
            return parameters_of(shared)
        zeros = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], chosen.ways), x.dtype), head)
        return with_head(parameters_of(shared), zeros)

    def accuracy(params: Params, batch: Batch) -> jax.Array:
        x, y = batch
        return jnp.mean(predict(params, x).argmax(-1) == y)

    def unseen(name: str) -> TaskDistribution:
        return _episodes(
            chosen, name, splits, ways=chosen.ways, shots=chosen.shots, rotations=omniglot
        )

    statistics = {"transductive": TRANSDUCTIVE, "one-at-a-time": ONE_AT_A_TIME}[chosen.statistics]
    normalised = beside_support if statistics == ONE_AT_A_TIME else lambda tasks: tasks
    training = _episodes(
        chosen,
        "train",
        splits,
        ways=train_ways,
        shots=chosen.train_shots,
        rotations=drawn,
        augment=augmentation(chosen),
    )
    # A small folder may have no classes to spare: training is then followed on its own.
    spare = len(splits.validation.images) >= chosen.ways
    validation = unseen("validation" if spare else "train")
    test = {TRANSDUCTIVE: unseen("test"), ONE_AT_A_TIME: beside_support(unseen("test"))}

    return Problem(
        params=shared,
        start=start,
        predict=predict,
        loss_fn=loss_fn,
        metric_fn=accuracy,
        metric="accuracy",
        inner=lambda shared: inner(shared, chosen.ways),
        meta_gradient=meta_gradient,
        outer=functools.partial(_outer, chosen),
        train=normalised(training),
        validation=normalised(validation),
        test=test.pop(statistics),
        statistics=statistics,
        otherwise=test,
        splits=splits,
    )


def _episodes(
    chosen: options.ImageOptions, name: str, splits: Splits, **kwargs: Any
) -> TaskDistribution:
    classes: ImageClasses = getattr(splits, name)
    try:
        return episodes(
            classes.images,
            counts=classes.counts,
            queries=chosen.queries,
            **kwargs,
        )
    except ValueError as error:
        raise ValueError(f"{name} split: {error}") from None


def _algorithm(
    chosen: options.ImageOptions,
    loss_fn: LossFn,
    inner: Callable[[Any], optax.GradientTransformation],
) -> MetaGradient:
    if not chosen.learned_rates:
        return fomaml(loss_fn, inner(None), chosen.inner_steps)
    return learned_rates(loss_fn, lambda rates: inner(WithRates(None, rates)), chosen.inner_steps)


def _outer(chosen: options.ImageOptions, steps: int) -> optax.GradientTransformation:
    network = outer_optimizer(chosen.rate, steps, chosen.schedule)
    if not chosen.learned_rates:
        return network
    rates = outer_optimizer(RATES_RATE, steps, chosen.schedule)
    labels = WithRates("network", "rates")
    return optax.partition({"network": network, "rates": rates}, labels)


def _training_classes(classes: ImageClasses, *, mirror: bool, turn: bool) -> ImageClasses:
    """With mirrored and turned pictures as classes of their own, where wanted."""
    images, counts, names = classes.images, classes.counts, classes.names
    if mirror:
        images, counts = np.concatenate([images, images[:, :, :, ::-1]]), np.tile(counts, 2)
        names = (*names, *(f"{name} mirrored" for name in names))
    if turn:
        images, counts = rotated_classes(images), np.tile(counts, 4)
        names = tuple(f"{name} turned {90 * k}" for k in range(4) for name in names)
    return classes if images is classes.images else ImageClasses(images, counts, names)


def _regression(chosen: options.Sinusoid) -> Problem:
    net = models.mlp()

    def predict(params: Params, x: jax.Array) -> jax.Array:
        return cast(jax.Array, net.apply(params, x))

    def loss_fn(params: Params, batch: Batch) -> jax.Array:
        x, y = batch
        return jnp.mean((predict(params, x) - y) ** 2)

    unseen = sinusoid(shots=chosen.shots, queries=100)
    inner = optax.chain(optax.clip_by_global_norm(chosen.inner_clip), optax.sgd(chosen.inner_rate))
    return Problem(
        params=net.init(jax.random.key(chosen.seed), jnp.zeros((1, 1))),
        start=lambda params: params,
        predict=predict,
        loss_fn=loss_fn,
        metric_fn=loss_fn,
        metric="mean squared error",
        inner=lambda params: inner,
        meta_gradient=fomaml(loss_fn, inner, chosen.inner_steps),
        outer=lambda steps: optax.chain(
            optax.clip_by_global_norm(10.0), outer_optimizer(chosen.rate, steps)
        ),
        train=sinusoid(shots=chosen.shots, queries=chosen.queries),
        validation=unseen,
        test=unseen,
        tasks_at_once=None,  # so small a network gains nothing from tasks in turn
    )
