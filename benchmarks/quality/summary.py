"""What a study's runs say: each arm's score, and the comparisons that docs/quality-protocol.md names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean

import numpy as np

from benchmarks.harness.errors import InputError
from benchmarks.quality.ledger import Ledger
from benchmarks.quality.statistics import LEVEL, Paired, Runs, compare, holm, mean_interval
from benchmarks.quality.study import NONE, PRIMARY, arm_of, mean_scores, trials
from benchmarks.quality.tasks import PROTOCOL, Task, load_task
from benchmarks.quality.training import FINAL, TUNING, Outcome

SUMMARY_SCHEMA = 1
CANDIDATE, BASELINE = PRIMARY[1].name, PRIMARY[0].name
# Every other arm is compared with LoRA; the forms of SparseGrad with these besides.
FORMS_AT_PEAK = ("sparsegrad-core@peak", "sparsegrad-directions@peak")
FORMS = (*FORMS_AT_PEAK, "sparsegrad-core", "sparsegrad-directions")
FURTHER = (*((form, "random-mask") for form in FORMS), *((form, "full") for form in FORMS_AT_PEAK))
# Not in the protocol's list, and so neither corrected nor given a verdict: the published method against the other rival
# that the paper's sentence names, and against what it would have to beat to be of use.
EXPLORED = (("sparsegrad", "meprop-weight"), ("sparsegrad", "random-mask"), ("sparsegrad", "full"))
# A final run has learned a task when it reaches this share of what full fine-tuning reaches in the end.
TARGET_SHARE = 0.95

Finals = Mapping[tuple[str, str], Mapping[int, Outcome]]  # (arm, task) -> seed -> final run


def summarise(ledger: Ledger) -> dict[str, object]:
    """The whole study as JSON can carry it; what is not known yet is None, with a reason where a verdict would be."""
    study, arms = ledger.heading.study, ledger.heading.arms
    tasks = {name: load_task(name, study.hub) for name in study.tasks}
    planned = list(
        trials(
            study,
            {name: record.budget for name, record in arms.items()},
            {name: len(task.data.train) for name, task in tasks.items()},
            ledger.outcomes,
        )
    )
    known = set(planned)
    finals: dict[tuple[str, str], dict[int, Outcome]] = {}
    for outcome in ledger.outcomes:
        # Neither a final run at a rate that was the best until a tuning run was tried again, nor one to be tried again.
        if outcome.trial.purpose == FINAL and outcome.trial in known and ledger.settled(outcome.trial):
            finals.setdefault((outcome.trial.arm, outcome.trial.task), {})[outcome.trial.seed] = outcome
    primary = None
    if {CANDIDATE, BASELINE} <= set(arms):
        primary = _comparison(CANDIDATE, BASELINE, tasks, finals, study.seeds)
    secondary = [
        _comparison(first, second, tasks, finals, study.seeds)
        for first, second in (*((arm, BASELINE) for arm in arms if arm not in (BASELINE, CANDIDATE)), *FURTHER)
        if {first, second} <= set(arms)
    ]
    _adjust(secondary)
    explored = [
        _comparison(first, second, tasks, finals, study.seeds) | {"verdict": None}
        for first, second in EXPLORED
        if {first, second} <= set(arms)
    ]
    return {
        "schema_version": SUMMARY_SCHEMA,
        "protocol": PROTOCOL,
        "study": study.to_dict(),
        "runs": {
            "planned": len(planned),
            "settled": sum(trial is not None and ledger.settled(trial) for trial in planned),
            "failed": [
                {"run": o.trial.label, "status": o.status, "reason": o.reason}
                for o in ledger.outcomes
                if o.status != "ok"
            ],
            "hours": sum(o.time_s or 0.0 for o in ledger.outcomes) / 3600,
            "commits": dict(Counter(o.environment.get("commit") for o in ledger.outcomes if o.environment)),
        },
        "arms": [_arm(name, arms[name], ledger, tasks, finals) for name in arms],
        "primary": primary,
        "secondary": secondary,
        "explored": explored,
    }


def _comparison(first: str, second: str, tasks: Mapping[str, Task], finals: Finals, seeds: int) -> dict[str, object]:
    """The difference of two arms with its verdict; `undecided`, with the reason, until all their runs are done."""
    result: dict[str, object] = {"first": first, "second": second, "verdict": "undecided"}
    runs = {(arm, task): finals.get((arm, task), {}) for arm in (first, second) for task in tasks}
    missing = sum(seed not in of for of in runs.values() for seed in range(seeds))
    if missing:
        return result | {"reason": f"{missing} of {len(runs) * seeds} runs are not done"}
    # Where nothing more will come, Holm's correction counts a comparison that cannot be made as one that shows nothing.
    result["p_value"] = 1.0
    failed = [o for of in runs.values() for o in of.values() if o.status != "ok"]
    common = [seed for seed in range(seeds) if all(of[seed].status == "ok" for of in runs.values())]
    if len(common) < 2:
        left = f"{len(common)} of {seeds} seeds that all runs have, and a comparison needs 2"
        return result | {"reason": f"{len(failed)} runs failed, which leaves {left}"}
    found = asdict(compare([_paired(tasks[name], runs, first, second, common) for name in tasks]))
    result |= found | {"reason": None, "failed": len(failed)}
    result["per_task"] = [
        dict(zip(("task", "difference", "low", "high"), row, strict=True)) for row in found["per_task"]
    ]
    return _not_won_by_failing(result, failed)


def _not_won_by_failing(result: dict[str, object], failed: Sequence[Outcome]) -> dict[str, object]:
    """Leaving out the seeds of failed runs favours the arm that failed, so that one cannot win."""
    winner = {"holds": result["first"], "fails": result["second"]}.get(result["verdict"])
    lost = [o for o in failed if o.trial.arm == winner]
    if lost:
        reason = f"{winner} scores higher where it ran, but {len(lost)} of its runs failed ({lost[0].status})"
        return result | {"verdict": "undecided", "reason": reason}
    return result


def _paired(task: Task, runs: Finals, first: str, second: str, seeds: Sequence[int]) -> Paired:
    return Paired(
        task=task.name,
        metric=task.metric,
        labels=_labels(task),
        first=_predictions(runs[first, task.name], seeds),
        second=_predictions(runs[second, task.name], seeds),
        group=task.group,
    )


def _labels(task: Task) -> np.ndarray:
    return np.array([example.label for example in task.data.test])


def _predictions(of: Mapping[int, Outcome], seeds: Sequence[int]) -> np.ndarray:
    return np.array(_alike("predictions", [of[seed].predictions for seed in seeds]), dtype=float)


def _alike(what: str, series: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """The same, where all are equally long. Raises `InputError` where they cannot be of one arm and task."""
    lengths = sorted({len(values) for values in series})
    if len(lengths) > 1:
        raise InputError(
            f"the runs of one arm on one task have {lengths[0]} {what} and {lengths[-1]}: choose another --out"
        )
    return series


def _adjust(comparisons: Sequence[dict[str, object]]) -> None:
    """Holm's correction, which needs all of them: until then the verdicts are `undecided`."""
    if any("p_value" not in comparison for comparison in comparisons):
        for comparison in comparisons:
            if "p_value" in comparison:
                comparison |= {"verdict": "undecided", "reason": "the correction needs the other comparisons' runs"}
        return
    for comparison, adjusted in zip(comparisons, holm([c["p_value"] for c in comparisons]), strict=True):
        comparison["p_holm"] = adjusted
        if comparison["verdict"] != "undecided" and adjusted >= 1 - LEVEL:
            comparison |= {
                "verdict": "undecided",
                "reason": "its interval leaves out zero, but not after the correction",
            }


def _arm(name: str, record, ledger: Ledger, tasks: Mapping[str, Task], finals: Finals) -> dict[str, object]:
    study = ledger.heading.study
    of_task = {task: finals.get((name, task), {}) for task in tasks}
    done = all(len(of) == study.seeds and all(o.status == "ok" for o in of.values()) for of in of_task.values())
    mean = None
    if done and study.seeds > 1:
        seeds = range(study.seeds)
        runs = [
            Runs(task.name, task.metric, _labels(task), _predictions(of_task[task.name], seeds), task.group)
            for task in tasks.values()
        ]
        mean = mean_interval(runs)._asdict()
    return {
        "arm": name,
        "label": record.label,
        "method": record.method,
        "budget": record.budget,
        "matched": NONE if record.budget is None else arm_of(name).matched,
        "budget_params": record.budget_params,
        "trainable_params": record.trainable_params,
        "peak_step_bytes": record.peak_step_bytes,
        "resident_bytes": record.resident_bytes,
        "peak_preparation_bytes": record.peak_preparation_bytes,
        "mean": mean,
        "tasks": [_on_task(name, task, study.lrs_of(name), ledger, finals) for task in tasks.values()],
    }


def _on_task(name: str, task: Task, lrs: Sequence[float], ledger: Ledger, finals: Finals) -> dict[str, object]:
    of = [o for o in finals.get((name, task.name), {}).values() if o.status == "ok"]
    tuning = mean_scores(
        o for o in ledger.outcomes if (o.trial.purpose, o.trial.arm, o.trial.task) == (TUNING, name, task.name)
    )
    lr = of[0].trial.lr if of else None
    target = _target(task, finals)
    reached = [next((step for step, value in o.curve if value >= target), None) for o in of] if target else []
    return {
        "task": task.name,
        "metric": task.metric,
        "scores": {o.trial.seed: o.score for o in of},
        "score": fmean(o.score for o in of) if of else None,
        "lr": lr,
        "lr_at_edge": lr in (min(lrs), max(lrs)) if lr is not None else None,
        "tuning": {f"{lr:g}": value for lr, value in sorted(tuning.items())},
        "losses": [fmean(values) for values in zip(*_alike("losses", [o.losses for o in of]), strict=True)],
        "target": target,
        "steps_to_target": reached,
    }


def _target(task: Task, finals: Finals) -> float | None:
    """The score on validation that counts as learned: a share of what full fine-tuning reaches."""
    full = [o for o in finals.get(("full", task.name), {}).values() if o.status == "ok"]
    return TARGET_SHARE * fmean(o.curve[-1][1] for o in full) if full else None


def table(summary: Mapping[str, object]) -> list[str]:
    """The arms and the primary endpoint as lines for a terminal."""
    tasks = summary["study"]["tasks"]
    rows = [("arm", "peak, MiB", *tasks, "mean", "95 % interval")]
    for arm in summary["arms"]:
        mean = arm["mean"]
        scores = ["—" if of["score"] is None else f"{of['score']:.1f} ({len(of['scores'])})" for of in arm["tasks"]]
        interval = ("—", "—") if mean is None else (f"{mean['score']:.2f}", f"{mean['low']:.2f} to {mean['high']:.2f}")
        rows.append((arm["arm"], f"{arm['peak_step_bytes'] / 2**20:.1f}", *scores, *interval))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))]).rstrip()
        for name, *cells in rows
    ]
    primary = summary["primary"]
    return [*lines, *([_sentence(primary)] if primary else [])]


def _sentence(comparison: Mapping[str, object]) -> str:
    what = f"{comparison['first']} minus {comparison['second']}: {comparison['verdict']}"
    if "difference" not in comparison:
        return f"{what} ({comparison['reason']})"
    interval = f"{comparison['difference']:+.2f} points ({comparison['low']:+.2f} to {comparison['high']:+.2f})"
    return f"{what}, {interval}" + (f"; {comparison['reason']}" if comparison["reason"] else "")
