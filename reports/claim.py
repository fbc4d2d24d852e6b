"""The claim's page: what `claim.json` holds, the verdict first and then the evidence. It judges nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from reports import palette, quality, record, sheet, space, tables
from reports.cells import Cell, Table
from reports.figures import claim as figures
from reports.figures.claim import definition_name
from reports.page import PAGE, Illustration, encode, renderings, template

Found = Mapping[str, object]
Rows = Sequence[Mapping[str, object]]

FILES = (
    ("claim.json", "everything on this page"),
    ("verdicts.csv", "every verdict with its case, definition, tolerance, figure, limits and evidence"),
    ("memory.csv", "reading 1: bytes and ratios by definition"),
    ("budgets.csv", "reading 2: the largest budgets"),
    ("cards.csv", "reading 3: the largest batch, sequence and model"),
    ("sensitivity.csv", "peaks to LoRA's by condition"),
    ("quality.csv", "the quality study: every arm's score by task and seed"),
    ("records.csv", "every prediction with its whole configuration; records.json is the same for the report command"),
)
VERDICT_WORDS = {"holds": "holds", "fails": "fails", "undecided": "is undecided"}
_DIRECTIONS = {"below": "below", "above": "above", "equal": "", None: ""}
_AXES = {"batch": "Largest batch", "seq": "Longest sequence", "model": "Largest model"}


def write_page(found: Found, out: Path) -> Path:
    """Write the figures and `index.html` of what `claim.json` holds into `out`; returns the page's path."""
    out = Path(out)
    page = out / PAGE
    record.write_bytes(encode(render(found, out)), page)
    return page


def render(found: Found, out: Path) -> str:
    """The page's HTML; its figures are written into `out` as PNG files."""
    memory = [{**row, "title": _case_title(row)} for row in found["memory"]]
    return template("claim.html.j2").render(
        found=found,
        words=VERDICT_WORDS,
        percent=lambda part: f"{100 * part:.0f} %",
        number=_ratio,
        figures=_figures(found, memory, out),
        memory=_memory_tables(found, memory),
        decided=_tolerance_table(found, found["deciding"]["definition"]),
        tolerances=_tolerance_table(found),
        paper=_paper_tables(found),
        budgets=_budget_table(found),
        cards=_card_tables(found),
        turns=_turns_table(found),
        variations=_variation_table(found),
        quality=quality.section(found["quality"], out),
        space=space.section(found.get("space"), out),
        space_files=space.FILES,
        definition_name=definition_name,
        deciding=definition_name(found["deciding"]["definition"]),
        environment=[(name.replace("_", " "), tables.plain(value)) for name, value in found["environment"].items()],
        files=FILES,
        method_colour=palette.method_colour,
        themes=(palette.LIGHT, palette.DARK),
        missing=tables.MISSING,
    )


def _figures(found: Found, memory: Rows, out: Path) -> dict[str, Illustration]:
    tolerance, definitions = found["deciding"]["tolerance"], list(found["definitions"])
    drawn = {}
    shown = [row for row in memory if row["budgets"] != "the paper's" and row["semantics"] == "cuda"]
    if shown:
        title = "Memory to LoRA's with as many trained parameters, by definition of memory"
        sheets = _both(figures.draw_ratios, title, shown, definitions, tolerance)
        drawn["memory"] = Illustration(
            renderings(sheets, out / "memory.png"),
            figures.describe_ratios(shown, definitions),
            "Each mark is a method's memory divided by LoRA's on that case, by the definition at the left; left of the "
            "line at 1 it needs less than LoRA. Marks in the band are within the tolerance that decides. SparseGrad as "
            "published has the larger mark. Full fine-tuning and MeProp stand beside it; methods whose name continues "
            "after sparsegrad are this suite's forms.",
        )
    if found["budgets"]:
        title = "Trained parameters at the same peak of a step"
        groups = _grouped(found["budgets"], "case", _budget_bar)
        drawn["budgets"] = Illustration(
            renderings(
                _both(
                    figures.draw_bars,
                    title,
                    "a budget that needs no more memory",
                    groups,
                    "parameters / reference's, log scale",
                    log=True,
                ),
                out / "budgets.png",
            ),
            figures.describe_bars(title, groups),
            "How many parameters each method may train in LoRA's peak of a step, divided by LoRA's; where a method has "
            "no bar not even a budget of 1 has LoRA's peak. LoRA at SparseGrad's peak, where it stands, turns the "
            "question round: the parameters that LoRA could train in SparseGrad's memory, divided by SparseGrad's.",
        )
    batches = [row for row in found["cards"] if row["axis"] == "batch"]
    if batches:
        title = "Largest batch that fits on a card"
        groups = _grouped([{**row, "group": f"{row['case']}, {row['card']}"} for row in batches], "group", _card_bar)
        drawn["cards"] = Illustration(
            renderings(
                _both(figures.draw_bars, title, "preparation included", groups, "batch", columns=4), out / "cards.png"
            ),
            figures.describe_bars(title, groups),
            "The largest batch whose preparation and training fit on a card of that size, by the model of CUDA's "
            "caching allocator, with 512 MiB set aside for the CUDA context. Every panel has its own scale.",
        )
    grid = [row for row in found["sensitivity"] if row["kind"] == "grid"]
    if grid:
        title = f"Peak of a step to LoRA's on {grid[0]['case']}, by batch, sequence and dtype"
        drawn["sensitivity"] = Illustration(
            renderings(_both(figures.draw_conditions, title, grid, tolerance), out / "sensitivity.png"),
            figures.describe_conditions(title, found["turns"]),
            "Each line is a method with as many trained parameters as LoRA; below the line at 1 it needs less. All "
            "panels share one scale of ratios.",
        )
    return drawn


def _both(draw, *arguments, **options) -> dict[sheet.Layout, sheet.Sheet]:
    return {layout: draw(*arguments, layout=layout, **options) for layout in (sheet.WIDE, sheet.NARROW)}


def _grouped(rows: Rows, name: str, bar) -> dict[str, list[dict[str, object]]]:
    groups: dict[str, list[dict[str, object]]] = {}
    for row in rows:
        groups.setdefault(str(row[name]), []).append(bar(row))
    return groups


def _budget_bar(row: Mapping[str, object]) -> dict[str, object]:
    reverse = row["method"] == "lora" and not str(row["at_peak_of"]).startswith("lora")
    name = (
        f"{row['label']} at {row['at_peak_of']}'s peak"
        if reverse
        else str(row["label"] if row["fits"] else row["method"])
    )
    note = "" if row["fits"] else "none fits" if row["status"] == "ok" else f"not obtained ({row['status']})"
    return {"name": name, "method": row["method"], "value": row["to_reference"], "note": note}


def _card_bar(row: Mapping[str, object]) -> dict[str, object]:
    note = "not obtained" if row["number"] is None else "none fits" if row["number"] == 0 else f"{row['number']:,}"
    return {"name": row["label"], "method": row["method"], "value": row["number"], "note": note}


def _case_title(row: Mapping[str, object]) -> str:
    return str(row["case"]) if row["semantics"] == "cuda" else f"{row['case']}, on a CPU"


def _memory_tables(found: Found, memory: Rows) -> list[Table]:
    """A table a case: each method's MiB by definition, with its ratio to LoRA's and the verdict on that."""
    definitions = list(found["definitions"])
    said = {
        (row["case"], row["semantics"], row["label"], row["budgets"], row["definition"]): row
        for row in found["verdicts"]
        if row["reading"] == 1
        and row["tolerance"] == found["deciding"]["tolerance"]
        and str(row["against"]).startswith("lora")
    }
    parts = []
    for title in dict.fromkeys(row["title"] for row in memory):
        rows = []
        for row in (each for each in memory if each["title"] == title):
            budgets = "budget as in the paper" if row["budgets"] == "the paper's" else ""
            cells = [
                Cell(str(row["label"]), budgets or ("ours" if row["ours"] else "")),
                Cell(tables.count(row["budget_params"]), kind="number"),
            ]
            for name in definitions:
                key = (row["case"], row["semantics"], row["label"], row["budgets"], name)
                cells.append(_memory_cell(row["to_lora"][name], row["bytes"][name], said.get(key)))
            rows.append((row["method"], cells))
        headings = ["method", "parameters", *(definition_name(name) for name in definitions)]
        parts.append(Table(title, headings, rows))
    return parts


def _memory_cell(ratio: float | None, size: int | None, verdict: Mapping[str, object] | None) -> Cell:
    if size is None:
        return Cell(tables.MISSING, kind="missing")
    return _judged(_ratio(ratio), tables.mib(size), verdict)


def _judged(text: str, small: str, verdict: Mapping[str, object] | None) -> Cell:
    """A number with the verdict on it, in a word and as a colour; one that is better than LoRA's has its own colour."""
    if verdict is None:
        return Cell(text, small, "number")
    better = verdict["direction"] == ("above" if verdict["reading"] == 3 else "below")
    said = {"holds": "identical", "undecided": "undecided"}.get(str(verdict["verdict"]), str(verdict["direction"]))
    return Cell(text, small, f"number {'better' if better else verdict['verdict']}", said)


def _tolerance_table(found: Found, only: str | None = None) -> Table:
    """The published method's verdicts by definition (or by that one alone) and tolerance, against each rival."""
    tolerances = found["tolerances"]
    groups: dict[tuple, dict[float, Mapping[str, object]]] = {}
    for row in found["verdicts"]:
        if only not in (None, row["definition"]):
            continue
        if row["reading"] == 1 and row["method"] == found["deciding"]["method"] and row["budgets"] == "equal":
            key = (_case_title(row), row["against"], row["definition"])
            groups.setdefault(key, {})[row["tolerance"]] = row
    rows = []
    for (title, against, definition), by_tolerance in groups.items():
        figure = by_tolerance[tolerances[0]]["figure"]
        cells = [
            Cell(title),
            Cell(str(against)),
            Cell(definition_name(definition)),
            Cell(_ratio(figure), kind="number") if figure is not None else Cell(tables.MISSING, kind="missing"),
            *(_verdict_cell(by_tolerance[tolerance]) for tolerance in tolerances),
        ]
        rows.append((None, cells))
    headings = [
        "case",
        "against",
        "definition",
        "ratio",
        *(f"within {100 * tolerance:.0f} %" for tolerance in tolerances),
    ]
    which = "by every definition" if only is None else f"by the {definition_name(only)} peak, which decides"
    return Table(f"SparseGrad as published, {which}", headings, rows)


def _verdict_cell(row: Mapping[str, object]) -> Cell:
    direction = _DIRECTIONS[row["direction"]]
    return Cell(str(row["verdict"]), direction or str(row["reason"] or ""), str(row["verdict"]))


def _paper_tables(found: Found) -> list[Table]:
    """The paper's ratios beside ours, what its sizes cannot be, and whether they follow the batch."""
    paper = found["paper"]
    if paper is None:
        return []
    names = list(paper["ratios"])
    rows = [
        (
            None,
            [
                Cell("the paper, Table 3"),
                *(Cell(_ratio(paper["ratios"][name]), kind="number") for name in names),
                Cell(""),
            ],
        )
    ]
    for each in paper["definitions"]:
        agrees = {True: "yes", False: "no", None: "not obtained"}[each["agrees"]]
        cells = [Cell(definition_name(each["what"]))]
        for name in names:
            sizes = " / ".join(tables.mib(each["bytes"][part]) for part in name.split("/"))
            cells.append(Cell(_ratio(each["ratios"][name]), f"{sizes} MiB", "number"))
        rows.append((None, [*cells, Cell(agrees, kind={"yes": "holds", "no": "fails"}.get(agrees, "undecided"))]))
    agreement = f"all within {100 * paper['agreement']:.0f} % of the paper's"
    ratios = Table("Ratios of memory, RoBERTa-base", ["definition", *names, agreement], rows)

    printed = paper["memory_mb"]["full"]
    floors = []
    for each in paper["floors"]:
        mb = each["bytes"] / 1e6
        cells = [Cell(each["what"]), Cell(f"{mb:,.0f}", kind="number"), Cell(tables.mib(each["bytes"]), kind="number")]
        above = each["bytes"] > printed * 2**20
        floors.append((None, [*cells, Cell("yes" if above else "no", kind="fails" if above else "")]))
    heading = f"more than {printed:,.0f} MB, also where an MB is 2^20 bytes"
    floor = Table(
        "Full fine-tuning of RoBERTa-base with Adam in float32", ["live at once", "MB", "MiB", heading], floors
    )

    batches = [
        (
            None,
            [Cell(f"batch {row['batch']}"), *(Cell(f"{row[name]:,.0f}", kind="number") for name in paper["memory_mb"])],
        )
        for row in paper["by_batch"]
    ]
    by_batch = Table(
        "The paper's Table 8, MB, as means over the tasks of each batch size", ["tasks", *paper["memory_mb"]], batches
    )
    return [ratios, floor, by_batch]


def _budget_table(found: Found) -> Table:
    rows = []
    for row in found["budgets"]:
        fits = row["fits"]
        cells = [
            Cell(str(row["label"] if fits else row["method"]), "ours" if row["ours"] else ""),
            Cell(str(row["case"])),
            Cell(str(row["at_peak_of"]), f"{tables.mib(row['limit_bytes'])} MiB"),
            Cell(f"{row['budget']:,}" if fits and isinstance(row["budget"], int) else tables.MISSING, kind="number"),
            Cell(tables.count(row["budget_params"]), kind="number"),
            Cell(_ratio(row["to_reference"]), kind="number"),
            Cell(tables.mib(row["peak_step_bytes"]), "" if fits else "with a budget of 1", "number"),
            Cell("" if fits else str(row["reason"] or row["status"])),
        ]
        rows.append((row["method"], cells))
    headings = (
        "method",
        "case",
        "at the peak of",
        "largest budget",
        "parameters",
        "to the reference's",
        "its peak, MiB",
        "remark",
    )
    return Table("The largest budget at the same peak of a step", headings, rows)


def _card_tables(found: Found) -> list[Table]:
    parts = []
    keys = dict.fromkeys((row["case"], row["axis"]) for row in found["cards"])
    for case, axis in keys:
        here = [row for row in found["cards"] if (row["case"], row["axis"]) == (case, axis)]
        cards = list(dict.fromkeys(row["card"] for row in here))
        said = {
            (row["label"], row["definition"]): row
            for row in found["verdicts"]
            if row["reading"] == 3 and row["case"] == case and row["tolerance"] == found["deciding"]["tolerance"]
        }
        rows = []
        for method in dict.fromkeys(row["method"] for row in here):
            of_method = {row["card"]: row for row in here if row["method"] == method}
            any_row = next(iter(of_method.values()))
            cells = [Cell(str(any_row["label"] if axis != "model" else method), "ours" if any_row["ours"] else "")]
            cells += [
                _card_cell(of_method[card], said.get((of_method[card]["label"], f"largest {axis} in {card}")))
                for card in cards
            ]
            rows.append((method, cells))
        parts.append(Table(f"{_AXES[axis]}, {case}", ["method", *cards], rows))
    return parts


def _card_cell(row: Mapping[str, object], verdict: Mapping[str, object] | None) -> Cell:
    if row["number"] is None:
        return Cell(tables.MISSING, str(row["reason"] or "not obtained"), "missing")
    text = (row["name"] or "none") if row["axis"] == "model" else f"{row['number']:,}" if row["number"] else "none"
    small = [] if row["to_lora"] is None else [f"{_ratio(row['to_lora'])} of LoRA's"]
    small += ["the model's longest"] if row["longest"] else []
    return _judged(str(text), ", ".join(small), verdict)


def _turns_table(found: Found) -> Table:
    rows = [
        (
            row["method"],
            [
                Cell(str(row["method"])),
                Cell(f"{row['below']} of {row['conditions']}", kind="number"),
                Cell(_ratio(row["least"]), str(row["least_at"]), "number"),
                Cell(_ratio(row["most"]), str(row["most_at"]), "number"),
            ],
        )
        for row in found["turns"]
    ]
    return Table("Peak of a step to LoRA's", ["method", "less than LoRA on", "least", "most"], rows)


def _variation_table(found: Found) -> Table:
    rows = [row for row in found["sensitivity"] if row["kind"] == "variation"]
    changes = list(dict.fromkeys(row["changed"] for row in rows))
    by_key = {(row["method"], row["changed"]): row["to_lora"] for row in rows}
    methods = dict.fromkeys(row["method"] for row in rows)
    body = [
        (method, [Cell(method), *(Cell(_ratio(by_key.get((method, change))), kind="number") for change in changes)])
        for method in methods
    ]
    return Table("Peak of a step to LoRA's, one thing changed at a time", ["method", *map(str, changes)], body)


def _ratio(value: object) -> str:
    return tables.number(None if value is None else Fraction(value), decimals=3)
