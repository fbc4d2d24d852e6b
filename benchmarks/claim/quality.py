"""The one place where the study of quality enters the claim.

The study fine-tunes methods for real, at LoRA's peak memory and at LoRA's number of parameters, by the protocol in
docs/quality-protocol.md; its committed summary is `benchmarks/reference/quality/summary.json`, as
`benchmarks/quality/summary.py` writes it. Read of it are `primary` and `secondary`: comparisons of two arms (`first`,
`second`), each with a `verdict` (holds where the first is better) and, once all its runs are done, the `difference` in
points with its interval, `low` to `high`; otherwise a `reason`. `explored` are comparisons outside of the protocol,
without a verdict. And `arms`: what each scored on which task, in how much memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median_low

from benchmarks.claim.cases import PUBLISHED
from benchmarks.claim.verdict import UNDECIDED, VERDICTS
from benchmarks.harness.errors import InputError
from reports.reading import parse, read_text, shown

SUMMARY = Path(__file__).parent.parent / "reference" / "quality" / "summary.json"
NOT_STUDIED = "which method fine-tunes better at equal memory is not studied yet"
UNITS = "points"


@dataclass(frozen=True)
class Quality:
    """What is known of quality; `studied` False is the absence of a study, and never a pass.

    `verdict` is on SparseGrad as published against LoRA at as many parameters, `peak_ratio` the published method's peak
    of a step there divided by LoRA's. `sentence` says that and the study's primary endpoint, without a full stop.
    `cases` are the protocol's comparisons, flat, `explored` those outside of it. `arms` are what took part, and `facts`
    say how it was run.
    """

    verdict: str
    sentence: str
    studied: bool
    peak_ratio: float | None = None
    cases: tuple[dict[str, object], ...] = ()
    explored: tuple[dict[str, object], ...] = ()
    arms: tuple[dict[str, object], ...] = ()
    facts: dict[str, object] = field(default_factory=dict)


def scores(arms: Iterable[Mapping[str, object]]) -> Iterator[dict[str, object]]:
    """Every final run's score as a flat row."""
    for arm in arms:
        for of in arm["tasks"]:
            for seed, score in of["scores"].items():
                yield {
                    "arm": arm["arm"],
                    "label": arm["label"],
                    "peak_step_bytes": arm["peak_step_bytes"],
                    "task": of["task"],
                    "metric": of["metric"],
                    "lr": of["lr"],
                    "seed": seed,
                    "score": score,
                }


def read(path: Path) -> dict[str, object] | None:
    """The study's summary; None where there is none. Raises `InputError` where it cannot be read."""
    if not path.exists():
        return None
    try:
        summary = parse(read_text(path))
    except (OSError, ValueError) as error:
        raise InputError(f"the summary of the quality study, {path}, cannot be read: {error}") from error
    if not isinstance(summary, dict):
        raise InputError(f"the summary of the quality study, {path}, holds no object: give what `quality --out` writes")
    return summary


def judge(quality: Mapping[str, object] | None) -> Quality:
    """The study's verdicts; undecided where there is no study. Raises `InputError` for what is no study's summary."""
    if quality is None:
        return Quality(UNDECIDED, NOT_STUDIED, studied=False)
    try:
        primary = quality["primary"]
        arms = tuple(_arm(each) for each in quality["arms"])
        peaks = {arm["arm"]: arm["peak_step_bytes"] for arm in arms}
        compared = ([] if primary is None else [primary]) + list(quality["secondary"])
        cases = tuple(_case(each, peaks, VERDICTS) for each in compared)
        explored = tuple(_case(each, peaks, (None,)) for each in quality.get("explored", ()))
        if len({tuple(of["task"] for of in arm["tasks"]) for arm in arms}) > 1:
            raise ValueError("the arms have different tasks")
        facts = _facts(quality)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the quality study's summary lacks what the claim reads of it: {error!r}") from error
    published = next((case for case in cases if (case["first"], case["second"]) == (PUBLISHED, "lora")), None)
    said = [_words(case) for case in ([] if primary is None else [cases[0]]) + ([published] if published else [])]
    if published is None:
        said.append("SparseGrad as published was not compared with LoRA")
    return Quality(
        published["verdict"] if published else UNDECIDED,
        "; ".join(said),
        studied=True,
        peak_ratio=published["peak_ratio"] if published else None,
        cases=cases,
        explored=explored,
        arms=arms,
        facts=facts,
    )


def _case(
    comparison: Mapping[str, object], peaks: Mapping[str, int], verdicts: Sequence[str | None]
) -> dict[str, object]:
    if comparison["verdict"] not in verdicts:
        raise InputError(f"a verdict is one of {', '.join(map(str, verdicts))}, got {shown(comparison['verdict'])}")
    if comparison.get("difference") is not None and None in (comparison.get("low"), comparison.get("high")):
        raise ValueError("a difference has an interval")
    per_task = [
        {"task": str(row["task"]), **{name: float(_number(row[name])) for name in ("difference", "low", "high")}}
        for row in comparison.get("per_task", ())
    ]
    return {
        "first": comparison["first"],
        "second": comparison["second"],
        "case": f"{comparison['first']} minus {comparison['second']}",
        "verdict": comparison["verdict"],
        # What the first needs for what it scores: a difference in points is one at this price.
        "peak_ratio": peaks[comparison["first"]] / peaks[comparison["second"]],
        "figure": _number(comparison.get("difference")),
        "low": _number(comparison.get("low")),
        "high": _number(comparison.get("high")),
        "unit": UNITS,
        "p_holm": _number(comparison.get("p_holm")),
        "detectable": _number(comparison.get("detectable")),
        "seeds_to_decide": _number(comparison.get("seeds_to_decide")),
        "equivalent": comparison.get("equivalent"),
        "per_task": per_task,
        "without": _without(per_task),
        "reason": comparison.get("reason"),
    }


def _without(per_task: Sequence[Mapping[str, object]]) -> dict[str, object] | None:
    """The mean difference without the task that moves it most, and which that is; None where there is one task."""
    if len(per_task) < 2:
        return None
    mean = fmean(row["difference"] for row in per_task)
    most = max(per_task, key=lambda row: abs(row["difference"] - mean))
    others = fmean(row["difference"] for row in per_task if row is not most)
    return {"task": most["task"], "figure": others}


def _arm(arm: Mapping[str, object]) -> dict[str, object]:
    mean = dict.fromkeys(("mean", "low", "high"))
    if arm["mean"] is not None:
        mean = {
            "mean" if name == "score" else name: float(_number(arm["mean"][name])) for name in ("score", "low", "high")
        }
    return {
        "arm": str(arm["arm"]),
        "method": str(arm["method"]),
        "label": str(arm["label"]),
        "matched": str(arm["matched"]),
        "trainable_params": _number(arm["trainable_params"]),
        "peak_step_bytes": _positive(arm["peak_step_bytes"]),
        **mean,
        "tasks": [_on_task(of) for of in arm["tasks"]],
    }


def _on_task(of: Mapping[str, object]) -> dict[str, object]:
    reached = [None if step is None else int(step) for step in of["steps_to_target"]]
    if (of["score"] is None) != (of["lr"] is None):
        raise ValueError("a score has a learning rate")
    return {
        "task": str(of["task"]),
        "metric": str(of["metric"]),
        "score": _number(of["score"]),
        "scores": {int(seed): _number(score) for seed, score in of["scores"].items()},
        "lr": _number(of["lr"]),
        "lr_at_edge": bool(of["lr_at_edge"]),
        "losses": [_number(loss) for loss in of["losses"]],
        "reached": sum(step is not None for step in reached),
        # The median run; one that does not get there is slower than any that does.
        "steps_to_target": _finite(median_low([math.inf if step is None else step for step in reached] or [math.inf])),
    }


def _facts(quality: Mapping[str, object]) -> dict[str, object]:
    study, runs = quality["study"], quality["runs"]
    return {
        "protocol": _whole(quality["protocol"]),
        **{name: str(study[name]) for name in ("model", "train_rest")},
        "train_size": None if study["train_size"] is None else _whole(study["train_size"]),
        **{name: _whole(study[name]) for name in ("epochs", "batch", "longest", "seeds")},
        "runs": _whole(runs["settled"]),
        "planned": _whole(runs["planned"]),
        "failed": len(runs["failed"]),
        "hours": float(_number(runs["hours"])),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{shown(value)} stands where a number must be")
    return value


def _whole(value: object) -> int:
    return int(_number(value))


def _positive(value: object) -> int:
    if _whole(value) < 1:
        raise ValueError(f"{shown(value)} stands where a peak must be")
    return _whole(value)


def _words(case: Mapping[str, object]) -> str:
    if case["figure"] is None:
        return f"{case['case']}: {case['verdict']}, {case['reason']}"
    interval = f"{case['low']:+.2f} to {case['high']:+.2f}"
    price = f"at {case['peak_ratio']:.2f} of {case['second']}'s peak"
    without = case["without"]
    others = f", {without['figure']:+.2f} without {without['task']}" if without else ""
    why = f": {case['reason']}" if case["reason"] else ""
    return f"{case['case']}: {case['verdict']}, {case['figure']:+.2f} {case['unit']} ({interval}) {price}{others}{why}"
