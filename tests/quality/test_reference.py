"""The committed study: its summary is what its runs say, and both READMEs print its figures."""

import json
from itertools import takewhile
from pathlib import Path

import pytest

from benchmarks.claim.quality import SUMMARY, judge, read
from benchmarks.quality.ledger import Ledger
from benchmarks.quality.summary import summarise

ROOT = Path(__file__).parents[2]
STUDY = SUMMARY.with_name("README.md")
# Three times the steps on one task.
LONGER = SUMMARY.parent / "longer" / "summary.json"
# A third of the training examples on three tasks.
HUNDRED = SUMMARY.parent / "hundred" / "summary.json"


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


def test_both_readmes_print_the_runs_of_a_hundred_examples():
    study, core = (json.loads(path.read_text()) for path in (HUNDRED, SUMMARY))
    assert study["study"]["train_size"] == 100
    tasks, primary = study["study"]["tasks"], study["primary"]
    headings, printed = rows(STUDY, "of 100 examples")
    assert headings[:-1] == tasks
    in_core = [row["difference"] for row in core["primary"]["per_task"] if row["task"] in tasks]
    mean = f"{primary['difference']:+.2f} ({primary['low']:+.2f} to {primary['high']:+.2f}"
    assert printed == {
        **{
            arm["arm"]: [
                *(f"{task['score']:.2f}" for task in arm["tasks"]),
                f"{arm['mean']['score']:.2f} ({arm['mean']['low']:.2f} to {arm['mean']['high']:.2f})",
            ]
            for arm in study["arms"]
        },
        "difference": [*(f"{row['difference']:+.2f}" for row in primary["per_task"]), f"{mean})"],
        "of 300 examples": [*(f"{each:+.2f}" for each in in_core), f"{sum(in_core) / len(in_core):+.2f}"],
    }
    assert f"it **{primary['verdict']}**, by {primary['difference']:.2f} points" in " ".join(STUDY.read_text().split())
    said = f"by {primary['difference']:+.2f} points ({primary['low']:+.2f} to {primary['high']:+.2f}"
    said += f", {primary['verdict']})"
    assert said in " ".join((ROOT / "README.md").read_text().split())
