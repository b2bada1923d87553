"""From the words of a command to its options; what is wrong with them becomes one line."""

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro

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
    """Refuses a file where a folder is to be written.

    Raises:
        ValueError: naming it.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; pass --out with a folder")


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
