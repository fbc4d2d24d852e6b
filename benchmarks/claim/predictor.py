"""Predictions, each made once, with a line on stderr as they come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from benchmarks.collect import outcome, say
from benchmarks.harness.predict import predict
from benchmarks.harness.spec import RunSpec
from reports.record import Record

# What says why a budget was chosen, and changes nothing of what is predicted.
_REASONS = ("matched", "equal_trainable", "equal_memory")


class Predictor:
    """The record of a spec; a spec that was predicted before is not predicted again.

    Args:
        run: what predicts; records lose their timelines, which nothing here reads.
    """

    def __init__(self, run: Callable[[RunSpec], Record] = predict):
        self._run = run
        self._found: dict[RunSpec, Record] = {}
        self._started = time.monotonic()

    @property
    def records(self) -> list[Record]:
        """All that were predicted, in that order."""
        return list(self._found.values())

    def __call__(self, spec: RunSpec) -> Record:
        """The record of `spec`."""
        key = replace(spec, **dict.fromkeys(_REASONS))
        if key not in self._found:
            self._found[key] = record = replace(self._run(key), timeline=None)
            passed = time.monotonic() - self._started
            facts = f"{spec.label()}, {spec.batch} x {spec.seq}, {spec.dtype}, {spec.device}, {record.label}"
            say(f"[{len(self._found)}] {facts}: {outcome(record)} (after {passed:.0f} s)")
        return replace(self._found[key], **{name: getattr(spec, name) for name in _REASONS})
