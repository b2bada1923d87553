"""Any table whose groups are tasks: patients, machines or places, each with a few rows."""

import os
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from fomaml_jax.datasets._checks import check_choice, check_rows_fit, names_of, whole_number
from fomaml_jax.datasets._csv_file import MISSING, Columns
from fomaml_jax.datasets._types import Groups, GroupSplits

FURTHEST = 1e15
"""Standard deviations from the mean, whose squares float32 still sums."""


class Table(NamedTuple):
    """A table as tasks.

    Attributes:
        splits: its groups.
        columns: the target's name, then the features'.
        mean: `[1 + features]` float64: of the training groups' rows, which `values` are apart from.
        scale: `[1 + features]` float64: their standard deviation, by which `values` are divided.
    """

    splits: GroupSplits
    columns: tuple[str, ...]
    mean: np.ndarray
    scale: np.ndarray

    @property
    def standards(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of each column by its name."""
        pairs = zip(self.mean.tolist(), self.scale.tolist(), strict=True)
        return dict(zip(self.columns, pairs, strict=True))


def table(
    path: str | os.PathLike[str],
    *,
    group: str,
    target: str,
    features: Sequence[str],
    time: str | None = None,
    shots: int = 5,
    missing: Literal["drop", "mean"] = "drop",
    validation: float = 0.15,
    test: float = 0.25,
    seed: int = 0,
) -> Table:
    r"""A CSV file in which the rows of one group, a patient's say, are one task.

    Whole groups are dealt out at random to training, validation and test. Features and target are
    standardised by the rows of the training groups alone. Within a group, rows are in the order of
    `time`, so that first rows can be given and later ones predicted.

    Cells that are empty, or say NA, NaN, null, none or ?, are missing. Rows without a group, target
    or time are left out, and so are groups that have no row beyond `shots`; warnings say how many.

    Args:
        path: the file, in UTF-8, its first line the names of the columns.
        group: the column that says which group a row is of; any text.
        target: the column to predict, of numbers.
        features: the columns to predict it from, of numbers. The time may be among them.
        time: the column to order a group's rows by, of numbers or dates; without it they stay in
            the order of the file.
        shots: how many rows of a group will be given.
        missing: what to do about missing features: "drop" leaves the row out, "mean" puts the mean
            of the training groups.
        validation: fraction of the groups to validate on: at least two, or zero where they cannot
            be spared.
        test: fraction of the groups to test on: at least two.
        seed: of the deal.

    Returns:
        A `Table`; groups are in the order of the file.

    Raises:
        FileNotFoundError, IsADirectoryError: no file.
        TypeError: `shots` or `seed` is no whole number, `features` one string.
        ValueError: an empty file, unknown or doubled columns, a cell that is no number, a column
            for two purposes, fewer than four groups with enough rows, or a target that is the same
            everywhere.

    Warns:
        UserWarning: for rows and groups that were left out, cells that were filled in, and features
            that are the same in all training rows.

    Example:
        >>> import pathlib, tempfile
        >>> rows = [f"{who},{day},{who + day}" for who in range(6) for day in range(8)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "visits.csv")
        ...     _ = file.write_text("\n".join(["patient,day,score", *rows]))
        ...     visits = table(file, group="patient", target="score", features=["day"], time="day")
        >>> visits.splits.train.features.shape, visits.splits.test.names
        ((2, 8, 1), ('2', '3'))
    """
    check_choice("missing", missing, ("drop", "mean"))
    shots, seed = whole_number("shots", shots, at_least=1), whole_number("seed", seed, at_least=0)
    columns = (target, *names_of("features", features))
    check_purposes(group, columns, time)
    file = Columns(path)
    file.check([group, *columns, *([] if time is None else [time])])
    values = np.stack([file.numbers(name) for name in columns], axis=1)
    kept, times = _usable(file, group, values, time, missing)
    rows = _rows_by_group(file.text(group), kept, times, shots)
    if rows:
        check_rows_fit(file.path, rows, len(columns))
    splits = _dealt(list(rows), validation, test, seed, file, shots)
    trained_on = values[np.concatenate([rows[name] for name in splits[0]])]
    mean, scale = _standard(trained_on, columns)
    standard = np.where(scale > 0, (values - mean) / np.where(scale > 0, scale, 1.0), 0.0)
    _check_near(file, columns, standard, np.concatenate(list(rows.values())))
    filled = np.isnan(standard)
    if count := int(filled[np.concatenate(list(rows.values()))].sum()):
        _say(f"{count} missing cells have the mean of the training groups")
    standard[filled] = 0.0
    packed = (_packed(standard, {name: rows[name] for name in split}) for split in splits)
    return Table(GroupSplits(*packed), columns, mean, scale)


def check_purposes(group: str, columns: Sequence[str], time: str | None) -> None:
    """Refuses a column that is to be two things, and a table without features."""
    if len(columns) < 2:
        raise ValueError("features is empty; name at least one column to predict from")
    for place, name in enumerate(columns):
        if name == group:
            raise ValueError(f"{name!r} is the group, and cannot be the target or a feature too")
        if name in columns[:place]:
            raise ValueError(f"{name!r} is named twice among the target and the features")
    if time in (group, columns[0]):
        raise ValueError(f"{time!r} is the time, and cannot be the group or the target too")


def _usable(
    file: Columns, group: str, values: np.ndarray, time: str | None, missing: str
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows stay, `[rows]`, and the time of each."""
    times = np.arange(len(values)) if time is None else file.times(time)
    groups = file.text(group)
    lacking = {
        "group": np.array([name.lower() in MISSING for name in groups]),
        "target": np.isnan(values[:, 0]),
        "time": np.isnan(times),
    }
    if missing == "drop":
        lacking["feature"] = np.asarray(np.isnan(values[:, 1:]).any(1))
    for what, rows in lacking.items():
        if rows.any():
            _say(f"{rows.sum()} of {len(rows)} rows are left out, their {what} is missing")
    # It may be an abbreviation, and not for missing.
    if words := sorted({name for name in groups if name and name.lower() in MISSING}):
        _say(f"a group that is called {words[0]!r} is taken for missing; give it another name")
    return ~np.logical_or.reduce(list(lacking.values())), times


def by_group(names: Sequence[str], kept: np.ndarray) -> dict[str, list[int]]:
    """The rows that are kept, by the group they are of, both in the order of the file."""
    found: dict[str, list[int]] = {}
    for row in np.flatnonzero(kept).tolist():
        found.setdefault(names[row], []).append(row)
    return found


def _rows_by_group(
    names: Sequence[str], kept: np.ndarray, times: np.ndarray, shots: int
) -> dict[str, np.ndarray]:
    """The rows of each group that has enough, in the order of time."""
    found = by_group(names, kept)
    enough = {name: np.array(rows) for name, rows in found.items() if len(rows) > shots}
    if short := len(found) - len(enough):
        one = next(name for name in found if name not in enough)
        _say(
            f"{short} of {len(found)} groups are left out, such as {one!r}: with "
            f"{shots} rows given, none of theirs is left to predict"
        )
    ordered = {n: rows[np.argsort(times[rows], kind="stable")] for n, rows in enough.items()}
    if tied := sum(times[rows[shots - 1]] == times[rows[shots]] for rows in ordered.values()):
        _say(
            f"in {tied} of {len(ordered)} groups the last row given and the first to predict are "
            "of one time: their order is that of the file"
        )
    return ordered


def _dealt(
    names: list[str], validation: float, test: float, seed: int, file: Columns, shots: int
) -> list[list[str]]:
    """Groups to train, validate and test on, each in the order of the file."""
    for name, fraction in {"validation": validation, "test": test}.items():
        if not 0 <= fraction < 1 or (name == "test" and not fraction):
            raise ValueError(f"{name} must be a fraction of the groups below 1, got {fraction}")
    if len(names) < 4:
        raise ValueError(
            f"{file.path} has {len(names)} groups of more than {shots} usable rows, expected at "
            "least 4: two to train on and two others to test on; give fewer rows (shots, --shots), "
            'keep rows that miss a feature (missing="mean", --missing mean), or add groups'
        )
    tested = min(max(2, round(test * len(names))), len(names) - 2)
    chosen = max(2, round(validation * len(names))) if validation else 0
    chosen = chosen if len(names) - tested - chosen >= 2 else 0
    if validation and not chosen:
        _say("no groups are left to validate on: training is followed on its own groups")
    order = np.random.default_rng(seed).permutation(len(names))
    for_test, for_validation, for_training = np.split(order, [tested, tested + chosen])
    return [
        [names[g] for g in sorted(p.tolist())] for p in (for_training, for_validation, for_test)
    ]


def _standard(rows: np.ndarray, columns: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, missing cells aside; 0 if it is constant."""
    empty = np.isnan(rows).all(0)
    if empty.any():
        raise ValueError(f"{columns[int(empty.argmax())]} is missing in all rows to train on")
    mean, scale = np.nanmean(rows, axis=0), np.nanstd(rows, axis=0)
    # What is the same everywhere is so up to the rounding of its mean.
    constant = scale <= 1e-12 * np.maximum(np.abs(mean), 1e-300)
    if constant[0]:
        raise ValueError(
            f"{columns[0]} is {rows[0, 0]:g} in all rows to train on: there is nothing to predict"
        )
    for name in np.array(columns)[constant].tolist():
        _say(f"{name} is the same in all rows to train on, and says nothing")
    return mean, np.where(constant, 0.0, scale)


def _check_near(
    file: Columns, columns: Sequence[str], standard: np.ndarray, used: np.ndarray
) -> None:
    """Refuses what is so far from training that it can only stand for no value."""
    rows, places = np.nonzero(np.abs(standard[used]) > FURTHEST)
    if len(rows):
        row, name = int(used[rows[0]]), columns[int(places[0])]
        raise ValueError(
            f"{file.path}, line {file.lines[row]}: {name} is {file.text(name)[row]!r}, "
            f"{np.abs(standard[row, places[0]]):.0e} standard deviations from the rows to train on:"
            " leave the cell empty if it has no value"
        )


def _packed(standard: np.ndarray, groups: dict[str, np.ndarray]) -> Groups:
    counts = np.array([len(rows) for rows in groups.values()], np.int32)
    values = np.zeros((len(counts), counts.max(initial=0), standard.shape[1]), np.float32)
    for place, rows in zip(values, groups.values(), strict=True):
        place[: len(rows)] = standard[rows]
    return Groups(values, counts, tuple(groups))


def _say(what: str) -> None:
    warnings.warn(what, stacklevel=3)
