"""The ledger: what is written is read again, and what is not a study's runs is refused in one line."""

import json
from dataclasses import replace

import pytest

from benchmarks.harness.errors import InputError
from benchmarks.quality.ledger import Heading, Ledger
from benchmarks.quality.study import Study
from benchmarks.quality.tasks import PROTOCOL
from benchmarks.quality.training import FINAL, Outcome, Trial
from reports.record import STATUSES, Record

STUDY = Study(arms=("lora",), tasks=("trec", "amazon"), lrs=(1e-3,), train_size=None)
TRIAL = Trial(FINAL, "amazon", None, "lora", "lora", 7, 1e-3, 0, 3, "minilm-l6", 16, 64, "none")
FINISHED = Outcome(TRIAL, "ok", score=61.5, predictions=(0.25, -1.0), losses=(2.0, 1.0), curve=((3, 12.5),), time_s=2.5)


@pytest.fixture
def ledger(tmp_path):
    it = Ledger(tmp_path / "study" / "runs.jsonl")
    it.start(Heading(STUDY, {"lora": Record(method="lora", budget=7, model="minilm-l6", peak_step_bytes=5)}))
    return it


def test_each_outcome_is_on_disk_as_soon_as_it_is_added(ledger):
    for seed in range(3):
        outcome = replace(FINISHED, trial=replace(TRIAL, seed=seed), score=1.0 + seed)
        ledger.add(outcome)
        again = Ledger(ledger.path)
        assert again.heading == ledger.heading
        assert again.outcomes == ledger.outcomes
        assert again.outcomes[seed] == outcome
    assert len(ledger.path.read_text().splitlines()) == 1 + 3


def test_every_field_of_an_outcome_is_kept(ledger):
    ledger.add(FINISHED)
    assert Ledger(ledger.path).outcomes == [FINISHED]


def test_the_last_outcome_of_a_trial_counts(ledger):
    for outcome in (Outcome(TRIAL, "killed", "out of memory"), FINISHED):
        ledger.add(outcome)
        for it in (ledger, Ledger(ledger.path)):
            assert it.outcomes == [outcome]
            assert it.settled(TRIAL) == (outcome is FINISHED)
    assert len(ledger.path.read_text().splitlines()) == 1 + 2


@pytest.mark.parametrize("status", STATUSES)
def test_what_may_have_been_the_machines_fault_is_tried_again(ledger, status):
    assert not ledger.settled(TRIAL)
    ledger.add(FINISHED if status == "ok" else Outcome(TRIAL, status, "as told"))
    assert Ledger(ledger.path).settled(TRIAL) == (status in ("ok", "diverged", "refused"))


@pytest.mark.parametrize("kept", [0, 1, 40, -1])
def test_a_line_that_was_cut_off_is_dropped_and_the_next_is_readable(ledger, kept):
    whole = ledger.path.read_bytes()
    ledger.add(FINISHED)
    line = ledger.path.read_bytes()[len(whole) :]
    ledger.path.write_bytes(whole + line[:kept])
    cut = Ledger(ledger.path)
    assert (cut.heading, cut.outcomes) == (ledger.heading, [])
    assert ledger.path.read_bytes() == whole
    cut.add(FINISHED)
    assert Ledger(ledger.path).outcomes == [FINISHED]


def test_a_heading_that_was_cut_off_is_a_study_not_begun(ledger):
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[:-1])
    cut = Ledger(ledger.path)
    assert (cut.heading, cut.outcomes) == (None, [])
    cut.start(ledger.heading)
    assert ledger.path.read_bytes() == whole


def changed(line, **values):
    return json.dumps(json.loads(line) | values)


@pytest.mark.parametrize(
    "change",
    [
        lambda line: "",
        lambda line: "[]",
        lambda line: "3",
        lambda line: "nonsense",
        lambda line: line[:-1],
        lambda line: "\udcff",
        lambda line: "[" * 100_000,
        lambda line: changed(line, score=None),
        lambda line: changed(line, status="fine"),
        lambda line: changed(line, predictions=None),
        lambda line: changed(line, curve=[3]),
        lambda line: changed(line, losses=[float("nan")]),
        lambda line: changed(line, score=float("inf")),
        lambda line: changed(line, trial={"arm": "lora"}),
        lambda line: changed(line, trial=json.loads(line)["trial"] | {"budget": []}),
        lambda line: changed(line, verdict="holds"),
    ],
)
def test_a_line_that_is_no_outcome(ledger, change):
    ledger.add(FINISHED)
    heading, line = ledger.path.read_text().splitlines()
    content = f"{heading}\n{change(line)}\n{line}\n".encode(errors="surrogateescape")
    ledger.path.write_bytes(content)
    refused(ledger.path, 2)
    assert ledger.path.read_bytes() == content


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"protocol": PROTOCOL + 1},
        {"protocol": None},
        {"study": {"model": "m", "sizes": 3}},
        {"study": {"arms": ["nobody"]}},
        {"study": {"seeds": "eight"}},
        {"arms": {"lora": {"method": "lora"}}},
        {"arms": ["lora"]},
    ],
)
def test_a_heading_of_something_else(ledger, change):
    ledger.path.write_text(changed(ledger.path.read_text(), **change) + "\n")
    message = refused(ledger.path, 1)
    if "protocol" in change:
        assert "choose another directory" in message


def refused(path, number):
    with pytest.raises(InputError, match=f"runs.jsonl, line {number}, is not of a study's runs: ") as error:
        Ledger(path)
    assert "\n" not in str(error.value)
    return str(error.value)
