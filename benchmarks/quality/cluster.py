"""Training runs as jobs of a cluster, through submitit: Slurm, or processes of this machine to try it out.

submitit hands the question over in a file of its own and tells what became of the job. The answer is a file of JSON
that the job writes in one stroke, named by its trial: a command that was ended while jobs went on finds what they left.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from benchmarks.harness.errors import InputError
from benchmarks.harness.worker import why
from benchmarks.quality.training import Outcome, Trial, run
from reports.reading import parse, read_text
from reports.record import write_bytes

POLL_S = 0.5  # submitit itself asks Slurm more seldom
# Until a file that a job has written elsewhere is seen here.
SEEN_AFTER_S = 30.0
# Beginnings of Slurm's words for jobs that ended without an answer; others have crashed.
STATUSES = {
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "OUT_OF_ME": "killed",
    "CANCELLED": "killed",
    "PREEMPTED": "killed",
    "NODE_FAIL": "killed",
    "BOOT_FAIL": "killed",
}


class Cluster:
    """Makes the workers of a study whose trials are jobs.

    Args:
        name: submitit's: slurm, or local.
        folder: where jobs have their files, on a disk that all machines share.
        options: submitit's own parameters by its own names, such as `slurm_partition` or `mem_gb`.

    Raises:
        InputError: where submitit or the cluster is not there, or does not know an option.
    """

    def __init__(self, name: str, folder: Path, options: Mapping[str, str]):
        try:
            from submitit import AutoExecutor
        except ImportError:
            raise InputError("--cluster needs submitit: pip install -e '.[bench,cluster]'") from None
        try:
            self._executor = AutoExecutor(folder=folder / "jobs", cluster=name)
            self._executor.update_parameters(
                **{"name": "quality", "cpus_per_task": 1} | {key: _read(value) for key, value in options.items()}
            )
        except (RuntimeError, NameError, ValueError, TypeError, AssertionError) as error:  # what submitit raises
            raise InputError(f"--cluster {name} cannot be used so: {error}") from error
        self._folder = folder
        self._submits = threading.Lock()

    def __call__(self, time_limit_s: float) -> ClusterWorker:
        """A worker whose jobs are ended after so many seconds, rounded up to minutes."""
        self._executor.update_parameters(timeout_min=max(1, math.ceil(time_limit_s / 60)))
        return ClusterWorker(self)

    def submit(self, trial: Trial):
        """submitit's job, and where its answer will be."""
        name = hashlib.sha256(json.dumps(asdict(trial), sort_keys=True).encode()).hexdigest()[:32]
        answer = self._folder / "answers" / f"{name}.json"
        if answer.exists():
            return None, answer
        with self._submits:
            return self._executor.submit(answer_trial, asdict(trial), str(answer)), answer


class ClusterWorker:
    """One job at a time; whatever becomes of it is an outcome. As `worker.TrialWorker`."""

    def __init__(self, cluster: Cluster):
        self._cluster = cluster
        self._job = None
        self._closed = False

    def run(self, trial: Trial) -> Outcome:
        """The outcome of a trial, when its job has ended."""
        self._job, answer = self._cluster.submit(trial)
        while self._job is not None and not self._job.done() and not self._closed:
            time.sleep(POLL_S)
        job, self._job = self._job, None
        if self._closed:
            return Outcome(trial, "killed", "the study was ended")
        ended = time.monotonic()
        while not answer.exists() and _may_have_answered(job) and time.monotonic() < ended + SEEN_AFTER_S:
            time.sleep(POLL_S)
        if not answer.exists():
            return Outcome(trial, *_why(job))
        try:
            return Outcome.from_dict(parse(read_text(answer)))
        except (OSError, ValueError, TypeError, KeyError) as error:
            return Outcome(trial, "crashed", f"the job gave no readable answer: {error}")
        finally:
            answer.unlink(missing_ok=True)

    def close(self) -> None:
        """Cancel the job that is under way."""
        self._closed = True
        if self._job is not None:
            self._job.cancel(check=False)


def answer_trial(trial: Mapping[str, object], path: str) -> None:
    """What a job does: run a trial, and write its outcome, whatever it is."""
    asked = Trial(**trial)
    try:
        outcome = run(asked)
    except Exception as error:
        outcome = Outcome(asked, *why(error))
    write_bytes(json.dumps(outcome.to_dict(), allow_nan=False).encode(), path)


def _may_have_answered(job) -> bool:
    return job.state.upper() in ("COMPLETED", "COMPLETING", "FINISHED")


def _why(job) -> tuple[str, str]:
    state = job.state.upper()
    status = next((found for word, found in STATUSES.items() if state.startswith(word)), "crashed")
    lines = [line.strip() for line in (job.stderr() or "").splitlines() if line.strip()]
    said = lines[-1][:500] if lines else "it said nothing"
    return status, f"the job {job.job_id} ended as {state} without an answer: {said}"


def _read(value: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value
