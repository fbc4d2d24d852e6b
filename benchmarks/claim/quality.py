"""The one place where the study of quality enters the claim.

The study fine-tunes methods for real, at LoRA's peak memory and at LoRA's number of parameters, by the protocol in
docs/quality-protocol.md; its committed summary is `benchmarks/reference/quality/summary.json`, as
`benchmarks/quality/summary.py` writes it. Read of it are `primary` and `secondary`: comparisons of two arms (`first`,
`second`), each with a `verdict` (holds where the first is better) and, once all its runs are done, the `difference` in
points with its interval, `low` to `high`; otherwise a `reason`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.claim.cases import PUBLISHED
from benchmarks.claim.verdict import UNDECIDED, VERDICTS
from benchmarks.harness.errors import InputError

SUMMARY = Path(__file__).parent.parent / "reference" / "quality" / "summary.json"
NOT_STUDIED = "which method fine-tunes better at equal memory is not studied yet"
UNITS = "points"


@dataclass(frozen=True)
class Quality:
    """What is known of quality; `studied` False is the absence of a study, and never a pass.

    `verdict` is on SparseGrad as published against LoRA, `sentence` says that and the study's primary endpoint, without
    a full stop, and `cases` are all comparisons, flat.
    """

    verdict: str
    sentence: str
    studied: bool
    cases: tuple[dict[str, object], ...] = ()


def read(path: Path = SUMMARY) -> dict[str, object] | None:
    """The study's summary; None where there is none. Raises `InputError` where it cannot be read."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the summary of the quality study, {path}, cannot be read: {error}") from error


def judge(quality: Mapping[str, object] | None) -> Quality:
    """The study's verdicts; undecided where there is no study. Raises `InputError` for what is no study's summary."""
    if quality is None:
        return Quality(UNDECIDED, NOT_STUDIED, studied=False)
    try:
        primary = quality["primary"]
        cases = tuple(_case(each) for each in ([] if primary is None else [primary]) + list(quality["secondary"]))
    except (KeyError, TypeError) as error:
        raise InputError(f"the quality study's summary lacks what the claim reads of it: {error!r}") from error
    published = next((case for case in cases if (case["first"], case["second"]) == (PUBLISHED, "lora")), None)
    said = [_words(case) for case in ([] if primary is None else [cases[0]]) + ([published] if published else [])]
    if published is None:
        said.append("SparseGrad as published was not compared with LoRA")
    return Quality(published["verdict"] if published else UNDECIDED, "; ".join(said), True, cases)


def _case(comparison: Mapping[str, object]) -> dict[str, object]:
    if comparison["verdict"] not in VERDICTS:
        raise InputError(f"a verdict is one of {', '.join(VERDICTS)}, got {comparison['verdict']!r}")
    return {
        "first": comparison["first"],
        "second": comparison["second"],
        "case": f"{comparison['first']} minus {comparison['second']}",
        "verdict": comparison["verdict"],
        "figure": comparison.get("difference"),
        "low": comparison.get("low"),
        "high": comparison.get("high"),
        "unit": UNITS,
        "reason": comparison.get("reason"),
    }


def _words(case: Mapping[str, object]) -> str:
    if case["figure"] is None:
        return f"{case['case']}: {case['verdict']}, {case['reason']}"
    interval = f"{case['low']:+.2f} to {case['high']:+.2f}"
    return f"{case['case']}: {case['verdict']}, {case['figure']:+.2f} {case['unit']} ({interval})"
