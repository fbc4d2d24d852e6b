"""One command at a time on a file that grows, or on a folder: two at once would mix what they write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: two commands on one place are not kept apart there.
    fcntl = None


@contextmanager
def held(path: Path, option: str) -> Iterator[None]:
    """Hold what a command writes at `path`, as no other process does at the time; `option` is where it was named.

    The lock is the system's, on `.NAME.lock` beside the file: it ends with the process, however that dies. A folder is
    held by its main file's name. Where the file system has no locks, as on Windows, nothing is held.

    Raises:
        InputError: where another process holds it.
        OSError: where the lock's file cannot be made.
    """
    if fcntl is None:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked(lock, path, option)
    try:
        yield
    finally:
        # Before it is released, so that nobody else's is removed.
        lock.unlink(missing_ok=True)
        os.close(handle)


def _locked(lock: Path, path: Path, option: str) -> int:
    """The open file that holds the lock."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 20).decode(errors="replace") or "unknown"
            os.close(handle)
            raise InputError(
                f"{path} is being written by process {holder}: wait until that has ended, or choose another {option}"
            ) from None
        except OSError:  # a file system without locks
            return handle
        if _is(lock, handle):
            os.ftruncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
            return handle
        # Its last holder removed it in between: another may hold a new one by now.
        os.close(handle)


def _is(lock: Path, handle: int) -> bool:
    """Whether the open file is the one that bears the name."""
    try:
        return os.path.samestat(os.stat(lock), os.fstat(handle))
    except FileNotFoundError:
        return False
