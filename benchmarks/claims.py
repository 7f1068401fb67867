"""Claims: a name in a folder is held by at most one living process, by flock, or by a beating file where there is no flock.

They are the one part that may fail quietly (a network file system may lie about locks), so nothing relies on them but the
saving of work.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
import time
from pathlib import Path as File

from sde.errors import RunError

from .files import BINARY, NO_LINK, call, exists, names, read, remove_folder, show, subfolder, trouble, write_all

#: Seconds after which a claim that no longer beats is taken for dead, by the observer's clock; used where there is no flock.
STALE = 60.0

_NO_FLOCK = {getattr(errno, name) for name in ("ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUP") if hasattr(errno, name)}


class Claims:
    """Names in a folder, each held by at most one living process.

    With flock a name ends with its process, however that ends. Without, its file holds a number that a thread counts up; one
    that stands still for ``STALE`` seconds of the observer's clock is taken over. Clocks of different machines are never
    compared. ``words`` say who holds it, for people.
    """

    def __init__(self, path: File, words: str) -> None:
        self.path, self.words = subfolder(path), words
        self.token = secrets.token_hex(8)
        self._open: dict[str, int] = {}  # name -> its descriptor
        self._seen: dict[str, tuple[bytes, float]] = {}  # of names that others hold: their bytes, and since when
        self._beat, self._thread, self._guard = 0, None, threading.Lock()
        self._end = threading.Event()
        self.flock = True
        self.take(f"worker-{self.token}")

    def take(self, name: str) -> bool:
        """Hold the name. False: another process does."""
        path = self.path / name
        with trouble(path, "claimed"):
            while True:
                try:
                    found = self._lock(name, path) if self.flock else self._take_beating(name, path)
                except FileNotFoundError:  # a worker that ends takes an empty folder away
                    subfolder(self.path)
                    continue
                if found is not None:
                    return found

    def _lock(self, name: str, path: File) -> bool | None:
        """None: to be tried again, since another process removed the name, or since there is no flock."""
        descriptor = call("open", path, os.O_RDWR | os.O_CREAT | NO_LINK | BINARY, 0o666)
        keep = False
        try:
            call("flock", descriptor)
            keep = self._is(path, descriptor)  # else its last holder has removed it since it was opened
            if not keep:
                return None
            self._open[name] = descriptor
            write_all(descriptor, self._text())
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            self._open.pop(name, None)
            keep = False
            if error.errno not in _NO_FLOCK or self._open:
                raise
            self.flock = False
            call("unlink", path)  # the first name that is taken, this process's own
            return None
        finally:
            if not keep:
                call("close", descriptor)

    def give(self, name: str) -> None:
        """Let the name go."""
        with contextlib.suppress(OSError):  # a name that stays is one that nobody holds
            call("unlink", self.path / name)
        with self._guard, contextlib.suppress(OSError):  # else a beat could go to the next file of this number
            call("close", self._open.pop(name))

    def close(self) -> None:
        """Let everything go, and clear away the names of dead processes."""
        self._end.set()
        for name in list(self._open):
            self.give(name)
        with contextlib.suppress(RunError):
            for name in names(self.path):
                if self.take(name):
                    self.give(name)
        remove_folder(self.path)

    def start(self) -> None:
        """From now on this process is at work on the folder, for others to see."""
        self.take(f"work-{self.token}")

    def at_work(self) -> list[str]:
        """Words of the other living processes that are; the names of dead ones are cleared away."""
        found = [name for name in names(self.path) if name.startswith("work-") and name not in self._open]
        return [self._says(name) for name in found if self._held(name)]

    def alive(self, token: str) -> bool:
        """Whether the process of this token lives. Without flock, a doubt is a yes."""
        return token == self.token or self._held(f"worker-{token}")

    def _held(self, name: str) -> bool:
        """Whether another process holds the name; else it is cleared away."""
        if not exists(self.path / name):
            return False
        if self.take(name):
            self.give(name)
            return False
        return True

    def _says(self, name: str) -> str:
        data = read(self.path / name) or b""
        return show(data.decode("utf-8", "replace").partition("\n")[0]) or "a process that does not say which"

    @staticmethod
    def _is(path: File, descriptor: int) -> bool:
        try:
            there, here = call("lstat", path), call("fstat", descriptor)
        except FileNotFoundError:
            return False
        return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)

    def _text(self) -> bytes:
        return f"{self.words}\n{self.token} {self._beat:020d}\n".encode("utf-8", "backslashreplace")

    # --- without flock

    def _take_beating(self, name: str, path: File) -> bool | None:
        try:
            descriptor = call("open", path, os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
        except FileExistsError:
            now, found = time.monotonic(), read(path) or b""
            before, since = self._seen.get(name, (None, now))
            if found != before:
                self._seen[name] = found, now
                return False
            if now - since < STALE:
                return False
            del self._seen[name]
            with contextlib.suppress(FileNotFoundError):
                call("unlink", path)
            return None
        with self._guard:
            self._open[name] = descriptor
            write_all(descriptor, self._text())
        if self._thread is None:
            self._thread = threading.Thread(target=self._beating, daemon=True)
            self._thread.start()
        return True

    def _beating(self) -> None:
        while not self._end.wait(STALE / 12.0):
            self._beat += 1
            with self._guard:
                for descriptor in self._open.values():
                    with contextlib.suppress(OSError):  # a beat that is missed may cost work, nothing else
                        os.lseek(descriptor, 0, os.SEEK_SET)
                        os.write(descriptor, self._text())
