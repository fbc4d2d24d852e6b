"""Two hundred steps of every method hold what ten held: nothing that a step makes is left over, and no state grows."""

import pytest
import torch

from baselines.registry import get, methods
from benchmarks.harness.memory import Tracker, steady_collection, storages, tensors_in
from benchmarks.harness.protocol import build, ready, training_step
from benchmarks.harness.spec import RunSpec

EARLY, LATE = 10, 200


def state_bytes(optimizers):
    """Bytes of all storages that the optimizers keep."""
    kept = {
        storage._cdata: storage.nbytes()
        for optimizer in optimizers
        for tensor in tensors_in(optimizer.state)
        for storage in storages(tensor)
    }
    return sum(kept.values())


def held_then(method, after=lambda: None):
    """(live bytes by the tracker, bytes of optimizer state) early and late; `after` is called after each step."""
    budget = None if get(method).knob is None else 3
    spec = RunSpec(method=method, budget=budget, layer=(6, 9), batch=2, seq=3, calibration_steps=3)
    workload = spec.workload()
    tracker = Tracker()
    made, model, _ = build(spec, workload)
    made.prepare(model, workload.batches())
    state = ready(spec, workload, made, model)
    tracker.adopt(model)
    tracker.see([*made.basis_tensors(model)])
    found = []
    # Another batch each time, so that supports move.
    batches = workload.batches()
    with tracker, steady_collection():
        for period in range(1, LATE + 1):
            for _ in range(made.period):
                training_step(state, next(batches), tracker.phase)
                after()
            if period in (EARLY, LATE):
                found.append((tracker.live_bytes, state_bytes(state.optimizers)))
    return found


@pytest.mark.parametrize("method", methods())
def test_nothing_grows(method):
    early, late = held_then(method)
    assert early == late
    live, state = early
    assert live > state
    assert (state > 0) == (method != "head")  # a layer has no head, so that nothing of it trains


def test_a_leak_shows():
    kept = []
    early, late = held_then("lora", after=lambda: kept.append(torch.ones(7)))
    assert late[0] - early[0] == (LATE - EARLY) * 7 * 4
