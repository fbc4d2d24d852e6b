"""Runs in processes of their own: one measured run each, so that no run sees another's memory.

A worker is told what to do one request at a time, so that whoever drives it can put its steps next to another
worker's. Requests and answers are lines of JSON through pipes. Whatever happens to a worker becomes a record with a
status, carried by `RunFailed`; nothing else raises but what is wrong with the harness itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

import torch

from baselines.method import MethodError
from benchmarks.harness.cuda import hold_to
from benchmarks.harness.environment import allocator, environment, process_peak_bytes
from benchmarks.harness.errors import InputError
from benchmarks.harness.nvml import driver_version
from benchmarks.harness.plain import PlainPass
from benchmarks.harness.process import Ended, LineProcess, end_with_parent, process_variables
from benchmarks.harness.protocol import Diverged, measure_memory
from benchmarks.harness.spec import RunSpec
from reports.capacity import CONTEXT_BYTES
from reports.record import Record, RecordError
from sparsegrad import SparseGradError

DEFAULT_TIME_LIMIT_S = 1800
MOST_THREADS = 1024

# How it is told that memory ran out, where that is a bare RuntimeError.
SHORT_OF_MEMORY = (
    "can't allocate memory",  # torch's CPU allocator
    "CUDA error: out of memory",  # the driver, which has none for a context or a library
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)

REQUESTS = ("prepare", "round", "plain", "memory")


class RunFailed(Exception):
    """A run that did not end ok; `record` says how and why."""

    def __init__(self, record: Record):
        super().__init__(record.status, record.reason)
        self.record = record


class Worker(LineProcess):
    """The parent's end of a worker: a process that holds one method on one workload from request to request."""

    def __init__(self, spec: RunSpec, time_limit_s: float = DEFAULT_TIME_LIMIT_S):
        self.spec = spec
        self._limit_s = time_limit_s
        self._left_s = time_limit_s
        super().__init__("benchmarks.harness.worker")
        self.send(spec.to_dict())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def renew(self) -> None:
        """Start the time limit anew."""
        self._left_s = self._limit_s

    def prepare(self) -> None:
        """Build and prepare the model and warm up. Raises `RunFailed`, as all requests do."""
        self._ask("prepare")

    def round(self) -> float:
        """One period of steps: the mean time of a step, seconds."""
        return float(self._ask("round"))

    def plain(self) -> dict[str, object]:
        """End the plain pass: what a record has from it besides the times."""
        return dict(self._ask("plain"))

    def memory(self) -> dict[str, object]:
        """The tracked pass, and the names and the environment of the run: the rest of a record."""
        return dict(self._ask("memory"))

    def high_water_bytes(self) -> int | None:
        """The most memory that the process took so far; None where the system does not tell."""
        return process_peak_bytes(self._process.pid)

    def _ask(self, request: str) -> object:
        started = time.monotonic()
        try:
            self.send(request)
            answer = self.answer(self._left_s)
            if "failed" in answer:
                raise self._failed(Record.from_dict(answer["failed"]))
            return answer["value"]
        except TimeoutError:
            reason = f"the worker was ended after its time limit of {self._limit_s:g} s"
            raise self._failed(failed(self.spec, "timeout", reason)) from None
        except Ended as ended:
            raise self._failed(failed(self.spec, ended.status, ended.reason)) from None
        except (ValueError, TypeError, KeyError, RecordError) as error:
            reason = f"the worker gave no readable answer: {error}"
            raise self._failed(failed(self.spec, "crashed", reason)) from error
        finally:
            self._left_s -= time.monotonic() - started

    def _failed(self, record: Record) -> RunFailed:
        self.close()
        return RunFailed(record)


def expected_environment(spec: RunSpec) -> dict[str, object]:
    """The environment fields of a record, as far as they are known without the worker."""
    known = environment("cpu") | {"allocator": allocator(process_variables())}
    if spec.device != "cpu":
        # Asking for a GPU's name would open a CUDA context in this process, which measures nothing.
        known |= {"device_name": None, "driver": driver_version()}
    if spec.threads:
        known["threads"] = spec.threads
    return known


def failed(spec: RunSpec, status: str, reason: str) -> Record:
    """The record of a run that did not end ok."""
    return spec.blank(spec.label(), status=status, reason=reason, **expected_environment(spec))


# --- the worker's end


class Session:
    """What a worker does for its requests, in this process."""

    def __init__(self, spec: RunSpec):
        if spec.threads:
            torch.set_num_threads(spec.threads)
        if spec.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError("--device cuda needs an NVIDIA GPU that torch can see; use --device cpu")
        self._spec = spec
        self._workload = spec.workload()
        if spec.gpu_memory_bytes is not None:
            hold_to(torch.device(spec.device), spec.gpu_memory_bytes - CONTEXT_BYTES)
        self._pass: PlainPass | None = None

    def prepare(self) -> None:
        """Build and prepare the model and warm up."""
        self._pass = PlainPass(self._spec, self._workload)

    def round(self) -> float:
        """One period of steps: seconds per step."""
        return self._pass.round()

    def plain(self) -> dict[str, object]:
        """End the plain pass."""
        done, self._pass = self._pass, None
        return done.finish()

    def memory(self) -> dict[str, object]:
        """The tracked pass and the names of what ran."""
        return {
            "model": self._workload.name,
            "data": self._workload.data,
            **measure_memory(self._spec, self._workload),
            **environment(self._spec.device),
        }


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests, the first line of which is the spec, until there are no more or one fails."""
    spec = RunSpec.from_dict(json.loads(next(requests)))
    session = None
    for line in requests:
        request = json.loads(line)
        if request not in REQUESTS:
            raise ValueError(f"a request is one of {', '.join(REQUESTS)}, got {request!r}")
        try:
            session = session or Session(spec)
            answer = {"value": getattr(session, request)()}
        except Exception as error:
            answer = {"failed": told(spec, error).to_dict()}
        answers.write(json.dumps(answer, allow_nan=False) + "\n")
        answers.flush()
        if "failed" in answer:
            return


def told(spec: RunSpec, error: Exception) -> Record:
    """What can go wrong in a run, as a record; what is a defect of the harness is raised again."""
    status, reason = why(error)
    return failed(spec, status, reason)


def why(error: Exception) -> tuple[str, str]:
    """Status and reason of a run that ended with this error; what is a defect of the harness is raised again."""
    match error:
        case InputError() | MethodError() | SparseGradError():
            return "refused", str(error)
        case Diverged():
            return "diverged", str(error)
        case MemoryError():
            return "oom", str(error).splitlines()[0] if str(error) else "out of memory"
        case torch.OutOfMemoryError():
            # One line of many sentences: that memory ran out, what was asked for, what there is, then advice.
            sentences = str(error).partition("\n")[0].rstrip(".").split(". ")
            return "oom", "; ".join(sentences[:3])
        case RuntimeError() if line := _first_line_with(SHORT_OF_MEMORY, str(error)):
            return "oom", line
    raise error


def _first_line_with(phrases: Sequence[str], text: str) -> str | None:
    return next((line for line in text.splitlines() if any(phrase in line for phrase in phrases)), None)


def main() -> None:
    """Serve standard input; what libraries print goes to standard error."""
    end_with_parent()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
