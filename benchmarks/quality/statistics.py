"""Whether one arm of a study scores better than another, and how far its seeds and test examples can tell.

A study trains every arm (a method at a budget) on every task with S seeds, and keeps the prediction of each run for
each of the N test examples. What a score would have been with other seeds (training subset, head initialisation, batch
order) and with other test examples of the same task are two sources of error. They are crossed: all seeds are tested on
the same examples, so more seeds do nothing for the second.

**The model.** Y[s, j] is the difference of the two arms for seed s on example j, in points: of being right for
accuracy, of the delete-one jackknife's pseudo-values N r - (N - 1) r[-j] for Pearson's correlation r. With the random
effects Y[s, j] = difference + seed[s] + example[j] + residual[s, j], the mean has

    variance = var(seed) / S + var(example) / N + var(residual) / (S N).

The first and third are what the seeds' own scores scatter: the variance of the S differences of scores, over S. The
second is (MS_example - MS_residual) / (S N) of the two-way analysis of variance, or 0 where that is negative. The
interval is Student's t with Satterthwaite's degrees of freedom, variance^2 / sum(part^2 / (its degrees of freedom)),
S - 1 for the seeds' part and N - 1 for the examples': few where the seeds' part dominates, many where the examples'
does. The same design, readers by cases, is radiology's (Hillis 2007, Statistics in Medicine 26, 596-619).

**Tasks are fixed.** The difference is the mean over the study's tasks, and they are not a sample of anything: a verdict
is about these tasks, at these training sizes, and says nothing about others. Tasks of one group share their test
examples and their training subsets, so their tables Y are averaged before the analysis, which counts every covariance
between them. Groups are independent, and their parts of the variance add. That is an assumption on the runs: what a
run draws must come from its seed and its group together, so that seed 0 of one group has nothing in common with seed 0
of another. In simulations whose seeds shared 30 % of their effects' variance across six groups, the interval held the
truth in 87 to 91 % of studies.

**How often it is right.** In simulated studies of 8 seeds (six tasks of accuracies or correlations of 0.6 to 0.9 with
300 to 1000 test examples, or one task; seeds that scatter the difference by 0.3 to 2 points, normal or with heavy or
skewed tails; residuals that are most of the variance, or hardly any) the 95 % interval held the truth in 94.5 to 95.7 %
of 4000 studies in each of 13 settings. Single tasks' intervals did in 94.5 to 95.3 %, and in 91 % with 2 seeds. Where
a tenth of both arms' runs collapses to one class, the interval is too wide, not too narrow (96 %; one task 99 %).

**Why no bootstrap.** Resampling seeds and examples independently counts var(residual) / (S N) three times, shrinks the
seeds' part by (S - 1) / S, and its percentiles have no t for few seeds: errors of both signs, that need not cancel. In
four of these settings, of 500 studies each, such an interval held the truth in 95 to 99.8 %; Student's t over the
seeds alone, which takes the test examples for fixed, in 83 to 95 %; resampling the examples alone, in 79 to 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from benchmarks.harness.errors import InputError

METRICS = ("accuracy", "pearson")
POINTS = 100.0  # scores are in points, hundredths of a metric's unit
LEVEL = 0.95
MARGIN = 1.0  # points; a smaller difference is of no practical concern
POWER = 0.80  # of `detectable` and `seeds_to_decide`
MOST_SEEDS = 10_000  # nobody runs more: `seeds_to_decide` is None beyond


@dataclass(frozen=True, eq=False)
class Runs:
    """One arm on one task.

    `predictions` is (S, N): what the run of each seed predicts for each test example, a class of `labels` for accuracy,
    a real number for Pearson. `labels` is (N,). Tasks of one `group` share their test examples, in the same order, and
    their seeds' training subsets.

    Raises:
        InputError: for an unknown metric, shapes that do not fit, fewer than two seeds or three examples, values that
            are not finite, or labels for Pearson that are all the same.
    """

    task: str
    metric: str
    labels: np.ndarray
    predictions: np.ndarray
    group: str

    def __post_init__(self):
        _check(self.task, self.metric, self.labels, self.predictions)


@dataclass(frozen=True, eq=False)
class Paired:
    """Two arms on one task: row s of `first` and of `second`, both (S, N), are runs with the same seed.

    The same seed gave both the same training subset, head initialisation and batch order. The rest is as in `Runs`.

    Raises:
        InputError: as `Runs`, and where the arms' shapes differ.
    """

    task: str
    metric: str
    labels: np.ndarray
    first: np.ndarray
    second: np.ndarray
    group: str

    def __post_init__(self):
        _check(self.task, self.metric, self.labels, self.first)
        _check(self.task, self.metric, self.labels, self.second)
        if np.shape(self.first) != np.shape(self.second):
            raise InputError(
                f"{self.task}: the arms have predictions of shapes {np.shape(self.first)} and {np.shape(self.second)}, "
                "where every seed must have run both; give the seeds that both arms have."
            )


class TaskDifference(NamedTuple):
    """score(first) - score(second) on one task, with its own interval, in points."""

    task: str
    difference: float
    low: float
    high: float


class MeanScore(NamedTuple):
    """One arm's score, the mean over tasks, with its interval, in points."""

    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The mean over tasks of score(first) - score(second), and what it says; all differences are in points.

    `low` to `high` is the interval at `level`, and `p_value` (two-sided) is below 1 - level exactly where it leaves
    out zero. `verdict` is `holds` where the whole interval lies above zero, `fails` where it lies below, otherwise
    `undecided`. `equivalent`: the whole interval lies within `margin` of zero, whatever the verdict.

    `detectable` is the smallest true difference that such a study finds with a probability of 80 %, by this study's
    estimate of its own standard error. `seeds_to_decide` is how many seeds an undecided study of these test examples
    needs in all for that probability, if the true difference is the one observed. This can be off by a factor of
    several either way, since it goes with the square of a difference that is itself uncertain. It is None where the
    study is decided, and where `MOST_SEEDS` would not do, mostly because the test examples alone leave it open.

    `per_task` has the tasks in the order given. Its intervals are each at `level` by itself: see `holm`.
    """

    difference: float
    low: float
    high: float
    p_value: float
    verdict: str
    level: float
    margin: float
    equivalent: bool
    seeds: int
    detectable: float
    seeds_to_decide: int | None
    per_task: tuple[TaskDifference, ...]


def score(metric: str, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Scores in points (...,) of `predictions` (..., N) on `labels` (N,).

    Accuracy is the share of predictions that equal their label. Pearson is the correlation of predictions and labels,
    and 0 where all predictions are the same: they say nothing of the labels.
    """
    _check_metric(metric)
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if metric == "accuracy":
        return POINTS * (predictions == labels).mean(-1)
    x, y = _centred(predictions), _centred(labels)
    xx, yy = (x * x).sum(-1), (y * y).sum(-1)
    return POINTS * _correlation((x * y).sum(-1), xx, yy, xx, yy)


def compare(tasks: Sequence[Paired], level: float = LEVEL, margin: float = MARGIN) -> Comparison:
    """Is `first` better than `second`, as a mean over these tasks? The module says how the interval comes about.

    Raises:
        InputError: where there is no task, two have one name, the numbers of seeds differ, tasks of one group differ
            in their number of examples, `level` is not in (0, 1) or `margin` is not positive.
    """
    if not margin > 0:
        raise InputError(f"margin must be a positive number of points, got {margin}.")
    _check_study(tasks, level)
    tables = [
        _table(task.metric, task.first, task.labels) - _table(task.metric, task.second, task.labels) for task in tasks
    ]
    mean = _Mean.over(tables, [task.group for task in tasks])
    half = mean.half_width(level)
    low, high = mean.value - half, mean.value + half
    verdict = "holds" if low > 0 else "fails" if high < 0 else "undecided"
    return Comparison(
        difference=mean.value,
        low=low,
        high=high,
        p_value=mean.p_value(),
        verdict=verdict,
        level=level,
        margin=margin,
        equivalent=-margin < low and high < margin,
        seeds=mean.seeds,
        detectable=mean.detectable(level, mean.seeds),
        seeds_to_decide=mean.seeds_to_decide(level) if verdict == "undecided" else None,
        per_task=tuple(
            TaskDifference(task.task, *_Mean.over([table], [task.group]).interval(level))
            for task, table in zip(tasks, tables, strict=True)
        ),
    )


def mean_interval(tasks: Sequence[Runs], level: float = LEVEL) -> MeanScore:
    """One arm's mean score over these tasks, with its interval by the same model.

    Two arms' intervals say little of their difference, whose errors are mostly shared: use `compare`.

    Raises:
        InputError: as `compare`.
    """
    _check_study(tasks, level)
    tables = [_table(task.metric, task.predictions, task.labels) for task in tasks]
    return MeanScore(*_Mean.over(tables, [task.group for task in tasks]).interval(level))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given: reject those below alpha, and one false rejection among
    all has a probability of at most alpha (Holm 1979, Scandinavian Journal of Statistics 6, 65-70).

    Raises:
        InputError: for a value outside [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise InputError(f"p-values must be in [0, 1], got {list(p_values)}.")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True, eq=False)
class _Mean:
    """A mean over tasks, in points, and the two parts of its variance by group, each (G,) in squared points."""

    value: float
    seeds: int
    seed_part: np.ndarray  # at `seeds` seeds: it goes with 1 / seeds
    example_part: np.ndarray  # as it is at any number of seeds
    examples: np.ndarray  # (G,)

    @classmethod
    def over(cls, tables: Sequence[_Table], groups: Sequence[str]) -> _Mean:
        """The mean over tasks that have these tables."""
        value, seed_part, example_part, examples = 0.0, [], [], []
        for group in dict.fromkeys(groups):
            members = [table for table, of in zip(tables, groups, strict=True) if of == group]
            scores = sum(table.scores for table in members) / len(tables)  # (S,)
            y = sum(table.y for table in members) / len(tables)  # (S, N)
            n_seeds, n_examples = y.shape
            by_example = y.mean(0) - y.mean()  # (N,)
            residual = y - y.mean(1, keepdims=True) - by_example
            # Mean squares over S N.
            ms_example = (by_example**2).sum() / (n_examples - 1) / n_examples
            ms_residual = (residual**2).sum() / (n_seeds - 1) / (n_examples - 1) / n_seeds / n_examples
            value += float(scores.mean())
            seed_part.append(scores.var(ddof=1) / n_seeds)
            example_part.append(max(0.0, ms_example - ms_residual))
            examples.append(n_examples)
        return cls(value, n_seeds, np.array(seed_part), np.array(example_part), np.array(examples))

    def error(self, seeds: int) -> tuple[float, float]:
        """Standard error with that many seeds, and its degrees of freedom."""
        seed_part = self.seed_part * self.seeds / seeds
        variance = float(seed_part.sum() + self.example_part.sum())
        if variance == 0:
            return 0.0, seeds - 1.0
        scatter = float((seed_part**2).sum() / (seeds - 1) + (self.example_part**2 / (self.examples - 1)).sum())
        return math.sqrt(variance), variance**2 / scatter

    def half_width(self, level: float) -> float:
        error, freedom = self.error(self.seeds)
        return error * student_quantile(level, freedom)

    def interval(self, level: float) -> tuple[float, float, float]:
        half = self.half_width(level)
        return self.value, self.value - half, self.value + half

    def p_value(self) -> float:
        error, freedom = self.error(self.seeds)
        if error == 0:
            return float(self.value == 0)
        return student_tail(abs(self.value) / error, freedom)

    def detectable(self, level: float, seeds: int) -> float:
        """The true difference whose estimate leaves zero out of its interval with a probability of `POWER`."""
        error, freedom = self.error(seeds)
        return error * (student_quantile(level, freedom) + student_quantile(2 * POWER - 1, freedom))

    def seeds_to_decide(self, level: float) -> int | None:
        def decide(seeds: int) -> bool:
            return self.detectable(level, seeds) <= abs(self.value)

        if self.value == 0 or not decide(MOST_SEEDS):
            return None
        too_few, enough = self.seeds, MOST_SEEDS
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            too_few, enough = (too_few, middle) if decide(middle) else (middle, enough)
        return enough


class _Table(NamedTuple):
    """An arm's or a difference's scores (S,) and jackknife pseudo-values (S, N), in points."""

    scores: np.ndarray
    y: np.ndarray

    def __sub__(self, other: _Table) -> _Table:
        return _Table(self.scores - other.scores, self.y - other.y)


def _table(metric: str, predictions: np.ndarray, labels: np.ndarray) -> _Table:
    scores = score(metric, predictions, labels)
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if metric == "accuracy":  # a mean's pseudo-values are what it is the mean of
        return _Table(scores, POINTS * (predictions == labels))
    n = len(labels)
    x, y = _centred(predictions), _centred(labels)
    xx, yy = (x * x).sum(-1, keepdims=True), (y * y).sum(-1, keepdims=True)
    # The centred moments without example j: its own product goes, and so does the move of both means.
    without = n / (n - 1)
    left_out = _correlation(
        (x * y).sum(-1, keepdims=True) - without * x * y, xx - without * x * x, yy - without * y * y, xx, yy
    )
    return _Table(scores, n * scores[:, None] - (n - 1) * POINTS * left_out)


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean(-1, keepdims=True, dtype=np.float64)


def _correlation(
    xy: np.ndarray, xx: np.ndarray, yy: np.ndarray, whole_xx: np.ndarray, whole_yy: np.ndarray
) -> np.ndarray:
    """Pearson's r of centred moments; 0 where xx or yy is no more than the rounding of the whole it is left from."""
    constant = (xx <= 1e-12 * whole_xx) | (yy <= 1e-12 * whole_yy)
    return np.where(constant, 0.0, xy / np.sqrt(np.where(constant, 1.0, xx * yy)))


def student_tail(t: float, freedom: float) -> float:
    """P(|T| > t) of Student's distribution, for t >= 0 and any positive number of degrees of freedom."""
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t), t * t / (freedom + t * t))


def student_quantile(level: float, freedom: float) -> float:
    """The t with P(|T| <= t) = level, for level in (0, 1)."""
    # P(|T| <= t) is concave in t, and the normal's quantile lies below t's: Newton's steps approach it from below.
    t = NormalDist().inv_cdf((1 + level) / 2)
    log_scale = (
        math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2 + math.log(2)
    )
    for _ in range(200):
        density = math.exp(log_scale - (freedom + 1) / 2 * math.log1p(t * t / freedom))
        step = (student_tail(t, freedom) - (1 - level)) / density
        t += step
        if step <= 1e-12 * t:
            break
    return t


def _incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularised incomplete beta function at x = 1 - rest, by its continued fraction (DLMF 8.17.22)."""
    if x == 0 or rest == 0:
        return float(x != 0)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast below, and 8.17.4 mirrors the rest
        return 1 - _incomplete_beta(b, a, rest, x)
    log_front = a * math.log(x) + b * math.log(rest) - math.log(a)
    log_front += math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    # Lentz's method: the value as a product of ratios of successive numerators and of denominators.
    fraction = numerators = 1.0
    denominators = 0.0
    for n in range(1, 10_000):
        m = n // 2
        if n % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        denominators = 1 / (1 + term * denominators)
        numerators = 1 + term / numerators
        fraction *= numerators * denominators
        if abs(numerators * denominators - 1) < 1e-15:
            break
    return math.exp(log_front) / fraction


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise InputError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}.")


def _check(task: str, metric: str, labels: np.ndarray, predictions: np.ndarray) -> None:
    _check_metric(metric)
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.ndim != 1 or predictions.ndim != 2 or predictions.shape[1] != len(labels):
        raise InputError(
            f"{task}: predictions must be (seeds, examples) and labels (examples,), got shapes {predictions.shape} and "
            f"{labels.shape}; give one prediction for each seed and label."
        )
    if len(predictions) < 2 or len(labels) < 3:
        raise InputError(
            f"{task}: {len(predictions)} seeds and {len(labels)} test examples have no error to estimate; "
            "give at least 2 seeds and 3 examples."
        )
    if not (np.isfinite(labels).all() and np.isfinite(predictions).all()):
        raise InputError(
            f"{task}: a prediction or label is NaN or infinite, and has no score; "
            "decide what a run that diverged answers, or leave out its seed."
        )
    if metric == "pearson" and np.ptp(labels) == 0:
        raise InputError(f"{task}: all labels are {labels[0]}, and no correlation is defined; use another metric.")


def _check_study(tasks: Sequence[Runs | Paired], level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level must be in (0, 1), got {level}.")
    if not tasks:
        raise InputError("There is no task to take a mean over; give at least one.")
    names = [task.task for task in tasks]
    if len(set(names)) < len(names):
        raise InputError(f"Each task must be given once, got {', '.join(names)}.")
    shapes = [(task.predictions if isinstance(task, Runs) else task.first).shape for task in tasks]
    if len({seeds for seeds, _ in shapes}) > 1:
        given = ", ".join(f"{name} {seeds}" for name, (seeds, _) in zip(names, shapes, strict=True))
        raise InputError(f"All tasks must have the same number of seeds, got {given}; leave out what the others lack.")
    examples: dict[str, int] = {}
    for task, (_, n) in zip(tasks, shapes, strict=True):
        if examples.setdefault(task.group, n) != n:
            raise InputError(
                f"Tasks of group {task.group!r} must share their test examples, got {examples[task.group]} and {n}; "
                "give tasks with other examples a group of their own."
            )
