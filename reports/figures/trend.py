"""Small panels of one figure over the commits of a history, one for each benchmark in which it moved."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter

from reports import compare_tables, tables
from reports.compare import VERDICTS
from reports.figures.panels import LARGEST_DRAWN, TOO_LARGE
from reports.history import CommitMove, Entry, Series, is_hash
from reports.palette import VERDICT_COLOURS, VERDICT_MARKERS
from reports.record import RATIO_CONFIDENCE
from reports.sheet import (
    THEME,
    WIDE,
    Grid,
    Layout,
    Sheet,
    draw_note,
    legend_marker,
    panel_width,
    points,
    printable,
    tile_title,
)

Named = Sequence[tuple[str, Series]]  # each with the name of its benchmark

_COLUMNS = {"wide": 3, "narrow": 1}
_HEIGHT = 110
_TICK_CHARACTERS = 12
# Of a commit's name as an axis and a table have it.
SHORT = 7
LONGEST_COMMIT = 20


def draw(entries: Sequence[Entry], named: Named, layout: Layout = WIDE) -> Sheet:
    """One panel a series, each on a scale of its own: the level at each commit, and a mark where it moved."""
    figure = named[0][1].figure
    sheet = Sheet(f"{figure} over {len(entries):,} commits, {unit(figure)}", _legend(named), layout)
    side = 0.6 * (layout.font - 1) * (_TICK_CHARACTERS + 1)
    grid = Grid(
        _COLUMNS[layout.name],
        _HEIGHT,
        left=side,
        above=3.2 * layout.line,
        below=2.9 * layout.line,
        gap=side + 6 if _COLUMNS[layout.name] > 1 else 10,
    )
    axes = sheet.add_grid({"each panel on a scale of its own": len(named)}, grid)
    for ax, (name, series) in zip(*axes.values(), named, strict=True):
        method, _, rest = name.partition(", ")
        room = int((panel_width(ax, layout) + 10) / (0.6 * layout.font))
        below = textwrap.wrap(printable(rest), room, max_lines=2, placeholder=" …")
        tile_title(ax, [method, *below], layout, _HEIGHT)
        _panel(ax, entries, series, layout)
    return sheet


def describe(entries: Sequence[Entry], named: Named) -> str:
    """What `draw` shows, in words."""
    figure = named[0][1].figure
    parts = [f"{figure} over {len(entries):,} commits, a line with steps for each benchmark."]
    for name, series in named:
        known = [(entry, value) for entry, value in zip(entries, series.values, strict=True) if value is not None]
        said = [
            f"{compare_tables.value(figure, value)} at {short(entry.commit)}" for entry, value in (known[0], known[-1])
        ]
        moves = [
            f"{each.move.verdict} at {short(entries[each.position].commit)} to "
            f"{compare_tables.value(figure, each.move.new)}"
            for each in series.moves
        ]
        parts.append(f"{name}: from {said[0]} to {said[1]}; {', '.join(moves)}.")
    return " ".join(parts)


def short(commit: str) -> str:
    """A commit's name as it is shown: a hash by its first digits, with -dirty behind it where it had that."""
    if is_hash(commit):
        digits, dirty, _ = commit.partition("-")
        return digits[:SHORT] + dirty + "dirty" * bool(dirty)
    return commit if len(commit) <= LONGEST_COMMIT else commit[: LONGEST_COMMIT - 1] + "…"


def unit(figure: str) -> str:
    """What a panel's scale counts."""
    if figure.endswith("_bytes"):
        return "MiB"
    if figure.endswith("_ratio"):
        return "ratio to full fine-tuning's"
    if figure == "fits":
        return "yes or no"
    return "share" if figure.endswith("_fraction") else "count"


def _panel(ax: Axes, entries: Sequence[Entry], series: Series, layout: Layout) -> None:
    ax.set_xlim(-0.5, len(entries) - 0.5)
    _commits(ax, entries, series, layout)
    levels = [_level(series.figure, value) for value in series.values]
    known = [level for level in levels if level is not None]
    if max(map(abs, known)) >= LARGEST_DRAWN:
        ax.set_ylim(0, 1)
        ax.yaxis.set_major_locator(FixedLocator([]))
        draw_note(ax, TOO_LARGE, 0.5, layout)
        return
    # Each commit is as wide as any: a level from half a step before it to half a step behind.
    places = [place for position in range(len(levels)) for place in (position - 0.5, position + 0.5)]
    intervals = [each if each and max(map(abs, each)) < LARGEST_DRAWN else None for each in series.intervals]
    if any(intervals):
        lows, highs = ([math.nan if each is None else each[end] for each in intervals] for end in (0, 1))
        ax.fill_between(places, _twice(lows), _twice(highs), color=THEME.line, linewidth=0)
    heights = _twice([math.nan if level is None else level for level in levels])
    ax.plot(places, heights, color=THEME.foreground, linewidth=1.4, solid_joinstyle="miter")
    _scale(ax, series.figure, known, [end for each in intervals if each for end in each])
    for each in series.moves:
        if levels[each.position] is not None:
            ax.plot([each.position], [levels[each.position]], zorder=4, clip_on=False, **_mark(each))


def _twice(values: Sequence[float]) -> list[float]:
    return [value for value in values for _ in range(2)]


def _level(figure: str, value: int | float | None) -> float | None:
    if value is None:
        return None
    return value / tables.MIB if figure.endswith("_bytes") else float(value)


def _scale(ax: Axes, figure: str, levels: Sequence[float], ends: Sequence[float]) -> None:
    """The scale around all levels and intervals; the least, the largest and the last level are named."""
    low, high = min(*levels, *ends, levels[0]), max(*levels, *ends, levels[0])
    room = 0.12 * (high - low) or abs(high) or 1
    ax.set_ylim(low - room, high + room)
    apart = 0.16 * (high - low + 2 * room)
    named: list[float] = []
    for level in (levels[-1], max(levels), min(levels)):
        if all(abs(level - other) > apart for other in named):
            named.append(level)
    span = max(levels) - min(levels)
    ax.yaxis.set_major_locator(FixedLocator(named))
    ax.yaxis.set_major_formatter(FixedFormatter([_tick(figure, level, span) for level in named]))


def _tick(figure: str, level: float, span: float) -> str:
    """A level with as many decimals as tell it from the others."""
    if figure == "fits":
        return "yes" if level else "no"
    decimals = 2 if figure.endswith(("_bytes", "_ratio", "_fraction")) else 0
    if decimals and span:
        decimals = min(max(decimals, 1 - math.floor(math.log10(span))), 7)
    said = f"{level:,.{decimals}f}"
    return said if len(said) <= _TICK_CHARACTERS else f"{level:.5e}"


def _commits(ax: Axes, entries: Sequence[Entry], series: Series, layout: Layout) -> None:
    """Names the commits at which it moved, the most severe first, then the ends, wherever two names do not meet."""
    size = layout.font - 2
    step = panel_width(ax, layout) / len(entries)
    moved = sorted(series.moves, key=lambda each: each.move.severity)
    taken: list[tuple[float, float]] = []  # pixels from the panel's left edge
    ax.xaxis.set_major_locator(FixedLocator(sorted({each.position for each in moved})))
    ax.xaxis.set_major_formatter(NullFormatter())
    for position in (*(each.position for each in moved), len(entries) - 1, 0):
        entry = entries[position]
        lines = (short(entry.commit), entry.when[:10])
        width = 0.62 * size * max(map(len, lines))
        # Beside its commit rather than below it where it would leave the panel.
        left = min(max((position + 0.5) * step - width / 2, 0), step * len(entries) - width)
        if all(left > end + 6 or left + width < start - 6 for start, end in taken):
            taken.append((left, left + width))
            ax.text(
                (left + width / 2) / step / len(entries),
                -7 / _HEIGHT,
                "\n".join(lines),
                transform=ax.transAxes,
                ha="center",
                va="top",
                fontsize=points(size),
                color=THEME.muted,
                parse_math=False,
            )


def _mark(each: CommitMove) -> dict[str, object]:
    return {
        "linestyle": "none",
        "marker": VERDICT_MARKERS[each.move.verdict],
        "markersize": points(9),
        "markerfacecolor": _fill(each.move.verdict) if each.by_the_commit else THEME.background,
        "markeredgecolor": THEME.foreground,
        "markeredgewidth": 0.8,
    }


def _fill(verdict: str) -> str:
    return VERDICT_COLOURS.get(verdict, THEME.background)


def _legend(named: Named) -> list[Patch | Line2D]:
    moves = [each for _, series in named for each in series.moves]
    entries: list[Patch | Line2D] = [Line2D([], [], color=THEME.foreground, linewidth=1.4, label="level")]
    if any(any(series.intervals) for _, series in named):
        entries.append(Patch(facecolor=THEME.line, label=f"{RATIO_CONFIDENCE:.0%} interval"))
    for verdict in VERDICTS:
        if any(each.move.verdict == verdict for each in moves):
            entries.append(legend_marker(VERDICT_MARKERS[verdict], verdict, _fill(verdict)))
    if any(not each.by_the_commit and each.move.verdict in VERDICT_COLOURS for each in moves):
        entries.append(legend_marker("o", "hollow: not by one commit", THEME.background))
    return entries
