"""A classifier on tasks unlike those it was trained on, and what adaptation adds there."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fomaml_jax import shifts
from fomaml_jax.baselines import class_means, nearest
from fomaml_jax.batch_statistics import ONE_AT_A_TIME, beside_support, queries_of
from fomaml_jax.classifiers import Classifier
from fomaml_jax.datasets import ImageClasses
from fomaml_jax.devices import every_device
from fomaml_jax.evaluation import Evaluation, accuracy, evaluate, paired_difference
from fomaml_jax.tasks import TaskDistribution, episodes
from fomaml_jax.types import Batch, Params

ADAPTED, FEATURES, PIXELS = "adapted", "features", "pixels"
"""What a query's label comes from: the adapted network; the nearest class mean of the network's
features without adaptation; the nearest class mean of pixels."""

Verdict = Literal["helps", "not shown", "hurts"]


class Pool(NamedTuple):
    """Test classes to sample tasks from.

    Attributes:
        classes: the pictures, and how many of each class are real.
        turned: whether each class of a task is turned by a random multiple of 90 degrees.
        groups: `[classes]` integers, if a task has its classes from one group, such as an alphabet.
    """

    classes: ImageClasses
    turned: bool
    groups: np.ndarray | None = None

    @property
    def most_ways(self) -> int:
        """Of a task."""
        together = np.zeros(len(self.classes.images), int) if self.groups is None else self.groups
        return int(np.bincount(together).max())

    def sampler(
        self, images: jax.Array, *, ways: int, shots: int, queries: int
    ) -> TaskDistribution:
        """`key -> Task` from `images`, which are the pool's own, on the device."""
        return episodes(
            images,
            ways=ways,
            shots=shots,
            queries=queries,
            counts=self.classes.counts,
            groups=self.groups,
            rotations=self.turned,
        )


class Setting(NamedTuple):
    """Tasks of one shape, which share one compiled program.

    Attributes:
        data: the name of their pool.
        ways: classes.
        shots: support examples a class.
        thinned: whether only `(shots + 1) / 2` a class are left, an odd number of shots being
            drawn: on average, so that the classes may have uneven numbers.
    """

    data: str
    ways: int
    shots: int
    thinned: bool = False

    @property
    def support(self) -> int:
        """Support examples of a task."""
        return self.ways * ((self.shots + 1) // 2 if self.thinned else self.shots)


class Condition(NamedTuple):
    """One point of the report.

    Attributes:
        shift: what changes.
        label: how far, in words.
        setting: the tasks.
        strengths: those of `shifts.NAMED` that are not 0.
        steepness: of `shifts.uneven_counts`, in a thinned setting.
    """

    shift: str
    label: str
    setting: Setting
    strengths: Mapping[str, float] = {}
    steepness: float = 0.0

    @property
    def tasks(self) -> tuple[Any, ...]:
        """What its tasks are made of: conditions in which this is the same are one."""
        return self.setting, tuple(sorted(self.strengths.items())), self.steepness


def measure(
    classifier: Classifier,
    pools: Mapping[str, Pool],
    conditions: Iterable[Condition],
    key: jax.Array,
    *,
    queries: int,
    num_tasks: int,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Judges a classifier under each condition, beside the baselines that do not adapt.

    Task `i` has the same key under every condition: where the setting is the same, so are the
    classes, the pictures and their order, and only the shift is not.

    Args:
        classifier: as `load_classifier` has it.
        pools: test classes by name.
        conditions: of each shift the one without it first.
        key: a PRNG key; not consumed, only folded.
        queries: query examples a class.
        num_tasks: tasks of a condition.
        say: is told how far it is.

    Yields:
        One plain row a condition, as it is measured: accuracies with their intervals by `ADAPTED`,
        `FEATURES` and `PIXELS`, and their differences, task by task: `ahead` of features and of
        pixels, and `lost` since the first condition of the shift, where that has the same pictures.
    """
    conditions = list(conditions)
    images = {name: jnp.asarray(pool.classes.images) for name, pool in pools.items()}
    programs: dict[Setting, Any] = {}
    found: dict[Any, dict[str, Evaluation]] = {}
    first: dict[str, Condition] = {}
    for i, condition in enumerate(conditions):
        setting = condition.setting
        if setting not in programs:
            programs[setting] = _program(classifier, pools[setting.data], setting, queries)
        if condition.tasks not in found:
            say(f"{i + 1} of {len(conditions)}: {condition.shift}, {condition.label}")
            strengths = dict.fromkeys(shifts.NAMED, 0.0) | dict(condition.strengths)
            args = classifier.params, images[setting.data], key, strengths, condition.steepness
            found[condition.tasks] = _by_name(programs[setting](*args, num_tasks))
        clean = first.setdefault(condition.shift, condition)
        paired = clean is not condition and clean.setting == setting
        reference = found[clean.tasks] if paired else None
        yield _row(condition, found[condition.tasks], reference, queries)


def verdict(difference: Mapping[str, float]) -> Verdict:
    """Whether what is ahead by so much is ahead at all, by the 95% interval.

    What is not finite is of a network that diverged, and is behind.
    """
    mean, ci95 = difference["mean"], difference["ci95"]
    if mean > ci95:
        return "helps"
    if not math.isfinite(mean):
        return "hurts"
    return "hurts" if mean < -ci95 else "not shown"


def _program(
    classifier: Classifier, pool: Pool, setting: Setting, queries: int
) -> Callable[..., Evaluation]:
    """Compiled: `(params, images, key, strengths, steepness, num_tasks) -> Evaluation`."""
    alone = classifier.chosen.statistics == ONE_AT_A_TIME

    def judge(params, images, key, strengths, steepness, num_tasks):
        tasks = pool.sampler(images, ways=setting.ways, shots=setting.shots, queries=queries)
        applied = [make(strengths[name]) for name, make in shifts.NAMED.items()]
        if setting.thinned:
            counts = shifts.uneven_counts(setting.ways, setting.shots, steepness)
            applied.append(shifts.class_imbalance(counts, total=setting.support))
        tasks = shifts.shifted(tasks, *applied)
        tasks = beside_support(tasks) if alone else tasks
        adapt_fn, metric_fn = _contest(classifier, setting.ways)
        return evaluate(
            adapt_fn, metric_fn, params, tasks, key, num_tasks=num_tasks, mesh=every_device()
        )

    return jax.jit(judge, static_argnums=5)


def _contest(classifier: Classifier, ways: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Adaptation and its baselines as one `adapt_fn` and one `metric_fn` for `evaluate`."""

    def adapt_fn(params: Params, support: Batch) -> dict[str, Any]:
        x, y = support
        trained = dataclasses.replace(classifier, params=params)
        return {
            ADAPTED: trained.adapt(support, ways=ways),
            FEATURES: (params, class_means(trained.features(x), y, ways)),
            PIXELS: class_means(x, y, ways),
        }

    def metric_fn(adapted: dict[str, Any], query: Batch) -> dict[str, jax.Array]:
        x, y = query
        params, means = adapted[FEATURES]
        features = dataclasses.replace(classifier, params=params).features(x)
        return {
            ADAPTED: accuracy(classifier.predict(adapted[ADAPTED], x), y),
            FEATURES: jnp.mean(nearest(means, features) == y),
            PIXELS: jnp.mean(nearest(adapted[PIXELS], queries_of(x)) == y),
        }

    return adapt_fn, metric_fn


def _by_name(judged: Evaluation) -> dict[str, Evaluation]:
    """An evaluation of each number by itself."""
    mean, ci95, per_task = jax.device_get(judged[:3])
    return {
        name: Evaluation(mean[name], ci95[name], per_task[name], int(judged.num_tasks))
        for name in mean
    }


def _row(
    condition: Condition,
    found: dict[str, Evaluation],
    clean: dict[str, Evaluation] | None,
    queries: int,
) -> dict[str, Any]:
    setting, adapted = condition.setting, found[ADAPTED]

    def ahead_of(other: Evaluation) -> dict[str, float]:
        return _numbers(paired_difference(adapted, other))

    return {
        "shift": condition.shift,
        "label": condition.label,
        "data": setting.data,
        "ways": setting.ways,
        "shots": setting.shots,
        "support": setting.support,
        "queries": queries,
        "strengths": dict(condition.strengths),
        "steepness": condition.steepness,
        "num_tasks": adapted.num_tasks,
        **{name: _numbers(judged) for name, judged in found.items()},
        "ahead": {name: ahead_of(found[name]) for name in (FEATURES, PIXELS)},
        "lost": None if clean is None else _numbers(paired_difference(clean[ADAPTED], adapted)),
    }


def _numbers(judged: Evaluation) -> dict[str, float]:
    return {"mean": float(judged.mean), "ci95": float(judged.ci95)}
