"""Who writes to a file: a lock on the file itself, whatever names lead to it."""

import os
import struct
import sys
from pathlib import Path

from gradkeel.errors import RecordError

try:
    import fcntl
except ImportError:  # Windows, where a second writer is noticed at the first one's next write
    fcntl = None  # type: ignore[assignment]

_FAR = 1 << 62
"""The byte that is locked: far behind those of SQLite's own locks."""

_held: "dict[tuple[int, int], FileLock]" = {}
"""Files that this process holds. They are asked first, before a file is opened: whoever closes a file ends the locks
that SQLite has on it for the same process."""


class FileLock:
    """Holds a file for this process, until `release` or the process's end; makes the file if it is not there.

    It is on the file, so that a symlink, a second name or another spelling of the path meet it, and ends with the
    process, so that none is left behind.

    Raises:
        RecordError: somebody holds it.
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        held = RecordError(
            f"{path} is being written by another process or recorder; give each run a record of its own"
        )
        if path.exists() and _identity(path.stat()) in _held:
            raise held
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            _lock(descriptor)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise held from None
        except OSError:
            pass  # a file system without locks: as where there are none
        self._descriptor: int | None = descriptor
        self._identity = _identity(os.fstat(descriptor))
        _held[self._identity] = self

    def is_at(self, path: Path) -> bool:
        """Whether ``path`` still leads to the file."""
        try:
            return _identity(path.stat()) == self._identity
        except OSError:
            return False

    def is_deleted(self) -> bool:
        """Whether no name leads to the file any more."""
        return self._descriptor is not None and os.fstat(self._descriptor).st_nlink == 0

    def release(self) -> None:
        """Let go of the file."""
        if self._descriptor is not None:
            _held.pop(self._identity, None)
            os.close(self._descriptor)
            self._descriptor = None


def _lock(descriptor: int) -> None:
    """Lock an open file, without waiting.

    With one byte of it, where the lock can belong to the open file: a lock of the process SQLite would end together
    with its own, and on network file systems one of the whole file would keep SQLite out.
    """
    if fcntl is None:
        return
    if sys.platform == "linux":
        one_byte = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, _FAR, 1, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, one_byte)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _forget() -> None:
    """In a forked process: a lock that it had inherited would outlive whoever records."""
    for lock in list(_held.values()):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
