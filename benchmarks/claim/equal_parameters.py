"""Reading 1: as many trained parameters. Are the memory figures equal, by each definition of memory?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from benchmarks.claim.cases import FORMS, PUBLISHED, RIVALS, Case
from benchmarks.claim.predictor import Predictor
from benchmarks.claim.verdict import TOLERANCES, judge
from benchmarks.harness.plan import plan
from reports.record import Record

# The fields of a record that could be meant by "memory requirements".
DEFINITIONS = (
    "resident_bytes",
    "peak_forward_bytes",
    "peak_backward_bytes",
    "peak_optimizer_bytes",
    "peak_step_bytes",
    "peak_eval_bytes",
    "peak_preparation_bytes",
    "peak_reserved_bytes",
)
# Whether training fits is decided by this one.
DECIDING = "peak_step_bytes"
MATCHED, AS_PRINTED = "equal", "the paper's"


@dataclass(frozen=True)
class Found:
    """The record of a method on a case, and whose budget it has: `equal`, `the paper's`, or None."""

    case: Case
    budgets: str | None
    record: Record

    def row(self, reference: Record) -> dict[str, object]:
        """The record's memory by every definition, and its ratio to that of LoRA."""
        record = self.record
        return {
            "case": self.case.name,
            "semantics": record.device_semantics,
            "method": record.method,
            "label": record.label,
            "ours": record.method in FORMS,
            "budgets": self.budgets,
            "budget_params": record.budget_params,
            "trainable_params": record.trainable_params,
            "status": record.status,
            "reason": record.reason,
            "bytes": {name: getattr(record, name) for name in DEFINITIONS},
            "to_lora": {name: ratio(record, reference, name) for name in DEFINITIONS},
        }


def find(case: Case, methods: Sequence[str], predictor: Predictor, device: str = "cuda") -> list[Found]:
    """Every method at LoRA's number of parameters, then SparseGrad and MeProp at the budgets that the paper gives."""
    common = case.common(device)
    names = [case.reference if name == "lora" else name for name in methods]
    found = []
    for spec in plan(",".join(names), case.reference, **common):
        found.append(Found(case, MATCHED if spec.matched else None, predictor(spec)))
    if device == "cuda":
        for spec in plan(f"{PUBLISHED}[{case.kept}]", None, **common):
            found.append(Found(case, AS_PRINTED, predictor(spec)))
    return found


def reference(found: Sequence[Found], name: str = "lora") -> Record:
    """The record of a rival on the case, at equal parameters."""
    return next(each.record for each in found if each.record.method == name and each.budgets == MATCHED)


def verdicts(found: Sequence[Found]) -> Iterator[dict[str, object]]:
    """SparseGrad's verdicts against LoRA, and the published method's against MeProp, by definition and tolerance."""
    for each in found:
        if each.record.method not in (PUBLISHED, *FORMS) or each.budgets is None:
            continue
        for name in RIVALS if each.record.method == PUBLISHED and each.budgets == MATCHED else RIVALS[:1]:
            rival = reference(found, name)
            for definition in DEFINITIONS:
                if each.record.device_semantics == "cpu" and definition == "peak_reserved_bytes":
                    continue
                figure = ratio(each.record, rival, definition)
                for tolerance in TOLERANCES:
                    judgement = judge(figure, tolerance, reason=_why_not(each.record, rival))
                    yield verdict_row(
                        1,
                        each.case.name,
                        each.record,
                        against=rival.label,
                        definition=definition,
                        judgement=asdict(judgement),
                        budgets=each.budgets,
                        evidence=f"{getattr(each.record, definition)} / {getattr(rival, definition)} bytes",
                    )


def verdict_row(
    reading: int,
    case: str,
    record: Record,
    *,
    against: str,
    definition: str,
    judgement: dict[str, object],
    evidence: str,
    budgets: str | None = None,
) -> dict[str, object]:
    """One verdict of any reading, flat."""
    tolerance = judgement["tolerance"]
    return {
        "reading": reading,
        "case": case,
        "semantics": record.device_semantics,
        "method": record.method,
        "label": record.label,
        "budgets": budgets,
        "against": against,
        "definition": definition,
        "tolerance": tolerance,
        "figure": judgement["figure"],
        "low": None if tolerance is None else 1 - tolerance,
        "high": None if tolerance is None else 1 + tolerance,
        "verdict": judgement["verdict"],
        "direction": judgement["direction"],
        "reason": judgement["reason"],
        "evidence": evidence,
    }


def ratio(record: Record, rival: Record, definition: str) -> float | None:
    """How many times the rival's bytes; None where either was not obtained."""
    value, base = getattr(record, definition), getattr(rival, definition)
    return None if value is None or not base else value / base


def _why_not(*records: Record) -> str | None:
    """Why a figure is missing."""
    failed = [f"{each.label}: {each.status}, {each.reason}" for each in records if each.status != "ok"]
    return f"not obtained ({'; '.join(failed)})" if failed else None
