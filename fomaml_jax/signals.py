"""Ctrl-C and SIGTERM as questions that a loop answers when it is ready."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Literal

Stop = Literal["interrupted", "terminated"]

_MEANING: dict[int, Stop] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Asked:
    """Whether somebody has asked to stop, and how."""

    to: Stop | None = None
    _is_held: bool = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For what must not be torn apart: here another Ctrl-C is one like the first."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def stops_at_once(self, interrupts: int) -> bool:
        """Whether somebody who has pressed Ctrl-C so often waits no longer."""
        return interrupts > 1 and not self._is_held


@contextlib.contextmanager
def noticed(enabled: bool = True) -> Iterator[Asked]:
    """Notes Ctrl-C and SIGTERM instead of stopping at once; a second Ctrl-C does stop at once.

    Not while the first is being answered (`Asked.held`).
    Only Python's main thread can be asked; elsewhere, and where a signal is ignored (as Ctrl-C is
    under `nohup ... &`), nothing changes.
    """
    asked, interrupts = Asked(), 0

    def note(number: int, frame: object) -> None:
        nonlocal interrupts
        del frame
        interrupts += number == signal.SIGINT
        if asked.stops_at_once(interrupts):
            raise KeyboardInterrupt
        asked.to = _MEANING[number]

    with contextlib.ExitStack() as stack:
        if enabled and threading.current_thread() is threading.main_thread():
            for number in _MEANING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before = signal.signal(number, note)
                    stack.callback(signal.signal, number, before)
        yield asked
