"""The order of a study's runs, the ledger that keeps them, and what they say."""

import functools
import json
import math
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from baselines.registry import get, methods
from benchmarks.harness.budget import budget_params
from benchmarks.harness.errors import InputError
from benchmarks.quality import study as study_module
from benchmarks.quality.ledger import Heading, Ledger
from benchmarks.quality.schedule import run_all
from benchmarks.quality.study import ARMS, PARAMETERS, PEAK, PRIMARY, Study, arm_of, best_lr, records, trials
from benchmarks.quality.summary import summarise
from benchmarks.quality.tasks import load_task
from benchmarks.quality.training import FINAL, TUNING, Outcome
from reports.record import Record

EXAMPLE = Path(__file__).parents[2] / "examples" / "scaled_outputs.py"
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


@functools.cache
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
            return Outcome(trial, "ok", score=trial.lr, losses=(1.0,))
        truth = labels(trial.task)
        right = self.right[trial.arm] + trial.seed
        # Wrong ones are another class, or a rating of the other sign.
        found = [y if i % 1000 < right else (y + 1 if trial.task == "trec" else -y) for i, y in enumerate(truth)]
        return Outcome(trial, "ok", score=1.0, predictions=tuple(found), losses=(1.0,), curve=((5, 50.0),))

    def close(self):
        pass


def test_primary_arms_come_first_and_finals_wait_for_their_rate():
    planned = list(trials(STUDY, BUDGETS, POOLS, ()))
    assert len(planned) == 3 * 2 * 2 * 2 + 3 * 2 * 3
    tuning = [t for t in planned if t is not None]
    assert all(t.purpose == TUNING for t in tuning)
    assert [t.seed for t in tuning] == [1000, 1001] * 12
    assert all(t.steps == 8 * 19 for t in tuning)  # 300 examples in batches of 16: 19 steps an epoch
    names = [arm.name for arm in PRIMARY]
    assert {t.arm for t in tuning[:16]} == set(names)
    assert {t.arm for t in tuning[16:]} == {"head"}


@pytest.mark.parametrize(
    ("scores", "losses", "expected"),
    [
        ((1.0, 1.0, 2.0, 2.0), (0.0, 0.0, 1.0, 1.0), 1e-2),
        ((3.0, 0.0, 1.0, 1.0), (1.0, 1.0, 0.0, 0.0), 1e-3),  # the mean of both seeds
        ((2.0, 2.0, 1.0, 3.0), (1.0, 1.0, 0.0, 1.0), 1e-2),
        ((2.0, 2.0, 1.0, 3.0), (0.0, 1.0, 1.0, 1.0), 1e-3),
        ((2.0, 2.0, 2.0, 2.0), (1.0, 1.0, 1.0, 1.0), 1e-3),
        ((0.0, 0.0, -3.0, -3.0), (1.0, 1.0, 1.0, 1.0), 1e-3),
        ((None, 9.0, -3.0, -3.0), (1.0, 0.0, 1.0, 1.0), 1e-2),
        ((9.0, 9.0, None, None), (1.0, 1.0, 1.0, 1.0), 1e-3),
        ((None, 9.0, 9.0, None), (1.0, 1.0, 1.0, 1.0), 1e-3),
    ],
)
def test_the_best_rate(scores, losses, expected):
    tuning = [t for t in trials(STUDY, BUDGETS, POOLS, ()) if t is not None][:4]
    outcomes = [
        Outcome(trial, "diverged") if score is None else Outcome(trial, "ok", score=score, losses=(0.5, loss))
        for trial, score, loss in zip(tuning, scores, losses, strict=True)
    ]
    assert best_lr(outcomes) == expected
    assert best_lr(outcomes[::-1]) == expected


@pytest.mark.parametrize("jobs", [1, 3])
def test_everything_runs_once_and_a_new_ledger_reads_it(tmp_path, jobs):
    it, log = ledger(tmp_path), []
    right = {"lora": 700, "sparsegrad-core@peak": 800, "head": 300}
    assert run_all(it, jobs, lambda _: None, worker=lambda limit: Fake(right, log=log))
    assert len(log) == len(set(log)) == 42
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
    "content", [b"[]\n", b"nonsense\n", b'{"schema": 99, "protocol": 2, "study": {}, "arms": {}}\n', b'{"schema": 1}\n']
)
def test_a_file_that_is_no_ledger_is_refused(tmp_path, content):
    (tmp_path / "runs.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="line 1, is not of a study's runs"):
        Ledger(tmp_path / "runs.jsonl")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arms": ("lora", "nobody")}, "unknown arm 'nobody': choose of lora, sparsegrad-core@peak, "),
        ({"arms": ("nobody@peak",)}, "unknown arm 'nobody@peak': choose of lora, "),
        ({"arms": ("lora@",)}, "unknown arm 'lora@': choose of lora, "),
        ({"arms": ("lora", "lora")}, "arms must be one or more, each once, got lora, lora"),
        ({"arms": ()}, "arms must be one or more, each once, got none"),
        ({"tasks": ()}, "tasks must be one or more, each once, got none"),
        ({"tasks": ("movie-sentiment", "trec", "movie")}, "movie and movie-sentiment have the same texts: choose one"),
        ({"tasks": ("trec", "trec")}, "tasks must be one or more, each once, got trec, trec"),
        ({"lrs": (1.0, 1.0)}, "lrs must be one or more"),
        ({"lrs": (0.1, 0.0)}, "learning rates must be positive and finite, got 0"),
        ({"lrs": (math.inf,)}, "learning rates must be positive and finite, got inf"),
        ({"lrs": (math.nan,)}, "learning rates must be positive and finite, got nan"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"longest": -1}, "longest must be at least 1, got -1"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(InputError) as error:
        Study(**wrong)
    assert str(error.value).startswith(message)


# --- what a study asks for


def planned_order(planned):
    return [t and (t.purpose, t.task, t.arm, t.lr, t.seed) for t in planned]


def test_the_order_of_runs():
    arms = ("head", "sparsegrad-core@peak", "full", "lora")
    study = Study(tasks=("trec", "amazon"), arms=arms, lrs=(1e-3, 1e-2), seeds=2)
    budgets = BUDGETS | {"full": None}
    expected = []
    for arms in (("lora", "sparsegrad-core@peak"), ("head",), ("full",)):
        expected += [
            (TUNING, task, arm, lr, seed)
            for task in study.tasks
            for arm in arms
            for lr in study.lrs
            for seed in (1000, 1001)
        ]
        expected += [(FINAL, task, arm, 1e-2, seed) for seed in (0, 1) for task in study.tasks for arm in arms]
    unknown = [None if row[0] == FINAL else row for row in expected]
    before = list(trials(study, budgets, POOLS, ()))
    assert planned_order(before) == unknown
    done = [Outcome(t, "ok", score=t.lr, losses=(1.0,)) for t in before if t is not None]
    assert planned_order(trials(study, budgets, POOLS, done)) == expected
    # One run of LoRA on amazon is not done yet: its final runs there are not known.
    lacking = [
        o for o in done if (o.trial.arm, o.trial.task, o.trial.lr, o.trial.seed) != ("lora", "amazon", 1e-3, 1001)
    ]
    known = [None if row[:3] == (FINAL, "amazon", "lora") else row for row in expected]
    assert planned_order(trials(study, budgets, POOLS, lacking)) == known


def test_a_trial_has_the_settings_of_its_study():
    study = Study(
        model="m",
        tasks=("trec",),
        arms=("lora",),
        train_size=None,
        epochs=3,
        batch=5,
        longest=7,
        train_rest="all",
        hub=True,
    )
    trial = next(trials(study, {"lora": 9}, {"trec": 52}, ()))
    assert (trial.method, trial.budget, trial.train_size, trial.lr) == ("lora", 9, None, 5e-4)
    assert (trial.model, trial.batch, trial.longest, trial.train_rest, trial.hub) == ("m", 5, 7, "all", True)
    assert trial.steps == 3 * 11  # 52 in batches of 5


@pytest.mark.parametrize(
    ("size", "pool", "epochs", "steps"),
    [(300, 3981, 8, 152), (None, 3981, 1, 249), (7, 3981, 1, 1)],
)
def test_a_tuning_run_has_the_steps_of_a_final_run(size, pool, epochs, steps):
    study = replace(STUDY, train_size=size, epochs=epochs, tasks=("trec",), arms=("lora",))
    first = list(trials(study, BUDGETS, {"trec": pool}, ()))
    done = [Outcome(t, "ok", score=0.0, losses=(1.0,)) for t in first if t is not None]
    every = list(trials(study, BUDGETS, {"trec": pool}, done))
    assert {t.steps for t in every} == {steps}
    assert {t.purpose for t in every} == {TUNING, FINAL}


def test_every_arm_is_treated_alike():
    study = Study(arms=tuple(ARMS))
    budgets = dict.fromkeys(ARMS, 5)
    pools = dict.fromkeys(study.tasks, 1000)
    tuning = [t for t in trials(study, budgets, pools, ()) if t is not None]
    done = [Outcome(t, "ok", score=0.0, losses=(1.0,)) for t in tuning]
    every = list(trials(study, budgets, pools, done))
    assert Counter((t.purpose, t.arm) for t in every) == {
        (purpose, arm): count for arm in ARMS for purpose, count in ((TUNING, 6 * 4 * 2), (FINAL, 6 * 8))
    }
    for arm in ARMS:
        lrs = sorted({t.lr for t in tuning if t.arm == arm})
        assert len(lrs) == 4
        # Neighbours in 1, 2, 5, 10, ...
        assert all(round(b / a, 9) in (2.0, 2.5) for a, b in pairwise(lrs))
    assert {t.seed for t in tuning}.isdisjoint({t.seed for t in every if t.purpose == FINAL})


def test_a_study_survives_json():
    for study in (Study(), replace(STUDY, lrs=None, train_size=None, hub=True)):
        assert Study.from_dict(json.loads(json.dumps(study.to_dict()))) == study


# --- arms


def test_every_method_has_an_arm():
    # `sparsegrad-folded` is `sparsegrad` computed in another order: it trains the same model.
    assert set(methods()) - {arm.method for arm in ARMS.values()} == {"sparsegrad-folded"}


def test_the_protocol_has_each_arms_rates():
    protocol = (Path(__file__).parents[2] / "docs" / "quality-protocol.md").read_text()
    rows = re.findall(r"^\| (`[^|]+`) \| ([\de, -]+) \|$", protocol, flags=re.MULTILINE)
    said = {name: tuple(map(float, lrs.split(","))) for names, lrs in rows for name in re.findall("`(.+?)`", names)}
    assert said == {name: arm.lrs for name, arm in ARMS.items()}


@pytest.mark.parametrize(
    ("name", "method", "matched"),
    [
        ("sparsegrad-folded", "sparsegrad-folded", PARAMETERS),
        ("sparsegrad-folded@peak", "sparsegrad-folded", PEAK),
        ("peft:shira@peak", "peft:shira", PEAK),
        ("absent/mine.py:Mine", "absent/mine.py:Mine", PARAMETERS),
    ],
)
def test_an_arm_of_any_method(name, method, matched):
    arm = arm_of(name)
    assert (arm.name, arm.method, arm.matched) == (name, method, matched)
    assert arm.lrs == ARMS["lora"].lrs
    assert name not in ARMS


def test_no_file_is_run_for_the_name_of_an_arm(tmp_path):
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    name = f"{tmp_path / 'mine.py'}:Mine"
    it = ledger(tmp_path, replace(STUDY, arms=("head",)))
    study = replace(STUDY, arms=(name,))
    text = it.path.read_text().replace('"head"', json.dumps(name))
    it.path.write_text(text)
    assert Ledger(it.path).heading.study == study
    assert not (tmp_path / "was-run").exists()


# --- budgets


@pytest.fixture
def predicted(monkeypatch):
    """The specs that are predicted: LoRA of rank r takes 1000 + 100 r bytes, another method 1000 and 3 for an entry."""
    seen = []

    def stand_in(spec):
        seen.append(spec)
        each = {"lora": 100, "sparsegrad-directions": 48}.get(spec.method, 3)
        return spec.blank(spec.label(), peak_step_bytes=1000 + each * (spec.budget or 0))

    monkeypatch.setattr(study_module, "predict", stand_in)
    return seen


def test_budgets_match_loras(predicted, model):
    arms = ("head", "lora", "sparsegrad-core@peak", "sparsegrad-directions@peak", "sparsegrad-directions")
    arms += ("sparsegrad-core", "random-mask", "meprop-unified", "full")
    found = records(Study(model=model, arms=arms, train_rest="all"))
    assert tuple(found) == arms
    # LoRA of rank 7 on four layers of 16 x 32 has 7 (16 + 32) entries in each, and 1700 bytes.
    budgets = {name: record.budget for name, record in found.items()}
    assert budgets["lora"] == 7
    assert (budgets["full"], budgets["head"]) == (None, None)
    shapes = [(32, 16), (16, 32)] * 2
    for name in arms:
        arm = ARMS[name]
        if arm.matched == PEAK:
            each = 48 if arm.method == "sparsegrad-directions" else 3
            assert budgets[name] == (1700 - 1000) // each, name
        elif arm.matched == PARAMETERS:
            largest = get(arm.method).largest_budget(shapes)
            differences = {
                b: abs(budget_params(arm.method, b, shapes) - 4 * 7 * (16 + 32)) for b in range(1, largest + 1)
            }
            assert differences[budgets[name]] == min(differences.values()), name
    assert budgets["random-mask"] == budgets["sparsegrad-core"] == 7 * (16 + 32)
    conditions = {(s.model, s.batch, s.seq, s.train_rest, s.optimizer_impl, s.device) for s in predicted}
    assert conditions == {(model, 16, 64, "all", "fused", "cpu")}


def test_an_arm_that_no_budget_matches(predicted, model, monkeypatch):
    monkeypatch.setattr(study_module, "REFERENCE", "lora[1]")
    monkeypatch.setattr(
        study_module,
        "predict",
        lambda spec: spec.blank(spec.label(), peak_step_bytes=1000 if spec.method == "lora" else 1001),
    )
    with pytest.raises(InputError, match=r"^the arm sparsegrad-core@peak has no budget \(ok\): no budget fits"):
        records(Study(model=model, arms=("lora", "sparsegrad-core@peak")))


@pytest.mark.parametrize("name", ["head@peak", "lora@peak"])
def test_an_arm_without_a_budget_to_match(predicted, model, name):
    with pytest.raises(InputError, match=rf"^the arm {name} has no budget to match: name it {name[:4]}$"):
        records(Study(model=model, arms=(name,)))


def test_an_arm_of_a_users_own_method(predicted, model):
    arm = f"{EXAMPLE}:ScaledOutputs"
    found = records(Study(model=model, arms=("lora", arm)))
    assert found[arm].method == arm
    assert found[arm].budget is None


def test_an_arm_whose_prediction_is_refused(model, monkeypatch):
    monkeypatch.setattr(
        study_module, "predict", lambda spec: spec.blank(spec.label(), status="refused", reason="not this model")
    )
    with pytest.raises(InputError, match=r"^the arm lora has no budget \(refused\): not this model"):
        records(Study(model=model, arms=("lora",)))


def test_a_killed_final_run_is_not_done(tmp_path):
    it = ledger(tmp_path)

    def fails(trial):
        return "killed" if (trial.purpose, trial.arm, trial.seed, trial.task) == (FINAL, "lora", 1, "trec") else None

    right = {"lora": 600, "sparsegrad-core@peak": 800, "head": 300}
    assert not run_all(it, 1, lambda _: None, worker=lambda limit: Fake(right, fails))
    primary = summarise(it)["primary"]
    assert primary["verdict"] == "undecided"
    assert "1 of 12 runs are not done" in primary["reason"]
