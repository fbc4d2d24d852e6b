"""The paper that figures are drawn on: layouts, panels with a title and a legend, text that fits, PNG and SVG."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import text_to_path
from PIL import Image

from reports import svg
from reports.palette import LIGHT
from reports.record import Record

REGIMES = {
    "all": "train_rest = all: the rest of the model trains too",
    "none": "train_rest = none: the rest of the model is frozen",
}
# Device pixels per CSS pixel of the PNG, for sharp text on dense screens.
DENSITY = 1.5
# Figures are drawn in the light theme; their SVG turns dark with its reader.
THEME = LIGHT


@dataclass(frozen=True)
class Layout:
    """The size a figure is drawn for, in CSS pixels, and how many panels or small tiles stand side by side."""

    name: str
    width: int
    columns: int
    tiles: int
    font: int

    @property
    def line(self) -> int:
        """The height of a line of text."""
        return round(self.font * 1.5)

    def fits(self, width: float) -> int:
        """How many characters of ordinary text fit in `width`."""
        return max(8, int(width / (0.6 * self.font)))


WIDE = Layout("wide", width=1280, columns=2, tiles=4, font=12)
NARROW = Layout("narrow", width=358, columns=1, tiles=2, font=11)


@dataclass(frozen=True)
class Grid:
    """Small panels in rows: their size and the room around them in CSS pixels, and how many stand in a row."""

    columns: int
    height: float
    left: float  # beside the first of a row, for the scale that its row shares
    above: float
    below: float
    gap: float = 14  # between neighbours; more where each has a scale of its own


# Of the legend, in ems.
_HANDLE, _AFTER_HANDLE, _BETWEEN_COLUMNS = 1.4, 0.8, 1.4
# A letter's width is rounded to whole pixels where it is drawn.
_ROUNDING = 1.08


def _legend_columns(labels: Sequence[str], layout: Layout) -> int:
    """How many columns, which are filled one after the other, stand side by side in the layout."""
    size = FontProperties(size=points(layout.font))
    widths = [
        text_to_path.get_text_width_height_descent(label, size, ismath=False)[0] / points(1) * _ROUNDING
        + (_HANDLE + _AFTER_HANDLE) * layout.font
        for label in labels
    ]
    if not labels:
        return 1
    # One row where all fit in it, and else no more than can be told apart.
    most = min(len(labels), max(2, layout.width // 165))
    for columns in (len(labels), *range(most, 1, -1)):
        rows, longer = divmod(len(labels), columns)
        starts = [i * rows + min(i, longer) for i in range(columns + 1)]
        taken = sum(max(widths[a:b]) for a, b in pairwise(starts)) + (columns - 1) * _BETWEEN_COLUMNS * layout.font
        if taken <= layout.width - 2 * Sheet.pad:
            return columns
    return 1


class Sheet:
    """A figure laid out in CSS pixels from its top edge: title, legend, then panels in columns."""

    pad = 10

    def __init__(self, title: str, legend: list[Patch | Line2D], layout: Layout):
        self.layout, self.legend = layout, legend
        text = printable(title)
        self.title = textwrap.wrap(text, layout.fits(0.72 * (layout.width - 2 * self.pad)), max_lines=4) or [""]
        self.legend_columns = _legend_columns([str(handle.get_label()) for handle in legend], layout)
        self.legend_rows = math.ceil(len(legend) / self.legend_columns)
        self.height = 0.0
        self.figure = Figure(facecolor=THEME.background)

    def add_panels(self, heights: Mapping[str, float], left: float) -> dict[str, Axes]:
        """One axes per regime whose y axis counts pixels downwards; `left` is the room for what stands beside it."""
        line, width = self.layout.line, self.layout.width
        above, below = 1.8 * line, 3.2 * line
        columns = min(self.layout.columns, len(heights)) or 1
        heights = {regime: max(height, 7 * line) for regime, height in heights.items()}  # room for the y label
        regimes = list(heights)
        rows = [regimes[start : start + columns] for start in range(0, len(regimes), columns)]
        tallest = [max(heights[regime] for regime in row) for row in rows]
        top = self._begin(sum(tallest) + len(rows) * (above + below))
        axes = {}
        for row, height in zip(rows, tallest, strict=True):
            for column, regime in enumerate(row):
                x = column * width / columns + self.pad
                w = width / columns - left - 2 * self.pad - 6
                axes[regime] = self._panel(x + left, top + above, w, heights[regime], grid="x")
                axes[regime].set_ylim(heights[regime], 0)
                self._heading(REGIMES[regime], x, top)
            top += height + above + below
        return axes

    def add_grid(self, groups: Mapping[str, int], grid: Grid) -> dict[str, list[Axes]]:
        """Under each group's heading that many small panels, row by row."""
        layout, line = self.layout, self.layout.line
        heading, after = 1.8 * line, 0.6 * line
        step = grid.above + grid.height + grid.below
        rows = {name: math.ceil(number / grid.columns) for name, number in groups.items()}
        top = self._begin(sum(heading + number * step + after for number in rows.values()))
        cell = (layout.width - 2 * self.pad - grid.left) / grid.columns
        axes = {}
        for name, number in groups.items():
            self._heading(name, self.pad, top)
            axes[name] = [
                self._panel(
                    self.pad + grid.left + index % grid.columns * cell,
                    top + heading + index // grid.columns * step + grid.above,
                    cell - grid.gap,
                    grid.height,
                    grid="y",
                )
                for index in range(number)
            ]
            top += heading + rows[name] * step + after
        return axes

    def _begin(self, body: float) -> float:
        """Size the figure for a body that many pixels high, write its head, and give the body's top."""
        line = self.layout.line
        top = self.pad + len(self.title) * line * 1.2 + self.legend_rows * line * 1.15
        self.height = round(top + body + self.pad)
        self.figure.set_size_inches(self.layout.width / 100, self.height / 100)
        self._head()
        return top

    def _panel(self, x: float, y: float, width: float, height: float, grid: str) -> Axes:
        font = self.layout.font
        box = (x / self.layout.width, 1 - (y + height) / self.height, width / self.layout.width, height / self.height)
        ax = self.figure.add_axes(box, facecolor=THEME.background)
        for axis in (ax.xaxis, ax.yaxis):
            axis.label.set(fontsize=points(font), color=THEME.muted)
        ax.tick_params(labelsize=points(font - 1), colors=THEME.muted, length=points(4))
        ax.grid(axis=grid, color=THEME.line, linewidth=0.6)
        ax.set_axisbelow(True)
        for side, spine in ax.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(THEME.line)
        return ax

    def _heading(self, text: str, x: float, top: float) -> None:
        self.figure.text(
            x / self.layout.width,
            1 - (top + 0.9 * self.layout.line) / self.height,
            text,
            fontsize=points(self.layout.font),
            color=THEME.foreground,
            va="center",
            parse_math=False,
        )

    def _head(self) -> None:
        font, line, x = self.layout.font, self.layout.line, self.pad / self.layout.width
        self.figure.text(
            x,
            1 - self.pad / self.height,
            "\n".join(self.title),
            fontsize=points(font + 2),
            fontweight="bold",
            color=THEME.foreground,
            va="top",
            parse_math=False,
        )
        legend = self.figure.legend(
            handles=self.legend,
            loc="upper left",
            bbox_to_anchor=(x, 1 - (self.pad + len(self.title) * line * 1.2) / self.height),
            borderaxespad=0,
            borderpad=0.2,
            ncols=self.legend_columns,
            frameon=False,
            fontsize=points(font),
            labelcolor=THEME.foreground,
            handlelength=_HANDLE,
            handletextpad=_AFTER_HANDLE,
            columnspacing=_BETWEEN_COLUMNS,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        legend.set_in_layout(False)

    def png(self) -> bytes:
        """The sheet as PNG bytes in the light theme, the same for the same records."""
        self.figure.set_dpi(100 * DENSITY)
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        # Flat colours need no more than a palette, which makes the file a third as large; an octree's is off by one
        # in a channel here and there, and five times as quick as an exact one.
        image = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
        palette = image.quantize(128, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        stream = io.BytesIO()
        palette.save(stream, format="PNG", compress_level=6)
        return stream.getvalue()

    def svg(self) -> bytes:
        """The sheet as an SVG document in either theme, the same bytes for the same records."""
        stream = io.StringIO()
        # Identifiers come from a hash: without a salt of its own from a random one.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sparsegrad-bench"}):
            metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            FigureCanvasSVG(self.figure).print_svg(stream, metadata=metadata)
        return svg.compact(stream.getvalue(), self.layout.width, round(self.height)).encode()


def points(pixels: float) -> float:
    """CSS pixels as points, on a figure of 100 pixels an inch."""
    return pixels * 72 / 100


def printable(text: str) -> str:
    """`text` on one line, without characters that no font draws."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def shorten(text: str, width: int) -> str:
    """`text` on one line of at most `width` characters."""
    text = printable(text)
    return text if len(text) <= width else text[: max(1, width - 1)] + "…"


def panel_width(ax: Axes, layout: Layout) -> float:
    """The width of the plotting area in CSS pixels."""
    return ax.get_position().width * layout.width


def row_label(ax: Axes, record: Record, variation: str, right: str, top: float, layout: Layout) -> None:
    """The record's name over its row on the left, and `right` at the other end of the same line."""
    room = layout.fits(panel_width(ax, layout)) - len(right) - 3
    baseline = top + layout.line * 0.55
    shared = {"transform": ax.get_yaxis_transform(), "va": "center", "parse_math": False}
    name = f"{record.label} · {variation}" if variation else record.label
    ax.text(0.008, baseline, shorten(name, room), fontsize=points(layout.font), color=THEME.foreground, **shared)
    ax.text(1, baseline, right, ha="right", fontsize=points(layout.font), color=THEME.foreground, **shared)


def draw_note(ax: Axes, text: str, middle: float, layout: Layout) -> None:
    """What stands in place of a mark that cannot be drawn, at `middle` of the y axis."""
    ax.text(
        0.008,
        middle,
        shorten(text, layout.fits(panel_width(ax, layout))),
        transform=ax.get_yaxis_transform(),
        fontsize=points(layout.font - 1),
        fontstyle="italic",
        color=THEME.muted,
        va="center",
        parse_math=False,
    )


def tile_title(ax: Axes, lines: Sequence[str], layout: Layout, height: float) -> None:
    """Lines of text above a small panel `height` pixels high, the first in full colour and the others muted."""
    # Small panels stand close: their titles may use the room up to the next one's.
    size, room = (layout.font if layout.tiles > 2 else layout.font - 1), panel_width(ax, layout) + 10
    for index, text in enumerate(lines):
        up = (len(lines) - index - 0.4) * layout.line * 0.9
        ax.text(
            0,
            1 + up / height,
            shorten(text, int(room / (0.6 * size))),
            transform=ax.transAxes,
            fontsize=points(size if index == 0 else layout.font - 1),
            color=THEME.muted if index else THEME.foreground,
            va="center",
            parse_math=False,
        )


def legend_marker(marker: str, label: str, fill: str, edge: str = THEME.foreground) -> Line2D:
    """A legend's entry for marks of this shape."""
    return Line2D(
        [],
        [],
        linestyle="none",
        marker=marker,
        markersize=points(8),
        markerfacecolor=fill,
        markeredgecolor=edge,
        markeredgewidth=0.8,
        label=label,
    )
