"""Runs next to full fine-tuning's: pairing, and its ways out."""

from dataclasses import replace

import pytest

from benchmarks.harness import pairing
from benchmarks.harness.pairing import Reference, Run
from benchmarks.harness.turns import measure_all
from tests.harness.fake_workers import SPEC, alive, fake_workers, once


def measure(spec, reference):
    """The record of one run."""
    records = []
    measure_all([spec], reference, lambda _, record, seconds: records.append(record), span_s=0)
    return records[0]


@pytest.fixture
def workers(monkeypatch):
    """(script, log): what the workers do, and what they were asked to do."""
    return fake_workers(monkeypatch)


def test_steps_alternate_with_full_fine_tunings(workers):
    _, log = workers
    with Reference() as reference:
        record = measure(SPEC, reference)
    steps = [method for what, method in log if what == "round"]
    # One of the reference's to warm up, then pairs in which it comes first and last by turns.
    assert steps == ["full"] + ["full", "lora", "lora", "full"] * 3
    assert (record.status, record.pairing) == ("ok", "rounds")
    assert (record.step_time_s, record.reference_step_time_s, record.step_time_ratio) == (1.0, 2.0, 0.5)
    assert (record.step_time_ratio_low, record.step_time_ratio_high) == (0.5, 0.5)
    assert (record.timed_rounds, record.timed_steps, record.touched_params) == (6, 6, 5)
    assert (record.peak_step_bytes, record.model) == (77, "layer 16x24")
    assert sorted(log[-2:]) == [("close", "full"), ("close", "lora")]


def test_a_rest_comes_before_each_step_of_a_pair_and_is_no_part_of_it(workers, monkeypatch):
    _, log = workers
    monkeypatch.setattr(pairing.time, "sleep", lambda seconds: log.append(("rest", seconds)))
    with Reference() as reference:
        assert measure(SPEC, reference).step_time_s == 1.0
    pairs = log[log.index(("rest", pairing.REST_S)) :]
    assert [what for what, _ in pairs[: 4 * SPEC.rounds]] == ["rest", "round"] * 2 * SPEC.rounds


def test_the_reference_is_kept_while_the_conditions_stay(workers):
    _, log = workers
    with Reference() as reference:
        measure(replace(SPEC, snapshot="one.pickle"), reference)
        measure(replace(SPEC, snapshot="other.pickle"), reference)
        assert log.count(("prepare", "full")) == 1
        measure(replace(SPEC, batch=3), reference)
        assert log.count(("prepare", "full")) == 2
        assert log.count(("close", "full")) == 1


def test_full_fine_tuning_is_paired_with_another_worker_of_its_own(workers):
    _, log = workers
    with Reference() as reference:
        record = measure(replace(SPEC, method="full", budget=None), reference)
    assert log.count(("start", "full")) == 2
    assert record.step_time_ratio == 1.0


def test_without_a_reference_there_are_plain_seconds(workers):
    _, log = workers
    record = measure(SPEC, None)
    assert ("start", "full") not in log
    assert (record.step_time_s, record.timed_rounds) == (1.0, 6)
    assert (
        record.pairing is record.step_time_ratio is record.step_time_ratio_low is record.reference_step_time_s is None
    )


def test_without_rounds_there_is_no_plain_pass(workers):
    _, log = workers
    with Reference() as reference:
        record = measure(replace(SPEC, rounds=0), reference)
    assert log == [("start", "lora"), ("memory", "lora"), ("close", "lora")]
    assert record.peak_step_bytes == 77
    assert record.step_time_s is record.timed_rounds is record.touched_params is None


@pytest.mark.parametrize("status", ["oom", "killed", "crashed", "timeout"])
def test_where_full_fine_tuning_does_not_run_there_is_no_ratio(workers, status):
    script, log = workers
    script["full"] = {"prepare": status}
    with Reference() as reference:
        for _ in range(2):
            record = measure(SPEC, reference)
            assert (record.status, record.step_time_s, record.step_time_ratio) == ("ok", 1.0, None)
    assert log.count(("prepare", "full")) == 1  # not tried again on the same conditions


@pytest.mark.parametrize("who", ["lora", "full"])
@pytest.mark.parametrize("status", ["oom", "killed"])
def test_where_two_models_do_not_fit_they_take_turns_in_blocks(workers, who, status):
    script, log = workers
    script[who] = {"prepare": once(status, None)} if who == "lora" else {"round": once(status, 2.0)}
    with Reference() as reference:
        record = measure(SPEC, reference)
    crowded, after = log[: log.index(("start", "full"), 1)], log[log.index(("start", "full"), 1) :]
    assert sorted(entry for entry in crowded if entry[0] == "close") == [("close", "full"), ("close", "lora")]
    assert alive(after) == 1
    assert (record.status, record.pairing, record.step_time_ratio) == ("ok", "blocks", 0.5)
    # Six rounds asked for: three pairs of blocks of two steps.
    assert (record.timed_rounds, record.timed_steps) == (3, 6)
    assert [method for what, method in after if what == "round"] == ["full", "full", "lora", "lora"] * 3


def test_what_does_not_fit_alone_either_is_out_of_memory(workers):
    script, _ = workers
    script["lora"] = {"prepare": "oom"}
    with Reference() as reference:
        record = measure(SPEC, reference)
    assert (record.status, record.step_time_s) == ("oom", None)


@pytest.mark.parametrize("status", ["refused", "crashed", "timeout", "diverged"])
@pytest.mark.parametrize("what", ["prepare", "round"])
def test_another_failure_is_the_records_status(workers, what, status):
    script, log = workers
    script["lora"] = {what: status}
    with Reference() as reference:
        record = measure(SPEC, reference)
        assert (record.status, record.reason, record.method) == (status, "as told", "lora")
        assert log.count(("start", "lora")) == log.count(("close", "lora")) == 1
        # The next run finds the reference as it was.
        script.clear()
        assert measure(SPEC, reference).step_time_ratio == 0.5
    assert log.count(("prepare", "full")) == 1


def test_a_reference_that_is_lost_on_the_way_costs_the_ratio_alone(workers):
    script, _ = workers
    steps = iter([2.0, 2.0, 2.0, "crashed"])  # one to warm up, two rounds
    script["full"] = {"round": lambda: next(steps)}
    with Reference() as reference:
        record = measure(SPEC, reference)
    assert (record.status, record.timed_rounds, record.step_time_s) == ("ok", 6, 1.0)
    assert record.step_time_ratio is record.pairing is record.reference_step_time_s is None


def test_a_memory_pass_that_fails_leaves_what_was_obtained(workers):
    script, _ = workers
    script["lora"] = {"memory": "crashed"}
    with Reference() as reference:
        record = measure(SPEC, reference)
    assert (record.status, record.peak_step_bytes) == ("crashed", None)
    assert (record.step_time_s, record.step_time_ratio, record.touched_params) == (1.0, 0.5, 5)


def test_a_memory_pass_that_finds_too_little_memory_is_tried_without_the_reference(workers):
    script, log = workers
    script["lora"] = {"memory": once("oom", {"peak_step_bytes": 78})}
    with Reference() as reference:
        record = measure(SPEC, reference)
    assert (record.status, record.peak_step_bytes, record.step_time_ratio) == ("ok", 78, 0.5)
    assert log[-3:] == [("start", "lora"), ("memory", "lora"), ("close", "lora")]
    assert log.index(("close", "full")) < len(log) - 3


def test_a_run_that_is_abandoned_ends_its_worker(workers):
    _, log = workers
    with Run(SPEC, None) as run:
        run.prepare()
        assert log[-1] == ("prepare", "lora")
    assert log[-1] == ("close", "lora")


def test_real_workers():
    with Reference() as reference:
        first, second = measure(SPEC, reference), measure(replace(SPEC, method="head", budget=None), reference)
    for record in (first, second):
        assert (record.status, record.pairing, record.timed_rounds) == ("ok", "rounds", 6)
        assert 0 < record.step_time_min_s <= record.step_time_s <= record.step_time_max_s
        assert record.step_time_ratio_low <= record.step_time_ratio <= record.step_time_ratio_high
        assert record.touched_steps == 8
        assert record.process_peak_bytes > record.peak_step_bytes > 0
    assert (first.model, first.budget, second.budget) == ("layer 16x24", 2, None)
