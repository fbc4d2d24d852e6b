"""The order of a study's runs, the ledger that keeps them, and what they say."""

import json
from dataclasses import replace

import pytest

from benchmarks.harness.errors import InputError
from benchmarks.quality.ledger import Heading, Ledger
from benchmarks.quality.schedule import run_all
from benchmarks.quality.study import ARMS, PRIMARY, Study, best_lr, trials
from benchmarks.quality.summary import summarise
from benchmarks.quality.tasks import load_task
from benchmarks.quality.training import FINAL, TUNING, Outcome
from reports.record import Record

STUDY = Study(tasks=("trec", "amazon"), seeds=3, lrs=(1e-3, 1e-2))
STUDY = replace(STUDY, arms=("lora", "sparsegrad-core@peak", "head"))
BUDGETS = {"lora": 7, "sparsegrad-core@peak": 100, "head": None}
POOLS = {"trec": 3000, "amazon": 2000}


def record(arm):
    return Record(method=ARMS[arm].method, budget=BUDGETS[arm], model="minilm-l6", status="ok", peak_step_bytes=2**20)


def ledger(tmp_path, study=STUDY):
    it = Ledger(tmp_path / "runs.jsonl")
    it.start(Heading(study, {arm: record(arm) for arm in study.arms}))
    return it


def labels(task):
    return [example.label for example in load_task(task).data.test]


class Fake:
    """A worker whose runs score as told: `right` of 1,000 test examples, by arm."""

    def __init__(self, right, fails=lambda trial: None, log=None):
        self.right, self.fails, self.log = right, fails, [] if log is None else log

    def run(self, trial):
        self.log.append(trial)
        if status := self.fails(trial):
            return Outcome(trial, status, "told to")
        if trial.purpose == TUNING:
            return Outcome(trial, "ok", score=trial.lr)
        truth = labels(trial.task)
        right = self.right[trial.arm] + trial.seed
        # Wrong ones are another class, or a rating of the other sign.
        found = [y if i % 1000 < right else (y + 1 if trial.task == "trec" else -y) for i, y in enumerate(truth)]
        return Outcome(trial, "ok", score=1.0, predictions=tuple(found), losses=(1.0,), curve=((5, 50.0),))

    def close(self):
        pass


def test_primary_arms_come_first_and_finals_wait_for_their_rate():
    planned = list(trials(STUDY, BUDGETS, POOLS, ()))
    assert len(planned) == 3 * 2 * 2 + 3 * 2 * 3
    tuning = [t for t in planned if t is not None]
    assert all(t.purpose == TUNING and t.seed == STUDY.tuning_seed for t in tuning)
    assert all(t.steps == 8 * 19 // 3 for t in tuning)  # 300 examples in batches of 16: 19 steps an epoch
    names = [arm.name for arm in PRIMARY]
    assert {t.arm for t in tuning[:8]} == set(names)
    assert {t.arm for t in tuning[8:]} == {"head"}


@pytest.mark.parametrize(
    ("scores", "expected"), [((1.0, 2.0), 1e-2), ((2.0, 2.0), 1e-3), ((None, 2.0), 1e-2), ((None, None), 1e-3)]
)
def test_the_best_rate(scores, expected):
    tuning = [t for t in trials(STUDY, BUDGETS, POOLS, ()) if t is not None][:2]
    outcomes = [
        Outcome(trial, "diverged" if score is None else "ok", score=score)
        for trial, score in zip(tuning, scores, strict=True)
    ]
    assert best_lr(outcomes) == expected


@pytest.mark.parametrize("jobs", [1, 3])
def test_everything_runs_once_and_a_new_ledger_reads_it(tmp_path, jobs):
    it, log = ledger(tmp_path), []
    right = {"lora": 700, "sparsegrad-core@peak": 800, "head": 300}
    assert run_all(it, jobs, lambda _: None, worker=lambda limit: Fake(right, log=log))
    assert len(log) == len(set(log)) == 30
    again = Ledger(it.path)
    assert again.heading == it.heading
    assert sorted(map(repr, again.outcomes)) == sorted(map(repr, it.outcomes))
    more = []
    assert run_all(again, 1, lambda _: None, worker=lambda limit: Fake(right, log=more))
    assert more == []
    summary = summarise(again)
    json.dumps(summary, allow_nan=False)
    assert summary["primary"]["verdict"] == "holds"
    per_task = {row["task"]: row["difference"] for row in summary["primary"]["per_task"]}
    assert per_task["trec"] == pytest.approx(10.0)  # 100 of 1,000
    head = next(c for c in summary["secondary"] if c["first"] == "head")
    assert head["verdict"] == "fails"
    assert head["p_holm"] >= head["p_value"]


def test_a_study_cut_off_has_no_verdict_and_a_cut_off_line_is_dropped(tmp_path):
    it = ledger(tmp_path)
    right = dict.fromkeys(STUDY.arms, 500)
    assert not run_all(it, 1, lambda _: None, deadline_s=0.0, worker=lambda limit: Fake(right))
    assert list(it.outcomes) == []
    trial = next(iter(trials(STUDY, BUDGETS, POOLS, ())))
    it.add(Fake(right).run(trial))
    with open(it.path, "ab") as file:
        file.write(b'{"trial": {"purp')
    again = Ledger(it.path)
    assert [o.trial for o in again.outcomes] == [trial]
    again.add(Fake(right).run(replace(trial, lr=1e-2)))
    assert len(Ledger(it.path).outcomes) == 2
    primary = summarise(again)["primary"]
    assert primary["verdict"] == "undecided"
    assert "12 of 12 runs are not done" in primary["reason"]


@pytest.mark.parametrize(("loser", "verdict"), [("lora", "holds"), ("sparsegrad-core@peak", "undecided")])
def test_an_arm_whose_run_failed_cannot_win(tmp_path, loser, verdict):
    it = ledger(tmp_path)

    def fails(trial):
        return "diverged" if (trial.purpose, trial.arm, trial.seed, trial.task) == (FINAL, loser, 1, "trec") else None

    right = {"lora": 600, "sparsegrad-core@peak": 800, "head": 300}
    run_all(it, 1, lambda _: None, worker=lambda limit: Fake(right, fails))
    primary = summarise(it)["primary"]
    assert (primary["verdict"], primary["failed"]) == (verdict, 1)


def test_a_killed_run_is_tried_again_in_the_next_go_alone(tmp_path):
    it, log = ledger(tmp_path), []
    right = dict.fromkeys(STUDY.arms, 500)

    def first(trial):
        return "killed" if trial.purpose == TUNING and trial.arm == "head" else None

    assert not run_all(it, 2, lambda _: None, worker=lambda limit: Fake(right, first, log))
    assert len(log) == len(set(log))
    log.clear()
    assert run_all(it, 2, lambda _: None, worker=lambda limit: Fake(right, log=log))
    assert {t.arm for t in log} == {"head"}


def test_what_a_worker_raises_ends_the_study(tmp_path):
    def breaks(trial):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        run_all(ledger(tmp_path), 2, lambda _: None, worker=lambda limit: Fake({}, breaks))


@pytest.mark.parametrize(
    "content", [b"[]\n", b"nonsense\n", b'{"schema": 99, "protocol": 1, "study": {}, "arms": {}}\n', b'{"schema": 1}\n']
)
def test_a_file_that_is_no_ledger_is_refused(tmp_path, content):
    (tmp_path / "runs.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="line 1, is not of a study's runs"):
        Ledger(tmp_path / "runs.jsonl")


@pytest.mark.parametrize("wrong", [{"arms": ("lora", "nobody")}, {"tasks": ()}, {"seeds": 0}, {"lrs": (1.0, 1.0)}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(InputError):
        Study(**wrong)
