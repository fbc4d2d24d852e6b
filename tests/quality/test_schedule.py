"""Who runs what when: in order, a final run after its tuning, and nobody left waiting when something breaks."""

import random
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from benchmarks.quality import schedule
from benchmarks.quality import study as study_module
from benchmarks.quality.ledger import Heading, Ledger
from benchmarks.quality.schedule import run_all
from benchmarks.quality.study import ARMS, Study, trials
from benchmarks.quality.training import FINAL, TUNING, Outcome
from reports.record import Record

STUDY = Study(arms=("head", "lora", "sparsegrad-core@peak"), tasks=("trec", "amazon"), lrs=(1e-3, 1e-2), seeds=2)
BUDGETS = {"head": None, "lora": 7, "sparsegrad-core@peak": 100}
POOLS = {"trec": 3981, "amazon": 2297}


@pytest.fixture(autouse=True)
def pools(monkeypatch):
    def stub(name, hub):
        return SimpleNamespace(data=SimpleNamespace(train=range(POOLS[name])))

    monkeypatch.setattr(schedule, "load_task", stub)


@pytest.fixture
def ledger(tmp_path):
    it = Ledger(tmp_path / "runs.jsonl")
    it.start(Heading(STUDY, {a: Record(method=ARMS[a].method, budget=BUDGETS[a], model="m") for a in STUDY.arms}))
    return it


class Workers:
    """Makes workers that run nothing: `log` has what began and ended in which order, `closed` who was closed."""

    def __init__(self, run=None, pause_s=0.0):
        self.log, self.made, self.closed = [], [], []
        self._run, self._pause_s, self._random = run, pause_s, random.Random(0)

    def __call__(self, time_limit_s):
        self.made.append(SimpleNamespace(run=self.run, close=lambda: self.closed.append(len(self.made))))
        return self.made[-1]

    def run(self, trial):
        self.log.append(("begun", trial))
        time.sleep(self._random.random() * self._pause_s)
        outcome = self._run(trial) if self._run else None
        self.log.append(("ended", trial))
        return outcome or Outcome(trial, "ok", score=trial.lr, losses=(1.0,), predictions=(0.0,), curve=((1, 0.0),))

    @property
    def begun(self):
        return [trial for what, trial in self.log if what == "begun"]


def silent(_):
    pass


def in_time(call):
    """What a call returns or raises; it must not wait for ever."""
    found = []

    def body():
        try:
            found.append((call(), None))
        except Exception as error:
            found.append((None, error))

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(30)
    assert found, "still waiting"
    return found[0]


def planned(outcomes):
    return list(trials(STUDY, BUDGETS, POOLS, outcomes))


def test_one_job_goes_in_order(ledger):
    workers, said = Workers(), []
    assert run_all(ledger, 1, said.append, worker=workers)
    assert workers.begun == planned(ledger.outcomes)
    assert len(workers.begun) == 3 * 2 * 2 * 2 + 2 * 2 * 3
    assert [line.split()[0] for line in said] == [f"[{n}/36]" for n in range(1, 37)]
    assert len(workers.closed) == len(workers.made) == 1


@pytest.mark.parametrize("jobs", [2, 3])
def test_a_final_run_begins_when_its_tuning_is_complete(ledger, jobs):
    workers = Workers(pause_s=0.004)
    assert run_all(ledger, jobs, silent, worker=workers)
    assert sorted(map(repr, workers.begun)) == sorted(map(repr, planned(ledger.outcomes)))
    ended = set()
    for what, trial in workers.log:
        if what == "ended":
            ended.add(trial)
        elif trial.purpose == FINAL:
            tuned = [t.lr for t in ended if (t.purpose, t.arm, t.task) == (TUNING, trial.arm, trial.task)]
            assert sorted(tuned) == [1e-3, 1e-3, 1e-2, 1e-2]
            assert trial.lr == 1e-2
    together = max(
        sum({"begun": 1, "ended": -1}[what] for what, _ in workers.log[:n]) for n in range(len(workers.log) + 1)
    )
    assert 1 < together <= jobs == len(workers.closed)


def test_the_time_limit_is_the_workers(ledger):
    limits = []
    run_all(ledger, 2, silent, 77.0, 0.0, worker=lambda limit: limits.append(limit) or Workers()(limit))
    assert limits == [77.0, 77.0]


def test_after_the_deadline_nothing_is_begun_and_the_next_go_takes_what_is_left(ledger):
    workers = Workers()
    assert not run_all(ledger, 2, silent, deadline_s=0.0, worker=workers)
    assert workers.log == []

    class Stop(Exception):
        pass

    def stop_at_the_ninth(trial):
        if len(workers.begun) == 9:
            raise Stop

    workers = Workers(stop_at_the_ninth)
    with pytest.raises(Stop):
        run_all(ledger, 1, silent, worker=workers)
    done = workers.begun[:-1]
    rest = Workers()
    assert run_all(Ledger(ledger.path), 1, silent, worker=rest)
    assert not set(done) & set(rest.begun)
    assert len(done) + len(rest.begun) == 36


@pytest.mark.parametrize("failing", [TUNING, FINAL])
def test_a_failed_run_waits_for_the_next_go(ledger, failing):
    def killed(trial):
        if (trial.purpose, trial.arm, trial.task) == (failing, "lora", "trec"):
            return Outcome(trial, "killed", "out of memory")
        return None

    workers = Workers(killed)
    assert not run_all(ledger, 2, silent, worker=workers)
    assert len(workers.begun) == len(set(workers.begun)) == 36
    again = Workers()
    assert run_all(Ledger(ledger.path), 2, silent, worker=again)
    assert {(t.arm, t.task) for t in again.begun} == {("lora", "trec")}
    retried = [t for t in again.begun if t in set(workers.begun)]
    # The final runs had the smallest rate while no rate was known to be better: they are done anew.
    assert {t.purpose for t in retried} == {failing}
    assert len(again.begun) == (4 + 2 if failing == TUNING else 2)


def test_a_run_that_diverged_is_not_tried_again(ledger):
    def diverges(trial):
        return Outcome(trial, "diverged", "the loss is nan") if trial.arm == "lora" else None

    assert run_all(ledger, 1, silent, worker=Workers(diverges))
    again = Workers()
    assert run_all(Ledger(ledger.path), 1, silent, worker=again)
    assert again.begun == []


@pytest.mark.parametrize("jobs", [1, 3])
def test_what_a_worker_raises_is_raised_while_others_wait(tmp_path, jobs, monkeypatch):
    # One rate of one arm, tuned in one run: until it is done, all but one have nothing to do.
    monkeypatch.setattr(study_module, "TUNING_SEEDS", (1000,))
    study = Study(arms=("lora",), tasks=("trec",), lrs=(1e-3,), seeds=3)
    ledger = Ledger(tmp_path / "one.jsonl")
    ledger.start(Heading(study, {"lora": Record(method="lora", budget=7, model="m")}))

    def breaks(trial):
        time.sleep(0.02)
        raise ZeroDivisionError("a defect")

    workers = Workers(breaks)
    result, error = in_time(lambda: run_all(ledger, jobs, silent, worker=workers))
    assert result is None
    assert isinstance(error, ZeroDivisionError)
    assert len(workers.begun) == 1
    assert len(workers.closed) == jobs
    assert ledger.outcomes == []


def test_a_disk_that_is_full_ends_the_study(ledger, monkeypatch):
    def full(outcome):
        raise OSError("no space left on device")

    monkeypatch.setattr(ledger, "add", full)
    workers = Workers()
    _, error = in_time(lambda: run_all(ledger, 3, silent, worker=workers))
    assert isinstance(error, OSError)
    assert len(workers.closed) == 3


def test_an_interruption_closes_the_workers_and_keeps_nothing_of_what_they_did(ledger):
    closed = threading.Event()

    class Slow:
        """Runs until it is closed, as a process that is killed."""

        def run(self, trial):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert closed.wait(30)
            return Outcome(trial, "killed", "the worker was killed")

        def close(self):
            closed.set()

    # A shell's background jobs, and so their tests, start with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_all(ledger, 1, silent, worker=lambda limit: Slow())
    finally:
        signal.signal(signal.SIGINT, before)
    assert closed.is_set()
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and thread.daemon and "serve" in thread.name:
            thread.join(30)
    assert Ledger(ledger.path).outcomes == []
