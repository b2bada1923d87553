"""How a command ends: one line for the person, and an exit code."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import NoReturn

import jax

from fomaml_jax import processes

FAILED, REFUSED, DIVERGED, LOST, INTERRUPTED = 1, 2, 3, 4, 130


def stop(message: str, code: int, *, in_step: bool = False, at_once: bool = False) -> NoReturn:
    """Ends with a line; `in_step` where all processes of a run end here, and the first says so.

    `at_once` without what Python does at its end: XLA crashes there if it was interrupted while it
    compiled.
    """
    if processes.is_first() or not in_step:
        print(f"fomaml-jax: {message}", file=sys.stderr, flush=True)
    if at_once or (processes.are_several() and not in_step):
        os._exit(code)  # an orderly end would wait for the others, who wait for this one
    raise SystemExit(code)


def fail(error: Exception) -> NoReturn:
    """One line for the person, the traceback in a file for who mends it."""
    said = (str(error).strip() or "no message").splitlines()[0]
    if "RESOURCE_EXHAUSTED" in said:
        stop(f"this does not fit in memory; ask for less at once ({said})", REFUSED)
    if processes.are_several() and isinstance(error, jax.errors.JaxRuntimeError):
        stop(f"another process of this run was lost; start all again with --resume ({said})", LOST)
    with tempfile.NamedTemporaryFile(
        "w",
        encoding="utf-8",
        errors="backslashreplace",
        prefix="fomaml-jax-",
        suffix=".txt",
        delete=False,
    ) as file:
        traceback.print_exception(error, file=file)
    stop(f"{type(error).__name__}: {said}; the traceback is in {file.name}", FAILED)


@contextlib.contextmanager
def refusing():
    """Turns what is wrong with the input into one line."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        stop(" ".join(str(error).split()), REFUSED)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Shows a warning as a line, without the place in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *args, **kwargs: say(f"fomaml-jax: {message}")
        yield


class TerminatedError(BaseException):
    """SIGTERM, outside of training."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Lets SIGTERM end what is not training by an exception, so that files are left whole."""

    def end(number: int, frame: object) -> NoReturn:
        raise TerminatedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(text: str) -> None:
    """Tells a person who waits."""
    print(text, file=sys.stderr)


def let_go_of_the_output() -> None:
    """Else what is left in its buffer fails again at Python's end, and changes the exit code."""
    if sys.stdout is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
