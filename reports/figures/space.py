"""The figures of the sparse space: what the largest entries of a gradient hold, by their number and over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from reports.palette import method_colour
from reports.sheet import THEME, WIDE, Grid, Layout, Sheet, points, tile_title

Rows = Sequence[Mapping[str, object]]
# Space -> colour, marker, dashes; raw and random are in the theme's own colours, which turn with it. The basis's two
# are lines that carry the figures: they stand out from either theme's background.
LOOKS: Mapping[str, tuple[str, str, str]] = {
    "basis": ("#a05cc8", "o", "-"),
    "basis made anew": ("#1f9488", "D", "--"),
    "raw": (THEME.foreground, "s", "-"),
    "U alone": (method_colour("lora"), "^", "-"),
    "V alone": (method_colour("meprop-unified"), "v", "-"),
    "U transposed": (method_colour("meprop-weight"), "<", ":"),
    "V transposed": (method_colour("random-mask"), ">", ":"),
    "random": (THEME.muted, "x", ":"),
}
# The names as a reader meets them.
NAMES: Mapping[str, str] = {
    "basis": "in the basis, V G Uᵀ",
    "raw": "raw, G",
    "U alone": "U alone, G Uᵀ",
    "V alone": "V alone, V G",
    "U transposed": "U transposed, V G U",
    "V transposed": "V transposed, Vᵀ G Uᵀ",
    "random": "random orthogonal",
}
BANDED = ("basis", "raw")


def draw_energy(title: str, rows: Rows, densities: Sequence[float], layout: Layout = WIDE) -> Sheet:
    """The share of energy against the share of entries kept, a line a space and a panel a task and kind.

    Lines are means over layers; those of `BANDED` have a band from the least to the most of a layer.
    """
    spaces = [name for name in NAMES if any(row["space"] == name for row in rows)]
    legend: list[Line2D | Patch] = [Line2D([], [], label=NAMES[name], **_look(name)) for name in spaces]
    legend.append(Patch(label="range over the layers", facecolor=THEME.line, edgecolor="none"))
    panels = _panels(rows)
    sheet, axes = _sheet(title, legend, {"before the first training step": panels}, layout, 250, 190)
    for ax, (task, kind) in zip(axes["before the first training step"], panels, strict=True):
        tile_title(ax, [f"{task}, {kind} projections"], layout, _height(ax, layout))
        ax.set_xscale("log")
        ax.set_xlim(densities[0] / 1.25, densities[-1] * 1.25)
        ax.xaxis.set_major_locator(FixedLocator(densities))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("entries kept, %, log scale")
        for name in spaces:
            curves = [row["kept"] for row in rows if (row["task"], row["kind"], row["space"]) == (task, kind, name)]
            _line(ax, densities, [list(of_layers) for of_layers in zip(*curves, strict=True)], name)
    return sheet


def describe_energy(rows: Rows, densities: Sequence[float], density: float) -> str:
    """What `draw_energy` shows, in words: the means over layers at one density."""
    at = list(densities).index(density)
    parts = []
    for task, kind in _panels(rows):
        here = [row for row in rows if (row["task"], row["kind"]) == (task, kind)]
        said = ", ".join(
            f"{name} {100 * fmean(shares):.0f} %"
            for name in NAMES
            if (shares := [row["kept"][at] for row in here if row["space"] == name])
        )
        parts.append(f"{task}, {kind}: {said}")
    return (
        f"Share of a gradient's energy that its largest entries hold, against how many are kept, from "
        f"{100 * densities[0]:g} to {100 * densities[-1]:g} %. At {100 * density:g} %, {'; '.join(parts)}."
    )


def draw_ageing(title: str, rows: Rows, at: int, layout: Layout = WIDE) -> Sheet:
    """The share of energy at one density against the training step, by task, kind and how the model is trained.

    `rows` of the start, whose `training` is none, begin every line. The bases that are made anew begin as the others.
    """
    legend = [Line2D([], [], label=label, **_look(name)) for name, label in _AGES.items()]
    trainings = [name for name in dict.fromkeys(row["training"] for row in rows) if name != "none"]
    panels = _panels(rows)
    headings = {f"the model trained with {training}": panels for training in trainings}
    sheet, axes = _sheet(title, legend, headings, layout, 150, 130)
    for training, of_training in zip(trainings, axes.values(), strict=True):
        for ax, (task, kind) in zip(of_training, panels, strict=True):
            tile_title(ax, [f"{task}, {kind} projections"], layout, _height(ax, layout))
            ax.set_xlabel("training steps")
            for name in _AGES:
                points_of = _over_training(rows, training, task, kind, name, at)
                _line(ax, list(points_of), list(points_of.values()), name)
            ax.xaxis.set_major_locator(FixedLocator(list(points_of)))
    return sheet


def describe_ageing(rows: Rows, at: int) -> str:
    """What `draw_ageing` shows, in words: first and last values."""
    parts = []
    for training in dict.fromkeys(row["training"] for row in rows if row["training"] != "none"):
        for task, kind in _panels(rows):
            said = []
            for name, label in _AGES.items():
                values = [fmean(shares) for shares in _over_training(rows, training, task, kind, name, at).values()]
                said.append(f"{label} from {100 * values[0]:.0f} to {100 * values[-1]:.0f} %")
            parts.append(f"{training}, {task}, {kind}: {', '.join(said)}")
    return f"Share of a held-out gradient's energy over training. {'; '.join(parts)}."


_AGES = {
    "basis": "in the bases made at the start",
    "basis made anew": "in bases made anew",
    "raw": "raw, G",
}


def _over_training(rows: Rows, training: str, task: str, kind: str, space: str, at: int) -> dict[int, list[float]]:
    """Step -> the share at one density, layer by layer."""
    found: dict[int, list[float]] = {}
    for row in rows:
        first = row["training"] == "none" and row["space"] == ("raw" if space == "raw" else "basis")
        later = row["training"] == training and row["space"] == space
        if (row["task"], row["kind"]) == (task, kind) and (first or later):
            found.setdefault(row["step"], []).append(row["kept"][at])
    return dict(sorted(found.items()))


def _panels(rows: Rows) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["task"], row["kind"]) for row in rows))


def _sheet(
    title: str,
    legend: list[Line2D | Patch],
    groups: Mapping[str, Sequence[object]],
    layout: Layout,
    wide: float,
    narrow: float,
) -> tuple[Sheet, dict[str, list[Axes]]]:
    sheet = Sheet(title, legend, layout)
    grid = Grid(
        columns=min(4 if layout.name == "wide" else 1, max(map(len, groups.values()))),
        height=wide if layout.name == "wide" else narrow,
        left=layout.font * 4,
        above=1.6 * layout.line,
        below=3.2 * layout.line,
    )
    axes = sheet.add_grid({heading: len(panels) for heading, panels in groups.items()}, grid)
    for of_group in axes.values():
        for index, ax in enumerate(of_group):
            ax.set_ylim(0, 1)
            ax.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}"))
            if index % grid.columns == 0:
                ax.set_ylabel("energy kept, %")
            else:
                ax.tick_params(axis="y", labelleft=False)
    return sheet, axes


def _height(ax: Axes, layout: Layout) -> float:
    """Of the plotting area, in CSS pixels."""
    return ax.get_position().height * ax.figure.get_size_inches()[1] * 100


def _line(ax: Axes, xs: Sequence[float], shares: Sequence[Sequence[float]], name: str) -> None:
    """The means of `shares`, one list of layers for each x, and their range where the space has a band."""
    if name in BANDED:
        low, high = [min(each) for each in shares], [max(each) for each in shares]
        ax.fill_between(xs, low, high, facecolor=LOOKS[name][0], alpha=0.13, linewidth=0, zorder=1)
    ax.plot(xs, [fmean(each) for each in shares], zorder=4 if name == "basis" else 3, **_look(name))


def _look(name: str) -> dict[str, object]:
    colour, marker, dashes = LOOKS[name]
    return {
        "color": colour,
        "marker": marker,
        "linestyle": dashes,
        "linewidth": 1.6 if name in BANDED else 1.1,
        "markersize": points(6),
        "markeredgewidth": 0.6,
        "markeredgecolor": colour if marker == "x" else THEME.foreground,
    }
