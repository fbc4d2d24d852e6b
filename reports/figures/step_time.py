"""A step's time as a ratio to full fine-tuning's neighbouring step, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from reports import tables
from reports.figures import panels
from reports.figures.panels import NOT_OBTAINED, TOO_LARGE, Panels
from reports.palette import method_colour
from reports.record import RATIO_CONFIDENCE, Record
from reports.sheet import (
    THEME,
    WIDE,
    Layout,
    Sheet,
    draw_note,
    legend_marker,
    panel_width,
    points,
    row_label,
    shorten,
)

TITLE = "Step time to full fine-tuning's"

# Ratios past these are of no real pair of steps: they are printed, and not drawn to scale.
LEAST_DRAWN, MOST_DRAWN = 1e-4, 1e4
# The scale always holds these, so that a small effect looks small.
_ALWAYS = (0.5, 2.0)
# How many lines below a row's top its marker stands, under two lines of text.
_MARK = 2.45


def draw(workload: str, groups: Panels, layout: Layout = WIDE) -> Sheet:
    """Markers at `step_time_ratio` with their intervals on a log scale, one row per record."""
    groups = panels.drawn(groups)
    records = panels.flat(groups)
    row = 3 * layout.line + 10
    sheet = Sheet(f"{TITLE}: {workload}", _legend(records), layout)
    axes = sheet.add_panels({regime: len(group) * row for regime, group in groups.items()}, left=30)
    low, high = _limits(records)
    for regime, group in groups.items():
        ax = axes[regime]
        ax.set_xscale("log")
        ax.set_xlim(low, high)
        ax.xaxis.set_major_locator(FixedLocator(ticks(low, high)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_locator(NullLocator())
        ax.set_xlabel("step time / full's, log scale")
        ax.set_ylabel("method [budget]")
        # Only where markers are: a line from top to bottom would run through the text.
        half = 0.55 * layout.line
        lanes = [position * row + _MARK * layout.line for position in range(len(group))]
        ends = [y for lane in lanes for y in (lane - half, lane + half, math.nan)]
        ax.plot([1] * len(ends), ends, color=THEME.foreground, linewidth=1, zorder=1)
        for position, record in enumerate(group):
            _row(ax, record, tables.variation(record, group), position * row, layout)
    return sheet


def timed(groups: Panels) -> bool:
    """Whether any of the records has a time: predictions have none, nor have runs of no rounds."""
    return any(value is not None for r in panels.flat(groups) for value in (r.step_time_s, r.step_time_ratio))


def describe(workload: str, groups: Panels) -> str:
    """What `draw` shows, in words."""
    entries = {
        regime: [f"{record.label} {_ratio_text(record)}, {_details(record)}" for record in group]
        for regime, group in panels.drawn(groups).items()
    }
    how = f"ratios with {RATIO_CONFIDENCE:.0%} intervals on a log scale, 1 being full fine-tuning"
    return panels.words(TITLE, workload, how, entries)


def ticks(low: float, high: float) -> list[float]:
    """Round ratios between `low` and `high`: 1, 2, 5 times powers of ten, or the powers alone where that is many."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    steps = (1, 2, 5) if high / low < 200 else (1,)
    return [step * power for power in powers for step in steps if low <= step * power <= high]


def is_control(record: Record) -> bool:
    """Whether the ratio is full fine-tuning's to itself, which shows the noise of the measurement."""
    return record.method == "full" and record.step_time_ratio is not None


def _drawable(value: float | None) -> bool:
    return value is not None and LEAST_DRAWN <= value <= MOST_DRAWN


def _limits(records: Sequence[Record]) -> tuple[float, float]:
    values = [
        value
        for record in records
        if _drawable(record.step_time_ratio)
        for value in (record.step_time_ratio_low, record.step_time_ratio, record.step_time_ratio_high)
        if _drawable(value)
    ]
    return min(*_ALWAYS, *values) / 1.15, max(*_ALWAYS, *values) * 1.15


def _ratio_text(record: Record) -> str:
    if record.step_time_ratio is None:
        return f"ratio {panels.not_obtained(record)}"
    return tables.time_ratio(record)


def _details(record: Record) -> str:
    """The plain time, and what else decides how the ratio is to be read."""
    plain = "time " + NOT_OBTAINED if record.step_time_s is None else f"{tables.milliseconds(record.step_time_s)} ms"
    notes = [plain, "A/A control" if is_control(record) else "", "paired in blocks" if in_blocks(record) else ""]
    return ", ".join(note for note in (*notes, panels.remarks(record)) if note)


def in_blocks(record: Record) -> bool:
    """Whether only blocks of rounds were paired, since two models did not fit into memory at once."""
    return record.pairing == "blocks"


def _row(ax: Axes, record: Record, variation: str, top: float, layout: Layout) -> None:
    right = "" if record.step_time_ratio is None else tables.time_ratio(record)
    row_label(ax, record, variation, right, top, layout)
    ax.text(
        0.008,
        top + 1.45 * layout.line,
        shorten(_details(record), layout.fits(panel_width(ax, layout))),
        transform=ax.get_yaxis_transform(),
        fontsize=points(layout.font - 1),
        color=THEME.muted,
        va="center",
        parse_math=False,
    )
    middle = top + _MARK * layout.line
    if not _drawable(record.step_time_ratio):
        draw_note(ax, _instead(record), middle, layout)
        return
    low, high = record.step_time_ratio_low, record.step_time_ratio_high
    if low is not None and high is not None:
        ends = [min(max(value, LEAST_DRAWN), MOST_DRAWN) for value in (low, high)]
        ax.plot(ends, [middle, middle], color=THEME.foreground, linewidth=1.4, marker="|", markersize=points(9))
    predicted = record.source == "predicted"
    ax.plot(
        [record.step_time_ratio],
        [middle],
        linestyle="none",
        marker="o",
        markersize=points(layout.font - 3),
        markerfacecolor=THEME.background if predicted else method_colour(record.method),
        markeredgecolor=method_colour(record.method) if predicted else THEME.foreground,
        markeredgewidth=1.4 if predicted else 0.7,
    )


def _instead(record: Record) -> str:
    if record.step_time_ratio is None:
        return _ratio_text(record)
    return "0 (no place on a log scale)" if record.step_time_ratio == 0 else TOO_LARGE_OR_SMALL


TOO_LARGE_OR_SMALL = f"{TOO_LARGE.removesuffix(' to draw')} or too small to draw"


def _legend(records: Sequence[Record]) -> list[Line2D]:
    entries = [
        legend_marker("o", "median of the rounds", THEME.muted),
        Line2D(
            [],
            [],
            color=THEME.foreground,
            linewidth=1.4,
            marker="|",
            markersize=points(9),
            label=f"{RATIO_CONFIDENCE:.0%} interval",
        ),
        Line2D([], [], color=THEME.foreground, linewidth=1, label="1: as long as full"),
    ]
    if any(record.source == "predicted" for record in records):
        entries.append(legend_marker("o", "hollow: predicted", THEME.background))
    return entries
