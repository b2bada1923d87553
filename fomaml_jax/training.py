"""The outer loop: steps compiled together, followed, saved, and resumed where they stopped."""

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import operator
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fomaml_jax import checkpoints, processes, runs, signals
from fomaml_jax.agenda import Over, agenda_of
from fomaml_jax.checkpoints import Checkpoint, CheckpointError
from fomaml_jax.learner import MetaLearner, MetaState
from fomaml_jax.progress import progress
from fomaml_jax.tasks import task_keys
from fomaml_jax.types import Params, TaskInfo

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints in a run's folder."""

CALL_SECONDS = 1.0
"""How long one compiled call should take: as often can a run be followed, saved and stopped."""

DIVERGED_STEPS = 10
"""After so many steps in a row that left out too many tasks, a run has diverged."""

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
    is done again when it is resumed.

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
        validate_every: steps between two scores; a twentieth of all steps unless given. The last
            of all `steps` has one too.
        lower_is_better: whether a score is an error.
        patience: ends the run after so many scores without an improvement.
        report_every: steps between two reports; a hundredth of all, at most 500, unless given.
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
        ValueError: for no budget, numbers below one, a folder with a run in it (without `resume`)
            or one that another process trains in, a checkpoint of another problem, key, meta-batch
            or `config`, or where all are damaged; where several processes were called differently.
        TypeError: for a `config` that is not plain JSON; a ValueError for NaN in it.
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
    tasks_per_step = operator.index(tasks_per_step)
    place = None if folder is None else Path(folder)
    with jax.transfer_guard_host_to_device("allow"):  # once, and meant
        run = _Run(_start(learner.init(params)), scored=validate is not None)
    identity = {"key": _key_numbers(key), "tasks_per_step": tasks_per_step}
    identity |= {"random numbers": str(jax.random.key_impl(key))}
    identity |= {"config": json.loads(json.dumps(dict(config or {}), allow_nan=False))}
    if place is None and resume:
        raise ValueError("there is nothing to resume without a folder; pass folder too")
    advance = _compiled(learner, sample_task, key, tasks_per_step, max_left_out)
    total = None if agenda.steps is None else agenda.steps * tasks_per_step
    made_by = _made_by(mesh)
    processes.check_alike(json.dumps([identity, dataclasses.asdict(agenda)], default=str))
    with contextlib.ExitStack() as stack:
        if place is not None:
            with processes.first_goes_ahead():
                stack.enter_context(runs.alone(place))
                run.open(place, identity, made_by, resume)
        run.carry = _placed(run.carry, mesh)
        began, last_saved = time.monotonic() - run.seconds, time.monotonic()
        stride, told = 1, False
        good = latest = run.copied()

        def keep(run: _Run) -> None:
            if place is not None:
                run.save(place, identity, made_by)

        def append(row: dict[str, Any]) -> None:
            if place is not None:
                runs.append_metrics(place, row)

        asked = stack.enter_context(signals.noticed(stop_on_signals))
        name = name if processes.is_first() else None
        tell = stack.enter_context(progress(name, total, "tasks", run.step * tasks_per_step))
        try:
            while True:
                # Clocks, signals and callbacks may differ from process to process, steps may not.
                mine = (STOPS.index(asked.to), told, stride, run.seconds)
                stop, told, stride, seconds = processes.greatest(mine)
                over = agenda.over(run.step, run.since_best, seconds)
                if why := STOPS[int(stop)] or over or ("stopped" if told else None):
                    break
                called, before = time.monotonic(), run.step
                until = min(run.step + int(stride), agenda.next_event(run.step))
                limits = jax.device_put((np.int32(until), np.bool(run.reported)))
                run.carry = jax.block_until_ready(advance(run.carry, *limits))
                # What was there before is good if the tasks of the step after it were.
                good = latest if run.streak < run.step - latest.step else good
                stride = _next_stride(run.step - before, time.monotonic() - called)
                if run.streak >= DIVERGED_STEPS:
                    tell(run.step * tasks_per_step, run.note())
                    append(run.report(tasks_per_step))
                    raise DivergedError(_advice(run.step, max_left_out), good.trained("stopped"))
                if agenda.reports(run.step):
                    row = run.report(tasks_per_step)
                    if validate is not None and agenda.scores(run.step):
                        mine = float(jax.device_get(validate(run.params)))
                        run.score(processes.greatest([mine])[0], lower_is_better)
                    append(row)
                    if on_report is not None and on_report(dict(row), run.copied().params):
                        told = True
                run.seconds = time.monotonic() - began
                tell(run.step * tasks_per_step, run.note())
                due = agenda.saves(run.step, time.monotonic() - last_saved)
                if due and run.is_sound:
                    keep(run)
                    last_saved = time.monotonic()
                latest = run.copied()
        except DivergedError:
            with contextlib.suppress(OSError):
                if good.step:
                    keep(good)
                if place is not None and processes.is_first():  # saved before this was known
                    checkpoints.forget_after(place / CHECKPOINTS, good.step)
            raise
        except Exception:  # such as one in a function of the caller's
            if latest.step:
                with contextlib.suppress(OSError):
                    keep(latest if latest.is_sound else good)
            raise
        # Where tasks were left out just now, it may be this state that has diverged: from the one
        # before, the same steps are taken again.
        keep(run if run.is_sound else good)
        (stop,) = processes.greatest([STOPS.index(asked.to)])
    return run.trained(STOPS[int(stop)] or why)


class _Carry(NamedTuple):
    """What goes from step to step: the learner's state, and sums since the last report."""

    meta: MetaState
    step: jax.Array
    counted: jax.Array
    """Steps with a task that was finite: those that the means are over."""
    loss: jax.Array
    support_losses: jax.Array
    """Before the first and before the last inner step, and in how many steps there were any."""
    grad_norm: jax.Array
    left_out: jax.Array
    streak: jax.Array
    """Steps in a row, up to now, that left out too many tasks."""


_SUMS = ("counted", "loss", "support_losses", "grad_norm", "left_out")


def _start(meta: MetaState) -> _Carry:
    none = jnp.zeros((), jnp.int32)
    return _Carry(meta, none, none, jnp.zeros(()), jnp.zeros(3), jnp.zeros(()), none, none)


def _support_losses(tasks: TaskInfo) -> jax.Array:
    """The mean over finite tasks before the first and before the last inner step, and 1; or 0."""
    losses = tasks.support_losses
    if np.ndim(losses) != 2 or losses.shape[1] == 0:
        return jnp.zeros(3)
    ends = jnp.stack([losses[:, 0], losses[:, -1], jnp.ones_like(losses[:, 0])], axis=1)
    total = jnp.where(tasks.finite[:, None], ends, 0).sum(0)
    return total / jnp.maximum(tasks.finite.sum(), 1).astype(total.dtype)


def _compiled(
    learner: MetaLearner,
    sample_task: Callable[[jax.Array], Any],
    key: jax.Array,
    tasks_per_step: int,
    max_left_out: float,
) -> Callable[[_Carry, jax.Array, jax.Array], _Carry]:
    """`(carry, until, reported)`: steps until that many are done, or the run has diverged.

    However many steps a call takes, the numbers are the same: the sums go from call to call.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(carry: _Carry, until: jax.Array, reported: jax.Array) -> _Carry:
        sums = {name: getattr(carry, name) for name in _SUMS}
        begin = {name: jnp.where(reported, jnp.zeros_like(x), x) for name, x in sums.items()}

        def unfinished(carry: _Carry) -> jax.Array:
            return (carry.step < until) & (carry.streak < DIVERGED_STEPS)

        def body(carry: _Carry) -> _Carry:
            sampled = jax.vmap(sample_task)(task_keys(key, carry.step, tasks_per_step))
            meta, info = learner.step(carry.meta, sampled)
            left_out = tasks_per_step - info.num_finite
            too_many = left_out > math.floor(max_left_out * tasks_per_step + 1e-6)
            return _Carry(
                meta,
                carry.step + 1,
                carry.counted + (info.num_finite > 0).astype(jnp.int32),
                carry.loss + info.loss.astype(carry.loss.dtype),
                carry.support_losses + _support_losses(info.tasks).astype(carry.loss.dtype),
                carry.grad_norm + info.grad_norm.astype(carry.grad_norm.dtype),
                carry.left_out + left_out,
                jnp.where(too_many, carry.streak + 1, 0),
            )

        return jax.lax.while_loop(unfinished, body, carry._replace(**begin))

    return advance


def _placed(carry: _Carry, mesh: Mesh | None) -> _Carry:
    """A copy, because every call takes its buffers; where it will come back, to compile once."""
    carry = jax.tree.map(jnp.copy, carry)
    return carry if mesh is None else jax.device_put(carry, NamedSharding(mesh, PartitionSpec()))


def _next_stride(taken: int, seconds: float) -> int:
    """How many steps the next call may take, after one that took so many in so long."""
    return max(1, min(10 * taken, int(taken * CALL_SECONDS / max(seconds, 1e-6))))


@dataclasses.dataclass
class _Run:
    """All that has happened so far."""

    carry: _Carry
    scored: bool
    last_report: int = 0
    best: Params = None
    best_score: float | None = None
    since_best: int = 0
    """Scores since the best."""
    seconds: float = 0.0
    left_out: int = 0
    """Tasks left out up to the last report."""
    saved: int | None = None
    """The step of the last checkpoint."""
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.scored and self.best is None:
            self.best = jax.tree.map(jnp.copy, self.params)

    @property
    def params(self) -> Params:
        return self.carry.meta.params

    @property
    def step(self) -> int:
        return int(jax.device_get(self.carry.step))

    @property
    def streak(self) -> int:
        return int(jax.device_get(self.carry.streak))

    @property
    def is_sound(self) -> bool:
        """Whether the parameters, and some tasks of the step to them, are finite."""
        leaves = jax.device_get(jax.tree.leaves(self.params))
        # numpy does not know every kind below float32.
        known = [np.float32(x) if x.dtype.itemsize < 4 else x for x in leaves]
        return self.streak == 0 and all(np.isfinite(x).all() for x in known)

    @property
    def reported(self) -> bool:
        """Whether the sums have been reported, and start again."""
        return self.step == self.last_report

    def copied(self) -> "_Run":
        """This moment, which the next call does not take away."""
        kept = jax.tree.map(jnp.copy, self.carry)
        return dataclasses.replace(self, carry=kept, metrics=list(self.metrics))

    def report(self, tasks_per_step: int) -> dict[str, Any]:
        """Adds a row on the steps since the last."""
        sums = {name: jax.device_get(getattr(self.carry, name)) for name in _SUMS}
        count, left_out = int(sums["counted"]), int(sums["left_out"])
        row = {"step": self.step, "tasks": self.step * tasks_per_step}
        row |= {"loss": float(sums["loss"]) / count if count else math.nan}
        first, last, with_support = sums["support_losses"].tolist()
        if with_support:
            row |= {"support_loss_first": first / with_support}
            row |= {"support_loss_last": last / with_support}
        row |= {"grad_norm": float(sums["grad_norm"]) / count if count else math.nan}
        row |= {"left_out": left_out}
        self.left_out += left_out
        self.last_report = self.step
        self.metrics.append(row)
        return row

    def score(self, score: float, lower_is_better: bool) -> None:
        """Adds the score of the parameters to the last row, and keeps the best ones."""
        self.metrics[-1]["validation"] = score
        sign = -1 if lower_is_better else 1
        if not math.isnan(score) and (
            self.best_score is None or sign * score > sign * self.best_score
        ):
            self.best, self.best_score = jax.tree.map(jnp.copy, self.params), score
            self.since_best = 0
        else:
            self.since_best += 1

    def note(self) -> str:
        """What to say beside the progress."""
        loss = f"loss {self.metrics[-1]['loss']:.3f}" if self.metrics else ""
        score = "" if self.best_score is None else f", best {self.best_score:.3f}"
        unreported = 0 if self.reported else int(jax.device_get(self.carry.left_out))
        left_out = self.left_out + unreported
        return loss + score + (f", {left_out} tasks left out" if left_out else "")

    def trained(self, why: Why) -> Trained:
        """As the result."""
        meta = self.carry.meta
        best = meta.params if self.best_score is None else self.best
        return Trained(meta, best, self.best_score, self.metrics, why, self.seconds)

    def save(self, folder: Path, identity: dict[str, Any], made_by: dict[str, Any]) -> None:
        """Writes a checkpoint, if there is something new."""
        if self.saved == self.step or not processes.is_first():
            return
        fields = ("last_report", "best_score", "since_best", "seconds", "left_out")
        notes = {name: getattr(self, name) for name in fields}
        notes |= {"identity": identity, "made_by": made_by}
        notes |= {"rows": len(self.metrics), "digest": runs.digest_of_metrics(self.metrics)}
        runs.flush_metrics(folder)
        tree = {"carry": self.carry, "best": self.best}
        checkpoints.save(folder / CHECKPOINTS, Checkpoint(self.step, tree, notes))
        self.saved = self.step

    def open(
        self, folder: Path, identity: dict[str, Any], made_by: dict[str, Any], resume: bool
    ) -> None:
        """Goes on from the newest checkpoint, or begins in an empty folder."""
        begun = (folder / CHECKPOINTS).exists() or (folder / runs.METRICS).exists()
        if begun and not resume:
            raise ValueError(
                f"{folder} holds a run; pass resume=True to go on with it, or another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not begun:
            return
        like = {"carry": self.carry, "best": self.best}
        found, damaged = checkpoints.newest(folder / CHECKPOINTS, like)
        for line in damaged:
            warnings.warn(line, stacklevel=3)
        if found is None:
            warnings.warn(f"{folder} has no checkpoint; training begins at the start", stacklevel=3)
            self.metrics = runs.cut_metrics(folder, self.step)
            return
        notes = dict(found.notes)
        _check_identity(folder, notes.pop("identity"), identity)
        if (before := notes.pop("made_by")) != made_by:
            warnings.warn(
                f"the run in {folder} was saved with {_listed(before)}, and goes on with "
                f"{_listed(made_by)}: on the same tasks, to the same numbers but for rounding",
                stacklevel=3,
            )
        rows, digest = notes.pop("rows"), notes.pop("digest")
        self.carry, self.best = found.tree["carry"], found.tree["best"]
        for name, value in notes.items():
            setattr(self, name, value)
        self.saved = found.step
        self.metrics = runs.cut_metrics(folder, self.step)
        if digest != runs.digest_of_metrics(self.metrics):
            warnings.warn(
                f"{folder / runs.METRICS} is not what was written up to step {self.step} ({rows} "
                f"rows, found {len(self.metrics)}): distrust its curves, not the training",
                stacklevel=3,
            )


def _made_by(mesh: Mesh | None) -> dict[str, Any]:
    """What else bits depend on."""
    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    return {
        "jax": jax.__version__,
        "device": devices[0].device_kind,
        "devices": 1 if mesh is None else len(devices),
    }


def _listed(made_by: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in made_by.items())


def _check_identity(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    before_and_now = [_flat(identity) for identity in (saved, now)]
    for name in before_and_now[0] | before_and_now[1]:
        before, after = (identity.get(name) for identity in before_and_now)
        # A name that is younger than the checkpoint, such as a new option, cannot be compared.
        if name in before_and_now[0] and before != after:
            raise CheckpointError(
                f"the run in {folder} is another one: {name} was {before}, now {after}"
            )


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """With what the caller had to say under names of its own."""
    config = {f"config[{name!r}]": value for name, value in identity.get("config", {}).items()}
    return {name: value for name, value in identity.items() if name != "config"} | config


def _key_numbers(key: jax.Array) -> list[int]:
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.device_get(jax.random.key_data(key) if typed else key)).tolist()


def _advice(step: int, max_left_out: float) -> str:
    return (
        f"training has diverged: in each of the {DIVERGED_STEPS} steps up to step {step}, more "
        f"than {100 * max_left_out:g}% of the tasks had a loss or a gradient that is not finite; "
        "lower the inner rate, clip the inner gradients, or lower the outer rate"
    )
