"""Does the answer hang on the conditions? Peaks to LoRA's over batch, sequence, dtype and how it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from benchmarks.claim.cases import ROBERTA_BASE, Case
from benchmarks.claim.equal_parameters import DECIDING, ratio
from benchmarks.claim.predictor import Predictor
from benchmarks.harness.plan import plan

CASE = ROBERTA_BASE
GRID = {"batch": (8, 32, 128), "seq": (32, 128, 512), "dtype": ("float32", "bfloat16")}
# One thing changed at a time, from the case as it is.
VARIATIONS = (
    {"optimizer_impl": "for-loop"},
    {"optimizer_impl": "fused"},
    {"train_rest": "none"},
    {"attention": "eager"},
    {"checkpointing": True},
)


def conditions(
    grid: Mapping[str, Sequence[object]] = GRID, variations: Sequence[Mapping[str, object]] = VARIATIONS
) -> list[tuple[str, Mapping[str, object]]]:
    """Each a kind, `grid` or `variation`, and the fields of the case that it changes."""
    gridded = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return [("grid", changed) for changed in gridded] + [("variation", changed) for changed in variations]


def find(
    methods: Sequence[str], predictor: Predictor, condition: tuple[str, Mapping[str, object]], case: Case = CASE
) -> list[dict[str, object]]:
    """A row for each method of SparseGrad's under the condition, with its peak to LoRA's at as many parameters."""
    kind, changed = condition
    return list(_rows(case, kind, changed, methods, predictor))


def turns(rows: Sequence[Mapping[str, object]]) -> Iterator[dict[str, object]]:
    """For each method, on how many conditions it needs less than LoRA, and on which the least and the most."""
    for method in dict.fromkeys(row["method"] for row in rows):
        known = [row for row in rows if row["method"] == method and row["to_lora"] is not None]
        if not known:
            continue
        least, most = (pick(known, key=lambda row: row["to_lora"]) for pick in (min, max))
        yield {
            "method": method,
            "conditions": len(known),
            "below": sum(row["to_lora"] < 1 for row in known),
            "least": least["to_lora"],
            "least_at": words(least),
            "most": most["to_lora"],
            "most_at": words(most),
        }


def words(row: Mapping[str, object]) -> str:
    """A row's conditions in words."""
    shape = f"{row['batch']} x {row['seq']}, {row['dtype']}"
    return shape if row["changed"] is None else f"{shape}, {row['changed']}"


def _rows(
    case: Case, kind: str, changed: Mapping[str, object], methods: Sequence[str], predictor: Predictor
) -> Iterator[dict[str, object]]:
    common = {**case.common(), **changed}
    specs = plan(",".join([case.reference, *methods]), case.reference, **common)
    lora, *others = [predictor(spec) for spec in specs]
    for record in others:
        yield {
            "case": case.name,
            "kind": kind,
            "batch": common["batch"],
            "seq": common["seq"],
            "dtype": common["dtype"],
            "changed": None if kind == "grid" else ", ".join(f"{name} {value}" for name, value in changed.items()),
            "method": record.method,
            "label": record.label,
            "peak_step_bytes": getattr(record, DECIDING),
            "lora_peak_step_bytes": getattr(lora, DECIDING),
            "to_lora": ratio(record, lora, DECIDING),
            "reason": record.reason or lora.reason,
        }
