"""Verdicts on two arms, on studies whose truth is known."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from benchmarks.quality.statistics import (
    LEVEL,
    POWER,
    Paired,
    Runs,
    compare,
    holm,
    mean_interval,
    score,
    student_quantile,
    student_tail,
)

STANDARD = NormalDist()


def accuracy_task(generator, seeds, examples, accuracy, difference, seed_sd=1.0, name="a"):
    """Two arms whose accuracies are `accuracy` plus and minus half the `difference`, in points; labels are binary.

    An arm is right where a standard normal, plus its seed's, exceeds a threshold: that has a closed form. `seed_sd` is
    of the difference of the arms, in points. Of the normal's variance 0.6 is the example's, 0.15 the example's with the
    arm, 0.1 the example's with the seed, and 0.15 is left over.
    """
    slope = 100 * STANDARD.pdf(STANDARD.inv_cdf(accuracy / 100))  # points for each unit of the threshold
    seed = seed_sd / slope / math.sqrt(2)
    normal = generator.normal
    labels = generator.integers(0, 2, examples)
    shared = math.sqrt(0.6) * normal(size=examples) + math.sqrt(0.1) * normal(size=(seeds, examples))
    arms = []
    for half in (difference / 2, -difference / 2):
        own = math.sqrt(0.15) * (normal(size=examples) + normal(size=(seeds, examples))) + seed * normal(
            size=(seeds, 1)
        )
        least = STANDARD.inv_cdf((accuracy + half) / 100) * math.sqrt(1 + seed**2)
        arms.append(np.where(shared + own + least > 0, labels, 1 - labels))
    return Paired(name, "accuracy", labels, *arms, group=name)


def pearson_task(generator, seeds, examples, name="p"):
    """Two arms that correlate equally with the labels, at about 0.85."""
    normal = generator.normal
    labels = normal(size=examples)
    shared = normal(size=examples) + normal(size=(seeds, examples)) / 2
    arms = []
    for _ in range(2):
        noise = 0.5 * np.exp(normal(size=(seeds, 1)) / 50)
        own = (normal(size=examples) + normal(size=(seeds, examples))) / 2
        arms.append(3 + 2 * (labels + noise * (shared + own)))
    return Paired(name, "pearson", labels, *arms, group=name)


def study(generator, difference, seeds=8, examples=300):
    """Four tasks, or without a difference six of both metrics, whose seeds scatter by 0.3 to 2 points."""
    tasks = [
        accuracy_task(generator, seeds, examples, accuracy, difference, sd, f"{accuracy}")
        for accuracy, sd in [(60, 2.0), (70, 1.0), (80, 0.3), (90, 0.5)]
    ]
    if not difference:
        tasks += [pearson_task(generator, seeds, examples, name) for name in "pq"]
    return tasks


def binomial_bounds(n, p, miss=1e-3):
    """The counts that a binomial variable leaves on either side with a probability of at most `miss`."""
    below = np.cumsum([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
    return int(np.searchsorted(below, miss)), int(np.searchsorted(below, 1 - miss))


def by_definition(task):
    """The interval of one task, sum by sum: brute-force jackknife, analysis of variance, Satterthwaite."""
    seeds, examples = task.first.shape

    def metric(predictions, labels):
        return 100 * (
            np.mean(predictions == labels) if task.metric == "accuracy" else np.corrcoef(predictions, labels)[0, 1]
        )

    y = np.empty((seeds, examples))
    scores = []
    for s in range(seeds):
        whole = metric(task.first[s], task.labels) - metric(task.second[s], task.labels)
        scores.append(whole)
        for j in range(examples):
            left = np.arange(examples) != j
            without = metric(task.first[s, left], task.labels[left]) - metric(task.second[s, left], task.labels[left])
            y[s, j] = examples * whole - (examples - 1) * without
    grand, rows, columns = y.mean(), y.mean(1), y.mean(0)
    ms_example = seeds * sum((c - grand) ** 2 for c in columns) / (examples - 1)
    ms_residual = sum((y[s, j] - rows[s] - columns[j] + grand) ** 2 for s in range(seeds) for j in range(examples)) / (
        (seeds - 1) * (examples - 1)
    )
    by_seeds = np.var(scores, ddof=1) / seeds
    by_examples = max(0, (ms_example - ms_residual) / (seeds * examples))
    freedom = (by_seeds + by_examples) ** 2 / (by_seeds**2 / (seeds - 1) + by_examples**2 / (examples - 1))
    half = student_quantile(0.9, freedom) * math.sqrt(by_seeds + by_examples)
    return np.mean(scores) - half, np.mean(scores) + half


# Tables of Student's distribution, as every textbook has them; a million degrees of freedom stand for infinity.
@pytest.mark.parametrize(
    ("level", "freedom", "t"),
    [
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.95, 7, 2.365),
        (0.95, 30, 2.042),
        (0.95, 120, 1.980),
        (0.95, 1e6, 1.960),
        (0.6, 7, 0.896),
        (0.99, 4, 4.604),
        (0.99, 1e6, 2.576),
        (0.999, 1, 636.619),
        (0.999, 7, 5.408),
    ],
)
def test_students_quantiles_are_the_tables(level, freedom, t):
    assert student_quantile(level, freedom) == pytest.approx(t, abs=5.1e-4)
    assert student_tail(t, freedom) == pytest.approx(1 - level, rel=2e-3)


@pytest.mark.parametrize("freedom", [2.5, 11.3, 400.0])
@pytest.mark.parametrize("t", [0.1, 1.0, 3.0])
def test_students_tail_is_its_density_integrated(freedom, t):
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    x = np.linspace(-t, t, 20_001)
    inside = np.trapezoid(scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x)
    assert student_tail(t, freedom) == pytest.approx(1 - inside, abs=1e-7)
    assert student_quantile(inside, freedom) == pytest.approx(t, rel=1e-5)


def test_accuracy_is_the_share_of_equal_answers():
    labels = np.array([0, 1, 2, 1])
    assert score("accuracy", np.array([[0, 1, 2, 1], [0, 0, 2, 2], [1, 0, 0, 0]]), labels) == pytest.approx(
        [100, 50, 0]
    )
    assert score("accuracy", labels, labels).shape == ()


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_pearson_is_numpys(offset):
    generator = np.random.default_rng(0)
    labels = generator.normal(size=23)
    predictions = labels + generator.normal(size=(2, 3, 23))
    expected = [[100 * np.corrcoef(row, labels)[0, 1] for row in block] for block in predictions]
    assert score("pearson", predictions + offset, labels + offset) == pytest.approx(np.array(expected), rel=1e-8)


def test_a_constant_prediction_correlates_with_nothing():
    # The mean of nineteen 0.1 is not 0.1.
    predictions = np.tile([[0.0], [0.5], [0.1]], 19)
    labels = np.arange(19.0)
    assert score("pearson", predictions, labels) == pytest.approx(np.zeros(3), abs=1e-9)
    task = Paired("a", "pearson", labels, predictions, np.tile(labels, (3, 1)), group="a")
    assert compare([task]).difference == pytest.approx(-100)
    # One prediction apart from all others: without it, again a constant.
    predictions[:, 0] = 9
    assert math.isfinite(compare([replace(task, first=predictions)]).low)


def test_holm_by_hand():
    # Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, then 0.04 x 1, which may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("make", [lambda g: accuracy_task(g, 3, 19, 70, 0), lambda g: pearson_task(g, 3, 19)])
def test_the_interval_is_the_definitions(make):
    task = make(np.random.default_rng(3))
    result = compare([task], level=0.9)
    assert (result.low, result.high) == pytest.approx(by_definition(task))
    assert result.per_task == ((task.task, result.difference, result.low, result.high),)


def test_without_variance_of_examples_it_is_the_paired_t_test():
    """A table of differences whose columns all have the sum 1, and whose rows 307, 307, 307, 307 and four times -93."""
    examples, plus, minus = 856, 307, 93
    table = np.zeros((8, examples), int)
    for i in range(4):
        table[i, np.arange(i * plus, (i + 1) * plus) % examples] = 1
        table[4 + i, i * minus : (i + 1) * minus] = -1
    assert set(table.sum(0)) == {1}
    result = compare([Paired("a", "accuracy", np.ones(examples), table > 0, table < 0, group="a")])
    differences = 100 * table.sum(1) / examples
    mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(8)
    assert result.difference == pytest.approx(mean)
    assert (result.low, result.high) == pytest.approx((mean - 2.36462 * error, mean + 2.36462 * error), rel=1e-5)
    assert result.p_value == pytest.approx(student_tail(mean / error, 7))
    # A mean of half a standard deviation: 34 pairs find it with 80 % power (Cohen's tables; the exact t has 33.4).
    assert mean / differences.std(ddof=1) == pytest.approx(0.5, abs=1e-3)
    assert (result.verdict, result.seeds_to_decide) == ("undecided", 34)
    # Of eight pairs, the exact test finds 1.16 standard deviations with 80 % power.
    assert result.detectable == pytest.approx(1.16 * differences.std(ddof=1), rel=0.01)


def test_seeds_that_agree_leave_the_binomials_error():
    labels = np.ones(50)
    predictions = np.tile(np.arange(50) < 40, (8, 1))
    result = mean_interval([Runs("a", "accuracy", labels, predictions, group="a")])
    half = 100 * 2.00958 * math.sqrt(0.8 * 0.2 / 49)  # t of 49 degrees of freedom
    assert result == pytest.approx((80, 80 - half, 80 + half), rel=1e-5)


def test_a_large_difference_holds_and_its_mirror_fails():
    generator = np.random.default_rng(4)
    for _ in range(20):
        tasks = study(generator, difference=5)
        result = compare(tasks)
        mirror = compare([replace(task, first=task.second, second=task.first) for task in tasks])
        assert (result.verdict, mirror.verdict) == ("holds", "fails")
        assert (mirror.low, mirror.high) == pytest.approx((-result.high, -result.low))
        assert result.seeds_to_decide is None


def test_without_a_difference_it_is_undecided_as_often_as_stated():
    generator = np.random.default_rng(5)
    results = [compare(study(generator, difference=0)) for _ in range(200)]
    least, most = binomial_bounds(200, 1 - LEVEL)
    assert least <= sum(result.verdict != "undecided" for result in results) <= most
    assert all((result.verdict == "undecided") == (result.p_value >= 1 - LEVEL) for result in results)


def test_the_detectable_difference_is_found_as_often_as_stated():
    generator = np.random.default_rng(6)
    detectable = np.mean([compare(study(generator, difference=1)).detectable for _ in range(50)])
    found = sum(compare(study(generator, difference=detectable)).verdict == "holds" for _ in range(200))
    least, most = binomial_bounds(200, POWER)
    assert least <= found <= most


def test_the_seeds_to_decide_do_decide():
    generator = np.random.default_rng(7)

    def one(seeds):
        return compare([accuracy_task(generator, seeds, 1000, 80, difference=3, seed_sd=5)])

    results = [one(8) for _ in range(120)]
    undecided = [result for result in results if result.verdict == "undecided"]
    assert len(undecided) > 60
    # The number is for the difference that was observed: of studies that observed about the true one.
    seeds = int(np.median([result.seeds_to_decide for result in undecided if abs(result.difference - 3) < 0.4]))
    assert seeds > 22  # (1.96 + 0.84)^2 (5 / 3)^2: what the seeds' own scatter needs, without the examples'
    least, most = binomial_bounds(100, POWER)
    assert least <= sum(one(seeds).verdict == "holds" for _ in range(100)) <= most


def test_no_number_of_seeds_decides_what_the_examples_leave_open():
    # Of 300 examples, 30 are right in the first arm alone and 20 in the second alone, whatever the seed.
    right = np.zeros((2, 8, 300), bool)
    right[0, :, :200] = True
    right[1, :, 30:220] = True
    result = compare([Paired("a", "accuracy", np.ones(300), *right, group="a")])
    error = 100 * math.sqrt((50 / 300 - (10 / 300) ** 2) / 299)
    assert result.difference == pytest.approx(100 * 10 / 300)
    assert result.high - result.difference == pytest.approx(1.96793 * error, rel=1e-5)  # t of 299 degrees of freedom
    assert (result.verdict, result.seeds_to_decide) == ("undecided", None)


def test_copies_in_one_group_tell_no_more_than_one():
    task = accuracy_task(np.random.default_rng(9), 8, 300, 70, 2)
    copies = [task, replace(task, task="copy"), replace(task, task="another")]
    alone, together = compare([task]), compare(copies)
    for field in ("difference", "low", "high", "p_value", "detectable"):
        assert getattr(together, field) == pytest.approx(getattr(alone, field)), field
    apart = compare([replace(copy, group=copy.task) for copy in copies])
    assert apart.high - apart.low < 0.7 * (alone.high - alone.low)  # 1 / sqrt(3), were they independent
    mirror = compare([task, replace(task, task="mirror", first=task.second, second=task.first)])
    assert (mirror.low, mirror.high) == pytest.approx((0, 0), abs=1e-9)


def test_equal_arms_are_equivalent_and_undecided():
    task = accuracy_task(np.random.default_rng(10), 8, 300, 70, 0)
    result = compare([replace(task, second=task.first)])
    assert (result.difference, result.low, result.high, result.p_value) == (0, 0, 0, 1)
    assert (result.verdict, result.equivalent, result.seeds_to_decide) == ("undecided", True, None)


def test_equivalence_is_the_whole_interval_within_the_margin():
    tasks = study(np.random.default_rng(11), difference=1)
    result = compare(tasks)
    outermost = max(-result.low, result.high)
    assert compare(tasks, margin=outermost * 1.001).equivalent
    assert not compare(tasks, margin=outermost * 0.999).equivalent


def test_the_p_value_is_where_the_interval_reaches_zero():
    tasks = study(np.random.default_rng(12), difference=1)
    result = compare(tasks)
    touching = compare(tasks, level=1 - result.p_value)
    assert min(abs(touching.low), abs(touching.high)) == pytest.approx(0, abs=1e-9)


def test_arms_means_differ_by_the_difference():
    tasks = study(np.random.default_rng(13), difference=1)
    arms = [
        mean_interval([Runs(t.task, t.metric, t.labels, getattr(t, arm), t.group) for t in tasks])
        for arm in ("first", "second")
    ]
    assert arms[0].score - arms[1].score == pytest.approx(compare(tasks).difference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "f1"}, "metric must be one of accuracy, pearson"),
        ({"first": np.zeros((8, 4))}, "shapes"),
        ({"first": np.zeros(5)}, "shapes"),
        ({"second": np.zeros((7, 5))}, r"shapes \(8, 5\) and \(7, 5\)"),
        ({"first": np.zeros((1, 5)), "second": np.zeros((1, 5))}, "at least 2 seeds"),
        ({"second": np.full((8, 5), np.nan)}, "NaN"),
        ({"metric": "pearson", "labels": np.ones(5)}, "no correlation"),
    ],
)
def test_runs_that_cannot_be_compared(change, message):
    good = {"task": "a", "metric": "accuracy", "labels": np.arange(5), "group": "a"}
    good |= {"first": np.zeros((8, 5)), "second": np.ones((8, 5))}
    Paired(**good)
    with pytest.raises(ValueError, match=message):
        Paired(**(good | change))


def test_studies_that_cannot_be_compared():
    generator = np.random.default_rng(14)
    task = accuracy_task(generator, 8, 30, 70, 0)
    fewer = accuracy_task(generator, 7, 30, 70, 0, name="b")
    shorter = replace(accuracy_task(generator, 8, 29, 70, 0, name="c"), group="a")
    for tasks, message in [
        ([], "no task"),
        ([task, task], "given once"),
        ([task, fewer], "a 8, b 7"),
        ([task, shorter], "30 and 29"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(tasks)
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match="level"):
            compare([task], level=level)
    with pytest.raises(ValueError, match="margin"):
        compare([task], margin=0)
    with pytest.raises(ValueError, match="p-values"):
        holm([0.1, math.nan])
