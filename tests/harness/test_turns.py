"""Runs timed in turns: who steps when, and what happens where memory is short."""

import math
from dataclasses import replace

import pytest

from benchmarks.harness import turns
from benchmarks.harness.pairing import Reference
from benchmarks.harness.turns import measure_all
from tests.harness.fake_workers import SPEC, alive, fake_workers, once

FULL = replace(SPEC, method="full", budget=None)
HEAD = replace(SPEC, method="head", budget=None)
ALL = [FULL, SPEC, HEAD]


@pytest.fixture
def workers(monkeypatch):
    """(script, log), and as much memory as anybody wants."""
    monkeypatch.setattr(turns, "available_bytes", lambda: 1000)
    monkeypatch.setattr("benchmarks.harness.pairing.REST_S", 0)
    return fake_workers(monkeypatch)


def measured(specs=ALL, reference=True, **options):
    """Method -> record, in the order in which the runs were done."""
    records = {}
    with Reference() as full:
        measure_all(
            specs,
            full if reference else None,
            lambda spec, record, seconds: records.update({spec.method: record}),
            **{"span_s": 0, **options},
        )
    return records


def test_every_method_steps_beside_the_reference_in_every_round(workers):
    _, log = workers
    records = measured()
    assert {m: (r.status, r.step_time_ratio) for m, r in records.items()} == {
        "full": ("ok", 1.0),
        "lora": ("ok", 0.5),
        "head": ("ok", 0.25),
    }
    first = log.index(("prepare", "head")) + 2  # behind it the reference warms up
    steps = [method for what, method in log[first:] if what == "round"]
    rounds = [steps[i : i + 6] for i in range(0, 36, 6)]
    pairs = [[tuple(each[i : i + 2]) for i in (0, 2, 4)] for each in rounds]
    assert all(sorted(tuple(sorted(p)) for p in each) == sorted(
        [("full", "full"), ("full", "lora"), ("full", "head")]
    ) for each in pairs)  # fmt: skip
    # The reference comes first in one round and second in the next, and the methods' order changes.
    assert all(p[0] == "full" for each in pairs[::2] for p in each)
    assert all(p[1] == "full" for each in pairs[1::2] for p in each)
    assert len({tuple(sorted(p, key=("full").__eq__)[0] for p in each) for each in pairs}) > 1
    assert log.count(("start", "full")) == 2  # itself and the reference
    assert alive(log) == 4


def test_rounds_keep_their_distance(workers, monkeypatch):
    now = [0.0]
    slept = []
    monkeypatch.setattr(turns.time, "monotonic", lambda: now[0])

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(turns.time, "sleep", sleep)
    measured([SPEC], span_s=18.0)
    # Between six rounds, not before the first nor after the last; rests between steps are of no length here.
    assert [s for s in slept if s] == [3.0] * 5
    slept.clear()
    measured([SPEC], reference=False, span_s=18.0)
    assert not any(slept)  # no ratio, no interval


def test_no_interval_is_narrower_than_is_usual_in_its_company(workers):
    script, _ = workers
    for method, steps in (("lora", [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]), ("head", [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])):
        script[method] = {"round": iter(steps).__next__}
    records = measured()
    width = {m: math.log(r.step_time_ratio_high / r.step_time_ratio_low) for m, r in records.items()}
    # The head scatters most, and full fine-tuning not at all.
    assert 0 < width["full"] < 0.99 * width["head"]
    assert width["full"] == pytest.approx(width["lora"])


def test_the_span_of_the_rounds_is_recorded(workers):
    (record,) = measured([replace(SPEC, rounds=3)], span_s=0.15).values()
    assert 0.1 <= record.timed_span_s < 5


@pytest.mark.parametrize(("largest", "fit"), [(499, 3), (501, 1)])
def test_a_worker_is_begun_where_there_is_room_for_two_of_the_largest(workers, largest, fit):
    script, log = workers
    script["lora"] = {"high_water_bytes": largest}
    records = measured([SPEC, FULL, HEAD])
    assert all(record.status == "ok" for record in records.values())
    # With the reference. Where LoRA's worker leaves no room, the others have theirs after it.
    assert alive(log[: log.index(("memory", "lora"))]) == fit + 1
    assert list(records) == ["lora", "full", "head"]
    assert all(record.pairing == "rounds" for record in records.values())


@pytest.mark.parametrize("unknown", ["available", "size"])
def test_where_the_system_does_not_tell_each_is_timed_with_the_reference_alone(workers, monkeypatch, unknown):
    script, log = workers
    if unknown == "available":
        monkeypatch.setattr(turns, "available_bytes", lambda: None)
    else:
        script.update({name: {"high_water_bytes": None} for name in ("full", "lora", "head")})
    assert list(measured()) == ["full", "lora", "head"]
    assert alive(log) == 2


@pytest.mark.parametrize("status", ["oom", "killed"])
@pytest.mark.parametrize("what", ["prepare", "round", "plain", "memory"])
def test_too_little_memory_beside_others_is_tried_again_alone(workers, what, status):
    script, log = workers
    answers = {"prepare": None, "round": 1.0, "plain": {"period": 1}, "memory": {"peak_step_bytes": 77}}
    script["lora"] = {what: once(status, answers[what])}
    records = measured()
    assert {m: r.status for m, r in records.items()} == {"full": "ok", "lora": "ok", "head": "ok"}
    assert {m: r.step_time_ratio for m, r in records.items()} == {"full": 1.0, "lora": 0.5, "head": 0.25}
    second = len(log) - log[::-1].index(("start", "lora")) - 1
    others = [entry for entry in log[second:] if entry[1] == "head"]
    assert not [entry for entry in others if entry[0] == "start"] or what == "prepare"
    assert records["lora"].pairing == "rounds"


def test_what_does_not_fit_alone_either_says_so(workers):
    script, _ = workers
    script["lora"] = {"prepare": "oom"}
    assert {m: r.status for m, r in measured().items()} == {"full": "ok", "lora": "oom", "head": "ok"}


def test_a_reference_that_is_killed_beside_others_costs_nobody_the_ratio(workers):
    script, _ = workers
    rounds = iter([2.0] * 20 + ["killed"])
    script["full"] = {"round": lambda: next(rounds, 2.0)}
    records = measured([SPEC, HEAD])
    assert {m: (r.status, r.step_time_ratio) for m, r in records.items()} == {
        "lora": ("ok", 0.5),
        "head": ("ok", 0.25),
    }


def test_another_failure_of_one_leaves_the_others_alone(workers):
    script, log = workers
    script["lora"] = {"round": "diverged"}
    records = measured()
    assert {m: r.status for m, r in records.items()} == {"full": "ok", "lora": "diverged", "head": "ok"}
    assert log.count(("start", "lora")) == 1
    assert (records["head"].timed_rounds, records["head"].step_time_ratio) == (6, 0.25)


@pytest.mark.parametrize("fields", [{"rounds": 0}, {}])
def test_without_a_ratio_each_has_the_memory_to_itself(workers, fields):
    _, log = workers
    records = measured([replace(spec, **fields) for spec in ALL], reference=bool(fields))
    assert list(records) == ["full", "lora", "head"]
    assert alive(log) == 1


def test_an_interruption_ends_every_worker(workers):
    script, log = workers

    def stop():
        raise KeyboardInterrupt

    script["head"] = {"round": stop}
    with pytest.raises(KeyboardInterrupt):
        measured()
    assert sum({"start": 1, "close": -1}.get(what, 0) for what, _ in log) == 0
