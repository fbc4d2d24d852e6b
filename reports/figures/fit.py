"""Bars of what a card must have for each training that was predicted for CUDA, beside the memory of cards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from reports import capacity, tables
from reports.capacity import CARDS, CONTEXT_BYTES, Need
from reports.figures import panels
from reports.figures.breakdown import hatched_entry
from reports.figures.panels import HATCH, LARGEST_DRAWN, TOO_LARGE, Panels
from reports.palette import INK, method_colour
from reports.record import Record
from reports.sheet import THEME, WIDE, Layout, Sheet, draw_note, panel_width, points, row_label

TITLE = "What a card must have"
# How much of its colour a bar keeps where the allocator only caches.
PALE = 0.4

_CARD_LINE = {"color": THEME.foreground, "linewidth": 1.2}


def draw(workload: str, groups: Panels, layout: Layout = WIDE) -> Sheet:
    """A bar for each record: the CUDA context, what a step allocates, what the allocator holds besides, GiB."""
    groups = panels.drawn(groups)
    records = panels.flat(groups)
    head, row = 1.5 * layout.line, 2 * layout.line + 12
    sheet = Sheet(f"{TITLE}: {workload}", _legend(records), layout)
    axes = sheet.add_panels({regime: head + len(group) * row for regime, group in groups.items()}, left=30)
    limit = _limit(records)
    for regime, group in groups.items():
        ax = axes[regime]
        ax.set_xlim(0, 1.02 * limit)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}" if limit < 1e6 else f"{x:.1e}"))
        ax.yaxis.set_major_locator(NullLocator())
        ax.set_xlabel("memory of the card, GiB")
        ax.set_ylabel("method [budget]")
        tops = [head + position * row for position in range(len(group))]
        for record, top in zip(group, tops, strict=True):
            _row(ax, record, tables.variation(record, group), top, layout)
        _cards(ax, limit, head, [top for record, top in zip(group, tops, strict=True) if _drawable(record)], layout)
    return sheet


def describe(workload: str, groups: Panels) -> str:
    """What `draw` shows, in words."""
    entries = {
        regime: [f"{record.label} {_words(record)}" for record in group]
        for regime, group in panels.drawn(groups).items()
    }
    return panels.words(TITLE, workload, "horizontal bars, GiB, with lines at the memory of cards", entries)


def _words(record: Record) -> str:
    need = Need.of(record)
    if need is None:
        return panels.not_obtained(record)
    cards = ", ".join(f"{capacity.word(record, card)} in {capacity.card_name(card)}" for card in CARDS)
    return f"needs {tables.gib(need.most_bytes)} ({capacity.decides(record)}): {cards}"


def _drawable(record: Record) -> Need | None:
    need = Need.of(record)
    return need if need is not None and need.most_bytes < LARGEST_DRAWN else None


def _limit(records: Sequence[Record]) -> float:
    """The scale's end, GiB: the smallest card in which every bar ends, or the longest bar where there is no such."""
    largest = max((need.most_bytes for record in records if (need := _drawable(record))), default=0)
    return min((card for card in CARDS if card >= largest), default=largest) / tables.GIB


def _bar(top: float, layout: Layout) -> tuple[float, float]:
    """The top and the height of the bar of a row."""
    return top + layout.line + 4, layout.line - 4


def _row(ax: Axes, record: Record, variation: str, top: float, layout: Layout) -> None:
    need = Need.of(record)
    total = panels.remarks(record) if need is None else f"{tables.gib(need.most_bytes)} GiB"
    row_label(ax, record, variation, total, top, layout)
    y, height = _bar(top, layout)
    if _drawable(record) is None:
        draw_note(ax, panels.not_obtained(record) if need is None else TOO_LARGE, y + height / 2, layout)
        return
    left = 0.0
    parts = (
        (CONTEXT_BYTES, _context_patch()),
        (need.step_bytes - CONTEXT_BYTES, _allocated_patch(method_colour(record.method), HATCH)),
        (max(0, need.held_bytes - need.step_bytes), _cached_patch(method_colour(record.method), HATCH)),
    )
    for size, look in parts:
        ax.add_artist(Rectangle((left, y), size / tables.GIB, height, **look))
        left += size / tables.GIB
    if need.in_preparation:
        ends = [need.step_bytes / tables.GIB, need.preparation_bytes / tables.GIB]
        ax.plot(ends, [y + height / 2] * 2, markevery=[1], zorder=4, **_preparation_line())


def _cards(ax: Axes, limit: float, head: float, tops: Sequence[float], layout: Layout) -> None:
    """A line across each bar at each card's memory, and their names above; a whole line would run through the text."""
    shown = [card / tables.GIB for card in CARDS if card / tables.GIB <= limit]
    spans = [(y - 3, y + height + 3) for y, height in (_bar(top, layout) for top in tops)]
    ends = [y for low, high in ((layout.line, head), *spans) for y in (low, high, math.nan)]
    for card in shown:
        # Upon a bar of any colour a line shows on a ground of its own.
        for look in ({"color": THEME.background, "linewidth": 3.4}, _CARD_LINE):
            ax.plot([card] * len(ends), ends, solid_capstyle="butt", zorder=3, **look)
    size, right = layout.font - 1, math.inf
    places = {card: card / ax.get_xlim()[1] * panel_width(ax, layout) for card in shown}
    closest = min((b - a for a, b in itertools.pairwise(places.values())), default=math.inf)
    # The unit stands below the axis as well.
    unit = " GiB" if closest > _room("80 GiB", size) else ""
    for card, place in reversed(places.items()):
        name = f"{card:g}{unit}"
        if place + _room(name, size) / 2 > right:
            continue
        right = place - _room(name, size) / 2
        ax.text(
            card,
            0.5 * layout.line,
            name,
            ha="center",
            va="center",
            fontsize=points(size),
            color=THEME.foreground,
            parse_math=False,
        )


def _room(name: str, size: int) -> float:
    """The width that a card's name asks for, pixels."""
    return 0.65 * size * len(name) + 4


def _context_patch() -> dict[str, object]:
    return {"facecolor": THEME.line, "edgecolor": THEME.muted, "linewidth": 0.6}


def _allocated_patch(colour: str, hatch: str | None) -> dict[str, object]:
    return {"facecolor": colour, "edgecolor": INK if hatch else THEME.muted, "linewidth": 0.6, "hatch": hatch}


def _cached_patch(colour: str, hatch: str | None) -> dict[str, object]:
    return {**_allocated_patch(colour, hatch), "alpha": PALE}


def _preparation_line() -> dict[str, object]:
    return {
        "color": THEME.foreground,
        "linewidth": 1.4,
        "marker": "|",
        "markersize": points(16),
        "markeredgewidth": 2,
    }


def _legend(records: Sequence[Record]) -> list[Patch | Line2D]:
    needs = [need for record in records if (need := Need.of(record))]
    entries: list[Patch | Line2D] = [
        Patch(label="CUDA context, assumed", **_context_patch()),
        Patch(label="allocated in a step", **_allocated_patch(THEME.muted, None)),
        Patch(label="cached besides", **_cached_patch(THEME.muted, None)),
        Line2D([], [], label="a card's memory", linestyle="none", marker="|", markersize=points(14), **_CARD_LINE),
    ]
    if any(need.in_preparation for need in needs):
        entries.append(Line2D([], [], label="preparation, if more", markevery=[1], **_preparation_line()))
    if needs:
        entries.append(hatched_entry())
    return entries
