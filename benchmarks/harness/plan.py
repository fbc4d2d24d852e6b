"""From method names to specs: budgets by default, as given, or matched to a reference's."""

from __future__ import annotations

from collections.abc import Sequence

from baselines.method import Budget, Shape, target_shapes
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
    shapes = _shapes(**common)
    reference = None
    if equal_trainable is not None:
        reference_name, reference_budget = _reference("--equal-trainable", equal_trainable, shapes)
        reference = budget.budget_params(reference_name, reference_budget, shapes)
        if reference is None:
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


def plan_equal_memory(
    methods: str, reference: str, metric: str, **common: object
) -> tuple[RunSpec, list[RunSpec], dict[str, int]]:
    """The reference's spec, one for each of `methods`, and the largest budget of each method whose budget is sought.

    The reference comes first where it is among the methods. A spec with `matched` None is one whose budget is sought.
    Arguments and errors as for `plan`; `metric` is one of `budget.METRICS`.
    """
    known = budget.metrics(common.get("device", RunSpec.device))
    if metric not in known:
        raise InputError(f"--metric must be one of {', '.join(known)}, got {metric!r}")
    chosen = parse(methods)
    shapes = _shapes(**common)
    first = _reference("--reference", reference, shapes)
    common["equal_memory"] = f"{RunSpec(*first).method_label} {metric}"
    specs, largest = [], {}
    for name, value in chosen:
        if value is None and name == first[0]:
            value = first[1]
        sought = value is None and get(name).knob is not None
        if sought:
            largest[name] = get(name).largest_budget(shapes)
        else:
            budget.check(name, value, shapes)
        matched = None if sought else (name, value) == first
        specs.append(RunSpec(method=name, budget=value, matched=matched, **common))
    specs.sort(key=lambda spec: not spec.matched)
    return RunSpec(method=first[0], budget=first[1], matched=True, **common), specs, largest


def _shapes(**common: object) -> Sequence[Shape]:
    workload = RunSpec(method="full", **common).workload()
    skeleton = workload.skeleton()
    return target_shapes(skeleton, workload.layers(skeleton))


def _reference(option: str, text: str, shapes: Sequence[Shape]) -> tuple[str, Budget]:
    """The one method that `text` names, with its budget."""
    (name, value), *more = parse(text)
    if more or text.strip() == "all":
        raise InputError(f"{option} takes one method, got {text!r}")
    value = _or_default(name, value)
    budget.check(name, value, shapes)
    return name, value


def _or_default(name: str, value: Budget) -> Budget:
    knob = get(name).knob
    return knob.default if value is None and knob is not None else value
