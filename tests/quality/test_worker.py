"""Training runs in processes: whatever happens to one is an outcome, and the next trial is run all the same."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import process
from benchmarks.harness.errors import InputError
from benchmarks.harness.protocol import Diverged
from benchmarks.quality import worker
from benchmarks.quality.training import TUNING, Outcome, Trial
from benchmarks.quality.worker import TrialWorker

TRIAL = Trial(TUNING, "amazon", 20, "lora", "lora", 7, 1e-3, 1000, 3, "minilm-l6", 16, 64, "none")
OTHER = Trial(TUNING, "amazon", None, "head", "head", None, 1e-3, 1000, 3, "minilm-l6", 16, 64, "none")
# Stands in for a process: answers each trial with its number among those that this process got.
COUNTS = """
import json, sys
for number, line in enumerate(sys.stdin, 1):
    {first}
    print(json.dumps({{"trial": json.loads(line), "status": "ok", "score": number}}), flush=True)
"""


def stand_in(monkeypatch, code):
    """Put a Python program in the process's place; the list of the processes that are started."""
    started = []

    class Started(process.LineProcess):
        def __init__(self, module):
            super().__init__(module)
            started.append(self._process)

    monkeypatch.setattr(process, "process_command", lambda module: [sys.executable, "-S", "-c", code])
    monkeypatch.setattr(worker, "LineProcess", Started)
    return started


def alive(popen):
    return Path(f"/proc/{popen.pid}").exists()


def test_one_process_runs_one_trial_after_the_other_until_it_is_closed(monkeypatch):
    started = stand_in(monkeypatch, COUNTS.format(first=""))
    it = TrialWorker(60)
    outcomes = [it.run(trial) for trial in (TRIAL, OTHER)]
    assert outcomes == [Outcome(TRIAL, "ok", score=1), Outcome(OTHER, "ok", score=2)]
    (popen,) = started
    assert alive(popen)
    it.close()
    assert not alive(popen)
    it.close()  # again is nothing


def test_a_killed_process_is_an_outcome_and_the_next_trial_gets_a_new_one(monkeypatch):
    kill = "if number == 2: import os; os.kill(os.getpid(), 9)"
    started = stand_in(monkeypatch, COUNTS.format(first=kill))
    it = TrialWorker(60)
    assert it.run(TRIAL).score == 1
    killed = it.run(OTHER)
    assert (killed.trial, killed.status, killed.score) == (OTHER, "killed", None)
    assert "SIGKILL" in killed.reason
    assert it.run(OTHER) == Outcome(OTHER, "ok", score=1)
    assert len(started) == 2
    it.close()
    assert not any(map(alive, started))


def test_a_crash_is_told_with_its_last_line(monkeypatch):
    stand_in(monkeypatch, "import sys; sys.stdin.readline(); raise SystemError('the roof is off')")
    crashed = TrialWorker(60).run(TRIAL)
    assert (crashed.trial, crashed.status) == (TRIAL, "crashed")
    assert crashed.reason == "the worker ended with code 1: SystemError: the roof is off"


def test_a_process_that_hangs_is_ended(monkeypatch):
    started = stand_in(monkeypatch, COUNTS.format(first="import time; time.sleep(20)"))
    it = TrialWorker(0.3)
    timeout = it.run(TRIAL)
    assert (timeout.trial, timeout.status) == (TRIAL, "timeout")
    assert "0.3 s" in timeout.reason
    assert [alive(popen) for popen in started] == [False]


@pytest.mark.parametrize("answer", ["", "[", "[]", "3", "null", "{}", '{"trial": {}, "status": "ok"}'])
def test_an_answer_that_is_no_outcome(monkeypatch, answer):
    started = stand_in(
        monkeypatch, f"import sys; sys.stdin.readline(); print({answer!r}, flush=True); sys.stdin.read()"
    )
    crashed = TrialWorker(60).run(TRIAL)
    assert (crashed.trial, crashed.status) == (TRIAL, "crashed")
    assert "no readable answer" in crashed.reason
    assert [alive(popen) for popen in started] == [False]


def test_a_real_run_in_a_process_whose_libraries_print(monkeypatch, model):
    noise = (
        "import os; from benchmarks.quality import worker; run = worker.run; "
        "worker.run = lambda trial: (print('progress'), os.write(1, b'more'), run(trial))[2]; worker.main()"
    )
    command = [sys.executable, "-c", noise, str(os.getpid())]
    monkeypatch.setattr(process, "process_command", lambda module: command)
    trial = Trial(TUNING, "amazon", 20, "lora", "lora", 3, 1e-3, 1000, 3, model, 8, 16, "none")
    it = TrialWorker(300)
    try:
        outcome = it.run(trial)
        refused = it.run(Trial(TUNING, "amazon", 10**6, "lora", "lora", 3, 1e-3, 1000, 3, model, 8, 16, "none"))
    finally:
        it.close()
    assert (outcome.trial, outcome.status, outcome.reason) == (trial, "ok", None)
    assert -100 <= outcome.score <= 100
    assert len(outcome.losses) == 3
    assert outcome.environment["torch_version"] == torch.__version__
    assert refused.status == "refused"
    assert "cannot be drawn" in refused.reason


# --- the process's end


def served(monkeypatch, *results):
    """The outcomes of as many trials, the runs of which end as told."""
    it = iter(results)

    def run(trial):
        result = next(it)
        if isinstance(result, Exception):
            raise result
        return Outcome(trial, "ok", score=result)

    monkeypatch.setattr(worker, "run", run)
    requests = "".join(json.dumps(vars(trial)) + "\n" for trial in (TRIAL, OTHER)[: len(results)])
    answers = io.StringIO()
    worker.serve(io.StringIO(requests), answers)
    return [Outcome.from_dict(json.loads(line)) for line in answers.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("error", "status"),
    [(Diverged("the loss is nan"), "diverged"), (InputError("not so"), "refused"), (MemoryError("no more"), "oom")],
)
def test_a_run_that_fails_is_told_and_the_next_one_runs(monkeypatch, error, status):
    assert served(monkeypatch, error, 2.5) == [Outcome(TRIAL, status, str(error)), Outcome(OTHER, "ok", score=2.5)]


def test_a_defect_is_not_hidden(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        served(monkeypatch, ZeroDivisionError())
