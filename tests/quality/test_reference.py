"""The committed study: its summary is what its runs say, and both READMEs print its figures."""

import json
from collections import Counter
from itertools import takewhile
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.claim.quality import SUMMARY, judge, read
from benchmarks.quality.ledger import Ledger
from benchmarks.quality.study import arm_of
from benchmarks.quality.summary import summarise
from benchmarks.quality.training import FINAL

ROOT = Path(__file__).parents[2]
STUDY = SUMMARY.with_name("README.md")
# Three times the steps on one task.
LONGER = SUMMARY.parent / "longer" / "summary.json"
# A third of the training examples on three tasks, seven learning rates for each arm.
HUNDRED = SUMMARY.parent / "hundred" / "summary.json"
# An eighth of the core study's runs, on another machine.
AGAIN = SUMMARY.parent / "again" / "runs.jsonl"


def leaves(thing, path=()):
    """(path, value) of every number and word in nested JSON."""
    if isinstance(thing, dict | list):
        for key, value in thing.items() if isinstance(thing, dict) else enumerate(thing):
            yield from leaves(value, (*path, key))
    else:
        yield path, thing


@pytest.mark.parametrize("summary", [SUMMARY, LONGER, HUNDRED], ids=["core", "longer", "hundred"])
def test_the_summary_is_of_the_runs_beside_it(summary):
    runs = summary.with_name("runs.jsonl")
    made = dict(leaves(json.loads(json.dumps(summarise(Ledger(runs))))))
    committed = dict(leaves(json.loads(summary.read_text())))
    assert made.keys() == committed.keys()
    numbers = {path for path, value in made.items() if isinstance(value, float)}
    assert {path: value for path, value in made.items() if path not in numbers} == {
        path: value for path, value in committed.items() if path not in numbers
    }
    assert [made[path] for path in numbers] == pytest.approx([committed[path] for path in numbers], rel=1e-6, abs=1e-12)
    assert f"{made['runs', 'settled']} of {made['runs', 'planned']} runs" in STUDY.read_text()


@pytest.fixture(scope="module")
def quality():
    """What the claim reads of the study."""
    return judge(read(SUMMARY))


def rows(path, heading):
    """The first Markdown table in a file whose heading begins so: its headings, and its cells by the first one."""
    text = path.read_text()
    lines = takewhile(lambda line: line.startswith("|"), text[text.index(f"\n| {heading} |") + 1 :].splitlines())
    (_, *headings), _, *body = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return headings, {name: cells for name, *cells in body}


def interval(case):
    return f"{case['figure']:+.2f} ({case['low']:+.2f} to {case['high']:+.2f})"


def without_fine(case):
    of = [row["difference"] for row in case["per_task"] if row["task"] != "trec-fine"]
    return f"{sum(of) / len(of):+.2f}"


def test_the_project_s_readme_prints_each_arm(quality):
    headings, printed = rows(ROOT / "README.md", "arm")
    assert headings[-2:] == ["without `trec-fine", "verdict"]
    to_lora = {case["first"]: case for case in quality.cases if case["second"] == "lora"}
    assert printed == {
        arm["arm"]: [f"{arm['peak_step_bytes'] / 2**20:.1f}", f"{arm['mean']:.2f}"]
        + (
            ["", "", ""]
            if arm["arm"] == "lora"
            else [interval(case := to_lora[arm["arm"]]), without_fine(case), case["verdict"]]
        )
        for arm in quality.arms
    }


def test_the_study_s_readme_prints_each_arm_and_each_task(quality):
    _, printed = rows(STUDY, "arm")
    to_lora = {case["first"]: case for case in quality.cases if case["second"] == "lora"}
    for arm in quality.arms:
        peak = f"{arm['peak_step_bytes'] / 2**20:.1f}"
        mean = f"{arm['mean']:.2f} ({arm['low']:.2f} to {arm['high']:.2f})"
        case = to_lora.get(arm["arm"])
        assert printed.pop(arm["arm"])[1:] == [peak, mean, *(compared(case) if case else ["", "", ""])]
    assert not printed
    headings, printed = rows(STUDY, "minus LoRA")
    tasks = [of["task"] for of in quality.arms[0]["tasks"]]
    assert headings == [*tasks, "without trec-fine"]
    assert printed == {
        name: [*(f"{row['difference']:+.2f}" for row in case["per_task"]), without_fine(case)]
        for name, case in to_lora.items()
    }


def compared(case):
    p = "primary" if case["p_holm"] is None else "<0.0001" if case["p_holm"] < 1e-4 else f"{case['p_holm']:.4f}"
    return [interval(case), p, case["verdict"]]


def test_the_study_s_readme_prints_the_other_comparisons(quality):
    _, printed = rows(STUDY, "comparison")
    assert printed == {
        f"{case['first']}` minus `{case['second']}": [
            f"{case['peak_ratio']:.2f}",
            interval(case),
            without_fine(case),
            *(compared(case)[1:] if case["verdict"] else ["not corrected", "none: outside of the protocol"]),
        ]
        for case in (*quality.cases, *quality.explored)
        if case["second"] != "lora"
    }


def test_the_study_s_readme_prints_the_longer_runs():
    study, core = (json.loads(path.read_text()) for path in (LONGER, SUMMARY))
    assert (study["study"]["epochs"], study["study"]["tasks"]) == (3 * core["study"]["epochs"], ["trec-fine"])
    in_core = {
        arm["arm"]: task["score"] for arm in core["arms"] for task in arm["tasks"] if task["task"] == "trec-fine"
    }
    _, printed = rows(STUDY, "arm, 456 steps")
    assert printed == {
        arm["arm"]: [
            f"{arm['tasks'][0]['lr']:g}",
            f"{arm['mean']['score']:.2f} ({arm['mean']['low']:.2f} to {arm['mean']['high']:.2f})",
            f"{in_core[arm['arm']]:.2f}",
            f"{arm['tasks'][0]['losses'][-1]:.2f}",
        ]
        for arm in study["arms"]
    }
    primary = study["primary"]
    difference = f"{primary['difference']:+.2f} points ({primary['low']:+.2f} to {primary['high']:+.2f})"
    assert f"{difference}, **{primary['verdict']}**" in STUDY.read_text()
    assert f"{primary['seeds_to_decide']} seeds would decide it" in " ".join(STUDY.read_text().split())
    assert (
        f"{primary['difference']:+.2f} ({primary['low']:+.2f} to {primary['high']:+.2f}, {primary['verdict']})"
        in (ROOT / "README.md").read_text()
    )


def test_the_study_s_readme_prints_the_runs_of_a_hundred_examples():
    study, core = (json.loads(path.read_text()) for path in (HUNDRED, SUMMARY))
    assert study["study"]["train_size"] == 100
    tasks = study["study"]["tasks"]
    in_core = {
        (case["first"], case["second"]): fmean(row["difference"] for row in case["per_task"] if row["task"] in tasks)
        for case in (core["primary"], *core["secondary"])
    }
    headings, printed = rows(STUDY, "100 examples, seven rates")
    assert headings == [*tasks, "mean (95 % interval)", "p after Holm", "verdict", "of 300 examples"]
    assert printed == {
        **{
            arm["arm"]: [
                *(f"{task['score']:.2f} at {task['lr']:g}" for task in arm["tasks"]),
                f"{arm['mean']['score']:.2f} ({arm['mean']['low']:.2f} to {arm['mean']['high']:.2f})",
                *("" for _ in range(3)),
            ]
            for arm in study["arms"]
        },
        **{
            f"{case['first']}` minus `{case['second']}": [
                *(f"{row['difference']:+.2f}" for row in case["per_task"]),
                *compared({"p_holm": None, **case, "figure": case["difference"]}),
                f"{in_core[case['first'], case['second']]:+.2f}",
            ]
            for case in (study["primary"], *study["secondary"])
        },
    }


def test_the_best_of_seven_rates_is_the_best_of_the_protocol_s_four():
    for arm in json.loads(HUNDRED.read_text())["arms"]:
        for task in arm["tasks"]:
            tried = {float(lr): score for lr, score in task["tuning"].items()}
            assert set(tried) >= set(arm_of(arm["arm"]).lrs)
            assert len(tried) >= 7
            assert max(tried, key=tried.get) == task["lr"]
            assert not task["lr_at_edge"]
            assert task["lr"] in arm_of(arm["arm"]).lrs


def test_the_project_s_readme_prints_the_runs_of_a_hundred_examples():
    text = " ".join((ROOT / "README.md").read_text().split())
    study = json.loads(HUNDRED.read_text())
    for case in (study["primary"], study["secondary"][1]):
        said = f"{case['difference']:+.2f} points ({case['low']:+.2f} to {case['high']:+.2f}, {case['verdict']})"
        assert said in text


def test_the_study_s_readme_says_what_another_machine_found():
    first = {outcome.trial: outcome for outcome in Ledger(SUMMARY.with_name("runs.jsonl")).outcomes}
    again = Ledger(AGAIN).outcomes

    def of(outcome):
        return outcome.trial.purpose, outcome.trial.arm, outcome.trial.task

    # An eighth of the runs of each kind, so that eight times their time is the study's.
    assert Counter(of(o) for o in first.values()) == Counter({key: 8 * n for key, n in Counter(map(of, again)).items()})
    assert {o.status for o in again} == {"ok"}
    hours = 8 * sum(o.time_s for o in again) / 3600
    apart = sorted(abs(o.score - first[o.trial].score) for o in again if o.trial.purpose == FINAL)
    close = sum(round(points, 6) <= 0.1 for points in apart)
    text = " ".join(STUDY.read_text().split())
    assert f"**{hours:.1f} worker-hours for all {8 * len(again)} runs" in text
    assert f"{close} of {len(apart)} test scores are within 0.1 points" in text
    assert f"the furthest is {apart[-1]:.1f} away" in text
