"""Training runs as a cluster's jobs: whatever becomes of one is an outcome, and its answer is data."""

import json
import sys
import threading
from dataclasses import asdict, replace

import pytest

from benchmarks import cli
from benchmarks.harness.errors import InputError
from benchmarks.quality import cluster, command
from benchmarks.quality.cluster import Cluster, ClusterWorker, answer_trial
from benchmarks.quality.training import TUNING, Outcome, Trial
from reports.record import write_bytes

TRIAL = Trial(TUNING, "amazon", 20, "lora", "lora", 7, 1e-3, 1000, 2, "minilm-l6", 16, 64, "none")
DONE = Outcome(TRIAL, "ok", score=6.5, losses=(2.0, 1.0))


class Job:
    """Stands in for submitit's: ends at the second look, in a state, with an answer or without."""

    job_id = "17"

    def __init__(self, state, errors="", ends=True):
        self.state, self._errors, self._ends, self._looks = state, errors, ends, 0
        self.cancelled = threading.Event()

    def done(self):
        self._looks += 1
        return self._ends and self._looks > 1

    def stderr(self):
        return self._errors

    def cancel(self, check):
        self.cancelled.set()


class Submits:
    """Stands in for a `Cluster`: gives the job that it was made with."""

    def __init__(self, job, answer):
        self.job, self.answer = job, answer

    def submit(self, trial):
        return self.job, self.answer


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(cluster, "POLL_S", 0.005)
    monkeypatch.setattr(cluster, "SEEN_AFTER_S", 0.05)


def ran(job, answer):
    return ClusterWorker(Submits(job, answer)).run(TRIAL)


def test_the_answer_is_read_and_removed(tmp_path):
    answer = tmp_path / "answer.json"
    answer.write_text(json.dumps(DONE.to_dict()))
    assert ran(Job("COMPLETED"), answer) == DONE
    assert not answer.exists()


def test_an_answer_that_is_seen_late_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "SEEN_AFTER_S", 20)
    answer = tmp_path / "answer.json"
    threading.Timer(0.1, lambda: write_bytes(json.dumps(DONE.to_dict()).encode(), answer)).start()
    assert ran(Job("COMPLETED"), answer) == DONE


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("TIMEOUT", "timeout"),
        ("OUT_OF_MEMORY", "killed"),
        ("OUT_OF_ME+", "killed"),
        ("CANCELLED by 0", "killed"),
        ("NODE_FAIL", "killed"),
        ("FAILED", "crashed"),
        ("COMPLETED", "crashed"),
        ("INTERRUPTED", "crashed"),
    ],
)
def test_a_job_without_an_answer_is_an_outcome(state, status, tmp_path):
    outcome = ran(Job(state, "first\nlast words\n\n"), tmp_path / "none.json")
    assert (outcome.trial, outcome.status) == (TRIAL, status)
    assert outcome.reason == f"the job 17 ended as {state.upper()} without an answer: last words"


@pytest.mark.parametrize("text", ["", "[", "3", '{"trial": {}}', json.dumps(asdict(DONE) | {"score": "high"})])
def test_an_answer_that_is_none_is_an_outcome(text, tmp_path):
    answer = tmp_path / "answer.json"
    answer.write_text(text)
    outcome = ran(Job("COMPLETED"), answer)
    assert (outcome.trial, outcome.status) == (TRIAL, "crashed")
    assert outcome.reason.startswith("the job gave no readable answer: ")
    # A study that goes on tries it again.
    assert not answer.exists()


def test_closing_cancels_the_job_that_is_under_way(tmp_path):
    job, found = Job("RUNNING", ends=False), []
    worker = ClusterWorker(Submits(job, tmp_path / "none.json"))
    thread = threading.Thread(target=lambda: found.append(worker.run(TRIAL)), daemon=True)
    thread.start()
    while worker._job is None:
        pass
    worker.close()
    thread.join(20)
    assert job.cancelled.is_set()
    assert [outcome.status for outcome in found] == ["killed"]


def test_what_a_job_answers_when_its_run_fails(tmp_path, monkeypatch):
    def run(trial):
        raise InputError("no such task")

    monkeypatch.setattr(cluster, "run", run)
    answer_trial(asdict(TRIAL), str(tmp_path / "new" / "answer.json"))
    outcome = Outcome.from_dict(json.loads((tmp_path / "new" / "answer.json").read_text()))
    assert outcome == Outcome(TRIAL, "refused", "no such task")


# --- submitit itself


def test_a_real_job_on_this_machine(tmp_path):
    made = Cluster("local", tmp_path / "cluster", {})
    # A model that is not there: refused by the run itself, and none is built.
    trial = replace(TRIAL, model=str(tmp_path / "nothing"), task="trec")
    outcome = made(60).run(trial)
    assert (outcome.trial, outcome.status) == (trial, "refused")
    assert "nothing" in outcome.reason
    assert list((tmp_path / "cluster" / "answers").iterdir()) == []


def test_an_answer_that_an_ended_command_left_is_taken_up(tmp_path, monkeypatch):
    made, paths = Cluster("local", tmp_path, {}), []
    monkeypatch.setattr(made._executor, "submit", lambda *given: paths.append(given[-1]) or Job("COMPLETED"))
    made.submit(TRIAL)
    write_bytes(json.dumps(DONE.to_dict()).encode(), paths[0])
    assert made(60).run(TRIAL) == DONE
    assert len(paths) == 1
    made.submit(replace(TRIAL, seed=3))
    assert len(set(paths)) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("local", {"walltime": "3"}, "walltime"),
        ("local", {"mem_gb": "plenty"}, "mem_gb"),
        ("slurm", {}, "srun"),
        ("pbs", {}, "pbs"),
    ],
)
def test_what_submitit_refuses_is_refused(name, options, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=f"--cluster {name} cannot be used so: .*{message}"):
        Cluster(name, tmp_path, options)


def test_without_submitit_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"--cluster needs submitit: pip install -e '\.\[bench,cluster\]'"):
        Cluster("local", tmp_path, {})


def test_the_command_line(tmp_path, monkeypatch, capsys):
    made, seen = [], []
    monkeypatch.setattr(command, "_check_workloads", lambda study: None)
    monkeypatch.setattr(command, "records", lambda study, say: {})
    monkeypatch.setattr(command, "Cluster", lambda *given: made.append(given) or "worker")
    monkeypatch.setattr(command, "run_all", lambda *given: seen.append(given[-1]) or True)
    monkeypatch.setattr(command, "summarise", lambda ledger: {})
    monkeypatch.setattr(command, "table", lambda summary: [])
    options = ["--arms", "head", "--jobs", "9", "--cluster", "slurm"]
    options += ["--cluster-option", "slurm_partition=short", "--cluster-option", "mem_gb=4"]
    assert cli.main(["quality", "--out", str(tmp_path), *options]) == 0
    assert made == [("slurm", tmp_path / "cluster", {"slurm_partition": "short", "mem_gb": "4"})]
    assert seen == ["worker"]


def test_an_option_of_no_cluster(tmp_path, capsys):
    assert cli.main(["quality", "--out", str(tmp_path), "--cluster-option", "mem_gb=4"]) == 2
    assert "--cluster-option goes with --cluster" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["quality", "--out", str(tmp_path), "--cluster", "local", "--cluster-option", "mem_gb"])
    assert "write NAME=VALUE" in capsys.readouterr().err
