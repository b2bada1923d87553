"""A run's history in its folder: saved with what the run is, and taken up by that run alone."""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from fomaml_jax import checkpoints, named_arrays, processes, runs
from fomaml_jax.checkpoints import Checkpoint, CheckpointError
from fomaml_jax.history import History

_NOTED = ("last_report", "best_score", "since_best", "seconds", "left_out")
"""What of a history is no array."""


@dataclasses.dataclass(frozen=True)
class Keeper:
    """Where a run is kept, if anywhere, and what it is."""

    folder: Path | None
    identity: dict[str, Any]
    """What the run is: a checkpoint of another is refused."""
    made_by: dict[str, Any]
    """The version and the devices that rounding depends on."""

    def take_up(self, history: History, resume: bool) -> None:
        """Goes on from the newest checkpoint, or begins in an empty folder."""
        folder = self.folder
        if folder is None:
            return
        begun = (folder / runs.CHECKPOINTS).exists() or (folder / runs.METRICS).exists()
        if begun and not resume:
            raise ValueError(
                f"{folder} holds a run; pass resume=True to go on with it, or another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not begun:
            return
        like = {"carry": history.carry, "best": history.best}

        def check(notes: dict[str, Any]) -> None:
            _check_identity(folder, notes["identity"], self.identity)

        found, damaged = checkpoints.newest(folder / runs.CHECKPOINTS, like, check)
        for line in damaged:
            warnings.warn(line, stacklevel=3)
        if found is None:
            warnings.warn(f"{folder} has no checkpoint; training begins at the start", stacklevel=3)
            history.metrics = runs.cut_metrics(folder, history.step)
            return
        for line in self._filled(history, found):
            warnings.warn(line, stacklevel=3)

    def _filled(self, history: History, found: Checkpoint) -> list[str]:
        """Gives a history what a checkpoint holds; what is to be said of it."""
        assert self.folder is not None
        notes, lines = found.notes, []
        if (before := notes["made_by"]) != self.made_by:
            lines.append(
                f"the run in {self.folder} was saved with {_listed(before)}, and goes on with "
                f"{_listed(self.made_by)}: on the same tasks, to the same numbers but for rounding"
            )
        history.carry, history.best = found.tree["carry"], found.tree["best"]
        for name in _NOTED:
            setattr(history, name, notes[name])
        history.saved = found.step
        history.metrics = runs.cut_metrics(self.folder, found.step)
        if notes["digest"] != runs.digest_of_metrics(history.metrics):
            lines.append(
                f"{self.folder / runs.METRICS} is not what was written up to step {found.step} "
                f"({notes['rows']} rows, found {len(history.metrics)}): distrust its curves, not "
                "the training"
            )
        return lines

    def save(self, history: History) -> None:
        """Writes a checkpoint, if there is something new."""
        if self.folder is None or history.saved == history.step or not processes.is_first():
            return
        notes = {name: getattr(history, name) for name in _NOTED}
        notes |= {"identity": self.identity, "made_by": self.made_by}
        notes |= {"rows": len(history.metrics), "digest": runs.digest_of_metrics(history.metrics)}
        runs.flush_metrics(self.folder)
        tree = {"carry": history.carry, "best": history.best}
        checkpoints.save(self.folder / runs.CHECKPOINTS, Checkpoint(history.step, tree, notes))
        history.saved = history.step

    def append(self, row: dict[str, Any]) -> None:
        """Writes a row of metrics."""
        if self.folder is not None:
            runs.append_metrics(self.folder, row)

    def forget_after(self, step: int) -> None:
        """Removes what was saved later."""
        if self.folder is not None and processes.is_first():
            checkpoints.forget_after(self.folder / runs.CHECKPOINTS, step)


def identity_of(
    key: jax.Array, tasks_per_step: int, config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a run is, as plain JSON."""
    return {
        "key": named_arrays.by_name(key)[""].tolist(),
        "tasks_per_step": tasks_per_step,
        "random numbers": str(jax.random.key_impl(key)),
        "config": json.loads(json.dumps(dict(config or {}), allow_nan=False)),
    }


def made_by(mesh: Mesh | None) -> dict[str, Any]:
    """The version and the devices that rounding depends on."""
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
