"""A measured run whose rounds stand next to full fine-tuning's.

A machine's speed drifts; the ratio of two neighbouring steps does not. So the method's worker and the worker of full
fine-tuning on the same conditions (the reference) are alive at once and step in turns. The reference of `full` itself
is a second worker of full fine-tuning: its ratio shows what the harness cannot tell from 1.

Where two models do not fit at once, the two take turns in blocks: one worker at a time, prepared, stepped and ended.
Where full fine-tuning does not run at all there is no ratio, and plain seconds remain.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.harness.spec import RunSpec
from benchmarks.harness.worker import DEFAULT_TIME_LIMIT_S, RunFailed, Worker
from reports.record import RATIO_CONFIDENCE, Record

# How a run ends that finds too little memory.
CROWDED = ("oom", "killed")
# Pairs of blocks where one model is in memory at a time: each costs two preparations.
BLOCKS = 3
RESAMPLES = 10_000
# Before each step of a pair. OpenMP's threads wait busily for some milliseconds after their last work, so that a step
# that follows another worker's at once shares the processor with them: on two cores LoRA's step on a block of 384x1536
# took 36 ms so, and 30 ms alone or after this rest.
REST_S = 0.02


class Reference:
    """Full fine-tuning's worker on the conditions of the run at hand; kept from run to run while they stay the same."""

    def __init__(self, time_limit_s: float = DEFAULT_TIME_LIMIT_S):
        self.time_limit_s = time_limit_s
        self._spec: RunSpec | None = None
        self._worker: Worker | None = None

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def ready_for(self, spec: RunSpec) -> bool:
        """Have a worker on the conditions of `spec`; False where full fine-tuning does not run on them."""
        wanted = replace(spec, method="full", budget=None, matched=None, equal_trainable=None)
        if self._spec != wanted:
            self.close()
            self._spec = wanted
            self._worker = Worker(wanted, self.time_limit_s)
            try:
                self._worker.prepare()
            except RunFailed:
                self._worker = None
        if self._worker is not None:
            self._worker.renew()
        return self._worker is not None

    def round(self) -> float:
        """One round of the worker: seconds per step. Raises `RunFailed`."""
        try:
            return self._worker.round()
        except RunFailed:
            # For this run; the next one on these conditions tries again.
            self.close()
            raise

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()
        self._worker = self._spec = None


class Run:
    """One measured run, driven from outside: `prepare`, then `rounds` times `reference_round` and `round`, `finish`.

    None of them raises for what befalls the run: `finish` gives a record that says so. `spec.rounds` = 0 leaves the
    plain pass out. `reference` None leaves the pairing out.
    """

    def __init__(self, spec: RunSpec, reference: Reference | None, time_limit_s: float = DEFAULT_TIME_LIMIT_S):
        self.spec = spec
        self.seconds: list[float] = []
        self.reference_seconds: list[float] = []
        self.pairing: str | None = None
        self._reference = reference
        self._time_limit_s = time_limit_s
        self._rounds_timed = 0
        self._worker: Worker | None = None
        self._failure: Record | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_worker()

    @property
    def rounds(self) -> int:
        """How many rounds are to be driven, once the run is prepared; 0 where it failed."""
        if self._failure is not None:
            return 0
        return min(BLOCKS, self.spec.rounds) if self.pairing == "blocks" else self.spec.rounds

    def prepare(self) -> None:
        """Prepare the method's worker and find out how it can be paired."""
        if self.spec.rounds and self._reference is not None and self._reference.ready_for(self.spec):
            self.pairing = "rounds"
        try:
            self._start_worker()
        except RunFailed as failure:
            if self.pairing is None or failure.record.status not in CROWDED:
                self._failure = failure.record
                return
            self._take_turns_in_blocks()
        if self.pairing == "rounds":
            # The reference steps with the method's model in memory, and is warm again after its rest.
            try:
                self._reference.round()
            except RunFailed as failure:
                if failure.record.status in CROWDED:
                    self._take_turns_in_blocks()
                else:
                    self.pairing = None

    def reference_round(self) -> None:
        """Full fine-tuning's share of a round; nothing where the run is not paired."""
        if self._failure is not None or self.pairing is None:
            return
        try:
            if self.pairing == "blocks":
                self._end_worker()
                if not self._reference.ready_for(self.spec):
                    self._give_up_pairing()
                    return
            steps = [self._rested(self._reference) for _ in range(self._rounds_of_a_block)]
            self.reference_seconds.append(statistics.median(steps))
            if self.pairing == "blocks":
                self._reference.close()
        except RunFailed:
            self._give_up_pairing()

    def round(self) -> float:
        """The method's share of a round: seconds per step; 0 where the run failed."""
        if self._failure is not None:
            return 0.0
        try:
            self._start_worker()
            rounds = [self._rested(self._worker) for _ in range(self._rounds_of_a_block)]
            self.seconds.append(statistics.median(rounds))
            self._rounds_timed += len(rounds)
        except RunFailed as failure:
            self._failure = failure.record
            return 0.0
        return self.seconds[-1]

    def _rested(self, worker: Reference | Worker) -> float:
        if self.pairing == "rounds":
            time.sleep(REST_S)
        return worker.round()

    def finish(self) -> Record:
        """The record; the method's worker ends, the reference stays for the next run."""
        if self._failure is not None:
            return self._failure
        obtained: dict[str, object] = {}
        try:
            self._start_worker()
            if self.spec.rounds:
                obtained |= self._worker.plain()
                obtained |= self._times(obtained.pop("period"))
            obtained |= self._memory()
        except RunFailed as failure:
            return replace(failure.record, **obtained)
        finally:
            self._end_worker()
        return self.spec.blank(self.spec.label(), **obtained)

    def _memory(self) -> dict[str, object]:
        try:
            return self._worker.memory()
        except RunFailed as failure:
            if self.pairing != "rounds" or failure.record.status not in CROWDED:
                raise
        # The reference's model may have been what was too much.
        self._reference.close()
        self._end_worker()
        self._worker = Worker(self.spec, self._time_limit_s)
        return self._worker.memory()

    @property
    def _rounds_of_a_block(self) -> int:
        return max(1, self.spec.rounds // BLOCKS) if self.pairing == "blocks" else 1

    def _start_worker(self) -> None:
        if self._worker is None:
            self._worker = Worker(self.spec, self._time_limit_s)
            if self.spec.rounds:
                self._worker.prepare()

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _take_turns_in_blocks(self) -> None:
        self._reference.close()
        self._end_worker()
        self.pairing = "blocks"

    def _give_up_pairing(self) -> None:
        self.pairing = None
        self.reference_seconds.clear()

    def _times(self, period: int) -> dict[str, object]:
        return {
            "step_time_s": statistics.median(self.seconds),
            "step_time_min_s": min(self.seconds),
            "step_time_max_s": max(self.seconds),
            "timed_rounds": len(self.seconds),
            "timed_steps": self._rounds_timed * period,
            "pairing": self.pairing,
            **ratio_fields(self.seconds, self.reference_seconds),
        }


def ratio_fields(seconds: Sequence[float], reference_seconds: Sequence[float]) -> dict[str, float | None]:
    """Median of the paired ratios and its bootstrap interval, as a record's fields; without pairs, nothing.

    The interval is the percentile interval of the median over resampled rounds; one round has none.
    """
    if not reference_seconds:
        return {}
    ratios = np.array(seconds) / np.array(reference_seconds)
    low, high = bootstrap_median(ratios) if len(ratios) > 1 else (None, None)
    return {
        "reference_step_time_s": statistics.median(reference_seconds),
        "step_time_ratio": float(np.median(ratios)),
        "step_time_ratio_low": low,
        "step_time_ratio_high": high,
    }


def bootstrap_median(
    values: np.ndarray, confidence: float = RATIO_CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of the median of `values` (n,), the same for the same values."""
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    medians = np.median(values[draws], axis=1)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def measure(spec: RunSpec, reference: Reference | None, time_limit_s: float = DEFAULT_TIME_LIMIT_S) -> Record:
    """A whole run, driven here."""
    with Run(spec, reference, time_limit_s) as run:
        run.prepare()
        for _ in range(run.rounds):
            run.reference_round()
            run.round()
        return run.finish()
