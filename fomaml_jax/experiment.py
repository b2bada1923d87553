"""One run, from its options to a folder with parameters, metrics, pictures and result."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from fomaml_jax import (
    baselines,
    checkpoints,
    option_checks,
    options,
    pictures,
    problems,
    processes,
    runs,
    training,
)
from fomaml_jax.batch_statistics import TRANSDUCTIVE
from fomaml_jax.checkpoints import CheckpointError
from fomaml_jax.datasets import GroupSplits, digest
from fomaml_jax.devices import mesh_for, sampled_learner, tune_sampled
from fomaml_jax.evaluation import Evaluation, paired_difference
from fomaml_jax.parallel import TasksAtOnce
from fomaml_jax.problems import Problem
from fomaml_jax.tasks import TaskDistribution
from fomaml_jax.training import DivergedError, Trained
from fomaml_jax.types import MetaGradient, Params
from fomaml_jax.variants import variants_of

VALIDATIONS = 20
"""How often training is followed on validation tasks."""

VALIDATION_TASKS = 200
"""How many tasks follow training: they draw the curve, and choose nothing but with `--patience`."""


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


class StoppedError(Exception):
    """Training was asked to stop, and can be resumed.

    Attributes:
        why: "interrupted" or "terminated".
        step: outer steps that were taken.
        saved: those of them that were saved: all, unless tasks were left out in the last ones.
    """

    def __init__(self, why: str, step: int, saved: int) -> None:
        super().__init__(f"{why} after step {step}")
        self.why, self.step, self.saved = why, step, saved

    def __reduce__(self):
        """As a process pool needs it."""
        return type(self), (self.why, self.step, self.saved)


def train(
    chosen: options.Options,
    problem: Problem,
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Meta-trains, evaluates on unseen tasks, and fills the run's folder.

    Args:
        chosen: the options.
        problem: what they describe.
        folder: where the run goes.
        say: is given what a person who waits may want to read.
        resume: whether to go on with the run that is in the folder.

    Returns:
        What `result.json` holds.

    Raises:
        StoppedError: when interrupted or terminated while training.
        DivergedError: where too many tasks are left out for too long; the parameters before that
            are saved.
        ValueError: for a run that cannot be resumed.
    """
    with runs.alone(folder):
        return _train(chosen, problem, folder, say, resume)


def _train(
    chosen: options.Options,
    problem: Problem,
    folder: Path,
    say: Callable[[str], None],
    resume: bool,
) -> dict[str, Any]:
    keys = Keys.of(chosen.seed)
    if not resume:
        runs.write_json(folder / runs.CONFIG, options.to_json(chosen))
        runs.save_parameters(folder, problem.params)
    elif runs.is_handed_on(folder, problem.params):
        raise CheckpointError(
            f"{folder} holds a trained network and nothing of its training: there is no run to go "
            "on with"
        )
    if problem.splits is not None and not _has_kept_data(folder):
        runs.write_json(folder / runs.DATA, described(problem))
    elif problem.splits is not None:
        runs.check_unchanged(folder, described(problem))
    tuned = _tuned(chosen, problem, folder, keys, say, resume) if chosen.tune else problem
    trained = meta_train(chosen, tuned, folder, keys, resume)
    params = parameters_of(trained, chosen)
    runs.save_parameters(folder, params)
    if processes.is_first():
        (folder / runs.DIVERGED).unlink(missing_ok=True)
    # Of a resumed run only now: had it been refused, this would not be its configuration.
    runs.write_json(folder / runs.CONFIG, options.to_json(chosen))
    if trained.stopped in ("interrupted", "terminated"):
        saved = checkpoints.newest_step(folder / runs.CHECKPOINTS) or 0
        raise StoppedError(trained.stopped, int(trained.state.step), saved)
    judged = evaluate(chosen, problem, params)
    taken = dataclasses.replace(chosen, steps=max(1, int(trained.state.step)))
    with runs.replacing(folder / runs.PER_TASK) as temporary:
        np.save(temporary, judged.pop("per_task"), allow_pickle=False)
    result = judged | {
        "baselines": _compare(taken, problem, keys) if chosen.compare else {},
        "stopped": trained.stopped,
        "tasks_seen": int(trained.state.step) * chosen.tasks_per_step,
        "seconds": round(trained.seconds, 1),
        "config": options.to_json(chosen),
        "versions": runs.versions(),
    }
    if processes.is_first():
        pictures.draw_run(chosen, problem, jax.device_get(params), keys.test, folder, result)
    runs.write_json(folder / runs.RESULT, result)  # last: with it, the run is finished
    return result


def evaluate(chosen: options.Options, problem: Problem, params: Params) -> dict[str, Any]:
    """Adapts to unseen tasks; returns what there is to say as plain JSON, and `per_task`."""
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
        "per_task": np.asarray(judged.per_task[-1]),
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


def difference(
    chosen: options.Options,
    problem: Problem,
    params: Params,
    other_chosen: options.Options,
    other_problem: Problem,
    other_params: Params,
) -> dict[str, dict[str, float]]:
    """Another run on the very same unseen tasks, and what it is apart from this, task by task.

    Each adapts by as many steps as it reports.

    Raises:
        ValueError: for runs of different pictures.
    """
    if _tested_on(problem) != _tested_on(other_problem):
        raise ValueError(
            "the runs are judged on different tasks, their data or splits are not the same"
        )

    def judged(problem: Problem, params: Params, num_steps: int) -> Evaluation:
        judge = problems.judge_of(
            problem,
            problem.test,
            num_steps=num_steps,
            num_tasks=chosen.eval_tasks,
            every_step=False,
        )
        return judge(params, Keys.of(chosen.seed).test)

    one = judged(problem, params, chosen.adaptation_steps)
    other_steps = other_chosen.adaptation_steps
    other = judged(other_problem, other_params, other_steps)
    return {
        f"the other run, after {other_steps} steps": last(other),
        "this run minus the other": last(paired_difference(one, other)),
    }


def last(judged: Evaluation) -> dict[str, float]:
    """Mean and interval after the last step of adaptation."""
    return {"mean": float(judged.mean[-1]), "ci95": float(judged.ci95[-1])}


def meta_train(
    chosen: options.Options, problem: Problem, folder: Path, keys: Keys, resume: bool
) -> Trained:
    """First-order meta-training, followed on validation tasks, its parameters saved on the way."""
    judge = problems.judge_of(
        problem,
        problem.validation,
        num_steps=chosen.adaptation_steps,
        num_tasks=VALIDATION_TASKS,
    )

    sign = -1 if problem.lower_is_better else 1
    rows = runs.read_metrics(folder) if resume else []
    scores = [sign * row["validation"] for row in rows if "validation" in row]

    def follow(row: dict[str, Any], params: Params) -> None:
        if "validation" in row:
            scores.append(sign * row["validation"])
            if chosen.patience is None or scores[-1] >= np.nanmax([*scores, -np.inf]):
                runs.save_parameters(folder, params)
            runs.write_json(folder / runs.CONFIG, options.to_json(chosen))
        if chosen.tensorboard and processes.is_first():
            if not boards:  # rows that a killed run had written beyond this one are purged
                boards.append(stack.enter_context(_tensorboard(folder, row["step"])))
            for name in sorted(row.keys() - {"step"}):
                boards[0].add_scalar(name, row[name], row["step"])
            boards[0].flush()  # before the checkpoint that takes the row for written

    boards: list[Any] = []
    with contextlib.ExitStack() as stack:
        try:
            return training_of(
                chosen,
                problem,
                keys.train,
                validate=lambda params: judge(params, keys.validation).mean[-1],
                validate_every=-(-chosen.steps // VALIDATIONS),
                on_report=follow,
                folder=folder,
                config=options.identity(chosen) | _data_of(problem),
                resume=resume,
            )
        except DivergedError as error:
            runs.save_parameters(folder, parameters_of(error.trained, chosen))
            runs.write_json(folder / runs.DIVERGED, {"advice": str(error)})
            raise


def parameters_of(trained: Trained, chosen: options.Options) -> Params:
    """The last ones; with patience the best by validation."""
    return trained.state.params if chosen.patience is None else trained.best


def described(problem: Problem) -> dict[str, Any]:
    """The data of a run, so that a later evaluation knows them again, and what was trained on."""
    assert problem.splits is not None
    names = {name: list(classes.names) for name, classes in problem.splits._asdict().items()}
    found: dict[str, Any] = {"digest": digest(problem.splits), "classes": names}
    if isinstance(problem.splits, GroupSplits):
        found["standard"] = list(problem.standard)
        found["columns"] = {name: list(pair) for name, pair in problem.columns.items()}
    return found


def _has_kept_data(folder: Path) -> bool:
    """Whether there is a checkpoint, which is of these data alone, and what is said of them.

    Without one training begins at the start, on whatever the data are now.
    """
    saved = checkpoints.newest_step(folder / runs.CHECKPOINTS)
    return (folder / runs.DATA).exists() and saved is not None


def _tested_on(problem: Problem) -> str | None:
    """A fingerprint of the test classes or groups: of the others runs may make what they like."""
    if problem.splits is None:
        return None
    test = problem.splits.test
    return digest(problem.splits._replace(train=test, validation=test))


def _data_of(problem: Problem) -> dict[str, str]:
    return {} if problem.splits is None else {"data": digest(problem.splits)}


def training_of(
    chosen: options.Options, problem: Problem, key: jax.Array, **follow: Any
) -> Trained:
    """`train` as the options have it."""
    minutes = chosen.minutes
    return train_learner(
        problem.meta_gradient,
        problem.train,
        problem.params,
        problem.outer(chosen.steps),
        key,
        steps=chosen.steps,
        tasks_per_step=chosen.tasks_per_step,
        tasks_at_once=problem.tasks_at_once,
        seconds=None if minutes is None else 60 * minutes,
        patience=chosen.patience,
        lower_is_better=problem.lower_is_better,
        max_left_out=chosen.max_left_out,
        checkpoint_every=option_checks.checkpoint_interval(chosen.checkpoint_every),
        **follow,
    )


def train_learner(
    meta_gradient: MetaGradient,
    tasks: TaskDistribution,
    params: Params,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    tasks_per_step: int,
    tasks_at_once: TasksAtOnce,
    **follow: Any,
) -> Trained:
    """`train` with the tasks of a step shared out among the devices."""
    mesh = mesh_for(tasks_per_step)
    learner = sampled_learner(
        meta_gradient, tasks, optimizer, mesh=mesh, tasks_at_once=tasks_at_once
    )
    return training.train(
        learner,
        params,
        lambda key: key,
        key,
        tasks_per_step=tasks_per_step,
        mesh=mesh,
        **follow,
    )


def _tensorboard(folder: Path, step: int) -> Any:
    from tensorboardX import SummaryWriter  # an extra, whose absence the options refuse

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step)


def _tuned(
    chosen: options.Options,
    problem: Problem,
    folder: Path,
    keys: Keys,
    say: Callable[[str], None],
    resume: bool,
) -> Problem:
    """The problem with its training step in the form, and as many tasks at once, as is fastest.

    A run that is resumed keeps what was chosen for it: another form rounds differently.
    """
    path = folder / runs.PLAN
    if resume and (path.is_file() or (folder / runs.CHECKPOINTS).is_dir()):
        try:
            saved = json.loads(path.read_text())
            return dataclasses.replace(
                problem,
                meta_gradient=variants_of(problem.meta_gradient)[saved["variant"]],
                tasks_at_once=saved["tasks_at_once"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
    plan = tune_sampled(
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
            "versions": runs.versions(),
        },
    )
    return dataclasses.replace(
        problem, meta_gradient=plan.meta_gradient, tasks_at_once=plan.tasks_at_once
    )


def _compare(chosen: options.Options, problem: Problem, keys: Keys) -> dict[str, dict[str, float]]:
    """The baselines, judged on the same unseen tasks; `chosen.steps` are those that were taken."""

    def fit(meta_gradient, tasks, params, optimizer, **kwargs) -> Params:
        args = (meta_gradient, tasks, params, optimizer, keys.train)
        # A baseline that diverges is a result, and one that is interrupted is not.
        trained = train_learner(*args, max_left_out=1.0, stop_on_signals=False, **kwargs)
        return trained.state.params

    compared = {}
    if isinstance(chosen, options.ImageOptions):
        nearest = baselines.nearest_class_mean(chosen, problem, keys.test)
        compared["nearest class mean on pixels"] = last(nearest)
    elif isinstance(chosen, options.Table):
        compared["the mean of the rows given"] = last(baselines.own_mean(problem))
    else:
        second = baselines.second_order(chosen, problem, fit, keys.test)
        compared["second-order MAML"] = last(second)
    joint, factor = baselines.joint_pretraining(chosen, problem, fit, keys.test)
    compared["joint pre-training, fine-tuned"] = last(joint) | {"inner_rate_factor": factor}
    return compared
