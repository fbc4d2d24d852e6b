"""Small multiples: live bytes through one step, by category, with the step's phases and its peak."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from reports import tables
from reports.figures import panels
from reports.figures.breakdown import category_name, category_patch, hatched_entry, mib_tick
from reports.figures.panels import HATCH, LARGEST_DRAWN, NOT_OBTAINED, TOO_LARGE, Panels
from reports.record import BREAKDOWN, Record
from reports.sheet import (
    REGIMES,
    THEME,
    WIDE,
    Grid,
    Layout,
    Sheet,
    draw_note,
    legend_marker,
    panel_width,
    points,
    shorten,
    tile_title,
)
from reports.timeline import Timeline

TITLE = "Live memory through one step"
# Small panels drawn for a regime.
MOST_PANELS = 12

_HEIGHT = {"wide": 150, "narrow": 110}
_SHORT = {"forward": "fwd", "backward": "bwd", "optimizer": "opt", "zero_grad": "zero"}


@dataclass(frozen=True)
class Steps:
    """A timeline as it is drawn: the instants' places on the x axis, on which every phase is 1 wide, and bytes."""

    phases: tuple[str, ...]
    places: tuple[float, ...]
    by_category: dict[str, tuple[int, ...]]
    totals: tuple[int, ...]
    peaks: tuple[int, ...]  # the most bytes live in each phase

    @classmethod
    def of(cls, timeline: Timeline) -> Steps:
        """Every phase stretched to the same width, so that the phases of two methods stand under one another."""
        starts = [start for _, start in timeline.phases]
        ends = [*starts[1:], max(timeline.at[-1], starts[-1])]
        places = []
        for instant in timeline.at:
            # The state at a boundary ends one phase and begins the next: it stands between the two.
            phase = max(0, bisect.bisect_left(starts, instant) - 1)
            length = ends[phase] - starts[phase]
            places.append(phase + ((instant - starts[phase]) / length if length else 0.0))
        totals = timeline.totals
        return cls(
            tuple(name for name, _ in timeline.phases),
            tuple(places),
            {name: timeline.by_category[name] for name in BREAKDOWN},
            totals,
            tuple(_most(timeline.at, totals, *bounds) for bounds in zip(starts, ends, strict=True)),
        )

    @property
    def top(self) -> int:
        """The most bytes live, and so the panel's height."""
        return max(self.totals)

    @property
    def top_at(self) -> int:
        """The sample that holds the most bytes."""
        return self.totals.index(self.top)

    @property
    def top_phase(self) -> str:
        """The phase in which the most bytes are live."""
        return self.phases[self.peaks.index(self.top)]

    def kept(self, pixels: float) -> list[int]:
        """The samples to draw in a panel so many pixels wide: of each pixel's the least, the most and the last."""
        scale = pixels / len(self.phases)
        kept = {0, self.top_at, len(self.places) - 1}
        for _, group in itertools.groupby(range(len(self.places)), key=lambda index: int(self.places[index] * scale)):
            samples = list(group)
            kept |= {min(samples, key=self.totals.__getitem__), max(samples, key=self.totals.__getitem__), samples[-1]}
        return sorted(kept)


def draw(workload: str, groups: Panels, layout: Layout = WIDE) -> Sheet:
    """One small panel per record: bytes of each category, stacked, through one step, on one scale of MiB."""
    groups = panels.drawn(groups, MOST_PANELS)
    records = panels.flat(groups)
    sheet = Sheet(f"{TITLE}: {workload}", _legend(records), layout)
    largest = max((len(group) for group in groups.values()), default=0)
    columns = max(layout.tiles // 2, min(layout.tiles, largest))
    titles = 3 if any(panels.remarks(record) for record in records) else 2
    above, below = (0.9 * titles + 0.6) * layout.line, 2.7 * layout.line
    grid = Grid(columns, _HEIGHT[layout.name], left=5.6 * layout.font, above=above, below=below)
    axes = sheet.add_grid({REGIMES[regime]: len(group) for regime, group in groups.items()}, grid)
    limit = max((steps.top for record in records if (steps := _drawable(record))), default=0) / tables.MIB
    for regime, group in groups.items():
        for index, (ax, record) in enumerate(zip(axes[REGIMES[regime]], group, strict=True)):
            _scale(ax, limit, first=index % columns == 0)
            _panel(ax, record, tables.variation(record, group), layout)
    return sheet


def describe(workload: str, groups: Panels) -> str:
    """What `draw` shows, in words: the most bytes live in each phase."""
    entries = {
        regime: [f"{record.label} {_words(record)}" for record in group]
        for regime, group in panels.drawn(groups, MOST_PANELS).items()
    }
    return panels.words(TITLE, workload, "small stacked areas, the most MiB live in each phase", entries)


@functools.lru_cache(maxsize=4 * MOST_PANELS)
def _steps(text: str) -> Steps:
    # A figure is drawn twice and described once; its series need not be parsed each time.
    return Steps.of(Timeline.loads(text, BREAKDOWN))


def _drawable(record: Record) -> Steps | None:
    steps = _steps(record.timeline) if record.timeline is not None else None
    return steps if steps is not None and steps.top < LARGEST_DRAWN else None


def _most(at: Sequence[int], totals: Sequence[int], start: int, end: int) -> int:
    """The largest total from the state at `start` to that at `end`."""
    first, last = bisect.bisect_right(at, start) - 1, bisect.bisect_right(at, end)
    return max(totals[first:last])


def _words(record: Record) -> str:
    if record.timeline is None:
        return panels.not_obtained(record)
    steps = _steps(record.timeline)
    each = ", ".join(f"{name} {tables.mib(peak)}" for name, peak in zip(steps.phases, steps.peaks, strict=True))
    notes = panels.remarks(record)
    return f"{each}{f' ({notes})' if notes else ''}"


def _scale(ax: Axes, limit: float, first: bool) -> None:
    ax.set_ylim(0, 1.15 * limit or 1)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4) if limit else FixedLocator([0]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: mib_tick(y, limit)))
    ax.tick_params(axis="y", labelleft=first, length=points(4) if first else 0)
    ax.tick_params(axis="x", length=0)
    ax.xaxis.set_major_locator(FixedLocator([]))
    ax.set_xlabel("allocations and frees")
    if first:
        ax.set_ylabel("live, MiB")


def _panel(ax: Axes, record: Record, variation: str, layout: Layout) -> None:
    height = _HEIGHT[layout.name]
    name = f"{record.label} · {variation}" if variation else record.label
    steps = _drawable(record)
    if steps is None:
        missing = record.timeline is None
        tile_title(ax, [name, panels.remarks(record)], layout, height)
        ax.set_xlim(0, 1)
        draw_note(ax, panels.not_obtained(record) if missing else TOO_LARGE, sum(ax.get_ylim()) / 2, layout)
        return
    notes = panels.remarks(record)
    tile_title(ax, [name, *([notes] if notes else []), f"▼ {tables.mib(steps.top)} MiB"], layout, height)
    ax.set_xlim(0, len(steps.phases))
    _areas(ax, steps, record.source == "predicted", layout)
    _phases(ax, steps, layout)
    ax.plot(
        [steps.places[steps.top_at]],
        [steps.top / tables.MIB + 0.05 * ax.get_ylim()[1]],
        linestyle="none",
        marker="v",
        markersize=points(7),
        markerfacecolor=THEME.foreground,
        markeredgecolor=THEME.background,
        markeredgewidth=0.5,
        clip_on=False,
    )


def _areas(ax: Axes, steps: Steps, predicted: bool, layout: Layout) -> None:
    """The stack, drawn from the whole downwards: each area covers the lower part of the one before it."""
    kept = steps.kept(panel_width(ax, layout))
    places = [steps.places[index] for index in kept]
    levels = [0] * len(kept)
    tops: list[tuple[str, list[int]]] = []
    for name in BREAKDOWN:
        series = steps.by_category[name]
        levels = [level + series[index] for level, index in zip(levels, kept, strict=True)]
        if any(series[index] for index in kept):
            tops.append((name, levels))
    for name, levels in reversed(tops):
        patch = {**category_patch(name, HATCH if predicted else None), "linewidth": 0}
        ax.add_artist(Polygon(_outline(places, levels, len(steps.phases)), closed=True, **patch))
    if tops:
        whole = _outline(places, tops[-1][1], len(steps.phases))
        ax.plot(*zip(*whole[1:-1], strict=True), color=THEME.muted, linewidth=0.7)


def _outline(places: Sequence[float], levels: Sequence[int], end: float) -> list[tuple[float, float]]:
    """Bytes from each instant to the next as steps in MiB, closed along the axis."""
    corners = [(0.0, 0.0)]
    height = 0.0
    for index, (place, level) in enumerate(zip(places, levels, strict=True)):
        if index == 0 or level != levels[index - 1]:
            corners.append((place, height))
            height = level / tables.MIB
            corners.append((place, height))
    return [*corners, (end, height), (end, 0.0)]


def _phases(ax: Axes, steps: Steps, layout: Layout) -> None:
    names = steps.phases
    room = panel_width(ax, layout) / len(names)
    size = layout.font - 2
    for index, name in enumerate(names):
        if index:
            ax.axvline(index, color=THEME.foreground, linewidth=0.6, linestyle=(0, (3, 2)))
        fits = [word for word in (name, _SHORT.get(name, shorten(name, 4))) if len(word) * 0.62 * size <= room]
        if fits:
            ax.text(
                index + 0.5,
                -points(5) / points(_HEIGHT[layout.name]),
                shorten(fits[0], 20),
                transform=ax.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=points(size),
                color=THEME.muted,
                parse_math=False,
            )
    ax.xaxis.set_label_coords(0.5, -points(1.5 * size + 6) / points(_HEIGHT[layout.name]))


def _legend(records: Sequence[Record]) -> list[Patch | Line2D]:
    entries: list[Patch | Line2D] = [
        Patch(label=category_name(name), **category_patch(name, None)) for name in BREAKDOWN
    ]
    entries.append(legend_marker("v", "the step's peak", THEME.foreground))
    if any(record.source == "predicted" for record in records):
        entries.append(hatched_entry())
    if any(_drawable(record) is None for record in records):
        entries.append(Patch(label=f"empty: {NOT_OBTAINED}", facecolor=THEME.background, edgecolor=THEME.line))
    return entries
