"""What has happened in a run so far: its state, its rows of metrics, and its best parameters."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fomaml_jax.outer_steps import SUMS, Carry
from fomaml_jax.types import Params


@dataclasses.dataclass
class History:
    """All that has happened so far."""

    carry: Carry
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
        """The learner's, now."""
        return self.carry.meta.params

    @property
    def step(self) -> int:
        """How many were taken."""
        return int(jax.device_get(self.carry.step))

    @property
    def streak(self) -> int:
        """Steps in a row, up to now, that left out too many tasks."""
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

    def copied(self) -> "History":
        """A copy, which outlives the next call: that is given these arrays for good."""
        kept = jax.tree.map(jnp.copy, self.carry)
        return dataclasses.replace(self, carry=kept, metrics=list(self.metrics))

    def report(self, tasks_per_step: int, validation: float | None = None) -> dict[str, Any]:
        """Adds a row on the steps since the last, with the parameters' score if they have one."""
        sums = {name: jax.device_get(getattr(self.carry, name)) for name in SUMS}
        count, left_out = int(sums["counted"]), int(sums["left_out"])
        row = {"step": self.step, "tasks": self.step * tasks_per_step}
        row |= {"loss": float(sums["loss"]) / count if count else math.nan}
        first, last, with_support = sums["support_losses"].tolist()
        if with_support:
            row |= {"support_loss_first": first / with_support}
            row |= {"support_loss_last": last / with_support}
        row |= {"grad_norm": float(sums["grad_norm"]) / count if count else math.nan}
        row |= {"left_out": left_out}
        if validation is not None:
            row |= {"validation": validation}
        self.left_out += left_out
        self.last_report = self.step
        self.metrics.append(row)
        return row

    def score(self, score: float, lower_is_better: bool) -> None:
        """Keeps the parameters if theirs is the best score."""
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
        score = "" if self.best_score is None else f"best {self.best_score:.3f}"
        unreported = 0 if self.reported else int(jax.device_get(self.carry.left_out))
        left_out = self.left_out + unreported
        parts = loss, score, f"{left_out} tasks left out" if left_out else ""
        return ", ".join(filter(None, parts))
