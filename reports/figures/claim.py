"""The figures of the claim's page: ratios to LoRA by definition, budgets, cards, and conditions.

They draw rows of `claim.json`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from reports.figures.step_time import ticks
from reports.palette import INK, by_name, method_colour, method_marker
from reports.sheet import THEME, WIDE, Grid, Layout, Sheet, panel_width, points, shorten, tile_title

Rows = Sequence[Mapping[str, object]]
# Ratios past these are printed in the tables alone.
LEAST_DRAWN, MOST_DRAWN = 1e-3, 1e6
# Ticks of a scale of ratios that spans little, by layout.
_NEAR_ONE = {"wide": (0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.5, 2, 3, 4, 6, 8), "narrow": (0.5, 0.7, 1, 1.5, 2, 3, 4, 6)}


def definition_name(field: str) -> str:
    """A definition of memory in a word or two."""
    return field.removesuffix("_bytes").removeprefix("peak_").replace("_", " ")


def draw_ratios(title: str, memory: Rows, definitions: Sequence[str], tolerance: float, layout: Layout = WIDE) -> Sheet:
    """Each method's memory to LoRA's by every definition, a panel a case; the band is what counts as identical."""
    cases = _unique(memory, "title")
    methods = sorted({str(row["method"]) for row in memory if row["method"] != "lora"}, key=by_name)
    legend: list[Line2D | Patch] = [
        Line2D([], [], label=method, markersize=points(8), **_mark(method)) for method in methods
    ]
    legend.append(Patch(label=f"identical within {100 * tolerance:.0f} %", **_band()))
    sheet = Sheet(title, legend, layout)
    row = 24
    grid = Grid(
        columns=min(len(cases), 3 if layout.name == "wide" else 1) or 1,
        height=row * len(definitions),
        left=layout.font * 6.5,
        above=1.6 * layout.line,
        below=3 * layout.line,
    )
    (panels,) = sheet.add_grid({"left of 1: less than LoRA": len(cases)}, grid).values()
    values = [
        value for each in memory for value in each["to_lora"].values() if value and LEAST_DRAWN <= value <= MOST_DRAWN
    ]
    low, high = min(0.7, *values, 1) / 1.08, max(1.5, *values, 1) * 1.08
    for index, (case, ax) in enumerate(zip(cases, panels, strict=True)):
        _ratio_axis(ax, low, high, "memory / LoRA's, log scale", layout)
        ax.set_ylim(len(definitions) - 0.5, -0.5)
        ax.yaxis.set_major_locator(FixedLocator(range(len(definitions))))
        names = (
            [definition_name(name) for name in definitions] if index % grid.columns == 0 else [""] * len(definitions)
        )
        ax.set_yticklabels(names)
        ax.add_artist(Rectangle((1 - tolerance, -0.5), 2 * tolerance, len(definitions), zorder=0.5, **_band()))
        ax.axvline(1, color=THEME.foreground, linewidth=0.8, zorder=1)
        tile_title(ax, [case], layout, grid.height)
        of_case = [each for each in memory if each["title"] == case and each["method"] != "lora"]
        for position, name in enumerate(definitions):
            for each in sorted(of_case, key=lambda each: by_name(str(each["method"]))):
                value = each["to_lora"][name]
                if value is not None and LEAST_DRAWN <= value <= MOST_DRAWN:
                    size = points(9 if each["method"] == "sparsegrad" else 7)
                    over = 4 if each["method"] == "sparsegrad" else 3
                    ax.plot([value], [position], markersize=size, zorder=over, **_mark(str(each["method"])))
    return sheet


def describe_ratios(memory: Rows, definitions: Sequence[str]) -> str:
    """What `draw_ratios` shows, in words: the published method's ratios."""
    parts = []
    for row in memory:
        if row["method"] == "sparsegrad":
            said = ", ".join(f"{definition_name(name)} {_number(row['to_lora'][name])}" for name in definitions)
            parts.append(f"{row['title']}: {said}")
    return f"Memory to LoRA's by definition, log scale. SparseGrad as published on {'; '.join(parts)}."


def draw_bars(
    title: str,
    heading: str,
    groups: Mapping[str, Rows],
    label: str,
    layout: Layout = WIDE,
    log: bool = False,
    columns: int = 3,
) -> Sheet:
    """Horizontal bars, a panel a group of rows with `name`, `method`, `value` (None: `note` stands in its place).

    `heading` stands above the panels and `label` at the axes; with `log` bars begin at 1, else values are counts.
    """
    legend: list[Patch] = []
    sheet = Sheet(title, legend, layout)
    most = max((len(rows) for rows in groups.values()), default=1)
    row = 2.3 * layout.line
    grid = Grid(
        columns=min(len(groups), columns if layout.name == "wide" else 1) or 1,
        height=row * most,
        left=4,
        above=1.6 * layout.line,
        below=3 * layout.line,
    )
    (axes,) = sheet.add_grid({heading: len(groups)}, grid).values()
    for ax, (name, rows) in zip(axes, groups.items(), strict=True):
        tile_title(ax, [name], layout, grid.height)
        ax.grid(False, axis="y")
        ax.grid(True, axis="x", color=THEME.line, linewidth=0.6)
        known = [each["value"] for each in rows if each["value"] is not None]
        if log:
            _ratio_axis(ax, min(0.9, *known, 1) / 1.05, max(2, *known, 1) * 1.6, label, layout)
            ax.axvline(1, color=THEME.foreground, linewidth=0.8)
        else:
            ax.set_xlim(0, 1.02 * max([*known, 1]))
            ax.set_xlabel(label)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.set_ylim(grid.height, 0)
        ax.yaxis.set_major_locator(NullLocator())
        for position, each in enumerate(rows):
            _bar(ax, each, position * row, layout, start=1 if log else 0)
    return sheet


def describe_bars(title: str, groups: Mapping[str, Rows]) -> str:
    """What `draw_bars` shows, in words."""
    parts = [
        f"{name}: " + ", ".join(f"{each['name']} {each['note'] or _number(each['value'])}" for each in rows)
        for name, rows in groups.items()
    ]
    return f"{title}, horizontal bars. {'; '.join(parts)}."


def draw_conditions(title: str, rows: Rows, tolerance: float, layout: Layout = WIDE) -> Sheet:
    """Peaks to LoRA's over the batch, a line a method, a panel for each sequence length, dtype by dtype."""
    dtypes, seqs = _unique(rows, "dtype"), _unique(rows, "seq")
    methods = sorted(_unique(rows, "method"), key=by_name)
    legend: list[Line2D | Patch] = [
        Line2D([], [], label=name, markersize=points(7), color=method_colour(name), linewidth=1.2, **_shape(name))
        for name in methods
    ]
    legend.append(Patch(label=f"identical within {100 * tolerance:.0f} %", **_band()))
    sheet = Sheet(title, legend, layout)
    grid = Grid(
        columns=min(len(seqs), 3 if layout.name == "wide" else 1) or 1,
        height=190 if layout.name == "wide" else 160,
        left=layout.font * 4,
        above=1.6 * layout.line,
        below=3.2 * layout.line,
    )
    axes = sheet.add_grid({dtype: len(seqs) for dtype in dtypes}, grid)
    values = [row["to_lora"] for row in rows if row["to_lora"] is not None]
    low, high = min([*values, 1]), max([*values, 1])
    margin = 0.08 * (high - low or 1)
    for dtype in dtypes:
        for index, (seq, ax) in enumerate(zip(seqs, axes[dtype], strict=True)):
            here = [row for row in rows if row["dtype"] == dtype and row["seq"] == seq and row["to_lora"] is not None]
            batches = sorted({row["batch"] for row in here})
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(FixedLocator(batches))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xlim(min([*batches, 10]) / 1.3, max([*batches, 10]) * 1.3)
            ax.set_ylim(low - margin, high + margin)
            ax.set_xlabel("batch, log scale")
            first = index % grid.columns == 0
            ax.tick_params(labelleft=first)  # the others would stand in their neighbour's panel
            if first:
                ax.set_ylabel("peak / LoRA's")
            ax.axhspan(1 - tolerance, 1 + tolerance, zorder=0.5, **_band())
            ax.axhline(1, color=THEME.foreground, linewidth=0.8, zorder=1)
            tile_title(ax, [f"sequences of {seq:,} tokens"], layout, grid.height)
            for name in methods:
                line = sorted((row["batch"], row["to_lora"]) for row in here if row["method"] == name)
                if line:
                    look = {"color": method_colour(name), "linewidth": 1.2, "markersize": points(7), **_shape(name)}
                    ax.plot(*zip(*line, strict=True), zorder=3, **look)
    return sheet


def describe_conditions(title: str, turns: Rows) -> str:
    """What `draw_conditions` shows, in words."""
    parts = [
        f"{row['method']} from {_number(row['least'])} ({row['least_at']}) to {_number(row['most'])} ({row['most_at']})"
        for row in turns
    ]
    return f"{title}: peak of a step to LoRA's. {'; '.join(parts)}."


def _bar(ax: Axes, row: Mapping[str, object], top: float, layout: Layout, start: float) -> None:
    """The row's name over its bar, and its number, or the note that stands for it, at the other end of that line."""
    middle, value = top + 0.6 * layout.line, row["value"]
    right = str(row["note"] or _number(value))
    shared = {"transform": ax.get_yaxis_transform(), "va": "center", "parse_math": False, "color": THEME.foreground}
    room = layout.fits(panel_width(ax, layout))
    right = shorten(right, max(8, room - 12))
    name = shorten(str(row["name"]), max(8, room - len(right) - 2))
    ax.text(0.008, middle, name, fontsize=points(layout.font), **shared)
    ax.text(1, middle, right, ha="right", fontsize=points(layout.font), **shared)
    if value is not None and LEAST_DRAWN <= value:
        look = {"facecolor": method_colour(str(row["method"])), "edgecolor": INK, "linewidth": 0.6}
        ax.add_artist(Rectangle((start, top + 1.2 * layout.line), value - start, 0.75 * layout.line, **look))


def _ratio_axis(ax: Axes, low: float, high: float, label: str, layout: Layout) -> None:
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    marks = ticks(low, high) if high / low >= 12 else _NEAR_ONE[layout.name]
    marks = [mark for mark in marks if low <= mark <= high]
    ax.xaxis.set_major_locator(FixedLocator(marks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(label)
    ax.grid(True, axis="x", color=THEME.line, linewidth=0.6)


def _mark(method: str) -> dict[str, object]:
    return {"linestyle": "none", **_shape(method)}


def _shape(method: str) -> dict[str, object]:
    return {
        "marker": method_marker(method),
        "markerfacecolor": method_colour(method),
        "markeredgecolor": THEME.foreground,
        "markeredgewidth": 0.6,
    }


def _band() -> dict[str, object]:
    return {"facecolor": THEME.line, "edgecolor": "none", "alpha": 0.8}


def _number(value: object) -> str:
    if value is None or not math.isfinite(value):
        return "not obtained"
    return f"{value:,.0f}" if value == int(value) and value >= 10 else f"{value:,.3g}"


def _unique(rows: Rows, name: str) -> list:
    return list(dict.fromkeys(row[name] for row in rows))
