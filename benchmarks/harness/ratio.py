"""The ratio of two steps' times, and how far it can be trusted: an interval that knows that a machine drifts.

Rounds that follow one another are not independent: a processor that others use too is slower for tens of seconds at a
time, and more so for one kind of work than for another, so that even the ratio of neighbouring steps moves with it. An
interval that takes the rounds for independent ones (the bootstrap over rounds does) is then too narrow. So neighbours
are gathered into a few segments, whose medians are much less alike, and the interval is Student's t over the segments
(the method of batch means: Law and Kelton, Simulation Modeling and Analysis, section 9.5.3).

Five segments tell little of their own scatter, so that some intervals are narrow by chance. What scatters the ratios of
runs that are timed in turns is one machine: no interval is narrower than the median of theirs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from reports.record import RATIO_CONFIDENCE

SEGMENTS = 5
# Student's t at (1 + 0.99) / 2 by degrees of freedom.
STUDENT_T = {2: 9.925, 3: 5.841, 4: 4.604}
assert RATIO_CONFIDENCE == 0.99, "STUDENT_T is a table for 0.99"


def ratio_fields(
    seconds: Sequence[float], reference_seconds: Sequence[float], least: float = 0.0
) -> dict[str, float | None]:
    """Median of the paired ratios and its interval, as a record's fields; without pairs, nothing.

    `seconds` and `reference_seconds` are of the same rounds, in their order; the interval's half-width is at least
    `least`. Fewer than three rounds have no interval.
    """
    if not reference_seconds:
        return {}
    ratio = float(np.median(np.array(seconds) / np.array(reference_seconds)))
    half = half_width(seconds, reference_seconds)
    if half is not None:
        half = max(half, least)
    return {
        "reference_step_time_s": statistics.median(reference_seconds),
        "step_time_ratio": ratio,
        "step_time_ratio_low": None if half is None else ratio * math.exp(-half),
        "step_time_ratio_high": None if half is None else ratio * math.exp(half),
    }


def half_width(seconds: Sequence[float], reference_seconds: Sequence[float]) -> float | None:
    """Half the width of the interval of log(ratio), by these rounds alone; None for fewer than three pairs.

    Student's interval over the logarithms of the medians of `SEGMENTS` equal stretches (n of them where n is less).
    """
    segments = min(SEGMENTS, len(reference_seconds))
    if segments - 1 not in STUDENT_T:
        return None
    logs = np.log(np.array(seconds) / np.array(reference_seconds))
    medians = [float(np.median(segment)) for segment in np.array_split(logs, segments)]
    return STUDENT_T[segments - 1] * statistics.stdev(medians) / math.sqrt(segments)


def usual_half_width(halves: Iterable[float | None]) -> float:
    """The median of those half-widths that there are; 0 where there is none."""
    known = [half for half in halves if half is not None]
    return statistics.median(known) if known else 0.0
