"""Runs on the same conditions, timed in turns: as many as fit in memory at once, a round of each, then the next round.

What a machine does to the times changes within tens of seconds. Runs that are timed one after the other each see a few
seconds of it; in turns they all see the same minute, each beside full fine-tuning's worker. A run that finds too little
memory beside others is measured again alone, so that no status of a record is another run's doing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from benchmarks.harness.environment import available_bytes
from benchmarks.harness.pairing import Reference, Run
from benchmarks.harness.ratio import usual_half_width
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.worker import DEFAULT_TIME_LIMIT_S
from reports.record import Record

# The rounds are spread over this long at least, so that they see more of the machine than a moment: in a series of
# eight minutes, ratios of neighbouring steps were correlated over ten seconds and more.
SPAN_S = 45.0
LONGEST_SPAN_S = 86_400
# Another worker is started where this many times the largest one's memory is available.
ROOM = 2

Done = Callable[[RunSpec, Record, Sequence[float]], None]


def measure_all(
    specs: Sequence[RunSpec],
    reference: Reference | None,
    done: Done,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    span_s: float = SPAN_S,
) -> None:
    """Measure runs that differ in their method alone; `done` gets each one's spec, record and seconds as it ends.

    Runs are done in the order of `specs`, save those that did not fit in memory beside others: they come later. Without
    a reference, or without rounds, each run has the memory to itself.
    """
    later = list(specs)
    while later:
        together = later if reference is not None and later[0].rounds else later[:1]
        rest = later[len(together) :]
        alone, later = _take_turns(together, reference, done, time_limit_s, span_s)
        for spec in alone:
            _take_turns([spec], reference, done, time_limit_s, span_s)
        later += rest


def _take_turns(
    specs: Sequence[RunSpec], reference: Reference | None, done: Done, time_limit_s: float, span_s: float
) -> tuple[list[RunSpec], list[RunSpec]]:
    """Measure those that fit; gives those to be measured alone, and those that were not begun. The first is begun."""
    runs, alone, later = [], [], list(specs)
    with ExitStack() as opened:
        while later and (not runs or _room(runs, reference)):
            run = opened.enter_context(Run(later.pop(0), reference, time_limit_s, shares_memory=bool(runs)))
            run.prepare()
            if run.crowded and runs:
                alone.append(run.spec)
                run.finish()
                break
            runs.append(run)
            if run.crowded:  # beside the reference already
                break
        for run in runs:
            run.shares_memory = len(runs) > 1
        _drive(runs, span_s)
        usual = usual_half_width([run.half_width() for run in runs])
        for run in runs:
            run.least_half_width = usual
            record = run.finish()
            if run.crowded and run.shares_memory:
                alone.append(run.spec)
            else:
                done(run.spec, record, run.seconds)
    return alone, later


def _drive(runs: Sequence[Run], span_s: float) -> None:
    rounds = max(run.rounds for run in runs)
    # The order changes from round to round, so that nobody always follows the same neighbour.
    order = random.Random(0)
    for i, _ in enumerate(_paced(rounds, span_s / max(rounds, 1) if _spread(runs) else 0.0)):
        for run in order.sample(runs, len(runs)):
            run.pair(reference_first=i % 2 == 0)


def _spread(runs: Sequence[Run]) -> bool:
    """Whether there is a ratio whose interval should know more of the machine than a moment."""
    return any(run.pairing == "rounds" for run in runs)


def _paced(rounds: int, interval_s: float) -> Iterator[None]:
    for left in range(rounds - 1, -1, -1):
        started = time.monotonic()
        yield
        if left and (rest := started + interval_s - time.monotonic()) > 0:
            time.sleep(rest)


def _room(runs: Sequence[Run], reference: Reference | None) -> bool:
    """Whether one more worker is likely to fit; where the system does not tell, it is not begun."""
    if runs[0].spec.device != "cpu":
        # A GPU tells only those who open a context on it; who does not fit there ends with a clear oom.
        return True
    sizes = [holder.high_water_bytes() for holder in (reference, *runs) if holder is not None]
    largest = max((size for size in sizes if size is not None), default=None)
    available = available_bytes()
    return largest is not None and available is not None and available > ROOM * largest
