"""Runs next to full fine-tuning's: pairing, its ways out, and the interval of a ratio."""

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.harness import pairing
from benchmarks.harness.pairing import Reference, Run, bootstrap_median, measure, ratio_fields
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.worker import RunFailed, failed

SPEC = RunSpec(method="lora", budget=2, layer=(16, 24), batch=2, seq=4, rounds=6, calibration_steps=2)


class FakeWorker:
    """Stands in for a worker process: steps take what `script` says, and fail where it says a status."""

    def __init__(self, spec, _, script, log):
        self.spec, self.log = spec, log
        self._script = script.get(spec.method, {})
        log.append(("start", spec.method))

    def _do(self, what, value):
        self.log.append((what, self.spec.method))
        outcome = self._script.get(what, value)
        outcome = outcome() if callable(outcome) else outcome
        if isinstance(outcome, str):
            raise RunFailed(failed(self.spec, outcome, "as told"))
        return outcome

    def prepare(self):
        self._do("prepare", None)

    def renew(self):
        pass

    def round(self):
        return self._do("round", {"full": 2.0, "lora": 1.0}[self.spec.method])

    def plain(self):
        return dict(self._do("plain", {"touched_params": 5, "touched_steps": 8, "period": 1}))

    def memory(self):
        return dict(self._do("memory", {"peak_step_bytes": 77, "model": "layer 16x24"}))

    def close(self):
        self.log.append(("close", self.spec.method))


@pytest.fixture
def workers(monkeypatch):
    """(script, log): what the workers do, and what they were asked to do."""
    script, log = {}, []
    monkeypatch.setattr(pairing, "Worker", lambda spec, limit: FakeWorker(spec, limit, script, log))
    return script, log


def alive(log):
    """The most workers that were alive at once."""
    now = most = 0
    for what, _ in log:
        now += {"start": 1, "close": -1}.get(what, 0)
        most = max(most, now)
    return most


def once(status, otherwise):
    """Fails with `status` the first time, then gives `otherwise`."""
    outcomes = iter([status])
    return lambda: next(outcomes, otherwise)


def test_steps_alternate_with_full_fine_tunings(workers):
    _, log = workers
    with Reference() as reference:
        record = measure(SPEC, reference)
    steps = [method for what, method in log if what == "round"]
    # One of the reference's to warm up, then pairs in which it comes first.
    assert steps == ["full"] + ["full", "lora"] * 6
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
        measure(SPEC, reference)
        measure(SPEC, reference)
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
    steps = iter([2.0, 2.0, 2.0, "crashed"])
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


def test_the_interval_holds_the_median_as_often_as_it_says():
    """Of 400 samples of 15 from a skewed distribution, the 99 % intervals hold the true median in most."""
    generator = np.random.default_rng(1)
    truth = math.log(2)
    held = 0
    for _ in range(400):
        low, high = bootstrap_median(generator.exponential(size=15), confidence=0.99, resamples=500)
        held += low <= truth <= high
    # Binomial: at a coverage of 0.97, fewer than 0.94 of 400 has a probability below 0.001.
    assert held >= 0.94 * 400
    narrow = sum(
        low <= truth <= high
        for low, high in (bootstrap_median(generator.exponential(size=15), 0.5, 500) for _ in range(400))
    )
    assert narrow < 0.75 * 400


def test_the_interval_of_equal_values_is_that_value_and_the_same_every_time():
    assert bootstrap_median(np.full(7, 3.5)) == (3.5, 3.5)
    values = np.arange(9.0)
    assert bootstrap_median(values) == bootstrap_median(values)
    low, high = bootstrap_median(values)
    assert 0 <= low < 4 < high <= 8


def test_the_ratio_is_of_neighbours_not_of_medians():
    # A machine that slows down by a factor of ten: each pair still has the ratio 2.
    reference = [1.0, 3.0, 10.0]
    assert ratio_fields([2.0, 6.0, 20.0], reference) == {
        "reference_step_time_s": 3.0,
        "step_time_ratio": 2.0,
        "step_time_ratio_low": 2.0,
        "step_time_ratio_high": 2.0,
    }


def test_one_round_has_a_ratio_and_no_interval():
    fields = ratio_fields([1.0], [2.0])
    assert (fields["step_time_ratio"], fields["step_time_ratio_low"], fields["step_time_ratio_high"]) == (
        0.5,
        None,
        None,
    )
