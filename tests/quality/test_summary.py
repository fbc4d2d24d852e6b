"""What a study's runs say, on predictions made up so that every difference is known."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.claim.quality import judge
from benchmarks.harness.text import Example, TextData
from benchmarks.quality import summary as module
from benchmarks.quality.ledger import Heading, Ledger
from benchmarks.quality.statistics import LEVEL
from benchmarks.quality.study import ARMS, Study, trials
from benchmarks.quality.summary import summarise, table
from benchmarks.quality.tasks import Task
from benchmarks.quality.training import FINAL, TUNING, Outcome
from reports.record import Record

CANDIDATE, BASELINE = "sparsegrad-core@peak", "lora"
STUDY = Study(
    arms=(CANDIDATE, BASELINE, "random-mask", "full", "head"), tasks=("trec", "nyt"), lrs=(1e-3, 3e-3, 1e-2), seeds=4
)
EXAMPLES = 500
CLASSES = tuple(Example(f"text {i}", i % 2) for i in range(EXAMPLES))
RATINGS = tuple(Example(f"text {i}", (-1.0) ** i) for i in range(EXAMPLES))


def task(name, examples, names):
    return Task(TextData(name, train=examples[:50], validation=(), test=examples, label_names=names, source=""))


TASKS = {"trec": task("trec", CLASSES, ("even", "odd")), "nyt": task("nyt", RATINGS, ())}
RIGHT = {CANDIDATE: 400, BASELINE: 350, "random-mask": 350, "full": 420, "head": 200}


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    monkeypatch.setattr(module, "load_task", lambda name, hub: TASKS[name])


@pytest.fixture
def begun(tmp_path):
    """A ledger with its heading."""
    it = Ledger(tmp_path / "runs.jsonl")
    arms = {
        name: Record(method=ARMS[name].method, budget=None, model="m", peak_step_bytes=(i + 1) * 2**20)
        for i, name in enumerate(STUDY.arms)
    }
    it.start(Heading(STUDY, arms))
    return it


def predictions(name, right):
    """`right` of the examples as they are, and the others of the wrong class or sign; both classes are even in each."""
    truth = [example.label for example in TASKS[name].data.test]
    wrong = (1 - np.array(truth)) if name == "trec" else -np.array(truth)
    return tuple(np.where(np.arange(EXAMPLES) < right, truth, wrong).tolist())


def ok(trial, right):
    """A run that has `right` examples right; the best rate in tuning is 3e-3."""
    if trial.purpose == TUNING:
        return Outcome(trial, "ok", score=-abs(np.log10(trial.lr / 3e-3)), losses=(1.0,))
    # Seeds scatter by two examples around their arm's number.
    found = predictions(trial.task, right[trial.arm] + 2 * (trial.seed % 2))
    return Outcome(
        trial, "ok", score=50.0, predictions=found, losses=(2.0, 1.0 + trial.seed), curve=((5, 10.0), (9, 20.0))
    )


def run(ledger, right=RIGHT, special=lambda trial: None, until=lambda trial: False):
    """Add what the ledger lacks, in order, `until` a trial that is not begun."""
    study, pools = ledger.heading.study, {name: 50 for name in TASKS}
    budgets = {name: record.budget for name, record in ledger.heading.arms.items()}
    while True:
        done = {outcome.trial for outcome in ledger.outcomes}
        lacking = [t for t in trials(study, budgets, pools, ledger.outcomes) if t is not None and t not in done]
        for trial in lacking:
            if until(trial):
                return ledger
            ledger.add(special(trial) or ok(trial, right))
        if not lacking:
            return ledger


def secondary(summary, first, second):
    (found,) = [c for c in summary["secondary"] if (c["first"], c["second"]) == (first, second)]
    return found


# --- verdicts


@pytest.mark.parametrize(
    ("candidate", "verdict", "equivalent"), [(400, "holds", False), (300, "fails", False), (350, "undecided", True)]
)
def test_the_primary_endpoint(begun, candidate, verdict, equivalent):
    primary = summarise(run(begun, RIGHT | {CANDIDATE: candidate}))["primary"]
    assert (primary["first"], primary["second"]) == (CANDIDATE, BASELINE)
    assert (primary["verdict"], primary["equivalent"], primary["reason"]) == (verdict, equivalent, None)
    # Of 500: accuracy is right / 500, and so many even signs give a correlation of 2 right / 500 - 1.
    accuracy, correlation = (100 * (candidate - 350) / 500, 200 * (candidate - 350) / 500)
    assert [row["task"] for row in primary["per_task"]] == ["trec", "nyt"]
    assert [row["difference"] for row in primary["per_task"]] == pytest.approx([accuracy, correlation], abs=1e-9)
    assert primary["difference"] == pytest.approx((accuracy + correlation) / 2, abs=1e-9)
    assert primary["low"] <= primary["difference"] <= primary["high"]
    assert (primary["seeds"], primary["failed"]) == (4, 0)


def test_seeds_are_paired_whatever_the_order_in_which_they_ended(begun, tmp_path):
    run(begun)
    backwards = Ledger(tmp_path / "backwards.jsonl")
    backwards.start(begun.heading)
    finals = [o for o in begun.outcomes if o.trial.purpose == FINAL]
    for outcome in [o for o in begun.outcomes if o.trial.purpose == TUNING] + finals[::-1]:
        backwards.add(outcome)
    some, others = summarise(begun), summarise(backwards)
    assert some["primary"] == others["primary"]
    assert some["secondary"] == others["secondary"]


def test_no_verdict_before_all_runs_are_done(begun):
    last = ("head", "nyt", 3)
    run(begun, until=lambda t: t.purpose == FINAL and (t.arm, t.task, t.seed) == last)
    summary = summarise(begun)
    assert summary["primary"]["verdict"] == "holds"
    lacking = secondary(summary, "head", BASELINE)
    assert lacking == {
        "first": "head",
        "second": BASELINE,
        "verdict": "undecided",
        "reason": "1 of 16 runs are not done",
    }
    for comparison in summary["secondary"]:  # 140 of 500 apart, some of them
        assert comparison["verdict"] == "undecided"
        assert "p_holm" not in comparison
    assert summary["runs"]["settled"] == summary["runs"]["planned"] - 1


def test_a_study_that_has_not_begun(begun):
    summary = summarise(begun)
    json.dumps(summary, allow_nan=False)
    assert summary["primary"]["reason"] == "16 of 16 runs are not done"
    assert "difference" not in summary["primary"]
    assert (summary["runs"]["planned"], summary["runs"]["settled"]) == (5 * 2 * 3 * 2 + 5 * 2 * 4, 0)
    assert all(arm["mean"] is None for arm in summary["arms"])


def test_final_runs_at_a_rate_that_is_not_the_best_any_more_do_not_count(begun):
    def best_is_killed(trial):
        chosen = (trial.purpose, trial.arm, trial.task, trial.lr) == (TUNING, BASELINE, "trec", 3e-3)
        return Outcome(trial, "killed", "out of memory") if chosen else None

    run(begun, special=best_is_killed)
    killed = [o.trial for o in begun.outcomes if o.status == "killed"]
    assert len(killed) == 2
    assert summarise(begun)["primary"]["verdict"] == "holds"
    for trial in killed:
        begun.add(ok(trial, RIGHT))
    summary = summarise(begun)
    assert summary["primary"]["verdict"] == "undecided"
    assert summary["primary"]["reason"] == "4 of 16 runs are not done"
    (lora,) = [arm for arm in summary["arms"] if arm["arm"] == BASELINE]
    assert [of["lr"] for of in lora["tasks"]] == [None, 3e-3]
    # With a lower score at the new rate, and no mixture of both.
    run(begun, RIGHT | {BASELINE: 300})
    assert summarise(begun)["primary"]["per_task"][0]["difference"] == pytest.approx(100 * (400 - 300) / 500)


# --- failures


@pytest.mark.parametrize(
    ("candidate", "failed", "verdict"),
    [
        (400, CANDIDATE, "undecided"),
        (400, BASELINE, "holds"),
        (300, CANDIDATE, "fails"),
        (300, BASELINE, "undecided"),
    ],
)
def test_an_arm_does_not_win_by_failing(begun, candidate, failed, verdict):
    def diverges(trial):
        at = (trial.purpose, trial.arm, trial.task, trial.seed) == (FINAL, failed, "nyt", 2)
        return Outcome(trial, "diverged", "the loss is nan") if at else None

    summary = summarise(run(begun, RIGHT | {CANDIDATE: candidate}, diverges))
    primary = summary["primary"]
    assert (primary["verdict"], primary["failed"], primary["seeds"]) == (verdict, 1, 3)
    assert abs(primary["difference"]) > 10
    if verdict == "undecided":
        assert primary["reason"] == f"{failed} scores higher where it ran, but 1 of its runs failed (diverged)"
    (arm,) = [arm for arm in summary["arms"] if arm["arm"] == failed]
    assert arm["mean"] is None
    assert [sorted(of["scores"]) for of in arm["tasks"]] == [[0, 1, 2, 3], [0, 1, 3]]
    assert summary["runs"]["failed"] == [
        {"run": f"final {failed} on nyt (300), lr 0.003, seed 2", "status": "diverged", "reason": "the loss is nan"}
    ]


def test_too_few_seeds_that_all_runs_have(begun):
    def diverges(trial):
        lost = {("trec", 0), ("trec", 1), ("nyt", 2)}
        at = trial.purpose == FINAL and trial.arm == CANDIDATE and (trial.task, trial.seed) in lost
        return Outcome(trial, "diverged", "the loss is nan") if at else None

    primary = summarise(run(begun, special=diverges))["primary"]
    assert (primary["verdict"], primary["reason"]) == (
        "undecided",
        "3 runs failed, which leaves 1 of 4 seeds that all runs have, and a comparison needs 2",
    )
    assert "difference" not in primary


# --- Holm's correction


def test_a_comparison_that_cannot_be_made_does_not_hold_up_the_others(begun):
    def diverges(trial):
        lost = trial.purpose == FINAL and trial.arm == "head" and trial.seed < 3
        return Outcome(trial, "diverged", "the loss is nan") if lost else None

    summary = summarise(run(begun, special=diverges))
    head = secondary(summary, "head", BASELINE)
    assert (head["verdict"], head["p_value"], head["p_holm"]) == ("undecided", 1.0, 1.0)
    assert head["reason"].startswith("6 runs failed, which leaves 1 of 4 seeds")
    assert secondary(summary, "full", BASELINE)["verdict"] == "holds"
    assert secondary(summary, CANDIDATE, "random-mask")["verdict"] == "holds"


def test_secondary_verdicts_are_those_after_the_correction():
    def comparison(p, verdict):
        return {"p_value": p, "verdict": verdict, "reason": None}

    comparisons = [
        comparison(0.02, "fails"),
        comparison(0.04, "holds"),
        comparison(0.001, "holds"),
        comparison(0.5, "undecided"),
    ]
    module._adjust(comparisons)
    # From the smallest up: 4 x 0.001, 3 x 0.02, 2 x 0.04, 1 x 0.5.
    assert [c["p_holm"] for c in comparisons] == pytest.approx([0.06, 0.08, 0.004, 0.5])
    assert [c["verdict"] for c in comparisons] == ["undecided", "undecided", "holds", "undecided"]
    assert [c["reason"] is None for c in comparisons] == [False, False, True, True]


def test_which_comparisons_are_made(begun):
    summary = summarise(run(begun))
    assert [(c["first"], c["second"]) for c in summary["secondary"]] == [
        ("random-mask", BASELINE),
        ("full", BASELINE),
        ("head", BASELINE),
        (CANDIDATE, "random-mask"),
        (CANDIDATE, "full"),
    ]
    assert all(c["p_value"] <= c["p_holm"] <= 1 for c in summary["secondary"])
    decided = {(c["first"], c["second"]): c["verdict"] for c in summary["secondary"]}
    assert decided["head", BASELINE] == "fails"
    assert decided[CANDIDATE, "random-mask"] == "holds"
    assert decided["random-mask", BASELINE] == "undecided"
    assert all((c["p_holm"] < 1 - LEVEL) == (c["verdict"] != "undecided") for c in summary["secondary"])
    assert "p_holm" not in summary["primary"]


def test_what_is_outside_of_the_protocol_has_no_verdict_and_does_not_weigh_on_the_correction(begun, monkeypatch):
    monkeypatch.setattr(module, "EXPLORED", ())
    without = summarise(run(begun))
    monkeypatch.setattr(module, "EXPLORED", (("full", "head"), ("sparsegrad", "head")))
    summary = summarise(begun)
    # Of what takes part alone. Right are 420 and 200 of 500: 44 points of accuracy, 88 of correlation.
    (explored,) = summary["explored"]
    assert (explored["first"], explored["second"], explored["verdict"]) == ("full", "head", None)
    assert explored["difference"] == pytest.approx((44 + 88) / 2)
    assert explored["p_value"] < 0.05
    assert "p_holm" not in explored
    assert without["explored"] == []
    assert (summary["primary"], summary["secondary"]) == (without["primary"], without["secondary"])


# --- arms and tasks


def test_steps_to_the_target(begun):
    curves = {
        ("full", 0): ((10, 60.0), (20, 80.0)),
        ("full", 1): ((10, 79.0), (20, 90.0)),
        ("full", 2): ((10, 95.0), (20, 84.0)),
        ("full", 3): ((10, 95.0), (20, 86.0)),
        (BASELINE, 0): ((10, 80.7), (20, 80.7)),
        (BASELINE, 1): ((10, 80.8), (20, 0.0)),
        (BASELINE, 2): ((10, 70.0), (20, 81.0)),
        (BASELINE, 3): ((10, 99.0), (20, 99.0)),
    }

    def with_curve(trial):
        curve = curves.get((trial.arm, trial.seed)) if (trial.purpose, trial.task) == (FINAL, "trec") else None
        return replace(ok(trial, RIGHT), curve=curve) if curve else None

    arms = {arm["arm"]: arm["tasks"][0] for arm in summarise(run(begun, special=with_curve))["arms"]}
    # Full fine-tuning ends at 80, 90, 84 and 86: 85 in the mean, of which 95 % are 80.75.
    assert [of["target"] for of in arms.values()] == pytest.approx([80.75] * 5)
    assert arms["full"]["steps_to_target"] == [None, 20, 10, 10]
    assert arms[BASELINE]["steps_to_target"] == [None, 10, 20, 10]
    assert arms["head"]["steps_to_target"] == [None] * 4


def test_a_rate_at_the_edge_is_flagged(begun):
    def edge(trial):
        if trial.purpose != TUNING or trial.task != "trec":
            return None
        if trial.arm == BASELINE:
            return Outcome(trial, "ok", score=trial.lr, losses=(1.0,))
        if trial.arm == "head":
            return Outcome(trial, "diverged", "the loss is nan")
        return None

    arms = {arm["arm"]: arm["tasks"] for arm in summarise(run(begun, special=edge))["arms"]}
    found = {name: [(of["lr"], of["lr_at_edge"]) for of in tasks] for name, tasks in arms.items()}
    assert found[BASELINE] == [(1e-2, True), (3e-3, False)]
    assert found["head"] == [(1e-3, True), (3e-3, False)]
    assert found["full"] == [(3e-3, False), (3e-3, False)]
    assert arms[BASELINE][0]["tuning"] == {"0.001": 1e-3, "0.003": 3e-3, "0.01": 1e-2}
    assert arms["head"][0]["tuning"] == {"0.001": None, "0.003": None, "0.01": None}


def test_an_arm(begun):
    summary = summarise(run(begun))
    arm = summary["arms"][1]
    assert (arm["arm"], arm["method"], arm["peak_step_bytes"]) == (BASELINE, "lora", 2 * 2**20)
    trec, nyt = arm["tasks"]
    assert (trec["metric"], nyt["metric"]) == ("accuracy", "pearson")
    assert trec["scores"] == dict.fromkeys(range(4), 50.0)
    assert trec["losses"] == [2.0, 2.5]  # 1, 2, 3 and 4 in the mean
    # 350, 352, 350 and 352 right of 500: 70.2 points of accuracy, 2 x 70.2 - 100 of correlation.
    assert arm["mean"]["score"] == pytest.approx((70.2 + 40.4) / 2)
    assert arm["mean"]["low"] < arm["mean"]["score"] < arm["mean"]["high"]
    assert summary["runs"]["settled"] == summary["runs"]["planned"] == len(begun.outcomes)


def test_the_table(begun):
    assert table(summarise(begun))[-1] == f"{CANDIDATE} minus {BASELINE}: undecided (16 of 16 runs are not done)"
    run(begun)
    lines = table(summarise(begun))
    assert len(lines) == 1 + 5 + 1
    assert lines[2].split() == ["lora", "2.0", "50.0", "(4)", "50.0", "(4)", "55.30", *lines[2].split()[-3:]]
    assert lines[-1].startswith(f"{CANDIDATE} minus {BASELINE}: holds, +15.00 points (+")
    assert len({len(line) for line in lines[:-1]}) == 1


def test_a_summary_is_json_at_every_moment(begun):
    count = 0

    def check(trial):
        nonlocal count
        count += 1
        if count % 7 == 0:
            text = json.dumps(summarise(begun), allow_nan=False)
            table(summarise(begun))
            judged = judge(json.loads(text))  # what the claim reads of it
            assert {arm["arm"] for arm in judged.arms} == set(STUDY.arms)
            if judged.cases[0]["figure"] is None:
                assert "runs are not done" in judged.sentence

    run(begun, special=check)
    text = json.dumps(summarise(begun), allow_nan=False)
    assert json.loads(text)["primary"]["verdict"] == "holds"
