"""The part of the claim's page that shows the quality study: scores against memory, comparisons, learning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reports import sheet, tables
from reports.cells import Cell, Table
from reports.figures import quality as figures
from reports.page import Illustration, renderings

Found = Mapping[str, object]
Rows = Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class Section:
    """What the page shows of a study: how it was run, figures in their order, and tables by what they hold."""

    facts: str
    figures: Sequence[Illustration]
    comparisons: Table | None
    explored: Table | None
    per_task: Table | None
    scores: Table | None
    learning: Table | None


def section(quality: Found, out: Path) -> Section:
    """Of `claim.json`'s quality; its figures are written into `out` as PNG files."""
    arms, cases, explored = quality["arms"], quality["cases"], quality["explored"]
    return Section(
        facts=_facts(quality["facts"]),
        figures=_figures(arms, out),
        comparisons=_comparisons(cases) if cases else None,
        explored=_explored(explored) if explored else None,
        per_task=_per_task([*cases, *explored]),
        scores=_scores(arms) if arms else None,
        learning=_learning(arms) if any(of["score"] is not None for arm in arms for of in arm["tasks"]) else None,
    )


def _facts(facts: Found) -> str:
    if not facts:
        return ""
    size = "all" if facts["train_size"] is None else f"{facts['train_size']:,}"
    rest = "with the rest frozen" if facts["train_rest"] == "none" else "with the rest of the model training"
    failed = f"; {facts['failed']} failed" if facts["failed"] else ""
    return (
        f"{facts['model']} on {size} training examples of each task, {facts['epochs']} epochs of batches of "
        f"{facts['batch']}, texts cut off after {facts['longest']} tokens, {rest}; {facts['seeds']} seeds; learning "
        f"rates tuned with as many runs for every arm, by protocol {facts['protocol']} (docs/quality-protocol.md), "
        f"written before the runs. {facts['runs']:,} of {facts['planned']:,} runs are done, {facts['hours']:.1f} "
        f"hours{failed}."
    )


def _figures(arms: Rows, out: Path) -> list[Illustration]:
    if not figures.known(arms):
        return []
    return [
        _illustration(
            figures.draw_scores,
            figures.describe_scores,
            "Score at its price: the mean over the tasks against the peak of a step",
            arms,
            out / "quality.png",
            "Each mark is an arm of the study: how well it does on the test examples, as a mean over tasks and "
            "seeds, and what a step of it needs at its peak. Bars are 95 % intervals of that mean; what two arms "
            "share of the error is in both, so a difference is judged by the comparisons below and not by whether "
            "bars overlap. Hollow marks have LoRA's number of parameters, filled ones of the same shape LoRA's "
            "peak. Arms with one peak stand side by side. Arms are drawn when all their runs are done.",
        ),
        _illustration(
            figures.draw_tasks,
            figures.describe_tasks,
            "Score against the peak of a step, task by task",
            arms,
            out / "quality-tasks.png",
            "The same for each task. Bars reach from the lowest to the highest seed. An arrow names what lies far "
            "below.",
        ),
        _illustration(
            figures.draw_losses,
            figures.describe_losses,
            "Training loss over the steps",
            arms,
            out / "quality-losses.png",
            "The loss on the training examples at the learning rate that was tuned, each mark the mean of a tenth "
            "of the steps and of all seeds. Ratings are standardised, so that 1 is what the mean alone would "
            "have.",
        ),
    ]


def _illustration(draw: Callable, describe: Callable, title: str, arms: Rows, path: Path, caption: str) -> Illustration:
    sheets = {layout: draw(title, arms, layout=layout) for layout in (sheet.WIDE, sheet.NARROW)}
    return Illustration(renderings(sheets, path), describe(title, arms), caption)


def _comparisons(cases: Rows) -> Table:
    rows = [
        (
            None,
            [
                Cell(str(case["case"]), "the primary endpoint" if index == 0 else ""),
                *_measured(case),
                Cell(tables.number(case["p_holm"], decimals=4), kind="number"),
                Cell(tables.number(case["detectable"], decimals=2), kind="number"),
                Cell(str(case["verdict"]), _remark(case), str(case["verdict"])),
            ],
        )
        for index, case in enumerate(cases)
    ]
    headings = [*_MEASURED, "p after Holm", "could have been seen", "verdict"]
    return Table("Is the first better than the second?", headings, rows)


_MEASURED = ("comparison", "peaks of a step, first / second", "difference, points", "95 % interval")


def _measured(case: Found) -> list[Cell]:
    return [
        Cell(tables.number(case["peak_ratio"]), kind="number"),
        _signed(case["figure"], _of_others(case)),
        Cell(tables.MISSING if case["low"] is None else _interval(case)),
    ]


def _of_others(case: Found) -> str:
    without = case["without"]
    return f"{without['figure']:+.2f} without {without['task']}" if without else ""


def _explored(cases: Rows) -> Table:
    rows = [(None, [Cell(str(case["case"]), str(case["reason"] or "")), *_measured(case)]) for case in cases]
    return Table("Outside of the protocol: not corrected for their number, and no verdict", _MEASURED, rows)


def _remark(case: Found) -> str:
    remarks = [str(case["reason"])] if case["reason"] else []
    if case["equivalent"]:
        remarks.append("equivalent within 1 point")
    if case["verdict"] == "undecided" and case["seeds_to_decide"] is not None:
        remarks.append(f"about {case['seeds_to_decide']:,} seeds would decide it")
    return "; ".join(remarks)


def _per_task(cases: Rows) -> Table | None:
    done = [case for case in cases if case["per_task"]]
    if not done:
        return None
    tasks = list(dict.fromkeys(row["task"] for case in done for row in case["per_task"]))
    rows = []
    for case in done:
        by_task = {row["task"]: row for row in case["per_task"]}
        cells = [
            _signed(by_task[task]["difference"], _interval(by_task[task])) if task in by_task else Cell(tables.MISSING)
            for task in tasks
        ]
        rows.append((None, [Cell(str(case["case"])), *cells]))
    return Table("The same by task, in points", ["comparison", *tasks], rows)


def _scores(arms: Rows) -> Table:
    tasks = list(dict.fromkeys(of["task"] for arm in arms for of in arm["tasks"]))
    rows = []
    for arm in arms:
        of_task = {of["task"]: of for of in arm["tasks"]}
        cells = [
            Cell(str(arm["arm"]), str(arm["label"]) if arm["label"] != arm["arm"] else ""),
            Cell(tables.mib(arm["peak_step_bytes"]), kind="number"),
            Cell(tables.count(arm["trainable_params"]), kind="number"),
            *(_score(of_task[task], complete=arm["mean"] is not None) for task in tasks),
            Cell(_points(arm["mean"]), _interval(arm) if arm["mean"] is not None else "", "number"),
        ]
        rows.append((arm["method"], cells))
    headings = ["arm", "peak of a step, MiB", "trainable, head included", *tasks, "mean, 95 % interval"]
    return Table("Scores in points: accuracy in %, correlation times 100", headings, rows)


def _score(of: Found, complete: bool) -> Cell:
    if of["score"] is None:
        return Cell(tables.MISSING, kind="missing")
    edge = ", the edge of what was tried" if of["lr_at_edge"] else ""
    seeds = len(of["scores"])
    so_far = "" if complete else f"{seeds} seed{'s' * (seeds != 1)} so far"
    return Cell(_points(of["score"]), f"learning rate {of['lr']:g}{edge}", "number", so_far)


def _learning(arms: Rows) -> Table:
    tasks = list(dict.fromkeys(of["task"] for arm in arms for of in arm["tasks"]))
    rows = []
    for arm in arms:
        of_task = {of["task"]: of for of in arm["tasks"]}
        rows.append((arm["method"], [Cell(str(arm["arm"])), *(_reached(of_task[task]) for task in tasks)]))
    caption = "Steps of the median run to 95 % of what full fine-tuning reaches on validation in the end"
    return Table(caption, ["arm", *tasks], rows)


def _reached(of: Found) -> Cell:
    if not of["scores"]:
        return Cell(tables.MISSING, kind="missing")
    runs = f"reached by {of['reached']} of {len(of['scores'])} runs"
    return Cell("not reached" if of["steps_to_target"] is None else f"{of['steps_to_target']:,}", runs, "number")


def _signed(value: float | None, small: str) -> Cell:
    return Cell(tables.MISSING, kind="missing") if value is None else Cell(f"{value:+.2f}", small, "number")


def _points(value: float | None) -> str:
    return tables.number(value, decimals=1)


def _interval(row: Found) -> str:
    decimals = 1 if "mean" in row else 2
    sign = "" if "mean" in row else "+"
    return f"{row['low']:{sign}.{decimals}f} to {row['high']:{sign}.{decimals}f}"
