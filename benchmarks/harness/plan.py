"""From method names to specs: budgets by default, as given, or matched to a reference's."""

from __future__ import annotations

from baselines.method import Budget, target_shapes
from baselines.registry import get, parse
from benchmarks.harness import budget
from benchmarks.harness.errors import InputError
from benchmarks.harness.spec import RunSpec


def plan(methods: str, equal_trainable: str | None, **common: object) -> list[RunSpec]:
    """One spec for each of `methods` (as the command line writes them), checked as far as no weights are needed.

    With `equal_trainable` every method that has a budget and was not given one gets the one whose `budget_params` come
    nearest to the reference's. `common` are the other fields of `RunSpec`. Raises `InputError` and `MethodError`.
    """
    chosen = parse(methods)
    workload = RunSpec(method="full", **common).workload()
    skeleton = workload.skeleton()
    shapes = target_shapes(skeleton, workload.layers(skeleton))
    reference = None
    if equal_trainable is not None:
        (reference_name, reference_budget), *more = parse(equal_trainable)
        reference_budget = _or_default(reference_name, reference_budget)
        budget.check(reference_name, reference_budget, shapes)
        reference = budget.budget_params(reference_name, reference_budget, shapes)
        if more or reference is None:
            raise InputError(f"--equal-trainable takes one method that has a budget, got {equal_trainable!r}")
    specs = []
    for name, value in chosen:
        matched = None
        if reference is not None:
            # A method with a budget of its own on the command line keeps it.
            if value is None:
                value = reference_budget if name == reference_name else budget.equal_trainable(name, reference, shapes)
                matched = value is not None
            else:
                matched = (name, value) == (reference_name, reference_budget)
        spec = RunSpec(
            method=name,
            budget=_or_default(name, value),
            matched=matched,
            equal_trainable=equal_trainable,
            **common,
        )
        budget.check(spec.method, spec.budget, shapes)
        specs.append(spec)
    return specs


def _or_default(name: str, value: Budget) -> Budget:
    knob = get(name).knob
    return knob.default if value is None and knob is not None else value
