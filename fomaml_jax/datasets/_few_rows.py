"""A table in which some rows of a group are known and others are to be predicted."""

import os
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from fomaml_jax.datasets._checks import check_choice, check_rows_fit, names_of
from fomaml_jax.datasets._csv_file import MISSING, Columns
from fomaml_jax.datasets._table import by_group, check_purposes


class FewRows(NamedTuple):
    """The groups that have rows to predict, each with its known rows, padded to one shape.

    Attributes:
        names: of the groups, in the order of the file.
        known: `[groups, n, features]` float64: features of the known rows, NaN where missing.
        targets: `[groups, n]` float64: of the known rows.
        weights: `[groups, n]` float32: 1 for a known row, 0 for padding.
        asked: `[groups, m, features]` float64: features of the rows to predict.
        rows: `[groups, m]` integers: where in the file they are, -1 for padding.
        header: the names of the file's columns.
        cells: of every row of the file, as text.
    """

    names: tuple[str, ...]
    known: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    asked: np.ndarray
    rows: np.ndarray
    header: list[str]
    cells: list[list[str]]


def few_rows(
    path: str | os.PathLike[str],
    *,
    group: str,
    target: str,
    features: Sequence[str],
    missing: Literal["drop", "mean"] = "drop",
) -> FewRows:
    r"""A CSV file in which the target is given in some rows of each group and empty in others.

    Args:
        path: the file, as for `table`.
        group: the column that says which group a row is of.
        target: the column to predict; its cell is empty, or says NA and the like, where it is to be
            predicted.
        features: the columns to predict it from, of numbers.
        missing: what to do about missing features: "drop" leaves the row out, "mean" keeps it with
            NaN there.

    Returns:
        A `FewRows`.

    Raises:
        FileNotFoundError, IsADirectoryError: no file.
        ValueError: an empty file, unknown or doubled columns, a column for two purposes, a cell
            that is no number, or no row to predict.

    Warns:
        UserWarning: for rows that are left out.

    Example:
        >>> import pathlib, tempfile
        >>> rows = ["ann,0,5", "ann,1,6", "ann,2,", "ann,3,", "bob,0,4", "bob,1,"]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "visits.csv")
        ...     _ = file.write_text("\n".join(["patient,day,score", *rows]))
        ...     new = few_rows(file, group="patient", target="score", features=["day"])
        >>> new.names, new.targets.tolist(), new.rows.tolist()
        (('ann', 'bob'), [[5.0, 6.0], [4.0, 0.0]], [[2, 3], [5, -1]])
    """
    check_choice("missing", missing, ("drop", "mean"))
    features = names_of("features", features)
    check_purposes(group, (target, *features), None)
    file = Columns(path)
    file.check([group, target, *features])
    names = file.text(group)
    x = np.stack([file.numbers(name) for name in features], axis=1)
    y = file.numbers(target)
    usable = np.array([name.lower() not in MISSING for name in names])
    if missing == "drop":
        usable &= ~np.isnan(x).any(1)
    if left := int((~usable).sum()):
        warnings.warn(
            f"{left} of {len(y)} rows are left out, their group or a feature is missing",
            stacklevel=2,
        )
    rows = by_group(names, np.isnan(y) & usable)
    if not rows:
        raise ValueError(
            f"{file.path} has no row to predict: leave {target} empty in rows that have the rest"
        )
    known = by_group(names, ~np.isnan(y) & usable)
    for part in (rows, {name: known.get(name, []) for name in rows}):
        check_rows_fit(file.path, part, 2 + x.shape[1])  # the row's place and target too
    asked, given = _padded(rows, list(rows)), _padded(known, list(rows))
    return FewRows(
        tuple(rows),
        np.where(given[..., None] < 0, 0.0, x[given]),
        np.where(given < 0, 0.0, y[given]),
        (given >= 0).astype(np.float32),
        x[asked],
        asked,
        file.header,
        file.cells,
    )


def _padded(rows: dict[str, list[int]], names: Sequence[str]) -> np.ndarray:
    """`[groups, most rows]`, -1 where a group has fewer."""
    most = max((len(rows.get(name, ())) for name in names), default=0)
    padded = np.full((len(names), most), -1)
    for place, name in zip(padded, names, strict=True):
        there = rows.get(name, [])
        place[: len(there)] = there
    return padded
