"""The plain pass: what it times, what it counts, and what it leaves alone."""

import gc
import weakref

import pytest

from baselines.full import Full
from benchmarks.harness.plain import PlainPass
from benchmarks.harness.protocol import WARM_UP_STEPS
from benchmarks.harness.spec import RunSpec

LAYER = {"layer": (37, 53), "batch": 3, "seq": 11}


def plain_pass(method, workload=None, **options):
    spec = RunSpec(method=method, calibration_steps=2, **LAYER, **options)
    return PlainPass(spec, workload or spec.workload())


def test_touched_entries_are_counted_exactly():
    # A fixed support of three entries: AdamW moves each of them in every step, and nothing else.
    it = plain_pass("random-mask", budget=3, train_rest="none", lr=0.1)
    it.round()
    result = it.finish()
    assert (result["touched_params"], result["touched_steps"]) == (3, WARM_UP_STEPS + 1)


def test_a_round_is_a_period(monkeypatch):
    monkeypatch.setattr(Full, "period", 3)
    it = plain_pass("full")
    times = iter([1.0, 2.0, 6.0])
    monkeypatch.setattr(it._clock, "stop", lambda: next(times))
    assert it.round() == 3.0
    result = it.finish()
    assert (result["touched_steps"], result["period"]) == (WARM_UP_STEPS + 3, 3)


def test_steps_of_a_round_count_by_how_often_they_happen(monkeypatch):
    # GaLore decomposes in one step of 200, and in the first of a round's two.
    it = plain_pass("galore", budget=3)
    times = iter([400.0, 1.0])
    monkeypatch.setattr(it._clock, "stop", lambda: next(times))
    assert it.round() == pytest.approx(400 / 200 + 199 / 200)
    result = it.finish()
    assert (result["touched_steps"], result["period"]) == (WARM_UP_STEPS + 2, 2)


def test_drawing_a_batch_is_not_timed(monkeypatch):
    it = plain_pass("full")
    events = []
    batches = it._batches
    it._batches = iter(lambda: (events.append("draw"), next(batches))[1], None)
    monkeypatch.setattr(it._clock, "start", lambda: events.append("start"))
    monkeypatch.setattr(it._clock, "stop", lambda: events.append("stop") or 0.0)
    it.round()
    it.round()
    assert events == ["draw", "start", "stop"] * 2


def test_one_batch_is_held_at_a_time():
    workload = RunSpec(method="full", **LAYER).workload()
    original, alive, most = workload.batches, weakref.WeakSet(), 0

    def counted():
        nonlocal most
        for batch in original():
            alive.add(batch[0].untyped_storage())
            most = max(most, len(alive))
            yield batch
            del batch

    workload.batches = counted
    it = plain_pass("full", workload)
    for _ in range(6):
        it.round()
    assert most <= 2  # the loop lets go of one when it has the next


@pytest.mark.parametrize("before", [True, False])
def test_no_garbage_is_collected_in_a_round_and_the_collector_is_left_as_it_was(before):
    (gc.enable if before else gc.disable)()
    try:
        it = plain_pass("full")
        assert not gc.isenabled()
        it.finish()
        assert gc.isenabled() == before
    finally:
        gc.enable()


def test_the_model_is_let_go_when_the_pass_ends():
    it = plain_pass("full")
    model = weakref.ref(it._state.model)
    it.finish()
    gc.collect()
    assert model() is None
