"""The report's figures, each as PNG bytes with a text that says the same to those who cannot see it.

A figure shows one workload, with one panel per `train_rest` regime. It comes in two layouts, since text that fits a
wide page is too small to read once the page is as wide as a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from reports import tables
from reports.palette import CATEGORY_COLOURS, LIGHT, Theme, method_colour
from reports.record import BREAKDOWN, COUNTS, Record
from reports.sheet import WIDE, Layout, Sheet, draw_note, panel_width, points, row_label

Panels = Mapping[str, Sequence[Record]]

# A panel draws this many records; past it bars stop being comparable and the image becomes very tall.
MOST_DRAWN = 40
# Sizes from here on (8 EiB, 9e18 entries) belong to no machine: they are printed, and not drawn to scale.
LARGEST_DRAWN = 2**63
NOT_OBTAINED = "not obtained"
TOO_LARGE = "too large to draw"

BREAKDOWN_TITLE = "Live memory at the instant of the step's peak"
COUNTS_TITLE = "Parameter counts"

_MARKERS = dict(zip(COUNTS, "osD^v", strict=True))
_HATCH = "////"


def breakdown(workload: str, panels: Panels, layout: Layout = WIDE, theme: Theme = LIGHT) -> bytes:
    """Stacked bars of what was live at the instant of `peak_step_bytes`, MiB, one bar per record, as PNG bytes."""
    panels = drawn(panels)
    records = [record for group in panels.values() for record in group]
    row = 2 * layout.line + 8
    sheet = Sheet(f"{BREAKDOWN_TITLE}: {workload}", _breakdown_legend(records, theme), layout, theme)
    axes = sheet.add_panels({regime: len(group) * row for regime, group in panels.items()}, left=30)
    limit = max((_extent(record) for record in records), default=0) / tables.MIB
    for regime, group in panels.items():
        ax = axes[regime]
        ax.set_xlim(0, limit * 1.02 or 1)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4) if limit else NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}" if limit < 1e6 else f"{x:.1e}"))
        ax.yaxis.set_major_locator(NullLocator())
        ax.set_xlabel("live memory, MiB")
        ax.set_ylabel("method [budget]")
        for position, record in enumerate(group):
            _breakdown_row(ax, record, _variation(record, group), position * row, layout, theme)
    return sheet.png()


def breakdown_alt(workload: str, panels: Panels) -> str:
    """What `breakdown` shows, in words."""
    parts = [f"{BREAKDOWN_TITLE}, {workload}: stacked horizontal bars, MiB."]
    for regime, group in drawn(panels).items():
        entries = (f"{record.label} {_total_text(record)}{_parts_text(record)}" for record in group)
        parts.append(f"train_rest {regime}: {'; '.join(entries)}.")
    return " ".join(parts)


def counts(workload: str, panels: Panels, layout: Layout = WIDE, theme: Theme = LIGHT) -> bytes:
    """Each record's parameter counts under one another on a log scale, as PNG bytes."""
    panels = drawn(panels)
    records = [record for group in panels.values() for record in group]
    lane = layout.line - 3
    row = layout.line + len(COUNTS) * lane + 10
    sheet = Sheet(f"{COUNTS_TITLE}: {workload}", _counts_legend(records, theme), layout, theme)
    axes = sheet.add_panels({regime: len(group) * row for regime, group in panels.items()}, left=92)
    low, high = _decades([getattr(record, name) for record in records for name in COUNTS])
    for regime, group in panels.items():
        ax = axes[regime]
        ax.set_xscale("log")
        ax.set_xlim(low, high)
        ax.xaxis.set_major_locator(LogLocator(numticks=6))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("parameters (entries), log scale")
        ax.set_ylabel("method [budget]")
        ax.yaxis.set_major_locator(NullLocator())
        ax.yaxis.set_label_coords(-64 / panel_width(ax, layout), 0.5)
        for position, record in enumerate(group):
            top = position * row
            row_label(ax, record, _variation(record, group), _source_text(record), top, layout, theme)
            for index, name in enumerate(COUNTS):
                middle = top + layout.line + (index + 0.5) * lane
                _lane_label(ax, _count_name(name), middle, layout, theme)
                _count_lane(ax, record, name, middle, layout, theme)
    return sheet.png()


def counts_alt(workload: str, panels: Panels) -> str:
    """What `counts` shows, in words."""
    parts = [f"{COUNTS_TITLE}, {workload}: markers on a log scale."]
    for regime, group in drawn(panels).items():
        entries = (f"{record.label} {_counts_text(record)}" for record in group)
        parts.append(f"train_rest {regime}: {'; '.join(entries)}.")
    return " ".join(parts)


def drawn(panels: Panels) -> dict[str, list[Record]]:
    """The records of `panels` that a figure draws: the first `MOST_DRAWN` of each."""
    return {regime: list(group[:MOST_DRAWN]) for regime, group in panels.items()}


def _category_name(field: str) -> str:
    return field.removesuffix("_bytes")


def _count_name(field: str) -> str:
    return field.removesuffix("_params")


def _source_text(record: Record) -> str:
    notes = [record.source] if record.source != "measured" else []
    notes += [record.status] if record.status != "ok" else []
    return ", ".join(notes)


def _failure(record: Record) -> str:
    return "" if record.status == "ok" else f" ({tables.status(record)})"


def _total_text(record: Record) -> str:
    if record.peak_step_bytes is None:
        return f"{NOT_OBTAINED}{_failure(record)}"
    notes = _source_text(record)
    return f"{tables.mib(record.peak_step_bytes)} MiB{f', {notes}' if notes else ''}"


def _parts_text(record: Record) -> str:
    parts = ", ".join(f"{_category_name(name)} {tables.mib(size)}" for name, size in _segments(record))
    return f" ({parts})" if parts else ""


def _counts_text(record: Record) -> str:
    values = ((_count_name(name), getattr(record, name)) for name in COUNTS)
    return ", ".join(f"{name} {NOT_OBTAINED if value is None else tables.count(value)}" for name, value in values)


def _variation(record: Record, group: Sequence[Record]) -> str:
    """What tells `record` from others of its panel besides its label; measured or predicted is drawn, not said."""
    names = [name for name in tables.differing_circumstances(group) if name not in ("source", "equal_trainable")]
    return ", ".join(f"{name} {tables.plain(getattr(record, name))}" for name in names)


def _segments(record: Record) -> list[tuple[str, int]]:
    """The obtained categories of the record's peak, in stacking order."""
    return [(name, getattr(record, name)) for name in BREAKDOWN if getattr(record, name)]


def _unexplained(record: Record) -> int:
    """What of the peak no obtained category accounts for, bytes."""
    if record.peak_step_bytes is None or all(getattr(record, name) is not None for name in BREAKDOWN):
        return 0
    return max(0, record.peak_step_bytes - sum(size for _, size in _segments(record)))


def _length(record: Record) -> int:
    return max(record.peak_step_bytes or 0, sum(size for _, size in _segments(record)))


def _extent(record: Record) -> int:
    """The bytes a record's bar takes of the axis; 0 where it is not drawn."""
    return _length(record) if _length(record) < LARGEST_DRAWN else 0


def _breakdown_row(ax: Axes, record: Record, variation: str, top: float, layout: Layout, theme: Theme) -> None:
    if record.peak_step_bytes is not None:
        total = _total_text(record)
    else:
        total = f"total {NOT_OBTAINED}" if _segments(record) else _source_text(record)
    row_label(ax, record, variation, total, top, layout, theme)
    bar_top, height = top + layout.line + 1, layout.line - 3
    if _length(record) == 0:
        nothing = "0" if record.peak_step_bytes == 0 else f"{NOT_OBTAINED}{_failure(record)}"
        draw_note(ax, nothing, bar_top + height / 2, layout, theme)
        return
    if _extent(record) == 0:
        draw_note(ax, TOO_LARGE, bar_top + height / 2, layout, theme)
        return
    hatch = _HATCH if record.source == "predicted" else None
    left = 0.0
    for name, size in _segments(record):
        patch = _category_patch(name, hatch, theme)
        ax.add_patch(Rectangle((left, bar_top), size / tables.MIB, height, **patch))
        left += size / tables.MIB
    rest = _unexplained(record) / tables.MIB
    if rest:
        ax.add_patch(Rectangle((left, bar_top), rest, height, **_unexplained_patch(hatch, theme)))


def _category_patch(name: str, hatch: str | None, theme: Theme) -> dict[str, object]:
    # Hatching is drawn in the edge colour, so a predicted bar needs a dark edge and a measured one a thin outline.
    edge = "#1b1f24" if hatch else theme.muted
    return {"facecolor": CATEGORY_COLOURS[name], "edgecolor": edge, "linewidth": 0.6, "hatch": hatch}


def _unexplained_patch(hatch: str | None, theme: Theme) -> dict[str, object]:
    return {
        "facecolor": theme.background,
        "edgecolor": theme.muted,
        "linewidth": 0.8,
        "linestyle": "--",
        "hatch": hatch,
    }


def _breakdown_legend(records: Sequence[Record], theme: Theme) -> list[Patch | Line2D]:
    entries: list[Patch | Line2D] = [
        Patch(label=_category_name(name), **_category_patch(name, None, theme)) for name in BREAKDOWN
    ]
    if any(_unexplained(record) for record in records):
        entries.append(Patch(label=f"category {NOT_OBTAINED}", **_unexplained_patch(None, theme)))
    if any(record.source == "predicted" for record in records):
        hatched = {"facecolor": theme.background, "edgecolor": theme.foreground, "linewidth": 0.6, "hatch": _HATCH}
        entries.append(Patch(label="hatched: predicted", **hatched))
    return entries


def _decades(values: Sequence[int | None]) -> tuple[float, float]:
    """The whole decades around the values that a log scale can show, with room for the markers at its ends."""
    positive = [value for value in values if value is not None and 0 < value < LARGEST_DRAWN]
    if not positive:
        return 1.0, 10.0
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    margin = 10 ** (0.03 * (max(high, low + 1) - low))
    return 10.0**low / margin, 10.0 ** max(high, low + 1) * margin


def _lane_label(ax: Axes, text: str, middle: float, layout: Layout, theme: Theme) -> None:
    ax.text(
        -5 / panel_width(ax, layout),
        middle,
        text,
        transform=ax.get_yaxis_transform(),
        ha="right",
        va="center_baseline",
        fontsize=points(layout.font - 1),
        color=theme.muted,
    )


def _count_lane(ax: Axes, record: Record, name: str, middle: float, layout: Layout, theme: Theme) -> None:
    value = getattr(record, name)
    if value is None:
        draw_note(ax, NOT_OBTAINED, middle, layout, theme)
        return
    if value == 0 or value >= LARGEST_DRAWN:
        note = "0 (no place on a log scale)" if value == 0 else f"{tables.count(value)}, {TOO_LARGE}"
        draw_note(ax, note, middle, layout, theme)
        return
    predicted = record.source == "predicted"
    ax.plot(
        [value],
        [middle],
        linestyle="none",
        marker=_MARKERS[name],
        markersize=points(layout.font - 4),
        markerfacecolor=theme.background if predicted else method_colour(record.method),
        markeredgecolor=method_colour(record.method) if predicted else theme.foreground,
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
        color=theme.foreground,
    )


def _counts_legend(records: Sequence[Record], theme: Theme) -> list[Patch | Line2D]:
    entries: list[Patch | Line2D] = [
        _legend_marker(_MARKERS[name], _count_name(name), theme.muted, theme) for name in COUNTS
    ]
    if any(record.source == "predicted" for record in records):
        entries.append(_legend_marker("o", "hollow: predicted", theme.background, theme))
    return entries


def _legend_marker(marker: str, label: str, fill: str, theme: Theme) -> Line2D:
    return Line2D(
        [],
        [],
        linestyle="none",
        marker=marker,
        markersize=points(8),
        markerfacecolor=fill,
        markeredgecolor=theme.foreground,
        markeredgewidth=0.8,
        label=label,
    )
