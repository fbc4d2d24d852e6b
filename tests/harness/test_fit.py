"""The largest that fits, against a plain count upwards."""

from dataclasses import replace
from functools import cache

import pytest

from benchmarks.harness.fit import largest_that_fits
from benchmarks.harness.predict import CONTEXT_BYTES, predict
from benchmarks.harness.spec import RunSpec
from reports.record import Record


class Card:
    """A stand-in for predictions: what is up to `room` fits, `unknown` is refused."""

    def __init__(self, room: int, unknown: int | None = None):
        self.room, self.unknown = room, unknown
        self.asked: list[int] = []

    def __call__(self, number: int) -> Record:
        self.asked.append(number)
        if number == self.unknown:
            return Record(method="full", model="m", batch=number, status="refused", reason="why")
        return Record(method="full", model="m", batch=number, fits=number <= self.room)


@pytest.mark.parametrize("start", [1, 2, 16, 37, 100])
@pytest.mark.parametrize("room", [1, 2, 3, 15, 16, 17, 36, 37, 38, 99, 100, 101, 5000])
def test_it_fits_and_the_next_does_not(start, room):
    card = Card(room)
    record = largest_that_fits(card, start, most=100)
    expected = min(room, 100)
    assert (record.batch, record.fits) == (expected, True)
    assert expected in card.asked
    assert expected == 100 or expected + 1 in card.asked
    assert len(set(card.asked)) == len(card.asked)
    assert all(1 <= number <= 100 for number in card.asked)


def test_doubling_and_bisection_are_all_it_takes():
    card = Card(room=49)
    largest_that_fits(card, start=16, most=2**16)
    assert card.asked == [16, 32, 64, 48, 56, 52, 50, 49]


def test_a_start_beyond_the_end_is_the_end():
    assert largest_that_fits(Card(room=500), start=200, most=100).batch == 100


def test_where_not_even_one_fits():
    card = Card(room=0)
    record = largest_that_fits(card, start=16, most=100)
    assert (record.batch, record.fits) == (1, False)
    assert card.asked == [16, 8, 4, 2, 1]


@pytest.mark.parametrize("unknown", [16, 32, 28])
def test_a_refusal_ends_the_search(unknown):
    card = Card(room=29, unknown=unknown)
    record = largest_that_fits(card, start=16, most=100)
    assert (record.batch, record.status, record.reason) == (unknown, "refused", "why")
    assert card.asked[-1] == unknown


def test_of_a_layer_on_a_card():
    room = CONTEXT_BYTES + 1500 * 2**20
    spec = RunSpec("full", layer=(256, 1024), seq=2**15, device="cuda", optimizer_impl="foreach", gpu_memory_bytes=room)
    predicted = cache(lambda batch: predict(replace(spec, batch=batch)))
    record = largest_that_fits(predicted, start=2, most=64)
    fits = [predicted(batch).fits for batch in range(1, record.batch + 2)]
    assert record.batch > 1
    assert fits == [True] * record.batch + [False]
