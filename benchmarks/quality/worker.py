"""Training runs in processes of their own, one after the other in each."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import TextIO

from benchmarks.harness.process import Ended, LineProcess, end_with_parent
from benchmarks.harness.worker import why
from benchmarks.quality.training import Outcome, Trial, run


class TrialWorker:
    """The parent's end. A process that dies, or whose time is up, is an outcome; the next trial gets a new one."""

    def __init__(self, time_limit_s: float):
        self._limit_s = time_limit_s
        self._process: LineProcess | None = None

    def run(self, trial: Trial) -> Outcome:
        """The outcome of a trial, whatever happens to it."""
        if self._process is None:
            self._process = LineProcess("benchmarks.quality.worker")
        try:
            self._process.send(asdict(trial))
            return Outcome.from_dict(self._process.answer(self._limit_s))
        except TimeoutError:
            outcome = Outcome(trial, "timeout", f"the worker was ended after its time limit of {self._limit_s:g} s")
        except Ended as ended:
            outcome = Outcome(trial, ended.status, ended.reason)
        except (ValueError, TypeError, KeyError) as error:
            outcome = Outcome(trial, "crashed", f"the worker gave no readable answer: {error}")
        self.close()
        return outcome

    def close(self) -> None:
        """End the process and its children."""
        if self._process is not None:
            self._process.close()
            self._process = None


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer trials with outcomes until there are no more."""
    for line in requests:
        trial = Trial(**json.loads(line))
        try:
            outcome = run(trial)
        except Exception as error:
            outcome = Outcome(trial, *why(error))
        answers.write(json.dumps(outcome.to_dict(), allow_nan=False) + "\n")
        answers.flush()


def main() -> None:
    """Serve standard input; what libraries print goes to standard error."""
    end_with_parent()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
