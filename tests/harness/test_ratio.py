"""The ratio of two steps' times and its interval."""

import math
import statistics

import numpy as np
import pytest

from benchmarks.harness.ratio import STUDENT_T, half_width, ratio_fields, usual_half_width


@pytest.mark.parametrize(("freedom", "t"), STUDENT_T.items())
def test_the_table_is_students_distribution(freedom, t):
    # Its density, integrated from -t to t.
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    x = np.linspace(-t, t, 200_001)
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert np.trapezoid(density, x) == pytest.approx(0.99, abs=1e-5)


def test_fifteen_rounds_are_five_segments_of_three_neighbours():
    ratios = np.array([1, 2, 9, 4, 4, 4, 2, 8, 8, 1, 1, 1, 2, 0.5, 2.0])
    logs = [math.log(m) for m in (2, 4, 8, 1, 2)]  # the segments' medians
    half = 4.604 * statistics.stdev(logs) / math.sqrt(5)
    fields = ratio_fields(3 * ratios, [3.0] * 15)
    assert fields["step_time_ratio"] == pytest.approx(2)
    assert fields["step_time_ratio_low"] == pytest.approx(2 * math.exp(-half))
    assert fields["step_time_ratio_high"] == pytest.approx(2 * math.exp(half))


@pytest.mark.parametrize(("n", "t"), [(3, 9.925), (4, 5.841), (5, 4.604)])
def test_fewer_rounds_are_segments_of_their_own(n, t):
    ratios = np.exp(np.arange(n) / 8)
    assert half_width(ratios, [1.0] * n) == pytest.approx(t * statistics.stdev(np.arange(n) / 8) / math.sqrt(n))


def drifting(generator, rounds, memory):
    """Ratios around 1 whose logarithms are an autoregressive series: neighbours are alike where `memory` is near 1."""
    x = generator.normal() / math.sqrt(1 - memory**2)
    series = []
    for _ in range(rounds):
        x = memory * x + generator.normal()
        series.append(0.02 * x)
    return np.exp(series)


@pytest.mark.parametrize(("memory", "coverage"), [(0.0, 0.98), (0.4, 0.96)])
def test_the_interval_holds_the_truth_as_often_as_it_says(memory, coverage):
    """Of 1000 series of 15, also where neighbours are alike, which an interval over single rounds does not survive."""
    generator = np.random.default_rng(1)
    held = by_rounds = 0
    for _ in range(1000):
        ratios = drifting(generator, 15, memory)
        logs = np.log(ratios)
        held += abs(float(np.median(logs))) <= half_width(ratios, np.ones(15))
        # The same of fifteen rounds as if independent: Student's t with 14 degrees of freedom.
        by_rounds += abs(logs.mean()) <= 2.977 * logs.std(ddof=1) / math.sqrt(15)
    assert held >= coverage * 1000
    if memory:
        assert by_rounds < held


def test_equal_ratios_have_an_interval_without_width():
    assert half_width([7.0] * 7, [2.0] * 7) == pytest.approx(0, abs=1e-12)


def test_an_interval_is_no_narrower_than_is_usual():
    steady, noisy = [1.0] * 15, [1.0, 1.1, 1.2] * 5
    by_itself = ratio_fields(noisy, steady)
    assert ratio_fields(noisy, steady, least=half_width(noisy, steady) / 2) == by_itself
    wider = ratio_fields(steady, steady, least=0.25)
    assert (wider["step_time_ratio_low"], wider["step_time_ratio_high"]) == pytest.approx(
        (math.exp(-0.25), math.exp(0.25))
    )
    assert usual_half_width([0.1, None, 0.4, 0.2]) == 0.2
    assert usual_half_width([None]) == 0.0


def test_the_ratio_is_of_neighbours_not_of_medians():
    # A machine that slows down by a factor of ten: each pair still has the ratio 2.
    fields = ratio_fields([2.0, 6.0, 20.0], [1.0, 3.0, 10.0])
    assert fields == pytest.approx(
        {"reference_step_time_s": 3.0, "step_time_ratio": 2.0, "step_time_ratio_low": 2.0, "step_time_ratio_high": 2.0}
    )


@pytest.mark.parametrize("rounds", [1, 2])
def test_too_few_rounds_have_a_ratio_and_no_interval(rounds):
    fields = ratio_fields([1.0] * rounds, [2.0] * rounds)
    assert fields["step_time_ratio"] == 0.5
    assert fields["step_time_ratio_low"] is fields["step_time_ratio_high"] is None
    assert ratio_fields([1.0] * rounds, [2.0] * rounds, least=0.5) == fields


def test_without_pairs_there_is_nothing():
    assert ratio_fields([1.0, 2.0], []) == {}
