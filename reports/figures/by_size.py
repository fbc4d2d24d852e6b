"""The step's peak of layers and blocks by their size and by method: the one figure that shows many workloads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from reports import tables
from reports.figures import panels
from reports.figures.panels import LARGEST_DRAWN
from reports.palette import by_name, method_colour, method_marker
from reports.record import Record
from reports.sheet import (
    REGIMES,
    THEME,
    WIDE,
    Grid,
    Layout,
    Sheet,
    draw_note,
    legend_marker,
    points,
    shorten,
    tile_title,
)

TITLE = "Peak of a step by layer size and method"
# The first of each; what is left out stands in the tables.
MOST_PANELS = 8
MOST_SIZES = 8
MOST_METHODS = 28

_HEIGHT = 230
# The part of a size's place on the axis over which its methods spread: equal peaks would hide one another.
_SPREAD = 0.5


@dataclass(frozen=True)
class Setting:
    """What one panel holds fixed: all but the size and the method."""

    kind: str  # layer or block
    tokens: int | None  # batch x seq
    dtype: str
    semantics: str  # whose kernels: cpu or cuda

    @property
    def title(self) -> str:
        """The panel's name."""
        kind = "layer" if self.kind == "layer" else "two blocks"
        tokens = f"{tables.count(self.tokens)} token{'s' if self.tokens != 1 else ''}"
        return f"{kind}, {tokens}, {self.dtype}{', CUDA' if self.semantics == 'cuda' else ''}"


@dataclass
class Panel:
    """The records of one setting by size, (D_in, D_out) in order of their product."""

    sizes: dict[tuple[int, int], list[Record]] = field(default_factory=dict)

    def sorted(self) -> Panel:
        """The same in order of size, the `MOST_SIZES` smallest."""
        order = sorted(self.sizes, key=lambda size: (size[0] * size[1], size))
        return Panel({size: self.sizes[size] for size in order[:MOST_SIZES]})


@dataclass(frozen=True)
class Chart:
    """What the figure draws: panels by regime and setting, and the methods in their order."""

    regimes: dict[str, dict[Setting, Panel]]
    methods: tuple[str, ...]
    total: int  # records of layers and blocks, drawn or not

    @classmethod
    def of(cls, records: Iterable[Record]) -> Chart:
        """The layers and blocks among the records."""
        found: dict[str, dict[Setting, Panel]] = {}
        names: dict[str, None] = {}
        total = 0
        for record in records:
            shape = tables.alone(record.model)
            if shape is None:
                continue
            total += 1
            names.setdefault(record.method)
            tokens = None if record.batch is None or record.seq is None else record.batch * record.seq
            setting = Setting(shape[0], tokens, record.dtype, record.device_semantics)
            panel = found.setdefault(record.train_rest, {}).setdefault(setting, Panel())
            panel.sizes.setdefault(shape[1:], []).append(record)
        regimes = {
            regime: {setting: settings[setting].sorted() for setting in sorted(settings, key=_order)[:MOST_PANELS]}
            for regime, settings in sorted(found.items())
        }
        return cls(regimes, tuple(sorted(names, key=by_name)[:MOST_METHODS]), total)

    @property
    def records(self) -> list[Record]:
        """The records that are drawn."""
        every = (record for panel in self.panels for group in panel.sizes.values() for record in group)
        return [record for record in every if record.method in self.methods]

    @property
    def left_out(self) -> int:
        """How many records of layers and blocks are not drawn."""
        return self.total - len(self.records)

    @property
    def panels(self) -> list[Panel]:
        """The panels in their order."""
        return [panel for settings in self.regimes.values() for panel in settings.values()]

    def shift(self, method: str) -> float:
        """How far a method's marks stand from the middle of a size."""
        number = len(self.methods)
        return (self.methods.index(method) - (number - 1) / 2) * _SPREAD / number


def draw(chart: Chart, layout: Layout = WIDE) -> Sheet:
    """A mark for each record's `peak_step_bytes`, MiB on a log scale, over the sizes of its panel."""
    sheet = Sheet(TITLE, _legend(chart), layout)
    largest = max((len(settings) for settings in chart.regimes.values()), default=0)
    columns = max(1, min(layout.tiles // 2 if layout.tiles > 2 else 1, largest))
    grid = Grid(columns, _HEIGHT, left=5.6 * layout.font, above=1.5 * layout.line, below=4.2 * layout.line)
    axes = sheet.add_grid({REGIMES[regime]: len(settings) for regime, settings in chart.regimes.items()}, grid)
    low, high = _limits(chart.records)
    for regime, settings in chart.regimes.items():
        for index, (setting, panel) in enumerate(settings.items()):
            ax = axes[REGIMES[regime]][index]
            tile_title(ax, [setting.title], layout, _HEIGHT)
            _scale(ax, list(panel.sizes), low, high, layout, first=index % columns == 0)
            _marks(ax, panel, chart, layout)
    return sheet


def describe(chart: Chart) -> str:
    """What `draw` shows, in words."""
    parts = [f"{TITLE}: marks on a log scale, MiB."]
    for regime, settings in chart.regimes.items():
        for setting, panel in settings.items():
            sizes = (
                f"{_size(size)}: {', '.join(_words(record) for record in group if record.method in chart.methods)}"
                for size, group in panel.sizes.items()
            )
            parts.append(f"train_rest {regime}, {setting.title}: {'; '.join(sizes)}.")
    return " ".join(parts)


def _order(setting: Setting) -> tuple:
    tokens = -1 if setting.tokens is None else setting.tokens
    return (setting.kind != "layer", tokens, setting.dtype, setting.semantics)


def _size(size: tuple[int, int], between: str = "x") -> str:
    return f"{size[0]}{between}{size[1]}"


def _words(record: Record) -> str:
    notes = panels.remarks(record)
    peak = panels.NOT_OBTAINED if record.peak_step_bytes is None else tables.mib(record.peak_step_bytes)
    return f"{record.label} {peak}{f' ({notes})' if notes else ''}"


def _drawable(record: Record) -> bool:
    return record.peak_step_bytes is not None and 0 < record.peak_step_bytes < LARGEST_DRAWN


def _limits(records: Sequence[Record]) -> tuple[float, float]:
    """The scale's ends in MiB, with room for the markers and for what was not obtained below them."""
    peaks = [record.peak_step_bytes / tables.MIB for record in records if _drawable(record)]
    low, high = (min(peaks), max(peaks)) if peaks else (1.0, 1.0)
    span = max(high / low, 2.0)
    return low / span**0.16, max(high, 2 * low) * span**0.05


def _ticks(low: float, high: float) -> list[float]:
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    steps = (1, 2, 5) if high / low < 300 else (1,)
    every = [step * power for power in powers for step in steps if low <= step * power <= high]
    return every[:: math.ceil(len(every) / 8) or 1]


def _scale(ax: Axes, sizes: Sequence[tuple[int, int]], low: float, high: float, layout: Layout, first: bool) -> None:
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ax.set_xlim(-0.5, max(1, len(sizes)) - 0.5)
    ax.xaxis.set_major_locator(FixedLocator(list(range(len(sizes)))))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _size(sizes[round(x)], "\nx ")))
    ax.yaxis.set_major_locator(FixedLocator(_ticks(low, high)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}" if 1e-4 <= y < 1e6 else f"{y:.0e}"))
    ax.tick_params(axis="y", labelleft=first, length=points(4) if first else 0)
    ax.tick_params(axis="x", length=0)
    for edge in range(1, len(sizes)):
        ax.axvline(edge - 0.5, color=THEME.line, linewidth=0.6)
    ax.set_xlabel("D_in x D_out" if layout.tiles < 3 else "size of the layer, D_in x D_out")
    if first:
        ax.set_ylabel("peak, MiB, log scale")


def _marks(ax: Axes, panel: Panel, chart: Chart, layout: Layout) -> None:
    for method in chart.methods:
        for source in ("measured", "predicted"):
            of_size = [
                [record for record in group if record.method == method and record.source == source]
                for group in panel.sizes.values()
            ]
            _series(ax, method, of_size, chart.shift(method), source == "predicted", layout)
    if not any(_drawable(record) for group in panel.sizes.values() for record in group):
        low, high = ax.get_ylim()
        draw_note(ax, panels.NOT_OBTAINED, math.sqrt(low * high), layout)


def _series(
    ax: Axes, method: str, of_size: Sequence[Sequence[Record]], shift: float, predicted: bool, layout: Layout
) -> None:
    """One method's marks; joined where each size has one record, since a line through several would pick."""
    colour = method_colour(method)
    marks = [(place + shift, r) for place, group in enumerate(of_size) for r in group if _drawable(r)]
    missing = [place + shift for place, group in enumerate(of_size) if any(not _drawable(r) for r in group)]
    several = any(len(group) > 1 for group in of_size)
    look = {
        "marker": method_marker(method),
        # A star fills less of its square than other shapes do; a prediction must not hide behind what it predicts.
        "markersize": points(
            (9 if layout.tiles > 2 else 8) * (1.35 if method_marker(method) == "*" else 1) * (1.5 if predicted else 1)
        ),
        "markerfacecolor": THEME.background if predicted else colour,
        "markeredgecolor": colour if predicted else THEME.foreground,
        "markeredgewidth": 1.4 if predicted else 0.6,
    }
    if not several and len(marks) > 1:
        by_place = dict(marks)
        line = [by_place.get(place + shift) for place in range(len(of_size))]
        heights = [math.nan if record is None else record.peak_step_bytes / tables.MIB for record in line]
        places = [place + shift for place in range(len(of_size))]
        ax.plot(places, heights, color=colour, linewidth=0.9, linestyle="--" if predicted else "-", zorder=2)
    if marks:
        heights = [record.peak_step_bytes / tables.MIB for _, record in marks]
        ax.plot([place for place, _ in marks], heights, linestyle="none", zorder=3 - 0.5 * predicted, **look)
    if missing:
        ax.plot(
            missing,
            [0.05] * len(missing),
            linestyle="none",
            marker="x",
            markersize=points(7),
            markeredgecolor=colour,
            markeredgewidth=1.4,
            transform=ax.get_xaxis_transform(),
        )


def _legend(chart: Chart) -> list[Line2D]:
    entries = [legend_marker(method_marker(name), shorten(name, 22), method_colour(name)) for name in chart.methods]
    records = chart.records
    if any(record.source == "predicted" for record in records):
        entries.append(legend_marker("o", "hollow: predicted", THEME.background))
    if any(not _drawable(record) for record in records):
        entries.append(legend_marker("x", f"{panels.NOT_OBTAINED}, or off the scale", THEME.muted, THEME.muted))
    return entries
