"""A measured run whose rounds stand next to full fine-tuning's.

A machine's speed drifts; the ratio of two neighbouring steps drifts much less. So the method's worker and the worker of
full fine-tuning on the same conditions (the reference) are alive at once and step in turns. The reference of `full`
itself is a second worker of full fine-tuning: its ratio shows what the harness cannot tell from 1.

Where two models do not fit at once, the two take turns in blocks: one worker at a time, prepared, stepped and ended.
Where full fine-tuning does not run at all there is no ratio, and plain seconds remain.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

from benchmarks.harness.ratio import half_width, ratio_fields
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.worker import DEFAULT_TIME_LIMIT_S, RunFailed, Worker
from reports.record import Record

# How a run ends that finds too little memory.
CROWDED = ("oom", "killed")
# Pairs of blocks where one model is in memory at a time: each costs two preparations.
BLOCKS = 3
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
        self._lost: RunFailed | None = None

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def ready_for(self, spec: RunSpec) -> bool:
        """Have a worker on the conditions of `spec`; False where full fine-tuning does not run on them."""
        wanted = replace(spec, method="full", budget=None, matched=None, equal_trainable=None, snapshot=None)
        if self._spec != wanted:
            self.close()
            self._spec = wanted
            self._worker = Worker(wanted, self.time_limit_s)
            try:
                self._worker.prepare()
            except RunFailed:
                self._worker = None
        return self._worker is not None

    def round(self) -> float:
        """One round of the worker: seconds per step. Raises `RunFailed`, and again until the next `ready_for`."""
        if self._worker is None:
            raise self._lost
        # The time limit is for a worker that hangs: this one serves many runs.
        self._worker.renew()
        try:
            return self._worker.round()
        except RunFailed as failure:
            self.close()
            self._lost = failure
            raise

    def high_water_bytes(self) -> int | None:
        """The most memory that the worker's process took so far."""
        return self._worker.high_water_bytes() if self._worker else None

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()
        self._worker = self._spec = None


class Run:
    """One measured run, driven from outside: `prepare`, then `rounds` times `pair`, then `finish`.

    None of them raises for what befalls the run: `finish` gives a record that says so. `spec.rounds` = 0 leaves the
    plain pass out. `reference` None leaves the pairing out.

    With `shares_memory`, other runs are in memory too: where there is too little of it, the run is `crowded` and ends,
    since the others may be the cause, instead of finding a way out.
    """

    def __init__(
        self,
        spec: RunSpec,
        reference: Reference | None,
        time_limit_s: float = DEFAULT_TIME_LIMIT_S,
        shares_memory: bool = False,
    ):
        self.spec = spec
        self.shares_memory = shares_memory
        self.crowded = False
        self.least_half_width = 0.0  # of the ratio's interval; see ratio.py
        self.seconds: list[float] = []
        self.reference_seconds: list[float] = []
        self.pairing: str | None = None
        self._reference = reference
        self._time_limit_s = time_limit_s
        self._rounds_timed = 0
        self._began: float | None = None
        self._ended: float | None = None
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
            if self.pairing is None or self.shares_memory or failure.record.status not in CROWDED:
                self._fail(failure)
                return
            self._take_turns_in_blocks()
        if self.pairing == "rounds":
            # The reference steps with the method's model in memory, and is warm again after its rest.
            try:
                self._reference.round()
            except RunFailed as failure:
                self._without_reference(failure)

    def pair(self, reference_first: bool = True) -> None:
        """One round: a step of full fine-tuning's (or a block of them) and one of the method's, in this order or not.

        Only the method's where the run is not paired; nothing where it failed.
        """
        self._began = self._began or time.monotonic()
        if reference_first or self.pairing == "blocks":
            self._reference_round()
            self._round()
        else:
            self._round()
            self._reference_round()
        self._ended = time.monotonic()

    def _reference_round(self) -> None:
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
        except RunFailed as failure:
            self.crowded |= failure.record.status in CROWDED
            self._give_up_pairing()

    def _round(self) -> None:
        if self._failure is not None:
            return
        try:
            self._start_worker()
            rounds = [self._rested(self._worker) for _ in range(self._rounds_of_a_block)]
            self.seconds.append(statistics.median(rounds))
            self._rounds_timed += len(rounds)
        except RunFailed as failure:
            self._fail(failure)

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
            self.crowded |= failure.record.status in CROWDED
            return replace(failure.record, **obtained)
        finally:
            self._end_worker()
        return self.spec.blank(self.spec.label(), **obtained)

    def high_water_bytes(self) -> int | None:
        """The most memory that the worker's process took so far."""
        return self._worker.high_water_bytes() if self._worker else None

    def half_width(self) -> float | None:
        """Half the width of the ratio's interval by this run's rounds alone; None where there is none."""
        return None if self._failure is not None else half_width(self.seconds, self.reference_seconds)

    def _memory(self) -> dict[str, object]:
        try:
            return self._worker.memory()
        except RunFailed as failure:
            if self.shares_memory or self.pairing != "rounds" or failure.record.status not in CROWDED:
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

    def _fail(self, failure: RunFailed) -> None:
        self._failure = failure.record
        self.crowded |= failure.record.status in CROWDED
        self._end_worker()

    def _without_reference(self, failure: RunFailed) -> None:
        """Full fine-tuning's worker failed beside the method's."""
        if failure.record.status not in CROWDED:
            self.pairing = None
        elif self.shares_memory:
            self.pairing, self.crowded = None, True
        else:
            self._take_turns_in_blocks()

    def _take_turns_in_blocks(self) -> None:
        self._reference.close()
        self._end_worker()
        self.pairing, self.crowded = "blocks", True

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
            "timed_span_s": self._ended - self._began,
            "pairing": self.pairing,
            **ratio_fields(self.seconds, self.reference_seconds, self.least_half_width),
        }
