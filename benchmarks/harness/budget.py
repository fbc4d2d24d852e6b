"""Budgets that make methods comparable: nearest to a reference's `budget_params`, or as large as its memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from baselines.method import Budget, Method, Setting, Shape
from baselines.registry import get
from reports.record import BREAKDOWN, PEAKS, Record

# What budgets can be matched in: the fields of bytes that every prediction fills, and those that CUDA's fill besides.
_METRICS = ("peak_step_bytes", *PEAKS, "peak_eval_bytes", "peak_preparation_bytes", "resident_bytes", *BREAKDOWN)
_CUDA_METRICS = ("peak_requested_bytes", "peak_reserved_bytes")
# Predictions by which a search that interpolates may take longer than bisection does.
SLACK = 8


def metrics(device: str) -> tuple[str, ...]:
    """The fields of a record that `equal_memory` can match in predictions for `device`, cpu or cuda."""
    return (*_METRICS, *_CUDA_METRICS) if device == "cuda" else _METRICS


def budget_params(name: str, budget: Budget, shapes: Sequence[Shape]) -> int | None:
    """What a method's budget stands for on target weights of these shapes; None for a method without one."""
    return _method(name, budget).budget_params(shapes)


def equal_trainable(name: str, reference: int, shapes: Sequence[Shape]) -> int | None:
    """The integer budget whose `budget_params` come nearest to `reference`; None for a method without a budget.

    `budget_params` rise with the budget, so the two neighbours of the crossing are found by bisection; of two that are
    equally near, the smaller.
    """
    cls = get(name)
    if cls.knob is None:
        return None
    low, high = 1, cls.largest_budget(shapes)
    while low < high:
        middle = (low + high) // 2
        if budget_params(name, middle, shapes) < reference:
            low = middle + 1
        else:
            high = middle
    return min((b for b in (low - 1, low) if b >= 1), key=lambda b: abs(budget_params(name, b, shapes) - reference))


def equal_memory(predict: Callable[[int], Record], metric: str, limit: int, most: int) -> Record:
    """The prediction with the largest integer budget, of 1 to `most`, whose `metric` is at most `limit` bytes.

    The search assumes that the metric rises with the budget. The budget returned was seen to satisfy the limit, and the
    next one was seen not to, or is beyond `most`. Where the metric wobbles, as bytes allocated in whole blocks may, it
    crosses the limit more than once: the budget returned is then at one of the crossings, and a larger one may satisfy
    the limit too. Each budget is predicted once: four in all where the metric is linear, and never more than
    `SLACK` beyond what bisection takes.

    Args:
        predict: the record of a budget.
        metric: one of `metrics`.
        limit: bytes.
        most: the largest budget that the target weights can take.

    Returns:
        The record, with `matched` True. Where neither `most` nor 1 satisfies the limit: the record of 1, with `matched`
        False and a `reason` that says so. A prediction whose status is not ok ends the search and is returned as it is.
    """
    record = predict(most)
    if record.status != "ok":
        return record
    high, high_bytes = most, getattr(record, metric)
    if high_bytes <= limit:
        return replace(record, matched=True)
    best = predict(1) if most > 1 else record
    if best.status != "ok":
        return best
    low, low_bytes = 1, getattr(best, metric)
    if low_bytes > limit:
        reason = f"no budget fits: even {best.label} has {low_bytes:,} bytes, more than {limit:,}"
        return replace(best, matched=False, reason=reason)

    tries, same, moved = 1, 0, None  # `same`: tries in a row, less one, that moved the same end
    while high - low > 1:
        if high - low > most >> max(0, tries - SLACK):
            number = (low + high) // 2
        else:
            number = low + (high - low) * (limit - low_bytes) // (high_bytes - low_bytes)
            # Further past that crossing each time: an end that stays where it is would keep the gap wide.
            number += (4**same - 1) * (1 if moved == "low" else -1)
            number = min(max(number, low + 1), high - 1)
        record = predict(number)
        if record.status != "ok":
            return record
        before = moved
        if getattr(record, metric) <= limit:
            best, low, low_bytes, moved = record, number, getattr(record, metric), "low"
        else:
            high, high_bytes, moved = number, getattr(record, metric), "high"
        tries, same = tries + 1, same + 1 if moved == before else 0
    return replace(best, matched=True)


def check(name: str, budget: Budget, shapes: Sequence[Shape]) -> None:
    """Raise `MethodError` for a budget that these target weights cannot take."""
    _method(name, budget).check_budget_fits(shapes)


def _method(name: str, budget: Budget) -> Method:
    return get(name)(budget, Setting(layers={}))
