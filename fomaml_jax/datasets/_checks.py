"""What every data set refuses at its border, each in one sentence that says what to pass."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

from fomaml_jax import host_memory


def whole_number(name: str, value: Any, *, at_least: int) -> int:
    """`value` as an int; raises where it is none, or less than `at_least`."""
    message = f"{name}={value!r} must be a whole number of at least {at_least}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(message)
    if value < at_least:
        raise ValueError(message)
    return int(value)


def names_of(name: str, value: Any) -> tuple[str, ...]:
    """`value` as a tuple of names; raises for a string, whose letters would be taken for them."""
    if isinstance(value, str):
        raise TypeError(f"{name}={value!r} must be a list of names, such as [{value!r}]")
    return tuple(value)


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def check_folder(path: Path, expected: str) -> None:
    """Raises unless `path` is a folder, saying what was `expected` there."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, expected {expected}")
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is not a folder, expected {expected}")


def check_rows_fit(path: Path, groups: Mapping[str, Sized], numbers: int) -> None:
    """Refuses groups of rows that memory cannot hold once each is as long as the longest.

    `numbers` of 8 bytes are needed for a row.
    """
    longest = max(groups, key=lambda name: len(groups[name]))
    most = len(groups[longest])
    needed, there = 8 * numbers * most * len(groups), host_memory.most()
    if needed > there:
        raise ValueError(
            f"{path}: {len(groups):,} groups, each padded to the {most:,} rows of the longest, "
            f"need {needed / 1e9:.0f} GB, and there are {there / 1e9:.0f}: give a file without "
            f"the rows that {longest!r} can do without, or with fewer groups"
        )


@contextlib.contextmanager
def cli_extra(user: str) -> Iterator[None]:
    """Says how to get the optional packages when an import inside fails."""
    try:
        yield
    except ImportError as error:
        message = f'{user} needs {error.name or error}: pip install "fomaml-jax[cli]"'
        raise ImportError(message) from error
