"""The paper that figures are drawn on: layouts, panels with a title and a legend, text that fits, PNG bytes."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image

from reports.palette import Theme
from reports.record import Record

REGIMES = {
    "all": "train_rest = all: the rest of the model trains too",
    "none": "train_rest = none: the rest of the model is frozen",
}
# Device pixels per CSS pixel, for sharp text on dense screens.
DENSITY = 1.5


@dataclass(frozen=True)
class Layout:
    """The size a figure is drawn for, in CSS pixels, and how many panels stand side by side."""

    name: str
    width: int
    columns: int
    font: int

    @property
    def line(self) -> int:
        """The height of a line of text."""
        return round(self.font * 1.5)

    def fits(self, width: float) -> int:
        """How many characters of ordinary text fit in `width`."""
        return max(8, int(width / (0.6 * self.font)))


WIDE = Layout("wide", width=1280, columns=2, font=12)
NARROW = Layout("narrow", width=358, columns=1, font=11)


class Sheet:
    """A figure laid out in CSS pixels from its top edge: title, legend, then panels in columns."""

    pad = 10

    def __init__(self, title: str, legend: list[Patch | Line2D], layout: Layout, theme: Theme):
        self.layout, self.theme, self.legend = layout, theme, legend
        text = printable(title)
        self.title = textwrap.wrap(text, layout.fits(0.72 * (layout.width - 2 * self.pad)), max_lines=4) or [""]
        self.legend_columns = min(len(legend), max(2, layout.width // 165))
        self.legend_rows = math.ceil(len(legend) / self.legend_columns)
        self.figure = Figure(facecolor=theme.background)

    def add_panels(self, heights: Mapping[str, float], left: float) -> dict[str, Axes]:
        """One axes per regime whose y axis counts pixels downwards; `left` is the room for what stands beside it."""
        font, line, width = self.layout.font, self.layout.line, self.layout.width
        above, below = 1.8 * line, 3.2 * line
        columns = min(self.layout.columns, len(heights)) or 1
        heights = {regime: max(height, 7 * line) for regime, height in heights.items()}  # room for the y label
        regimes = list(heights)
        rows = [regimes[start : start + columns] for start in range(0, len(regimes), columns)]
        head = self.pad + len(self.title) * line * 1.2 + self.legend_rows * line * 1.15
        tallest = [max(heights[regime] for regime in row) for row in rows]
        total = head + sum(tallest) + len(rows) * (above + below) + self.pad
        self.figure.set_size_inches(width / 100, total / 100)

        axes = {}
        top = head
        for row, height in zip(rows, tallest, strict=True):
            for column, regime in enumerate(row):
                x = column * width / columns + self.pad + left
                w = width / columns - left - 2 * self.pad - 6
                y = total - top - above - heights[regime]
                box = (x / width, y / total, w / width, heights[regime] / total)
                axes[regime] = self._panel(box, heights[regime])
                self.figure.text(
                    (x - left) / width,
                    1 - (top + 0.9 * line) / total,
                    REGIMES[regime],
                    fontsize=points(font),
                    color=self.theme.foreground,
                    va="center",
                )
            top += height + above + below
        self._head(total, font, line)
        return axes

    def _panel(self, box: tuple[float, float, float, float], height: float) -> Axes:
        theme, font = self.theme, self.layout.font
        ax = self.figure.add_axes(box, facecolor=theme.background)
        ax.set_ylim(height, 0)
        ax.xaxis.label.set(fontsize=points(font), color=theme.muted)
        ax.yaxis.label.set(fontsize=points(font), color=theme.muted)
        ax.tick_params(axis="x", labelsize=points(font - 1), colors=theme.muted, length=points(4))
        ax.grid(axis="x", color=theme.line, linewidth=0.6)
        ax.set_axisbelow(True)
        for side, spine in ax.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.line)
        return ax

    def _head(self, total: float, font: int, line: int) -> None:
        x = self.pad / self.layout.width
        self.figure.text(
            x,
            1 - self.pad / total,
            "\n".join(self.title),
            fontsize=points(font + 2),
            fontweight="bold",
            color=self.theme.foreground,
            va="top",
            parse_math=False,
        )
        legend = self.figure.legend(
            handles=self.legend,
            loc="upper left",
            bbox_to_anchor=(x, 1 - (self.pad + len(self.title) * line * 1.2) / total),
            borderaxespad=0,
            borderpad=0.2,
            ncols=self.legend_columns,
            frameon=False,
            fontsize=points(font),
            labelcolor=self.theme.foreground,
            handlelength=1.4,
            columnspacing=1.4,
        )
        legend.set_in_layout(False)

    def png(self) -> bytes:
        """The sheet as PNG bytes, the same for the same records."""
        self.figure.set_dpi(100 * DENSITY)
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        # Flat colours need no more than a palette, and a page embeds many images: this makes them a third as large.
        image = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
        palette = image.quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        stream = io.BytesIO()
        palette.save(stream, format="PNG", optimize=True)
        return stream.getvalue()


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


def row_label(ax: Axes, record: Record, variation: str, right: str, top: float, layout: Layout, theme: Theme) -> None:
    """The record's name over its row on the left, and `right` at the other end of the same line."""
    room = layout.fits(panel_width(ax, layout)) - len(right) - 3
    baseline = top + layout.line * 0.55
    shared = {"transform": ax.get_yaxis_transform(), "va": "center", "clip_on": True, "parse_math": False}
    name = f"{record.label} · {variation}" if variation else record.label
    ax.text(0.008, baseline, shorten(name, room), fontsize=points(layout.font), color=theme.foreground, **shared)
    ax.text(1, baseline, right, ha="right", fontsize=points(layout.font), color=theme.foreground, **shared)


def draw_note(ax: Axes, text: str, middle: float, layout: Layout, theme: Theme) -> None:
    """What stands in place of a mark that cannot be drawn."""
    ax.text(
        0.008,
        middle,
        shorten(text, layout.fits(panel_width(ax, layout))),
        transform=ax.get_yaxis_transform(),
        fontsize=points(layout.font - 1),
        fontstyle="italic",
        color=theme.muted,
        va="center",
        clip_on=True,
        parse_math=False,
    )
