"""Colours of the report: one per method, one per category of the memory breakdown, and the two themes.

Colours of a set stay apart under simulated protanopia, deuteranopia and tritanopia; some are pale on white or dark on
black, so whoever fills with them draws an outline too. A colour never stands alone: a name is printed beside it, or a
marker's shape says the same.
"""

from __future__ import annotations

import colorsys
import zlib
from dataclasses import dataclass
from types import MappingProxyType

METHOD_COLOURS = MappingProxyType(
    {
        "full": "#666666",
        "head": "#bbbbbb",
        "lora": "#56b4e9",
        "meprop-example": "#ddcc77",
        "meprop-unified": "#e69f00",
        "meprop-weight": "#d55e00",
        "random-mask": "#117733",
        "sparsegrad": "#7f3c8d",
        "sparsegrad-folded": "#a578ff",
        "sparsegrad-compact": "#0f1ec3",
        "sparsegrad-fixed": "#c32dd2",
        "sparsegrad-core": "#0f4b5a",
        "sparsegrad-directions": "#a51e00",
        "pissa": "#3ce1f0",
        "qlora": "#5a3c2d",
        "dora": "#96e1a5",
        "lora-fa": "#ff2d4b",
        "lora-xs": "#b49669",
        "vera": "#b4e14b",
        "bitfit": "#8796a5",
        "gmt": "#f03c87",
        "sift": "#5a1e96",
        "smt": "#a53cff",
        "galore": "#7800ff",
        "apollo": "#a569b4",
    }
)
# What matplotlib takes for a marker: a letter, (number of points, 1 for a star, angle), or the corners of a polygon.
Marker = str | tuple[int, int, float] | tuple[tuple[float, float], ...]


def _polygon(*corners: tuple[float, float]) -> Marker:
    return (*corners, corners[0])


_SHAPES = (
    (4, 1, 0),
    _polygon((-2, -1), (2, -1), (2, 1), (-2, 1)),  # a lying bar
    _polygon((-1, -2), (1, -2), (1, 2), (-1, 2)),  # a standing one
    _polygon((-2, 2), (2, 2), (-2, -2), (2, -2)),  # an hourglass
    _polygon((-2, 2), (2, -2), (2, 2), (-2, -2)),  # a bow tie
    _polygon((-2, -1.6), (2, -1.6), (2, 1.8), (0.9, 0.2), (0, 1.8), (-0.9, 0.2), (-2, 1.8)),  # a crown
    _polygon((-2, 0), (0, -1), (2, 0), (0, 1)),  # a lying diamond
    _polygon((-2, 2), (2, 2), (2, 0.7), (0.7, 0.7), (0.7, -2), (-0.7, -2), (-0.7, 0.7), (-2, 0.7)),  # a T
    (6, 1, 0),
    _polygon((-2, -1), (1, -1), (2, 1), (-1, 1)),  # a parallelogram
    _polygon((-2, 2), (-0.7, 2), (-0.7, -0.7), (2, -0.7), (2, -2), (-2, -2)),  # an L
    _polygon((0, 2), (2, -2), (0, -0.8), (-2, -2)),  # an arrowhead
)
# A method's shape, wherever names do not stand beside the marks.
METHOD_MARKERS = MappingProxyType(dict(zip(METHOD_COLOURS, (*"sdo<>^D*Xpv8P", *_SHAPES), strict=True)))
_OTHER_MARKERS = "hH"

CATEGORY_COLOURS = MappingProxyType(
    {
        "parameter_bytes": "#8c8c8c",
        "basis_bytes": "#7f3c8d",
        "optimizer_bytes": "#e69f00",
        "gradient_bytes": "#994f00",
        "activation_bytes": "#56b4e9",
        "temporary_bytes": "#ddcc77",
    }
)
# What became of a figure, as reports/compare.py has it, and each one's shape in matplotlib's letters. What is not
# comparable is not judged, and its mark is hollow.
VERDICT_COLOURS = MappingProxyType(
    {
        "regression": "#d55e00",
        "undecided": "#bbbbbb",
        "change": "#ddcc77",
        "improvement": "#56b4e9",
    }
)
VERDICT_MARKERS = MappingProxyType({**dict(zip(VERDICT_COLOURS, "XdDo", strict=True)), "not comparable": "s"})
# Lines upon the colours above, which are the same in both themes.
INK = "#14171a"


@dataclass(frozen=True)
class Theme:
    """The neutral colours of a page and of the figures on it."""

    name: str
    background: str
    surface: str
    foreground: str
    muted: str
    line: str
    accent: str


LIGHT = Theme("light", "#ffffff", "#f4f5f7", "#1b1f24", "#57606a", "#d0d7de", "#0b5cad")
DARK = Theme("dark", "#14181c", "#1e242a", "#e6e9ec", "#a0a9b2", "#3a424a", "#7cb8f2")


def method_colour(method: str) -> str:
    """The colour of a method, ``#rrggbb``; a name without one of its own gets a hue from its checksum."""
    if method in METHOD_COLOURS:
        return METHOD_COLOURS[method]
    hue = _checksum(method) % 360 / 360
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, 0.5, 0.45))


def method_marker(method: str) -> Marker:
    """The marker of a method; a name without one of its own gets one of the others from its checksum."""
    return METHOD_MARKERS.get(method) or _OTHER_MARKERS[_checksum(method) // 360 % len(_OTHER_MARKERS)]


def by_name(method: str) -> tuple[int, str]:
    """The order of methods wherever they stand side by side: those with a colour of their own first."""
    names = list(METHOD_COLOURS)
    return (names.index(method) if method in METHOD_COLOURS else len(names), method)


def _checksum(method: str) -> int:
    # crc32, not hash(): a name must look the same in every process.
    return zlib.crc32(method.encode("utf-8", "replace"))
