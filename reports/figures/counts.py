"""The five parameter counts of each record under one another, on a log scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from reports import tables
from reports.figures import panels
from reports.figures.panels import LARGEST_DRAWN, NOT_OBTAINED, TOO_LARGE, Panels
from reports.palette import method_colour
from reports.record import COUNTS, Record
from reports.sheet import THEME, WIDE, Layout, Sheet, draw_note, legend_marker, panel_width, points, row_label

TITLE = "Parameter counts"

_MARKERS = dict(zip(COUNTS, "osD^v", strict=True))


def draw(workload: str, groups: Panels, layout: Layout = WIDE) -> Sheet:
    """Each record's parameter counts under one another on a log scale."""
    groups = panels.drawn(groups)
    records = panels.flat(groups)
    lane = layout.line - 3
    row = layout.line + len(COUNTS) * lane + 10
    sheet = Sheet(f"{TITLE}: {workload}", _legend(records), layout)
    axes = sheet.add_panels({regime: len(group) * row for regime, group in groups.items()}, left=92)
    low, high = _decades([getattr(record, name) for record in records for name in COUNTS])
    for regime, group in groups.items():
        ax = axes[regime]
        ax.set_xscale("log")
        ax.set_xlim(low, high)
        ax.xaxis.set_major_locator(LogLocator(numticks=6))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(power)
        ax.set_xlabel("parameters (entries), log scale")
        ax.set_ylabel("method [budget]")
        ax.yaxis.set_major_locator(NullLocator())
        ax.yaxis.set_label_coords(-64 / panel_width(ax, layout), 0.5)
        for position, record in enumerate(group):
            top = position * row
            row_label(ax, record, tables.variation(record, group), panels.remarks(record), top, layout)
            for index, name in enumerate(COUNTS):
                middle = top + layout.line + (index + 0.5) * lane
                _lane_label(ax, _count_name(name), middle, layout)
                _lane(ax, record, name, middle, layout)
    return sheet


def describe(workload: str, groups: Panels) -> str:
    """What `draw` shows, in words."""
    entries = {
        regime: [f"{record.label} {_counts_text(record)}" for record in group]
        for regime, group in panels.drawn(groups).items()
    }
    return panels.words(TITLE, workload, "markers on a log scale", entries)


def power(value: float, _position: int | None = None) -> str:
    """A power of ten with its name where it has one: 1, 10, 100, 1k, ... 1M; 10^15 and the like where it has none."""
    exponent = round(math.log10(value))
    if 0 <= exponent < 15:
        return f"{10 ** (exponent % 3)}{('', 'k', 'M', 'G', 'T')[exponent // 3]}"
    return f"10^{exponent}"


def _count_name(field: str) -> str:
    return field.removesuffix("_params")


def _counts_text(record: Record) -> str:
    values = ((_count_name(name), getattr(record, name)) for name in COUNTS)
    return ", ".join(f"{name} {NOT_OBTAINED if value is None else tables.count(value)}" for name, value in values)


def _decades(values: Sequence[int | None]) -> tuple[float, float]:
    """The whole decades around the values that a log scale can show, with room for the markers at its ends."""
    positive = [value for value in values if value is not None and 0 < value < LARGEST_DRAWN]
    if not positive:
        return 1.0, 10.0
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    margin = 10 ** (0.03 * (max(high, low + 1) - low))
    return 10.0**low / margin, 10.0 ** max(high, low + 1) * margin


def _lane_label(ax: Axes, text: str, middle: float, layout: Layout) -> None:
    ax.text(
        -5 / panel_width(ax, layout),
        middle,
        text,
        transform=ax.get_yaxis_transform(),
        ha="right",
        va="center_baseline",
        fontsize=points(layout.font - 1),
        color=THEME.muted,
        parse_math=False,
    )


def _lane(ax: Axes, record: Record, name: str, middle: float, layout: Layout) -> None:
    value = getattr(record, name)
    if value is None:
        draw_note(ax, NOT_OBTAINED, middle, layout)
        return
    if value == 0 or value >= LARGEST_DRAWN:
        note = "0 (no place on a log scale)" if value == 0 else f"{tables.count(value)}, {TOO_LARGE}"
        draw_note(ax, note, middle, layout)
        return
    predicted = record.source == "predicted"
    ax.plot(
        [value],
        [middle],
        linestyle="none",
        marker=_MARKERS[name],
        markersize=points(layout.font - 4),
        markerfacecolor=THEME.background if predicted else method_colour(record.method),
        markeredgecolor=method_colour(record.method) if predicted else THEME.foreground,
        markeredgewidth=1.2 if predicted else 0.6,
    )
    low, high = (math.log10(edge) for edge in ax.get_xlim())
    right_half = math.log10(value) - low > 0.5 * (high - low)
    ax.annotate(
        tables.count(value),
        (value, middle),
        xytext=(points(-8 if right_half else 8), 0),
        textcoords="offset points",
        ha="right" if right_half else "left",
        va="center",
        fontsize=points(layout.font - 2),
        color=THEME.foreground,
        parse_math=False,
    )


def _legend(records: Sequence[Record]) -> list[Line2D]:
    entries = [legend_marker(_MARKERS[name], _count_name(name), THEME.muted) for name in COUNTS]
    if any(record.source == "predicted" for record in records):
        entries.append(legend_marker("o", "hollow: predicted", THEME.background))
    return entries
