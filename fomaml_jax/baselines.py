"""What meta-learning has to beat, given the same data and as many gradient evaluations."""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fomaml_jax import classifiers, heads, options, problems, uneven
from fomaml_jax.batch_statistics import queries_of
from fomaml_jax.datasets import GroupSplits, ImageClasses, Splits
from fomaml_jax.evaluation import Evaluation, evaluate, evaluate_on
from fomaml_jax.meta_gradients import fomaml, maml
from fomaml_jax.parallel import TasksAtOnce
from fomaml_jax.problems import Problem
from fomaml_jax.tasks import Augmentation, TaskDistribution, as_float
from fomaml_jax.types import Batch, MetaGradient, Params, Task

JOINT_BATCH, JOINT_BATCHES = 32, 4
"""Pictures that are normalised together in joint pre-training, and how many such batches a step."""

JOINT = "joint pre-training"

FINE_TUNING_FACTORS = (0.1, 0.3, 1.0, 3.0)
"""Fine-tuning chooses its rates among these multiples of ours, on validation tasks."""


class Fit(Protocol):
    """Takes outer steps, showing its progress, and returns the parameters."""

    def __call__(
        self,
        meta_gradient: MetaGradient,
        tasks: TaskDistribution,
        params: Params,
        optimizer: optax.GradientTransformation,
        *,
        steps: int,
        tasks_per_step: int,
        tasks_at_once: TasksAtOnce,
        name: str,
    ) -> Params:
        """Trains `params` on `steps` meta-batches of `tasks_per_step` tasks."""
        ...


def nearest_class_mean(
    chosen: options.ImageOptions, problem: Problem, key: jax.Array
) -> Evaluation:
    """Accuracy of giving each query picture the label of the nearest mean of support pixels."""

    def accuracy(means: jax.Array, query: Batch) -> jax.Array:
        return jnp.mean(nearest(means, queries_of(query[0])) == query[1])

    test = problem.test
    assert not isinstance(test, Task)

    @jax.jit
    def judge(key):
        return evaluate(
            lambda _, support: class_means(support[0], support[1], chosen.ways),
            lambda *a: [accuracy(*a)],
            (),
            test,
            key,
            num_tasks=chosen.eval_tasks,
        )

    return judge(key)


def class_means(x: jax.Array, y: jax.Array, ways: int) -> jax.Array:
    """Of each class the mean of its examples, `[ways, values]`; infinite where it has none."""
    members = jax.nn.one_hot(y, ways, dtype=x.dtype)
    sums, counts = members.T @ x.reshape(len(x), -1), members.sum(0)[:, None]
    return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), jnp.inf)


def nearest(means: jax.Array, x: jax.Array) -> jax.Array:
    """The label `[n]` of the class mean that is nearest to each example."""
    apart = x.reshape(len(x), 1, -1) - means[None]
    return (apart**2).sum(-1).argmin(-1)


def own_mean(problem: Problem) -> Evaluation:
    """Error of giving every query row of a group the mean of its support rows."""

    def mean_of(_: Params, support: Batch) -> jax.Array:
        (_, y), weights = support
        return uneven.weighted_mean(y, weights)

    def error(mean: jax.Array, query: Batch) -> list[jax.Array]:
        (_, y), weights = query
        return [problem.standard[1] * uneven.weighted_mean(jnp.abs(y - mean), weights)]

    assert isinstance(problem.test, Task)
    return evaluate_on(mean_of, error, (), problem.test)


def second_order(chosen: options.Options, problem: Problem, fit: Fit, key: jax.Array) -> Evaluation:
    """Second-order MAML on the same training tasks."""
    params = fit(
        maml(problem.loss_fn, problem.inner(problem.params), chosen.inner_steps),
        problem.train,
        problem.params,
        problem.outer(chosen.steps),
        steps=chosen.steps,
        tasks_per_step=chosen.tasks_per_step,
        tasks_at_once=problem.tasks_at_once,
        name="second-order MAML",
    )
    return problems.judge_of(
        problem, problem.test, num_steps=chosen.adaptation_steps, num_tasks=chosen.eval_tasks
    )(params, key)


def joint_pretraining(
    chosen: options.Options, problem: Problem, fit: Fit, key: jax.Array
) -> tuple[Evaluation, float]:
    """Trains one network on all training data at once, then fine-tunes it on each unseen task.

    It spends as many gradients of single examples as meta-training did, and fine-tunes by as many
    steps, at the rates that do best on validation tasks.

    Returns:
        The evaluation after each step, and the multiple of the inner rates that was chosen.
    """
    if isinstance(chosen, options.ImageOptions):
        params = _pretrain_on_classes(chosen, problem, fit)
    else:
        params = _pretrain_on_points(chosen, problem, fit)

    def judged(factor: float, tasks: TaskDistribution | Task, num_tasks: int, key: jax.Array):
        def inner(shared: Params) -> optax.GradientTransformation:
            return optax.chain(problem.inner(shared), optax.scale(factor))

        judge = problems.judge_of(
            dataclasses.replace(problem, inner=inner),
            tasks,
            num_steps=chosen.adaptation_steps,
            num_tasks=num_tasks,
        )
        return judge(params, key)

    def on_validation(factor: float) -> float:
        judgement = judged(factor, problem.validation, 200, jax.random.fold_in(key, 1))
        score = float(judgement.mean[-1]) * (-1 if problem.lower_is_better else 1)
        return -math.inf if math.isnan(score) else score

    best = max(FINE_TUNING_FACTORS, key=on_validation)
    return judged(best, problem.test, chosen.eval_tasks, key), best


def _pretrain_on_points(chosen: options.Options, problem: Problem, fit: Fit) -> Params:
    """Regression on the query points of all tasks, or all rows of groups, without adaptation."""
    train, learned_from = problem.train, float(chosen.queries)
    queries = learned_from
    if isinstance(problem.splits, GroupSplits):
        # The rows given too: they are of another time. Groups may have fewer than all queries.
        later = problem.splits.train.counts - chosen.shots
        queries = float(np.minimum(later, chosen.queries).mean())
        train, learned_from = _all_rows(problem.train), chosen.shots + queries
    seen = chosen.inner_steps * chosen.shots + queries
    steps = max(1, int(chosen.steps * seen / learned_from))
    return fit(
        fomaml(problem.loss_fn, optax.identity(), 0),
        train,
        problem.params,
        problem.outer(steps),
        steps=steps,
        tasks_per_step=chosen.tasks_per_step,
        tasks_at_once=problem.tasks_at_once,
        name=JOINT,
    )


def _all_rows(tasks: TaskDistribution) -> TaskDistribution:
    """The same tasks, all rows of each in its support and in its query."""

    def sample_task(key: jax.Array) -> Task:
        task = tasks(key)
        both = jax.tree.map(lambda *x: jnp.concatenate(x), task.support, task.query)
        return Task(both, both)

    return sample_task


def _pretrain_on_classes(chosen: options.ImageOptions, problem: Problem, fit: Fit) -> Params:
    """Classification of all training classes; its head then makes way for the problem's."""
    assert isinstance(problem.splits, Splits)
    classes = problem.splits.train
    if isinstance(chosen, options.Omniglot) and chosen.turns == "drawn":  # it sees turns as well
        classes = problems.training_classes(classes, mirror=False, turn=True)
    ways = problems.training_ways(chosen, classes)
    seen = ways * (chosen.inner_steps * chosen.train_shots + chosen.queries)
    steps = max(1, chosen.steps * chosen.tasks_per_step * seen // (JOINT_BATCH * JOINT_BATCHES))
    trained = fit(
        fomaml(classifiers.cross_entropy(classifiers.predictor(chosen)), optax.identity(), 0),
        _batches(classes, problems.augmentation(chosen)),
        classifiers.initial_params(chosen, len(classes.images), classes.images.shape[2:]),
        problems.outer_optimizer(chosen.rate, steps, chosen.schedule),
        steps=steps,
        tasks_per_step=JOINT_BATCHES,
        tasks_at_once=problem.tasks_at_once,
        name=JOINT,
    )
    body = heads.without_head(trained)["params"]

    def with_body(params: Params) -> Params:
        return {"params": params["params"] | body}

    return heads.on_parameters(with_body, problem.params)


def _batches(classes: ImageClasses, augment: Augmentation | None) -> TaskDistribution:
    """Random pictures with their class among all: `key -> Task`, support and query the same."""
    images, counts = jnp.asarray(classes.images), jnp.asarray(classes.counts)

    def sample_batch(key: jax.Array) -> Task:
        class_key, example_key, augment_key = jax.random.split(key, 3)
        labels = jax.random.randint(class_key, (JOINT_BATCH,), 0, len(images), jnp.int32)
        chosen = jax.random.randint(example_key, (JOINT_BATCH,), 0, counts[labels])
        x = as_float(images[labels, chosen])
        if augment is not None:
            x = jax.vmap(augment)(jax.random.split(augment_key, JOINT_BATCH), x)
        return Task((x, labels), (x, labels))

    return sample_batch
