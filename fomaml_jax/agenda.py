"""When a run reports, is scored, is saved, and ends."""

import dataclasses
import datetime
from typing import Literal

from fomaml_jax import refusals

Over = Literal["finished", "out of time", "no improvement"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agenda:
    """When to do what, and when to stop."""

    steps: int | None
    seconds: float | None
    patience: int | None
    report_every: int
    validate_every: int | None
    checkpoint_every: int | datetime.timedelta

    def over(self, step: int, since_best: int, seconds: float) -> Over | None:
        """Why to stop now, if at all: after so many steps, scores without a better, and seconds."""
        if self.steps is not None and step >= self.steps:
            return "finished"
        if self.patience is not None and since_best >= self.patience:
            return "no improvement"
        if self.seconds is not None and seconds >= self.seconds:
            return "out of time"
        return None

    def next_event(self, step: int) -> int:
        """The step at which there is something to do again."""
        intervals = (self.report_every, self.validate_every, self.checkpoint_every)
        steps = [n for n in intervals if n is not None and not isinstance(n, datetime.timedelta)]
        events = [step + n - step % n for n in steps]
        return min(events if self.steps is None else [*events, self.steps])

    def scores(self, step: int) -> bool:
        """Whether the parameters get a score."""
        n = self.validate_every
        return n is not None and (step % n == 0 or step == self.steps)

    def reports(self, step: int) -> bool:
        """Whether there is a row of metrics."""
        return step % self.report_every == 0 or step == self.steps or self.scores(step)

    def saves(self, step: int, seconds: float) -> bool:
        """Whether there is a checkpoint, so many seconds after the last."""
        every = self.checkpoint_every
        if isinstance(every, datetime.timedelta):
            return seconds >= every.total_seconds()
        return step % every == 0


def agenda_of(
    *,
    tasks_per_step: int,
    steps: int | None,
    tasks: int | None,
    seconds: float | None,
    validates: bool,
    validate_every: int | None,
    patience: int | None,
    report_every: int | None,
    checkpoint_every: int | datetime.timedelta,
    max_left_out: float,
) -> Agenda:
    """The agenda that `train` was asked for, with what was not said chosen.

    Raises:
        ValueError: naming the argument, the value, and what it may be.
    """
    steps, tasks = _count("steps", steps), _count("tasks", tasks)
    validate_every = _count("validate_every", validate_every)
    patience = _count("patience", patience)
    report_every = _count("report_every", report_every)
    if not isinstance(checkpoint_every, datetime.timedelta):
        checkpoint_every = refusals.check_at_least("checkpoint_every", checkpoint_every, 1)
    elif checkpoint_every < datetime.timedelta():
        raise ValueError(f"checkpoint_every must not be negative, got {checkpoint_every}")
    if steps is None and tasks is None and seconds is None:
        raise ValueError("nothing ends this training; pass steps, tasks or seconds")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    if not 0 <= max_left_out <= 1:
        raise ValueError(f"max_left_out must be a share between 0 and 1, got {max_left_out}")
    if patience is not None and not validates:
        raise ValueError("patience counts scores; pass validate too")
    budgets = [steps, None if tasks is None else -(-tasks // tasks_per_step)]
    all_steps = min((n for n in budgets if n is not None), default=None)
    in_all = all_steps or 20 * 500
    return Agenda(
        steps=all_steps,
        seconds=seconds,
        patience=patience,
        report_every=report_every or max(1, min(in_all // 100, 500)),
        validate_every=(validate_every or -(-in_all // 20)) if validates else None,
        checkpoint_every=checkpoint_every,
    )


def _count(name: str, value: int | None) -> int | None:
    return None if value is None else refusals.check_at_least(name, value, 1)
