"""Runs in processes of their own: one measured run each, so that no run sees another's memory.

Whatever happens to the worker becomes a record with a status; nothing raises but what is wrong with the harness itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from baselines.method import MethodError
from benchmarks.harness.environment import environment
from benchmarks.harness.errors import InputError
from benchmarks.harness.protocol import Diverged, run
from benchmarks.harness.spec import RunSpec
from reports.record import Record, RecordError, read, write
from sparsegrad import SparseGradError

DEFAULT_TIME_LIMIT_S = 1800
LONGEST_WAIT_S = 2_000_000  # poll() takes milliseconds in a C int


def run_in_process(spec: RunSpec, time_limit_s: float = DEFAULT_TIME_LIMIT_S) -> Record:
    """Measure one method on one workload in a new process; a worker that fails gives a record that says how."""
    with tempfile.TemporaryDirectory(prefix="sparsegrad-bench-") as folder:
        result = Path(folder, "record.json")
        # A session of its own, so that a worker that hangs is ended with its children.
        worker = subprocess.Popen(
            worker_command(result),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            _, errors = worker.communicate(json.dumps(spec.to_dict()), timeout=min(time_limit_s, LONGEST_WAIT_S))
        except subprocess.TimeoutExpired:
            _end(worker)
            return _failed(spec, "timeout", f"the worker was ended after its time limit of {time_limit_s:g} s")
        except BaseException:
            _end(worker)
            raise
        if worker.returncode == 0:
            try:
                return read(result)[0]
            except (RecordError, IndexError) as error:
                return _failed(spec, "crashed", f"the worker left no readable record: {error}")
        if worker.returncode == -signal.SIGKILL:
            return _failed(spec, "killed", "the worker was killed (SIGKILL); most often the system was out of memory")
        return _failed(spec, "crashed", f"the worker ended with code {worker.returncode}: {_last_line(errors)}")


def worker_command(result: Path) -> list[str]:
    """The command line of a worker that reads a spec from standard input and leaves its record in `result`.

    The worker is told who started it: asked later, the system could name whoever took over an orphan.
    """
    return [sys.executable, "-m", "benchmarks.harness.worker", str(result), str(os.getpid())]


def _end(worker: subprocess.Popen) -> None:
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    worker.communicate()


def _last_line(errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it said nothing"


def _failed(spec: RunSpec, status: str, reason: str) -> Record:
    # Asking for a GPU's name would open a CUDA context in this process, which measures nothing.
    known = environment("cpu")
    if spec.device != "cpu":
        known["device_name"] = None
    if spec.threads:
        known["threads"] = spec.threads
    return spec.blank(spec.label(), status=status, reason=reason, **known)


def measure(spec: RunSpec) -> Record:
    """`protocol.run`, with what can go wrong in it told by the record's status."""
    try:
        return run(spec)
    except (InputError, MethodError, SparseGradError) as error:
        return _failed(spec, "refused", str(error))
    except Diverged as error:
        return _failed(spec, "diverged", str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _failed(spec, "oom", str(error).splitlines()[0] if str(error) else "out of memory")
    except RuntimeError as error:
        # torch's CPU allocator raises a bare RuntimeError.
        if "can't allocate memory" not in str(error):
            raise
        return _failed(spec, "oom", next(line for line in str(error).splitlines() if "can't allocate" in line))


def _end_with_parent(parent: int) -> None:
    """End this process when the process that started it is gone, however that ended: nobody would read the record."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Read a spec from standard input, leave a list of one record in the file that the first argument names."""
    result, parent = sys.argv[1:]
    _end_with_parent(int(parent))
    spec = RunSpec.from_dict(json.load(sys.stdin))
    write([measure(spec)], result)


if __name__ == "__main__":
    main()
