"""The outer loop: steps compiled together, followed, saved, and resumed where they stopped."""

import contextlib
import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fomaml_jax import checkpoints, outer_steps, processes, refusals, runs, signals
from fomaml_jax.agenda import Agenda, Over, agenda_of
from fomaml_jax.history import History
from fomaml_jax.keeper import Keeper, identity_of, made_by
from fomaml_jax.learner import MetaLearner, MetaState
from fomaml_jax.outer_steps import DIVERGED_STEPS, Carry
from fomaml_jax.progress import Progress, progress
from fomaml_jax.types import Params

Why = Over | signals.Stop | Literal["stopped"]

STOPS: tuple[signals.Stop | None, ...] = (None, "terminated", "interrupted")
"""What a process may have been asked; where several were asked differently, the last counts."""


class Trained(NamedTuple):
    """What training came to.

    Attributes:
        state: the learner's state after the last step.
        best: the parameters with the best score, and the last ones where nothing was scored.
        best_score: theirs; `None` without `validate`.
        metrics: a row for every report, as in the metrics file.
        stopped: why it ended: "finished", "out of time", "no improvement" (for `patience`
            scores), "stopped" (by `on_report`), "interrupted" (Ctrl-C) or "terminated" (SIGTERM).
        seconds: in training, earlier parts of a resumed run included.
    """

    state: MetaState
    best: Params
    best_score: float | None
    metrics: list[dict[str, Any]]
    stopped: Why
    seconds: float


class DivergedError(RuntimeError):
    """Too many tasks were left out for too many steps.

    Attributes:
        trained: what there was before that.
    """

    def __init__(self, message: str, trained: Trained) -> None:
        super().__init__(message)
        self.trained = trained

    def __reduce__(self):
        """As a process pool needs it."""
        return type(self), (str(self), self.trained)


def train(
    learner: MetaLearner,
    params: Params,
    sample_task: Callable[[jax.Array], Any],
    key: jax.Array,
    *,
    tasks_per_step: int,
    steps: int | None = None,
    tasks: int | None = None,
    seconds: float | None = None,
    validate: Callable[[Params], Any] | None = None,
    validate_every: int | None = None,
    lower_is_better: bool = False,
    patience: int | None = None,
    report_every: int | None = None,
    on_report: Callable[[dict[str, Any], Params], Any] | None = None,
    folder: Path | str | None = None,
    config: Mapping[str, Any] | None = None,
    checkpoint_every: int | datetime.timedelta = datetime.timedelta(minutes=2),
    resume: bool = False,
    max_left_out: float = 0.5,
    mesh: Mesh | None = None,
    name: str | None = "meta-training",
    stop_on_signals: bool = True,
) -> Trained:
    """Trains a learner on a task distribution: followed, saved, and resumed to the same numbers.

    Task `i` of step `n` is `sample_task` of a key that is a function of `(key, n, i)` alone, so a
    run that was killed and resumed ends, bit for bit, where it would have ended; on another number
    of devices it sees the same tasks and ends there up to the order of summation.

    In several processes (`jax.distributed`) each calls this alike, with a mesh over all devices.
    The first one writes, and what clocks, signals, `on_report` or `validate` say in one holds for
    all. A process in which something raises must end, so that the others do not wait for it.

    Ctrl-C and SIGTERM end the loop after the step at hand, with everything saved: `Trained.stopped`
    says so. A second Ctrl-C raises `KeyboardInterrupt` at once.

    A `folder` holds `metrics.jsonl`, a JSON object a report, and `checkpoints/`, of which the two
    newest are kept. A checkpoint is the learner's state, the best parameters and score, the count
    towards `patience`, the seconds, the sums of the report under way, and what the run is: key,
    tasks, `config`. None is kept of a state from which a run was seen to diverge: where it
    diverges, or is stopped while tasks are left out, the one before is saved, and what came after
    is done again when it is resumed. For that, two more copies of the learner's state lie on the
    devices while it trains, and the best parameters with `validate`.

    Args:
        learner: any `MetaLearner`; its `step` is compiled here.
        params: what `learner.init` takes.
        sample_task: the task distribution, `key -> Task`. Where it is composed into the
            meta-gradient, so that memory does not grow with the number of tasks, `lambda key: key`.
        key: a PRNG key; not consumed, only folded.
        tasks_per_step: tasks in a meta-batch.
        steps: outer steps. Give this, `tasks`, `seconds`, or any of them: the first to be reached
            ends the run.
        tasks: a budget of training tasks.
        seconds: a budget of time, earlier parts of a resumed run included.
        validate: `params -> score`, a number; compile it yourself. It may not keep the parameters.
        validate_every: steps between two scores; a twentieth of all steps unless given (500 where
            `seconds` alone end the run). The last of all `steps` has one too.
        lower_is_better: whether a score is an error.
        patience: ends the run after so many scores without an improvement.
        report_every: steps between two reports; a hundredth of all, at most 500, unless given (100
            where `seconds` alone end the run).
        on_report: is given each row of metrics and the parameters, which it may keep; what is true
            of its result ends the run. Rows have `step`, `tasks`, `loss` (the mean query loss since
            the last report), `support_loss_first` and `support_loss_last` (the mean support loss
            before the first and before the last inner step, if there is one), `grad_norm` (mean),
            `left_out` (tasks that were not finite) and, where there is one, `validation`. Means are
            over finite tasks, and over the steps that had any; NaN where none had.
        folder: where metrics and checkpoints go; nothing is written unless given. One process at a
            time trains there.
        config: what else makes the run what it is, by name, as plain JSON: rates, a digest of the
            data. It goes into every checkpoint, and a run is resumed under the same values only; a
            name that a checkpoint does not have yet is not compared.
        checkpoint_every: steps or time between two checkpoints.
        resume: goes on from the newest intact checkpoint in `folder`, from the start if there is
            none.
        max_left_out: a run in which more than this share of the tasks of each of ten steps in a row
            is not finite has diverged.
        mesh: the one that the meta-gradient was given, if any.
        name: what the progress is called; `None` shows none.
        stop_on_signals: whether to heed Ctrl-C and SIGTERM as above.

    Returns:
        A `Trained`.

    Raises:
        ImportError: for a folder without orbax, which writes the checkpoints.
        ValueError: for no budget, numbers below one, a folder with a run in it (without `resume`)
            or one that another process trains in, a checkpoint of another problem, key, meta-batch,
            `config` or `lower_is_better`, or where all are damaged; where `validate` was not given
            before and is now, or the other way round; where several processes were called
            differently. What a checkpoint is refused for is a `CheckpointError`.
        TypeError: for a learner or a key that is none; for a `config` that is not plain JSON (a
            ValueError for NaN in it).
        DivergedError: where a run has diverged; it holds what there was before.

    Warns:
        UserWarning: for every damaged checkpoint that was left out, for rows of metrics that are
            missing, and where another version of JAX, device or number of devices saved the run.

    Example:
        >>> import jax, jax.numpy as jnp, optax, fomaml_jax as fj
        >>> sample_task = fj.tasks.sinusoid(shots=5, queries=10)
        >>> net = fj.models.mlp()
        >>> loss = lambda params, batch: jnp.mean((net.apply(params, batch[0]) - batch[1]) ** 2)
        >>> learner = fj.meta_learner(
        ...     fj.over_tasks(fj.fomaml(loss, optax.sgd(0.01), 1)), optax.sgd(1e-3))
        >>> params = net.init(jax.random.key(0), jnp.zeros((1, 1)))
        >>> trained = fj.train(learner, params, sample_task, jax.random.key(1),
        ...     tasks_per_step=4, steps=20, report_every=10, name=None)
        >>> trained.stopped, [row["step"] for row in trained.metrics]
        ('finished', [10, 20])
    """
    tasks_per_step = refusals.check_at_least("tasks_per_step", tasks_per_step, 1)
    agenda = agenda_of(
        tasks_per_step=tasks_per_step,
        steps=steps,
        tasks=tasks,
        seconds=seconds,
        validates=validate is not None,
        validate_every=validate_every,
        patience=patience,
        report_every=report_every,
        checkpoint_every=checkpoint_every,
        max_left_out=max_left_out,
    )
    if folder is None and resume:
        raise ValueError("there is nothing to resume without a folder; pass folder too")
    for part in ("init", "step"):
        if not callable(getattr(learner, part, None)):
            raise TypeError(f"learner has no {part}; make one, meta_learner(meta_gradient, adam)")
    refusals.check_function("sample_task", sample_task, "key -> Task")
    if validate is not None:
        refusals.check_function("validate", validate, "params -> score")
    if on_report is not None:
        refusals.check_function("on_report", on_report, "(row, params) -> whether to stop")
    refusals.check_key(key)
    refusals.check_mesh(mesh)
    with jax.transfer_guard_host_to_device("allow"):  # once, and meant
        history = History(outer_steps.start(learner.init(params)), scored=validate is not None)
    identity = identity_of(key, tasks_per_step, config)
    identity["validate"] = "not given" if validate is None else "given"
    if validate is not None:
        identity["lower_is_better"] = lower_is_better
    keeper = Keeper(None if folder is None else Path(folder).expanduser(), identity, made_by(mesh))
    processes.check_alike(json.dumps([identity, dataclasses.asdict(agenda)], default=str))
    with contextlib.ExitStack() as stack:
        if keeper.folder is not None:
            checkpoints.check_possible()
            with processes.first_goes_ahead():
                stack.enter_context(runs.alone(keeper.folder))
                keeper.take_up(history, resume)
        history.carry = outer_steps.placed(history.carry, mesh)
        loop = _Loop(
            advance=outer_steps.compiled(learner, sample_task, key, tasks_per_step, max_left_out),
            history=history,
            agenda=agenda,
            keeper=keeper,
            tasks_per_step=tasks_per_step,
            max_left_out=max_left_out,
            validate=validate,
            lower_is_better=lower_is_better,
            on_report=on_report,
        )
        asked = stack.enter_context(signals.noticed(stop_on_signals))
        total = None if agenda.steps is None else agenda.steps * tasks_per_step
        name = name if processes.is_first() else None
        tell = stack.enter_context(progress(name, total, history.step * tasks_per_step))
        try:
            why = loop.until_over(asked, tell)
        except DivergedError:
            with asked.held(), contextlib.suppress(OSError):
                loop.go_back()
            raise
        except (Exception, KeyboardInterrupt):  # one in a function of the caller's; a second Ctrl-C
            with asked.held(), contextlib.suppress(OSError):
                if loop.latest.step:  # the state before the step that went wrong
                    loop.save(loop.latest)
            raise
        with asked.held():
            loop.save(history)
        (stop,) = processes.greatest([STOPS.index(asked.to)])
    return _trained(history, STOPS[int(stop)] or why)


@dataclasses.dataclass(kw_only=True)
class _Loop:
    """Steps, and what is due after each, until something ends them."""

    advance: Callable[[Carry, jax.Array, jax.Array], Carry]
    history: History
    agenda: Agenda
    keeper: Keeper
    tasks_per_step: int
    max_left_out: float
    validate: Callable[[Params], Any] | None
    lower_is_better: bool
    on_report: Callable[[dict[str, Any], Params], Any] | None

    def __post_init__(self) -> None:
        self.began = time.monotonic() - self.history.seconds
        self.last_saved = time.monotonic()
        self.latest = self.good = self.history.copied()

    def until_over(self, asked: signals.Asked, tell: Progress) -> Why:
        """Takes steps until something ends them, and says what."""
        history, stride, told = self.history, 1, False
        while True:
            # Clocks, signals and callbacks may differ from process to process, steps may not.
            mine = (STOPS.index(asked.to), told, stride, history.seconds)
            stop, told, stride, seconds = processes.greatest(mine)
            over = self.agenda.over(history.step, history.since_best, seconds)
            if why := STOPS[int(stop)] or over or ("stopped" if told else None):
                return why
            stride = self.take(int(stride))
            if history.streak >= DIVERGED_STEPS:
                tell(history.step * self.tasks_per_step, history.note())
                self.keeper.append(history.report(self.tasks_per_step))
                advice = _advice(history.step, self.max_left_out)
                raise DivergedError(advice, _trained(self.good, "stopped"))
            if self.agenda.reports(history.step):
                told = self.report()
            history.seconds = time.monotonic() - self.began
            tell(history.step * self.tasks_per_step, history.note())
            with asked.held():
                self.save_if_due()
            self.latest = history.copied()

    def take(self, stride: int) -> int:
        """Takes at most so many steps in one call; how many the next may take."""
        history, called, before = self.history, time.monotonic(), self.history.step
        until = min(before + stride, self.agenda.next_event(before))
        limits = jax.device_put((np.int32(until), np.bool(history.reported)))
        history.carry = jax.block_until_ready(self.advance(history.carry, *limits))
        if history.streak < history.step - self.latest.step:
            # What was there before is good: the tasks of the step after it were.
            self.good = self.latest
        return outer_steps.next_stride(history.step - before, time.monotonic() - called)

    def report(self) -> bool:
        """Writes a row of metrics, with a score where one is due; whether that ends the run."""
        history, score = self.history, None
        if self.validate is not None and self.agenda.scores(history.step):
            mine = _number(self.validate(history.params))
            (score,) = processes.greatest([mine])
            history.score(score, self.lower_is_better)
        row = history.report(self.tasks_per_step, score)
        self.keeper.append(row)
        if self.on_report is None:
            return False
        return bool(self.on_report(dict(row), jax.tree.map(jnp.copy, history.params)))

    def save_if_due(self) -> None:
        """Saves this state, unless it may have diverged."""
        due = self.agenda.saves(self.history.step, time.monotonic() - self.last_saved)
        if due and self.history.is_sound:
            self.keeper.save(self.history)
            self.last_saved = time.monotonic()

    def save(self, history: History) -> None:
        """Saves a state, or the last good one if tasks were left out on the way to it.

        Then it may be this one that has diverged, and the same steps are taken again.
        """
        if history.is_sound:
            self.keeper.save(history)
        else:
            self.go_back()

    def go_back(self) -> None:
        """Keeps the last good state alone, of what was saved before the run was seen to diverge."""
        if self.good.step:
            self.keeper.save(self.good)
        self.keeper.forget_after(self.good.step)


def _number(score: Any) -> float:
    try:
        return float(jax.device_get(score))
    except TypeError:
        raise TypeError(
            "validate must return a number, such as fj.evaluate(...).mean, got "
            f"{refusals.describe(score)}"
        ) from None


def _trained(history: History, why: Why) -> Trained:
    meta = history.carry.meta
    best = meta.params if history.best_score is None else history.best
    return Trained(meta, best, history.best_score, history.metrics, why, history.seconds)


def _advice(step: int, max_left_out: float) -> str:
    return (
        f"training has diverged: in each of the {DIVERGED_STEPS} steps up to step {step}, more "
        f"than {100 * max_left_out:g}% of the tasks had a loss or a gradient that is not finite; "
        "lower the inner rate, clip the inner gradients, or lower the outer rate"
    )
