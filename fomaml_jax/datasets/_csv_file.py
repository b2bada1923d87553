"""A CSV file as columns of numbers: every cell that is none is named by its line and column."""

import contextlib
import csv
import datetime
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
"""Cells without a value, whatever their case."""

LARGEST = 1e150
"""Beyond it are marks for missing values, and what has no variance in float64."""

LONGEST = 2**31 - 1
"""Characters of a cell, as a column of text may be beside those that are read."""


class Columns:
    """The cells of a CSV file by column.

    Attributes:
        path: the file.
        header: the names of the columns.
        cells: `[rows]` of lists, as they are written.
        lines: `[rows]`: where in the file a row is, for who has to mend it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.header, self.cells, self.lines = _read(self.path)

    def check(self, names: Sequence[str]) -> None:
        """Refuses names that the file has not, or has twice."""
        for name in names:
            there = self.header.count(name)
            if there != 1:
                wrong = f"no column {name!r}" if not there else f"{there} columns {name!r}"
                raise ValueError(f"{self.path} has {wrong}; there are {', '.join(self.header)}")

    def text(self, name: str) -> list[str]:
        """A column as it is written."""
        place = self.header.index(name)
        return [row[place].strip() for row in self.cells]

    def numbers(self, name: str) -> np.ndarray:
        """A column as float64, NaN where a cell is missing."""
        return self._parsed(
            name,
            _number,
            "a number (write categories as numbers, such as 0 and 1, and nothing for no value)",
        )

    def times(self, name: str) -> np.ndarray:
        """A column of numbers or of dates, as float64."""
        cells = [cell for cell in self.text(name) if cell.lower() not in MISSING]
        if cells and _is_number(cells[0]):
            return self._parsed(name, _number, "a number, as in the first row")
        if not cells or not _is_date(cells[0]):
            return self._parsed(name, _date, "a number or a date such as 2026-01-31")
        zoned = _has_zone(cells[0])

        def date(cell: str) -> float:
            if _has_zone(cell) != zoned:  # nobody knows which of the two is earlier
                raise ValueError(cell)
            return _date(cell)

        zone = "with" if zoned else "without"
        return self._parsed(
            name, date, f"a date such as 2026-01-31, {zone} a time zone as in the first row"
        )

    def _parsed(self, name: str, parse, expected: str) -> np.ndarray:
        found = np.full(len(self.cells), np.nan)
        for i, cell in enumerate(self.text(name)):
            if cell.lower() in MISSING:
                continue
            with contextlib.suppress(ValueError):
                found[i] = parse(cell)
            if not math.isfinite(found[i]):
                raise ValueError(
                    f"{self.path}, line {self.lines[i]}: {name} is {cell!r}, expected {expected}"
                )
        return found


def _number(cell: str) -> float:
    """A number as people write it, with a finite square; Python takes 2026_1_5 for one as well."""
    number = float(cell)
    if "_" in cell or abs(number) > LARGEST:
        raise ValueError(cell)
    return number


def _is_number(cell: str) -> bool:
    with contextlib.suppress(ValueError):
        _number(cell)
        return True
    return False


def _is_date(cell: str) -> bool:
    with contextlib.suppress(ValueError):
        _date(cell)
        return True
    return False


def _has_zone(cell: str) -> bool:
    return _is_date(cell) and datetime.datetime.fromisoformat(cell).tzinfo is not None


def _date(cell: str) -> float:
    if _is_number(cell):  # such as 20260131, which `fromisoformat` reads as a date
        raise ValueError(cell)
    moment = datetime.datetime.fromisoformat(cell)
    # Dates without a zone are counted as of one, that of no place: what matters is the order.
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def _read(path: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """The header, the rows, and the line on which each ends."""
    limit = csv.field_size_limit(LONGEST)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            found = [(row, reader.line_num) for row in reader if any(cell.strip() for cell in row)]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist, expected a CSV file") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a folder, expected a CSV file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no CSV file in UTF-8: {error}; save it as CSV UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from None
    finally:
        csv.field_size_limit(limit)
    if len(found) < 2:
        there = "nothing" if not found else "a header and no rows"
        raise ValueError(f"{path} holds {there}, expected a header and rows below it")
    (header, _), *rows = found
    for separator, name in {";": "semicolons", "\t": "tabs"}.items():
        if len(header) == 1 and separator in header[0]:
            raise ValueError(
                f"{path} has {name} between its columns, expected commas: save it as CSV with "
                "commas, and with points in decimals"
            )
    for row, line in rows:
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {line}: {len(row)} cells, but the header has {len(header)}"
            )
    return [name.strip() for name in header], [row for row, _ in rows], [line for _, line in rows]
