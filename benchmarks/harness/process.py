"""A process of one's own that answers lines of JSON with lines of JSON, and what becomes of it when it does not.

Whatever happens to it is an `Ended` with a status of a record: it was killed, it crashed, its time was up.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time

# What glibc's allocator is told in such a process: keep what is freed. By default it returns memory to the system and
# takes it back in every step, at addresses that differ from process to process, and the page faults of that (tens of
# thousands in a step of a small encoder) made two workers of the SAME method differ by up to 15 %; with this, by less
# than 1 %. Who sets these variables otherwise is left alone; other allocators do not read them.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**46)}
LONGEST_WAIT_S = 2_000_000  # poll() takes milliseconds in a C int


class Ended(Exception):
    """A process that gave no answer: the `status` of a record, and the `reason`."""

    def __init__(self, status: str, reason: str):
        super().__init__(status, reason)
        self.status, self.reason = status, reason


class LineProcess:
    """The parent's end: `python -m module PARENT`, ended with its children when it is closed or fails."""

    def __init__(self, module: str):
        self._unread = b""
        # A file, not a pipe: nobody reads it before the end, and a full pipe would stop the process.
        self._errors = tempfile.TemporaryFile()
        # A session of its own, so that a process that hangs is ended with its children.
        self._process = subprocess.Popen(
            process_command(module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            env=process_variables(),
        )

    def send(self, message: object) -> None:
        """Send a message; whether anybody is there to read it, the answer will tell."""
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass

    def answer(self, limit_s: float) -> object:
        """The next message of the process. Raises `TimeoutError` after `limit_s` seconds, `Ended`, and `ValueError`."""
        deadline = time.monotonic() + min(limit_s, LONGEST_WAIT_S)
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError
            more = os.read(self._process.stdout.fileno(), 1 << 16)
            if not more:
                raise self._ended()
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """End the process and its children."""
        if self._process.returncode is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            try:
                pipe.close()
            except BrokenPipeError:  # what was not yet sent
                pass

    def _ended(self) -> Ended:
        """What became of a process that is gone without an answer."""
        try:
            # It closed its pipe, so that it is about to end; one that is not is ended.
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return Ended("crashed", "the worker closed its pipe and went on")
        if code == -signal.SIGKILL:
            return Ended("killed", "the worker was killed (SIGKILL); most often the system was out of memory")
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace")
        return Ended("crashed", f"the worker ended with code {code}: {_last_line(errors)}")


def process_command(module: str) -> list[str]:
    """The command line of such a process.

    It is told who started it: asked later, the system could name whoever took over an orphan.
    """
    return [sys.executable, "-m", module, str(os.getpid())]


def process_variables() -> dict[str, str]:
    """The environment variables of such a process."""
    return {**ALLOCATOR, **os.environ}


def end_with_parent() -> None:
    """End this process when the one named on its command line is gone, however that ended: nobody would read it."""
    parent = int(sys.argv[1])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _last_line(errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it said nothing"
