"""Reading 2: the same peak of a step. How many parameters does LoRA's memory buy each method, and LoRA SparseGrad's?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.claim.cases import FORMS, PUBLISHED, Case
from benchmarks.claim.equal_parameters import DECIDING, verdict_row
from benchmarks.claim.predictor import Predictor
from benchmarks.claim.quality import Quality
from benchmarks.claim.verdict import DECIDING_TOLERANCE, FAILS, HOLDS, UNDECIDED, judge
from benchmarks.harness.budget import equal_memory
from benchmarks.harness.plan import plan_equal_memory
from benchmarks.harness.spec import RunSpec
from reports.record import Record

# A budget is sought in so many steps: finer ones tell apart what whole blocks of the allocator blur.
STEPS = 1000


def find(
    case: Case, methods: Sequence[str], published: Record, predictor: Predictor, reverse: bool = True
) -> list[Record]:
    """LoRA, each of `methods` at LoRA's peak, then, with `reverse`, LoRA at that of `published`, SparseGrad's record.

    Where no budget fits the record is that of budget 1, with `matched` False and a `reason`.
    """
    named = ",".join([case.reference, *methods])
    reference, specs, largest = plan_equal_memory(named, case.reference, DECIDING, **case.common())
    expected = predictor(reference)
    records = [expected]
    if expected.status != "ok":
        return records
    for spec in specs[1:]:
        records.append(_largest(spec, largest[spec.method], getattr(expected, DECIDING), predictor))
    limit = getattr(published, DECIDING)
    if reverse and limit is not None:
        _, (spec,), largest = plan_equal_memory("lora", published.label, DECIDING, **case.common())
        records.append(_largest(spec, largest["lora"], limit, predictor))
    return records


def rows(case: Case, records: Sequence[Record], published: Record) -> list[dict[str, object]]:
    """The budgets, flat, with how many times the reference's parameters each is."""
    lora = records[0]
    found = []
    for record in records:
        reverse = record.method == "lora" and record is not lora
        reference = published if reverse else lora
        matched = record.status == "ok" and record.matched is not False
        found.append(
            {
                "case": case.name,
                "method": record.method,
                "label": record.label,
                "ours": record.method in FORMS,
                "at_peak_of": reference.label,
                "limit_bytes": getattr(reference, DECIDING),
                "peak_step_bytes": record.peak_step_bytes,
                "fits": matched,
                "budget": record.budget if matched else None,
                "budget_params": record.budget_params if matched else None,
                "to_reference": _times(record, reference) if matched else None,
                "status": record.status,
                "reason": record.reason,
            }
        )
    return found


def verdict(case: Case, records: Sequence[Record], quality: Quality) -> dict[str, object]:
    """The published method's: it fails where none of its budgets has LoRA's peak, within the tolerance that decides.

    Otherwise memory can be equal, and the study of quality decides, if it compared the two in equal memory.
    """
    lora = records[0]
    record = next((each for each in records if each.method == PUBLISHED), None)
    judgement = {"figure": None, "tolerance": None, "direction": None, "verdict": UNDECIDED, "reason": None}
    evidence = "not obtained"
    if record is None or record.status != "ok":
        judgement["reason"] = "not obtained" if record is None else f"{record.label}: {record.status}, {record.reason}"
        record = record or lora
    else:
        figure = getattr(record, DECIDING) / getattr(lora, DECIDING)
        least = "" if record.matched else " with a budget of 1"
        evidence = f"{getattr(record, DECIDING)} / {getattr(lora, DECIDING)} bytes{least}"
        judgement |= {"figure": figure, "tolerance": DECIDING_TOLERANCE}
        if record.matched is False and judge(figure, DECIDING_TOLERANCE).direction == "above":
            judgement |= {"verdict": FAILS, "direction": "above", "reason": record.reason}
        elif quality.studied and judge(quality.peak_ratio, DECIDING_TOLERANCE).verdict != HOLDS:
            judgement["reason"] = f"its quality was not studied at {lora.method}'s peak: {quality.sentence}"
        else:
            judgement |= {"verdict": quality.verdict, "reason": quality.sentence}
    return verdict_row(
        2, case.name, record, against=lora.label, definition=DECIDING, judgement=judgement, evidence=evidence
    )


def _largest(spec: RunSpec, most: int, limit: int, predictor: Predictor) -> Record:
    """The record of the largest budget, in steps of a thousandth of `most`; the smallest that is tried is 1."""
    step = max(1, most // STEPS)
    return equal_memory(
        lambda number: predictor(replace(spec, budget=1 if number == 1 else number * step)),
        DECIDING,
        limit,
        most // step,
    )


def _times(record: Record, reference: Record) -> float | None:
    return record.budget_params / reference.budget_params if reference.budget_params else None
