"""A study's runs spread over processes: each takes the first run that is ready and that nobody has."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from benchmarks.quality.ledger import Ledger
from benchmarks.quality.study import trials
from benchmarks.quality.tasks import load_task
from benchmarks.quality.training import Outcome, Trial
from benchmarks.quality.worker import TrialWorker

DEFAULT_TIME_LIMIT_S = 3600


def run_all(
    ledger: Ledger,
    jobs: int,
    say: Callable[[str], None],
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    deadline_s: float | None = None,
    worker: Callable[[float], TrialWorker] = TrialWorker,
) -> bool:
    """Run what the ledger's study lacks; whether nothing is lacking at the end.

    Args:
        ledger: with its heading; each outcome is added to it as it comes.
        jobs: processes.
        say: told of each run, with how many there are and for how long they will take.
        time_limit_s: seconds after which one run is ended.
        deadline_s: seconds after which no further run is begun.
        worker: makes what runs trials.
    """
    work = _Work(ledger, say, deadline_s)
    workers = [worker(time_limit_s) for _ in range(jobs)]
    threads = [threading.Thread(target=work.serve, args=(each,), daemon=True) for each in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            # Not join() alone: it would not let a signal through.
            while thread.is_alive():
                thread.join(0.2)
    finally:
        work.stop()
        for each in workers:
            each.close()
    if work.error is not None:
        raise work.error
    return work.complete()


class _Work:
    """What is to be done, shared by the threads that each hold a worker."""

    def __init__(self, ledger: Ledger, say: Callable[[str], None], deadline_s: float | None):
        self.error: Exception | None = None
        self._ledger, self._say = ledger, say
        self._changed = threading.Condition()
        self._running: set[Trial] = set()
        self._attempted: set[Trial] = set()
        self._stopped = False
        self._started = time.monotonic()
        self._ends = None if deadline_s is None else self._started + deadline_s
        self._steps_done = 0
        study = ledger.heading.study
        self._budgets = {name: record.budget for name, record in ledger.heading.arms.items()}
        self._pools = {task: len(load_task(task, study.hub).data.train) for task in study.tasks}
        self._longest = max(study.steps(pool) for pool in self._pools.values())

    def serve(self, worker: TrialWorker) -> None:
        """Take trials until there are no more."""
        try:
            while (trial := self._take()) is not None:
                outcome = worker.run(trial)
                with self._changed:
                    if self._stopped:
                        return
                    self._keep(outcome)
        except Exception as error:
            self.error = error
            self.stop()

    def stop(self) -> None:
        """Nobody takes a further trial."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def complete(self) -> bool:
        """Whether every trial has an outcome that needs no further run."""
        return all(trial is not None and self._ledger.settled(trial) for trial in self._all())

    def _all(self) -> list[Trial | None]:
        study = self._ledger.heading.study
        return list(trials(study, self._budgets, self._pools, self._ledger.outcomes))

    def _take(self) -> Trial | None:
        with self._changed:
            while not self._stopped:
                if self._ends is not None and time.monotonic() >= self._ends:
                    return None
                free = (t for t in self._all() if t is not None and self._open(t))
                trial = next(free, None)
                if trial is not None:
                    self._running.add(trial)
                    return trial
                if not self._running:
                    return None
                self._changed.wait()
            return None

    def _open(self, trial: Trial) -> bool:
        # A run that failed is not tried twice in one go.
        return trial not in self._running and trial not in self._attempted and not self._ledger.settled(trial)

    def _keep(self, outcome: Outcome) -> None:
        trial = outcome.trial
        self._ledger.add(outcome)
        self._running.discard(trial)
        self._attempted.add(trial)
        every = self._all()
        left = sum(t is None or not self._ledger.settled(t) for t in every)
        passed = time.monotonic() - self._started
        # Tasks have pools of different sizes, so that steps are counted and not runs.
        self._steps_done += trial.steps
        ahead = sum(self._longest if t is None else t.steps for t in every if t is None or not self._ledger.settled(t))
        minutes = passed / self._steps_done * ahead / 60
        result = f"{outcome.score:.2f}" if outcome.status == "ok" else f"{outcome.status}: {outcome.reason}"
        self._say(f"[{len(every) - left}/{len(every)}] {trial.label}: {result} (about {minutes:.0f} min left)")
        self._changed.notify_all()
