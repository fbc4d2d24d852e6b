"""Budgets that make methods comparable: the one whose `budget_params` are nearest to a reference's."""

from __future__ import annotations

from collections.abc import Sequence

from baselines.method import Budget, Method, Setting, Shape
from baselines.registry import get


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


def check(name: str, budget: Budget, shapes: Sequence[Shape]) -> None:
    """Raise `MethodError` for a budget that these target weights cannot take."""
    _method(name, budget).check_budget_fits(shapes)


def _method(name: str, budget: Budget) -> Method:
    return get(name)(budget, Setting(layers={}))
