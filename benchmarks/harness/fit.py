"""The largest batch or sequence that a card holds, found by predictions."""

from __future__ import annotations

from collections.abc import Callable

from reports.record import Record

# How far a search goes where nothing else ends it: a model's positions end its sequences.
MOST = {"batch": 2**16, "seq": 2**20}


def largest_that_fits(predict: Callable[[int], Record], start: int, most: int) -> Record:
    """The record of the largest number, of 1 to `most`, at which `predict(number).fits` is True.

    From `start` the number is doubled until it no longer fits, or halved until it does, and the gap is bisected. That
    assumes that memory rises with the number: the one returned fits, and the next was seen not to, or is beyond `most`;
    whether a number further up fits again is not asked.

    Where not even 1 fits it is the record of 1. A prediction whose status is not ok ends the search and is returned.
    """
    low, high = 0, most + 1  # the largest that was seen to fit, and the smallest that was seen not to
    best, number = None, min(start, most)
    while True:
        record = predict(number)
        if record.status != "ok":
            return record
        if record.fits:
            low, best = number, record
        else:
            high = number
        if high - low == 1:
            return best or record
        if best is None:
            number = high // 2
        elif high > most:
            number = min(2 * low, most)
        else:
            number = (low + high) // 2
