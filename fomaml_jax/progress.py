"""How far a loop is, in a terminal, a notebook, or a log file."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

LINES_EVERY = 15.0
"""Seconds between two lines in a log file."""


class Progress(Protocol):
    """Is told how much is done, and something to say beside it."""

    def __call__(self, done: int, note: str) -> None:
        """So much is done."""
        ...


@contextlib.contextmanager
def progress(name: str | None, total: int | None, done: int = 0) -> Iterator[Progress]:
    """A bar where one can be drawn, and a line now and then where not.

    Args:
        name: what is going on; `None` shows nothing.
        total: how many tasks there are to do, where that is known.
        done: how many were done before.
    """
    if name is None or sys.stderr is None:
        yield lambda done, note: None
        return
    shows_bars = sys.stderr.isatty() or "ipykernel" in sys.modules
    with _bar(name, total, done) if shows_bars else _lines(name, total, done) as told:
        yield told


@contextlib.contextmanager
def _bar(name: str, total: int | None, done: int) -> Iterator[Progress]:
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:  # an extra, of the command line
        with _lines(name, total, done) as told:
            yield told
        return
    kwargs: dict[str, Any] = {} if "ipykernel" in sys.modules else {"ncols": 100}
    bar = tqdm(total=total, initial=done, desc=name, unit=" tasks", unit_scale=True, **kwargs)

    def tell(done: int, note: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

    with bar:
        yield tell


@contextlib.contextmanager
def _lines(name: str, total: int | None, done: int) -> Iterator[Progress]:
    first, started, last_said = done, time.monotonic(), time.monotonic()
    latest: tuple[int, str] | None = None
    lines = 0

    def say(done: int, note: str) -> None:
        nonlocal lines
        lines += 1
        seconds = time.monotonic() - started
        speed = (done - first) / max(seconds, 1e-9)
        share = f" {done / total:4.0%}" if total else ""
        of_all = f" of {total}" if total else ""
        left = ""
        if total and speed and lines > 1:  # at the first line most of the time was compilation
            left = f", {_clock((total - done) / speed)} left"
        pace = f"{_clock(seconds)}{left}, {speed:.3g} tasks/s"
        with contextlib.suppress(OSError, ValueError):  # a full disk or a closed terminal
            sys.stderr.write(
                f"{name}{share}: {done}{of_all} tasks in {pace}{note and f', {note}'}\n"
            )
            sys.stderr.flush()

    def tell(done: int, note: str) -> None:
        nonlocal last_said, latest
        latest = (done, note)
        if time.monotonic() - last_said >= LINES_EVERY:
            last_said, latest = time.monotonic(), None
            say(done, note)

    try:
        yield tell
    finally:
        if latest:
            say(*latest)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
