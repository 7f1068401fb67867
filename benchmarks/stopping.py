"""How a run is stopped: Ctrl-C lets the part in hand end, a second one does not, and SIGTERM stops at once.

Files appear whole or not at all, so any of them leaves a folder that the same command goes on with.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress


class Stopped(BaseException):
    """A signal said so. Not an Exception: nothing on the way may take it for a failure and go on."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Signals:
    """Inside, SIGINT and SIGTERM end in ``Stopped``; ``check`` raises it where the work can be left."""

    def __enter__(self) -> Signals:
        self.asked, self._before = 0, {}
        if threading.current_thread() is threading.main_thread():
            for number, handler in ((signal.SIGINT, self._interrupt), (signal.SIGTERM, self._terminate)):
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        if self.asked:
            raise Stopped(self.asked)

    def _interrupt(self, *_: object) -> None:
        if self.asked:
            raise Stopped(self.asked)
        self.asked = 130
        _tell(b"\nfinishing the part in hand; Ctrl-C again throws it away\n")

    def _terminate(self, *_: object) -> None:
        self.asked = 143  # should a library swallow what is raised here, the next check raises it again
        raise Stopped(143)


def _tell(text: bytes) -> None:
    """To stderr, from a signal handler, where its buffer may be in use."""
    with suppress(OSError):
        os.write(2, text)
