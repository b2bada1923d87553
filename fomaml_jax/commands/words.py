"""From the words of a command to its options; what is wrong with them becomes one line."""

import contextlib
import dataclasses
import io
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tyro

from fomaml_jax import options
from fomaml_jax.commands.endings import REFUSED, stop

T = TypeVar("T")


def parse(kind: Callable[..., T], program: str, words: list[str], default: T | None = None) -> T:
    """Reads the options; what the parser has to say against them becomes one line."""
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return _at_home(tyro.cli(kind, prog=program, args=words, **defaults))
    except SystemExit as ended:
        if ended.code:
            stop(f"{_first_sentence(said.getvalue())} (see {program} --help)", REFUSED)
        raise


def _at_home(found: Any) -> Any:
    """The options with ~ in their paths expanded, which a shell leaves in --path=~/data."""

    def read(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(read, value))
        return value.expanduser() if isinstance(value, Path) else value

    fields = (field.name for field in dataclasses.fields(found))
    return dataclasses.replace(found, **{name: read(getattr(found, name)) for name in fields})


def check_folder(path: Path) -> None:
    """Refuses a place where no folder can be written, before any work is done.

    Raises:
        ValueError: naming it.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; pass --out with a folder")
    check_writable(path, "--out")


def check_file(path: Path, option: str = "--out") -> None:
    """Refuses a place where no file can be written, before any work is done.

    Raises:
        ValueError: naming it.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; pass {option} with a file")
    check_writable(path.parent, option)


def check_writable(folder: Path, option: str) -> None:
    """Refuses a folder that cannot be written to, or made.

    Raises:
        ValueError: naming the part of its path that stands in the way.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir():
        raise ValueError(f"{there} is a file; pass another {option}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{there} may not be written to; pass another {option}")


@contextlib.contextmanager
def saying_what_moved(chosen: options.Options) -> Iterator[None]:
    """Says of a run's data that are not where they were how to say where they are.

    Raises:
        FileNotFoundError: for these.
    """
    try:
        yield
    except FileNotFoundError as error:
        option = "--file" if isinstance(chosen, options.Table) else "--path"
        if isinstance(chosen, options.Folder) and chosen.path.is_dir():  # not moved, but incomplete
            raise
        raise FileNotFoundError(f"{error}; where it has moved, pass {option}") from None


def check_outside(path: Path, data: Path, option: str = "--out") -> None:
    """Refuses to write among the pictures, where the next call would take it for some.

    Raises:
        ValueError: naming both.
    """
    if path.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"{path} would be among the pictures in {data}; pass another {option}")


def _first_sentence(boxed: str) -> str:
    """The text below the box's title, up to the next rule, whatever the box is drawn with."""

    def is_rule(line: str) -> bool:
        return not line.strip("─-")

    plain = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    lines = [line.strip(" │╰╯") for line in plain.splitlines()[1:]]
    text = itertools.takewhile(lambda x: not is_rule(x), itertools.dropwhile(is_rule, lines))
    return " ".join(" ".join(text).split()) or " ".join(plain.split())


def taken(words: list[str], option: str, what: str) -> tuple[list[str], str | None]:
    """The words without an option and its value, and the value."""
    for i, word in enumerate(words):
        if word == option:
            if i + 1 == len(words) or words[i + 1].startswith("-"):
                stop(f"{option} needs {what}", REFUSED)
            return words[:i] + words[i + 2 :], words[i + 1]
        if word.startswith(f"{option}="):
            return words[:i] + words[i + 1 :], word.removeprefix(f"{option}=")
    return words, None
