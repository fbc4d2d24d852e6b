"""The figures of a quality study: scores against peak memory, over all tasks and task by task, and training losses.

They draw the `arms` of a study's summary: dictionaries with `arm`, `method`, `matched` (peak, parameters or none),
`peak_step_bytes`, `mean` (with `low` and `high`, None until it is known) and `tasks`, each with `task`, `metric`,
`score`, `scores` and `losses`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reports.palette import by_name, method_colour, method_marker
from reports.sheet import THEME, WIDE, Grid, Layout, Sheet, panel_width, points, tile_title

Arms = Sequence[Mapping[str, object]]

MIB = 2**20
METRICS = {"accuracy": "accuracy, %", "pearson": "correlation x 100"}
# Arms whose peaks differ by less than this share stand side by side: they would hide each other.
SAME_PEAK = 0.02
# The axis of memory spans at least this share of the largest peak: a small difference looks small.
LEAST_SPAN = 0.4
# An arm this many times the others' range below them is named at the edge and does not squeeze them together.
_FAR = 0.75


def known(arms: Arms) -> list[Mapping[str, object]]:
    """The arms that have a mean over all tasks."""
    return [arm for arm in arms if arm["mean"] is not None]


def front(arms: Arms) -> list[Mapping[str, object]]:
    """The Pareto front of the known arms by mean score, ascending in peak: no other has as little and scores more."""
    best: list[Mapping[str, object]] = []
    for arm in sorted(known(arms), key=lambda arm: (arm["peak_step_bytes"], -arm["mean"])):
        if not best or arm["mean"] > best[-1]["mean"]:
            best.append(arm)
    return best


def draw_scores(title: str, arms: Arms, layout: Layout = WIDE) -> Sheet:
    """Mean score over the tasks against the peak of a step, with intervals and the Pareto front."""
    shown = known(arms)
    legend = [*_legend(shown), Line2D([], [], label="Pareto front", **_FRONT)]
    sheet = Sheet(title, legend, layout)
    grid = Grid(
        columns=1,
        height=330 if layout.name == "wide" else 260,
        left=layout.font * 4,
        above=0.4 * layout.line,
        below=3.2 * layout.line,
    )
    ((ax,),) = sheet.add_grid({"above and left is better": 1}, grid).values()
    places = _places(shown)
    _memory_axis(ax, shown, places)
    lowest = _score_axis(ax, [(arm["low"], arm["mean"], arm["high"]) for arm in shown])
    ax.set_ylabel("mean score, points")
    steps = [(arm["peak_step_bytes"] / MIB, arm["mean"]) for arm in front(arms) if arm["mean"] >= lowest]
    corners = [corner for (_, y), (x, upper) in pairwise(steps) for corner in ((x, y), (x, upper))]
    if steps:
        path = [steps[0], *corners, (ax.get_xlim()[1], steps[-1][1])]
        ax.plot(*zip(*path, strict=True), zorder=1, **_FRONT)
    for arm, x in zip(shown, places, strict=True):
        if arm["mean"] < lowest:
            _at_the_edge(ax, arm, x, arm["mean"], layout)
            continue
        ax.plot([x, x], [arm["low"], arm["high"]], color=method_colour(str(arm["method"])), linewidth=1.6, zorder=2)
        ax.plot([x], [arm["mean"]], markersize=points(11), zorder=3, **_mark(arm))
    return sheet


def describe_scores(title: str, arms: Arms) -> str:
    """What `draw_scores` shows, in words."""
    parts = [
        f"{arm['arm']} at {arm['peak_step_bytes'] / MIB:,.0f} MiB {arm['mean']:.1f} "
        f"({arm['low']:.1f} to {arm['high']:.1f})"
        for arm in sorted(known(arms), key=lambda arm: arm["peak_step_bytes"])
    ]
    names = ", ".join(str(arm["arm"]) for arm in front(arms))
    return f"{title}, a scatter plot with intervals: {'; '.join(parts)}. On the Pareto front: {names}."


def draw_tasks(title: str, arms: Arms, layout: Layout = WIDE) -> Sheet:
    """Scores against the peak of a step, a panel a task: the mean over seeds and the range of the seeds."""
    tasks, shown = _tasks(arms), known(arms)
    sheet = Sheet(title, _legend(shown), layout)
    axes = sheet.add_grid({"mean and range of the seeds": len(tasks)}, _small(len(tasks), layout))
    places = _places(shown)
    for index, ((task, metric), ax) in enumerate(zip(tasks, *axes.values(), strict=True)):
        tile_title(ax, [f"{task}: {METRICS.get(metric, metric)}"], layout, _HEIGHT[layout.name])
        _memory_axis(ax, shown, places)
        of_task = [_of(arm, task) for arm in shown]
        spans = [_span(of) for of in of_task]
        lowest = _score_axis(ax, spans)
        if index % _columns(len(tasks), layout) == 0:
            ax.set_ylabel("score, points")
        for arm, x, span in zip(shown, places, spans, strict=True):
            if span[1] < lowest:
                _at_the_edge(ax, arm, x, span[1], layout)
                continue
            look = {"color": method_colour(str(arm["method"])), "linewidth": 1.2, "zorder": 2}
            ax.plot([x, x], [span[0], span[2]], **look)
            ax.plot([x], [span[1]], markersize=points(8), zorder=3, **_mark(arm))
    return sheet


def describe_tasks(title: str, arms: Arms) -> str:
    """What `draw_tasks` shows, in words."""
    parts = []
    for task, _ in _tasks(arms):
        said = ", ".join(f"{arm['arm']} {_of(arm, task)['score']:.1f}" for arm in known(arms))
        parts.append(f"{task}: {said}")
    return f"{title}, scatter plots. {'; '.join(parts)}."


def draw_losses(title: str, arms: Arms, layout: Layout = WIDE) -> Sheet:
    """The training loss over the steps, a panel a task: means over the seeds of each tenth of the steps."""
    tasks, shown = _tasks(arms), known(arms)
    legend = [Line2D([], [], label=str(arm["arm"]), linewidth=1.4, markersize=points(7), **_line(arm)) for arm in shown]
    sheet = Sheet(title, legend, layout)
    axes = sheet.add_grid({"lower has fitted the training examples better": len(tasks)}, _small(len(tasks), layout))
    for index, ((task, _), ax) in enumerate(zip(tasks, *axes.values(), strict=True)):
        tile_title(ax, [task], layout, _HEIGHT[layout.name])
        for arm in sorted(shown, key=_order, reverse=True):
            losses = _of(arm, task)["losses"]
            at = [100 * (part + 0.5) / len(losses) for part in range(len(losses))]
            ax.plot(at, losses, linewidth=1.2, markersize=points(5), zorder=2, **_line(arm))
        ax.set_xlim(0, 100)
        ax.set_xlabel("% of the steps")
        if index % _columns(len(tasks), layout) == 0:
            ax.set_ylabel("training loss")
        ax.yaxis.set_major_locator(MaxNLocator(5))
    return sheet


def describe_losses(title: str, arms: Arms) -> str:
    """What `draw_losses` shows, in words: where each arm ends."""
    parts = []
    for task, _ in _tasks(arms):
        said = ", ".join(f"{arm['arm']} {_of(arm, task)['losses'][-1]:.2f}" for arm in known(arms))
        parts.append(f"{task}: {said}")
    return f"{title}, lines. In the last part of the steps: {'; '.join(parts)}."


_FRONT = {"color": THEME.muted, "linewidth": 1.2, "linestyle": (0, (4, 3))}
_HEIGHT = {"wide": 170, "narrow": 150}


def _columns(tasks: int, layout: Layout) -> int:
    return min(tasks, 3 if layout.name == "wide" else 1) or 1


def _small(tasks: int, layout: Layout) -> Grid:
    return Grid(
        columns=_columns(tasks, layout),
        height=_HEIGHT[layout.name],
        left=layout.font * 4,
        above=1.6 * layout.line,
        below=3.2 * layout.line,
        gap=layout.font * 3.5 if layout.name == "wide" else 14,
    )


def _tasks(arms: Arms) -> list[tuple[str, str]]:
    return list(dict.fromkeys((str(of["task"]), str(of["metric"])) for arm in arms for of in arm["tasks"]))


def _of(arm: Mapping[str, object], task: str) -> Mapping[str, object]:
    return next(of for of in arm["tasks"] if of["task"] == task)


def _span(of: Mapping[str, object]) -> tuple[float, float, float]:
    """The lowest, the mean and the highest score over the seeds."""
    return min(of["scores"].values()), of["score"], max(of["scores"].values())


def _order(arm: Mapping[str, object]) -> tuple:
    return by_name(str(arm["method"])), str(arm["arm"])


def _legend(arms: Arms) -> list[Line2D]:
    return [
        Line2D([], [], label=str(arm["arm"]), markersize=points(9), **_mark(arm)) for arm in sorted(arms, key=_order)
    ]


def _mark(arm: Mapping[str, object]) -> dict[str, object]:
    """A method's mark; hollow where its budget is matched in parameters and an arm of another budget may stand by."""
    colour = method_colour(str(arm["method"]))
    hollow = arm["matched"] == "parameters" and arm["arm"] != "lora"
    return {
        "linestyle": "none",
        "marker": method_marker(str(arm["method"])),
        "markerfacecolor": THEME.background if hollow else colour,
        "markeredgecolor": colour if hollow else THEME.foreground,
        "markeredgewidth": 1.4 if hollow else 0.6,
    }


def _line(arm: Mapping[str, object]) -> dict[str, object]:
    return _mark(arm) | {"color": method_colour(str(arm["method"])), "linestyle": "-"}


def _places(arms: Arms) -> list[float]:
    """Where each arm stands, in MiB: at its peak, and beside it where others have the same to `SAME_PEAK`."""
    peaks = [arm["peak_step_bytes"] / MIB for arm in arms]
    if not peaks:
        return []
    step = 0.018 * max(max(peaks) - min(peaks), LEAST_SPAN * max(peaks))
    order = sorted(range(len(arms)), key=lambda i: (peaks[i], _order(arms[i])))
    places, group = [0.0] * len(arms), [order[0]]
    for index in [*order[1:], None]:
        if index is not None and peaks[index] <= peaks[group[0]] * (1 + SAME_PEAK):
            group.append(index)
            continue
        for position, member in enumerate(sorted(group, key=lambda i: _order(arms[i]))):
            places[member] = fmean(peaks[i] for i in group) + (position - (len(group) - 1) / 2) * step
        group = [index]
    return places


def _memory_axis(ax: Axes, arms: Arms, places: Sequence[float]) -> None:
    low, high = min(places, default=0.0), max(places, default=1.0)
    missing = max(0.0, LEAST_SPAN * high - (high - low))
    margin = 0.06 * (high - low) + missing / 2
    ax.set_xlim(low - margin, high + margin)
    ax.set_xlabel("peak of a step, MiB")
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))


def _score_axis(ax: Axes, spans: Sequence[tuple[float, float, float]]) -> float:
    """Limits that hold the spans (low, mean, high); gives the least mean that is drawn to scale."""
    spans = sorted(spans, key=lambda span: span[1])
    while len(spans) > 2:
        rest = spans[1:]
        low, high = min(span[0] for span in rest), max(span[2] for span in rest)
        if spans[0][1] >= low - _FAR * (high - low):
            break
        spans = rest
    low, high = min((span[0] for span in spans), default=0.0), max((span[2] for span in spans), default=100.0)
    margin = 0.08 * (high - low or 1)
    # Room at the lower edge for the names of what lies below it.
    ax.set_ylim(low - 2.2 * margin, high + margin)
    ax.yaxis.set_major_locator(MaxNLocator(6))
    return min((span[1] for span in spans), default=-math.inf)


def _at_the_edge(ax: Axes, arm: Mapping[str, object], x: float, score: float, layout: Layout) -> None:
    """The name and number of an arm below the scale, at the lower edge where it stands."""
    left, right = ax.get_xlim()
    pixels = panel_width(ax, layout) / (right - left)
    near_the_right = (right - x) * pixels < 9 * layout.font
    ax.text(
        x,
        0.03,
        f"↓ {arm['arm']} {score:.1f}",
        transform=ax.get_xaxis_transform(),
        ha="right" if near_the_right else "left",
        va="bottom",
        fontsize=points(layout.font - 1),
        color=THEME.muted,
        parse_math=False,
    )
