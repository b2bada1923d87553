"""From options to a problem: tasks to train and be judged on, a network, its loss and metric."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from fomaml_jax import classifiers, datasets, models, option_checks, options, regressors
from fomaml_jax.adaptation import adapt
from fomaml_jax.batch_statistics import ONE_AT_A_TIME, TRANSDUCTIVE, beside_support, one_at_a_time
from fomaml_jax.datasets import GroupSplits, ImageClasses, Splits, Table
from fomaml_jax.devices import every_device
from fomaml_jax.evaluation import Evaluation, accuracy, evaluate, evaluate_on
from fomaml_jax.heads import HEAD, fresh_head
from fomaml_jax.learned_rates import learned_rates
from fomaml_jax.meta_gradients import fomaml
from fomaml_jax.parallel import TasksAtOnce
from fomaml_jax.precision import compute_in
from fomaml_jax.starts import starting_from
from fomaml_jax.tasks import (
    Augmentation,
    TaskDistribution,
    episodes,
    random_affine,
    random_shift,
    rotated_classes,
    sinusoid,
)
from fomaml_jax.trainable import Trainable
from fomaml_jax.types import Batch, LossFn, MetaGradient, Params, Task, WithRates
from fomaml_jax.variants import in_every_form, preferring

RATES_RATE = 1e-2
"""The outer rate of the logarithms of learned inner rates."""

Predict = classifiers.Predict

MetricFn = Callable[[Params, Batch], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything that meta-training and its evaluation need to know.

    Attributes:
        params: the shared parameters, before training.
        start: `(shared params, support) -> params` to adapt to an unseen task from: with a new
            head, or at the level of a group's known rows.
        predict: `(params, x) -> outputs`.
        loss_fn: `(params, batch) -> loss`.
        metric_fn: `(params, batch) -> metric`, what is reported.
        metric: its name.
        inner: `(shared params) -> optimizer` of adaptation to unseen tasks.
        meta_gradient: `(shared params, task) -> (grads, TaskInfo)` for one training task.
        outer: the optimizer of the shared parameters, for a number of steps.
        train: the distribution of training tasks.
        validation: of tasks to follow training with; or all such tasks, as a meta-batch.
        test: of tasks never seen, or all of them.
        statistics: what their query examples are normalised with, where that matters.
        otherwise: the same tasks, by the name of the other statistics.
        moved: which parameters so many steps of adaptation move, `None` for all.
        tasks_at_once: as in `over_tasks`.
        splits: the pictures or groups behind the tasks, or `None`.
        columns: of a table, the target first: mean and standard deviation by which each is
            standardised.
    """

    params: Params
    start: Callable[[Params, Batch], Params]
    predict: Predict
    loss_fn: LossFn
    metric_fn: MetricFn
    metric: str
    inner: Callable[[Params], optax.GradientTransformation]
    meta_gradient: MetaGradient
    outer: Callable[[int], optax.GradientTransformation]
    train: TaskDistribution
    validation: TaskDistribution | Task
    test: TaskDistribution | Task
    statistics: str | None = None
    otherwise: Mapping[str, TaskDistribution] = dataclasses.field(default_factory=dict)
    moved: Callable[[int], Trainable | None] = lambda num_steps: None
    tasks_at_once: TasksAtOnce = "auto"
    splits: Splits | GroupSplits | None = None
    columns: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric is an error."""
        return self.metric != options.ACCURACY

    @property
    def standard(self) -> tuple[float, float]:
        """Mean and standard deviation by which targets are standardised."""
        return next(iter(self.columns.values()), (0.0, 1.0))


def build(chosen: options.Options, *, trains: bool = True) -> Problem:
    """The problem that the options describe; reads the data.

    Args:
        chosen: the options.
        trains: whether pictures have to be enough to train on, and not only to test.

    Raises:
        ValueError, OSError, ImportError: for data that are missing, damaged or too few, in one
            line.
    """
    option_checks.check(chosen)
    if isinstance(chosen, options.Sinusoid):
        problem = _regression(chosen)
    elif isinstance(chosen, options.Table):
        problem = _of_groups(chosen, _read(chosen))
    else:
        assert isinstance(chosen, options.ImageOptions)
        problem = _classification(chosen, _load(chosen), trains=trains)
    if chosen.apply_if_finite is None:
        return problem
    outer, most = problem.outer, chosen.apply_if_finite
    return dataclasses.replace(problem, outer=lambda n: optax.apply_if_finite(outer(n), most))


def adapt_path(problem: Problem, num_steps: int) -> Callable[[Params, Batch], Params]:
    """Adaptation that returns the parameters after 0, 1, ... `num_steps` steps, stacked."""

    def adapt_fn(params: Params, support: Batch) -> Params:
        last, info = adapt(
            lambda params, batch: (problem.loss_fn(params, batch), params),
            problem.start(params, support),
            support,
            problem.inner(params),
            num_steps,
            has_aux=True,
            trainable=problem.moved(num_steps),
        )
        return jax.tree.map(lambda path, end: jnp.concatenate([path, end[None]]), info.aux, last)

    return adapt_fn


def judge_of(
    problem: Problem,
    tasks: TaskDistribution | Task,
    *,
    num_steps: int,
    num_tasks: int,
    every_step: bool = True,
) -> Callable[[Params, jax.Array], Evaluation]:
    """A compiled `(params, key) -> Evaluation` of the metric after 0, 1, ... `num_steps` steps.

    Or, without `every_step`, after the last alone. Where there is but a meta-batch of tasks, each
    is judged once, and neither key nor number choose any.
    """
    adapt_fn, mesh = adapt_path(problem, num_steps), every_device()

    def metric_fn(path: Params, query: Batch) -> list[jax.Array]:
        if not every_step:
            path = jax.tree.map(lambda x: x[-1:], path)
        return list(jax.lax.map(lambda params: problem.metric_fn(params, query), path))

    @jax.jit
    def judged(params: Params, key: jax.Array) -> Evaluation:
        how = {"tasks_at_once": problem.tasks_at_once, "mesh": mesh}
        if isinstance(tasks, Task):
            return evaluate_on(adapt_fn, metric_fn, params, tasks, **how)
        return evaluate(adapt_fn, metric_fn, params, tasks, key, num_tasks=num_tasks, **how)

    def judge(params: Params, key: jax.Array) -> Evaluation:
        # They may come from training on fewer devices, where several processes took all the tasks:
        # JAX does not move arrays of one process to the devices of another.
        params = jax.device_get(params) if jax.process_count() > 1 else params
        return judged(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), key)

    return judge


def training_ways(chosen: options.ImageOptions, classes: ImageClasses) -> int:
    """Classes in a training episode."""
    unless_given = chosen.ways if chosen.head == "learned" else min(20, len(classes.images))
    return chosen.train_ways or unless_given


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


def _read(chosen: options.Table) -> Table:
    return datasets.table(
        chosen.file,
        group=chosen.group,
        target=chosen.target,
        features=chosen.features,
        time=chosen.time,
        shots=chosen.shots,
        missing=chosen.missing,
        validation=chosen.validation,
        test=chosen.test,
        seed=chosen.split_seed,
    )


def _classification(chosen: options.ImageOptions, splits: Splits, *, trains: bool) -> Problem:
    omniglot = isinstance(chosen, options.Omniglot)
    drawn = isinstance(chosen, options.Omniglot) and chosen.turns == "drawn"
    splits = splits._replace(
        train=training_classes(splits.train, mirror=chosen.mirror, turn=omniglot and not drawn)
    )
    train_ways = training_ways(chosen, splits.train)
    params = classifiers.initial_params(chosen, train_ways, splits.train.images.shape[2:])
    head = params["params"][HEAD]
    predict = classifiers.predictor(chosen)
    loss_fn = classifiers.cross_entropy(predict)
    meta_gradient = preferring("matmul_convolutions", _algorithm(chosen, train_ways))
    if chosen.head == "zero":
        meta_gradient = in_every_form(meta_gradient, functools.partial(fresh_head, head=head))

    def judged(params: Params, batch: Batch) -> jax.Array:
        x, y = batch
        return accuracy(predict(params, x), y)

    def of(name: str, **how: Any) -> TaskDistribution:
        make = functools.partial(_episodes, chosen, name, splits, **how)
        # Too few pictures are refused here, or, where nobody trains, of those who draw from them.
        return make() if trains or name == "test" else lambda key: make()(key)

    unseen = functools.partial(of, ways=chosen.ways, shots=chosen.shots, rotations=omniglot)

    normalised = beside_support if chosen.statistics == ONE_AT_A_TIME else lambda tasks: tasks
    _check_ways(chosen, "test", splits, chosen.ways)
    training = of(
        "train",
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
        params=classifiers.shared_of(chosen, params),
        start=lambda shared, _: classifiers.start_of(chosen, shared, head, chosen.ways),
        predict=predict,
        loss_fn=loss_fn,
        metric_fn=judged,
        metric=options.metric_of(chosen),
        inner=lambda shared: classifiers.inner_of(chosen, shared, chosen.ways),
        meta_gradient=meta_gradient,
        outer=functools.partial(_outer, chosen),
        train=normalised(training),
        validation=normalised(validation),
        test=test.pop(chosen.statistics),
        statistics=chosen.statistics,
        otherwise=test,
        moved=functools.partial(classifiers.moved_of, chosen),
        splits=splits,
    )


def _check_ways(chosen: options.ImageOptions, name: str, splits: Splits, ways: int) -> None:
    there = len(getattr(splits, name).images)
    if ways > there:
        option = "--ways" if ways == chosen.ways else "--train-ways"
        raise ValueError(
            f"{name} split: ways={ways} is more than the {there} classes there are; ask for fewer "
            f"with {option}"
        )


def _episodes(
    chosen: options.ImageOptions, name: str, splits: Splits, **kwargs: Any
) -> TaskDistribution:
    classes: ImageClasses = getattr(splits, name)
    _check_ways(chosen, name, splits, kwargs["ways"])
    smallest, shots = int(classes.counts.argmin()), kwargs["shots"]
    if shots + chosen.queries > classes.counts[smallest]:  # as `episodes` does, but by name
        raise ValueError(
            f"{name} split: the class {classes.names[smallest]} has {classes.counts[smallest]} "
            f"pictures, but shots={shots} plus queries={chosen.queries} are asked of every class; "
            "ask for fewer, or leave that class out"
        )
    try:
        return episodes(
            classes.images,
            counts=classes.counts,
            queries=chosen.queries,
            **kwargs,
        )
    except ValueError as error:
        raise ValueError(f"{name} split: {error}") from None


def _algorithm(chosen: options.ImageOptions, ways: int) -> MetaGradient:
    """First order, in the forms of convolutions that there are, computed in so many bits."""
    network = compute_in(jnp.dtype(chosen.compute), classifiers.native_predictor(chosen))
    in_training = one_at_a_time(network, queries_at_once=classifiers.QUERIES_AT_ONCE)
    loss_fn = classifiers.cross_entropy(in_training)

    def inner(rates: Any) -> optax.GradientTransformation:
        return classifiers.inner_of(chosen, rates, ways)

    steps, moved = chosen.inner_steps, classifiers.moved_of(chosen, chosen.inner_steps)
    if not chosen.learned_rates:
        return fomaml(loss_fn, inner(None), steps, trainable=moved)

    def at_rates(rates: Any) -> optax.GradientTransformation:
        return inner(WithRates(None, rates))

    return learned_rates(loss_fn, at_rates, steps, trainable=moved)


def _outer(chosen: options.ImageOptions, steps: int) -> optax.GradientTransformation:
    network = outer_optimizer(chosen.rate, steps, chosen.schedule)
    if not chosen.learned_rates:
        return network
    rates = outer_optimizer(RATES_RATE, steps, chosen.schedule)
    labels = WithRates("network", "rates")
    return optax.partition({"network": network, "rates": rates}, labels)


def training_classes(classes: ImageClasses, *, mirror: bool, turn: bool) -> ImageClasses:
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
        params=jax.jit(net.init)(jax.random.key(chosen.seed), jnp.zeros((1, 1))),
        start=lambda params, _: params,
        predict=predict,
        loss_fn=loss_fn,
        metric_fn=loss_fn,
        metric=options.metric_of(chosen),
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


def _of_groups(chosen: options.Table, table: Table) -> Problem:
    inner = regressors.inner_of(chosen)
    # A small table may have no groups to spare: training is then followed on its own.
    followed = "validation" if len(table.splits.validation.names) else "train"
    return Problem(
        params=regressors.initial_params(chosen),
        start=regressors.at_level,
        predict=regressors.predict,
        loss_fn=regressors.squared_error,
        metric_fn=functools.partial(regressors.absolute_error, unit=float(table.scale[0])),
        metric=options.metric_of(chosen),
        inner=lambda params: inner,
        meta_gradient=starting_from(
            regressors.at_level, fomaml(regressors.squared_error, inner, chosen.inner_steps)
        ),
        outer=lambda steps: outer_optimizer(chosen.rate, steps),
        train=regressors.training_tasks(chosen, table),
        validation=regressors.unseen_tasks(chosen, table, followed),
        test=regressors.unseen_tasks(chosen, table, "test"),
        tasks_at_once=None,
        splits=table.splits,
        columns=table.standards,
    )
