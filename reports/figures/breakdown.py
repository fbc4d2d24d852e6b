"""Stacked bars: what was live at the instant of the step's peak, by category."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from reports import tables
from reports.figures import panels
from reports.figures.panels import HATCH, LARGEST_DRAWN, NOT_OBTAINED, TOO_LARGE, Panels
from reports.palette import CATEGORY_COLOURS, INK
from reports.record import BREAKDOWN, Record
from reports.sheet import THEME, WIDE, Layout, Sheet, draw_note, row_label

TITLE = "Live memory at the instant of the step's peak"


def draw(workload: str, groups: Panels, layout: Layout = WIDE) -> Sheet:
    """Stacked bars of what was live at the instant of `peak_step_bytes`, MiB, one bar per record."""
    groups = panels.drawn(groups)
    records = panels.flat(groups)
    row = 2 * layout.line + 8
    sheet = Sheet(f"{TITLE}: {workload}", _legend(records), layout)
    axes = sheet.add_panels({regime: len(group) * row for regime, group in groups.items()}, left=30)
    limit = max((_extent(record) for record in records), default=0) / tables.MIB
    for regime, group in groups.items():
        ax = axes[regime]
        ax.set_xlim(0, limit * 1.02 or 1)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4) if limit else NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: mib_tick(x, limit)))
        ax.yaxis.set_major_locator(NullLocator())
        ax.set_xlabel("live memory, MiB")
        ax.set_ylabel("method [budget]")
        for position, record in enumerate(group):
            _row(ax, record, tables.variation(record, group), position * row, layout)
    return sheet


def describe(workload: str, groups: Panels) -> str:
    """What `draw` shows, in words."""
    entries = {
        regime: [f"{record.label} {_total_text(record)}{_parts_text(record)}" for record in group]
        for regime, group in panels.drawn(groups).items()
    }
    return panels.words(TITLE, workload, "stacked horizontal bars, MiB", entries)


def mib_tick(value: float, limit: float) -> str:
    """A tick of a scale in MiB that ends at `limit`."""
    return f"{value:,g}" if limit < 1e6 else f"{value:.1e}"


def category_name(field: str) -> str:
    """A field of the breakdown as the legend calls it."""
    return field.removesuffix("_bytes")


def category_patch(name: str, hatch: str | None) -> dict[str, object]:
    """How areas of a category are filled."""
    # Hatching is drawn in the edge colour, so a predicted bar needs a dark edge and a measured one a thin outline.
    edge = INK if hatch else THEME.muted
    return {"facecolor": CATEGORY_COLOURS[name], "edgecolor": edge, "linewidth": 0.6, "hatch": hatch}


def hatched_entry() -> Patch:
    """The legend's entry for what is predicted."""
    look = {"facecolor": THEME.background, "edgecolor": THEME.foreground, "linewidth": 0.6, "hatch": HATCH}
    return Patch(label="hatched: predicted", **look)


def _total_text(record: Record) -> str:
    if record.peak_step_bytes is None:
        return panels.not_obtained(record)
    notes = panels.remarks(record)
    return f"{tables.mib(record.peak_step_bytes)} MiB{f', {notes}' if notes else ''}"


def _parts_text(record: Record) -> str:
    parts = ", ".join(f"{category_name(name)} {tables.mib(size)}" for name, size in _segments(record))
    return f" ({parts})" if parts else ""


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


def _row(ax: Axes, record: Record, variation: str, top: float, layout: Layout) -> None:
    if record.peak_step_bytes is not None:
        total = _total_text(record)
    else:
        total = f"total {NOT_OBTAINED}" if _segments(record) else panels.remarks(record)
    row_label(ax, record, variation, total, top, layout)
    bar_top, height = top + layout.line + 1, layout.line - 3
    if _length(record) == 0:
        nothing = "0" if record.peak_step_bytes == 0 else panels.not_obtained(record)
        draw_note(ax, nothing, bar_top + height / 2, layout)
        return
    if _extent(record) == 0:
        draw_note(ax, TOO_LARGE, bar_top + height / 2, layout)
        return
    hatch = HATCH if record.source == "predicted" else None
    left = 0.0
    # add_artist, as add_patch would work out data limits that nobody asks for.
    for name, size in _segments(record):
        ax.add_artist(Rectangle((left, bar_top), size / tables.MIB, height, **category_patch(name, hatch)))
        left += size / tables.MIB
    rest = _unexplained(record) / tables.MIB
    if rest:
        ax.add_artist(Rectangle((left, bar_top), rest, height, **_unexplained_patch(hatch)))


def _unexplained_patch(hatch: str | None) -> dict[str, object]:
    return {
        "facecolor": THEME.background,
        "edgecolor": THEME.muted,
        "linewidth": 0.8,
        "linestyle": "--",
        "hatch": hatch,
    }


def _legend(records: Sequence[Record]) -> list[Patch | Line2D]:
    entries: list[Patch | Line2D] = [
        Patch(label=category_name(name), **category_patch(name, None)) for name in BREAKDOWN
    ]
    if any(_unexplained(record) for record in records):
        entries.append(Patch(label=f"category {NOT_OBTAINED}", **_unexplained_patch(None)))
    if any(record.source == "predicted" for record in records):
        entries.append(hatched_entry())
    return entries
