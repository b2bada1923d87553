"""One run, from its options to a folder with parameters, metrics, pictures and result."""

import collections
import contextlib
import dataclasses
import platform
import time
from collections.abc import Callable, Generator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from fomaml_jax import baselines, options, pictures, problems, runs
from fomaml_jax.batch_statistics import TRANSDUCTIVE
from fomaml_jax.evaluation import Evaluation
from fomaml_jax.problems import Problem
from fomaml_jax.training import meta_train, tune_training
from fomaml_jax.types import Params

VALIDATIONS = 20
"""How often training is followed on validation tasks."""

VALIDATION_TASKS = 200
"""How many tasks follow training: they choose nothing, they draw the curve."""


@dataclasses.dataclass(frozen=True)
class Keys:
    """Independent streams of one seed."""

    train: jax.Array
    validation: jax.Array
    test: jax.Array

    @classmethod
    def of(cls, seed: int) -> "Keys":
        """The streams of a seed."""
        return cls(*jax.random.split(jax.random.key(seed), 3))


def train(
    chosen: options.Options,
    problem: Problem,
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Meta-trains, evaluates on unseen tasks, and fills the run's folder.

    Args:
        chosen: the options.
        problem: what they describe.
        folder: where the run goes.
        say: is given what a person who waits may want to read.

    Returns:
        What `result.json` holds.

    Raises:
        KeyboardInterrupt: when interrupted; the folder then holds the parameters so far.
    """
    keys = Keys.of(chosen.seed)
    runs.write_json(folder / runs.CONFIG, options.to_json(chosen))
    runs.save_parameters(folder, problem.params)
    tuned = _tuned(chosen, problem, folder, keys, say) if chosen.tune else problem
    started = time.monotonic()
    params = _meta_train(chosen, tuned, folder, keys)
    seconds = time.monotonic() - started
    result = evaluate(chosen, problem, params) | {
        "baselines": _compare(chosen, problem, keys) if chosen.compare else {},
        "tasks_seen": chosen.steps * chosen.tasks_per_step,
        "seconds": round(seconds, 1),
        "config": options.to_json(chosen),
        "versions": versions(),
    }
    runs.write_json(folder / runs.RESULT, result)
    pictures.draw_run(chosen, problem, params, keys.test, folder, result)
    return result


def evaluate(chosen: options.Options, problem: Problem, params: Params) -> dict[str, Any]:
    """Adapts to unseen tasks; returns what there is to say as plain JSON."""
    judge = problems.judge_of(
        problem, problem.test, num_steps=chosen.adaptation_steps, num_tasks=chosen.eval_tasks
    )
    judged = judge(params, Keys.of(chosen.seed).test)
    otherwise = {
        name: problems.judge_of(
            problem,
            tasks,
            num_steps=chosen.adaptation_steps,
            num_tasks=chosen.eval_tasks,
            every_step=False,
        )(params, Keys.of(chosen.seed).test)
        for name, tasks in problem.otherwise.items()
    }
    images = isinstance(chosen, options.ImageOptions)
    return {
        "dataset": options.name_of(chosen),
        "ways": chosen.ways if images else None,
        "shots": chosen.shots,
        "metric": problem.metric,
        **last(judged),
        "num_tasks": int(judged.num_tasks),
        "transductive": problem.statistics == TRANSDUCTIVE if images else None,
        "statistics": problem.statistics,
        "otherwise": {name: last(found) for name, found in otherwise.items()},
        "inner_steps": chosen.adaptation_steps,
        "before_adaptation": float(judged.mean[0]),
        "per_step": [
            {"inner_steps": k, "mean": float(m), "ci95": float(c)}
            for k, (m, c) in enumerate(zip(judged.mean, judged.ci95, strict=True))
        ],
    }


def versions() -> dict[str, str]:
    """The versions and the device behind a result."""
    names = ("fomaml-jax", "jax", "jaxlib", "optax", "flax", "numpy")
    found = {name: metadata.version(name) for name in names}
    device = jax.devices()[0]
    return found | {"python": platform.python_version(), "device": str(device.device_kind)}


def last(judged: Evaluation) -> dict[str, float]:
    """Mean and interval after the last step of adaptation."""
    return {"mean": float(judged.mean[-1]), "ci95": float(judged.ci95[-1])}


def _meta_train(chosen: options.Options, problem: Problem, folder: Path, keys: Keys) -> Params:
    """First-order meta-training, followed on validation tasks, its parameters saved on the way."""
    validate = problems.judge_of(
        problem,
        problem.validation,
        num_steps=chosen.adaptation_steps,
        num_tasks=VALIDATION_TASKS,
    )
    training = training_of(chosen, problem, keys.train)
    params, validations = problem.params, 0
    try:
        with contextlib.closing(training):  # and its progress bar, before anything else is said
            for params, row in training:
                due = row["step"] * VALIDATIONS // chosen.steps
                if due > validations:
                    validations = due
                    row["validation"] = float(validate(params, keys.validation).mean[-1])
                    runs.save_parameters(folder, params)
                runs.append_metrics(folder, row)
    finally:
        runs.save_parameters(folder, params)
    return params


def training_of(
    chosen: options.Options, problem: Problem, key: jax.Array
) -> Generator[tuple[Params, dict[str, Any]], None, None]:
    """`meta_train` as the options have it."""
    return meta_train(
        problem.meta_gradient,
        problem.train,
        problem.params,
        problem.outer(chosen.steps),
        key,
        steps=chosen.steps,
        tasks_per_step=chosen.tasks_per_step,
        tasks_at_once=problem.tasks_at_once,
    )


def _tuned(
    chosen: options.Options,
    problem: Problem,
    folder: Path,
    keys: Keys,
    say: Callable[[str], None],
) -> Problem:
    """The problem with its training step in the form, and as many tasks at once, as is fastest."""
    plan = tune_training(
        problem.meta_gradient,
        problem.train,
        problem.params,
        keys.train,
        tasks_per_step=chosen.tasks_per_step,
    )
    say(str(plan))
    runs.write_json(
        folder / runs.PLAN,
        {
            "variant": plan.variant,
            "tasks_at_once": plan.tasks_at_once,
            "trials": [trial._asdict() for trial in plan.trials],
            "versions": versions(),
        },
    )
    return dataclasses.replace(
        problem, meta_gradient=plan.meta_gradient, tasks_at_once=plan.tasks_at_once
    )


def _compare(chosen: options.Options, problem: Problem, keys: Keys) -> dict[str, dict[str, float]]:
    """The baselines, judged on the same unseen tasks."""

    def fit(meta_gradient, tasks, params, optimizer, **kwargs) -> Params:
        trained = meta_train(meta_gradient, tasks, params, optimizer, keys.train, **kwargs)
        return collections.deque(trained, maxlen=1)[0][0]

    compared = {}
    if isinstance(chosen, options.ImageOptions):
        nearest = baselines.nearest_class_mean(chosen, problem, keys.test)
        compared["nearest class mean on pixels"] = last(nearest)
    else:
        second = baselines.second_order(chosen, problem, fit, keys.test)
        compared["second-order MAML"] = last(second)
    joint, factor = baselines.joint_pretraining(chosen, problem, fit, keys.test)
    compared["joint pre-training, fine-tuned"] = last(joint) | {"inner_rate_factor": factor}
    return compared
