"""The ratio of two steps' times, and how far it can be trusted: an interval that knows that a machine drifts.

Rounds that follow one another are not independent: a processor that others use too is slower for tens of seconds at a
time, and more so for one kind of work than for another, so that even the ratio of neighbouring steps moves with it. An
interval that takes the rounds for independent ones (the bootstrap over rounds does) is then too narrow. So neighbours
are gathered into a few segments, whose medians are much less alike, and the interval is Student's t over the segments
(the method of batch means: Law and Kelton, Simulation Modeling and Analysis, section 9.5.3).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from reports.record import RATIO_CONFIDENCE

SEGMENTS = 5
# Student's t at (1 + 0.99) / 2 by degrees of freedom.
STUDENT_T = {2: 9.925, 3: 5.841, 4: 4.604}
assert RATIO_CONFIDENCE == 0.99, "STUDENT_T is a table for 0.99"


def ratio_fields(seconds: Sequence[float], reference_seconds: Sequence[float]) -> dict[str, float | None]:
    """Median of the paired ratios and its interval, as a record's fields; without pairs, nothing.

    `seconds` and `reference_seconds` are of the same rounds, in their order. Fewer than three rounds have no interval.
    """
    if not reference_seconds:
        return {}
    ratios = np.array(seconds) / np.array(reference_seconds)
    low, high = segment_interval(ratios)
    return {
        "reference_step_time_s": statistics.median(reference_seconds),
        "step_time_ratio": float(np.median(ratios)),
        "step_time_ratio_low": low,
        "step_time_ratio_high": high,
    }


def segment_interval(ratios: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """The interval around the median of positive `ratios` (n,), which are in the order of time; n < 3 has none.

    Student's interval over the logarithms of the medians of `SEGMENTS` equal stretches (n of them where n is less).
    """
    segments = min(SEGMENTS, len(ratios))
    if segments - 1 not in STUDENT_T:
        return None, None
    medians = [float(np.median(segment)) for segment in np.array_split(np.log(ratios), segments)]
    half = STUDENT_T[segments - 1] * statistics.stdev(medians) / math.sqrt(segments)
    center = float(np.median(ratios))
    return center * math.exp(-half), center * math.exp(half)
