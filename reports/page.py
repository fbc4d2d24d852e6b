"""The report: `records.csv`, the figures as PNG files, and one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from reports import agreement, capacity, palette, record, sheet, tables
from reports.figures import breakdown, by_size, counts, fit, panels, step_time, timeline
from reports.figures.panels import Panels
from reports.overview import overview
from reports.record import RATIO_CONFIDENCE, Record

TEMPLATES = Path(__file__).parent / "templates"
PAGE = "index.html"
TREND_PAGE = "trend.html"
# A reason longer than this (a traceback, say) is folded away behind its beginning.
LONGEST_REASON = 160
# A longer name is cut short in the overview; the sections below have all of it.
LONGEST_NAME = 60
# An environment field with more values than this names the rest by their number.
MOST_VALUES = 6

_DIRECTIONS = dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C), "\ufffd")
_UNITS = {"_bytes": "bytes", "_params": "entries", "_s": "seconds"}


@dataclass(frozen=True)
class Kind:
    """A kind of figure of a workload: its file name's stem, how it is drawn and told in words, and its caption."""

    stem: str
    draw: Callable[[str, Panels, sheet.Layout], sheet.Sheet]
    describe: Callable[[str, Panels], str]
    most: int  # records of a regime that are drawn
    caption: str
    shows: Callable[[Panels], bool] = bool  # whether there is anything to show


KINDS = (
    Kind(
        "breakdown",
        breakdown.draw,
        breakdown.describe,
        panels.MOST_ROWS,
        "What was live at the instant of the step's peak. Regimes share one scale. Hatched bars are predictions; "
        "a bar that is missing was not obtained.",
    ),
    Kind(
        "timeline",
        timeline.draw,
        timeline.describe,
        timeline.MOST_PANELS,
        "Live bytes through one steady-state step by category, stacked in the order of the legend, on one scale for "
        "all panels. Across stand allocations and frees in their order, not time; each phase is stretched to the same "
        "width, so that the phases of two methods can be compared. Hatched areas are predictions; a panel that is "
        "empty was not obtained.",
    ),
    Kind(
        "step-time",
        step_time.draw,
        step_time.describe,
        panels.MOST_ROWS,
        "The time of a step as a ratio to full fine-tuning's neighbouring step: the median over the rounds with its "
        f"{RATIO_CONFIDENCE:.0%} interval over segments of the rounds, and beside it the plain median in milliseconds. "
        "Left of the line "
        "a step is shorter than full fine-tuning's. The row of full sets it against a second worker of full: an A/A "
        "control, whose distance from 1 is the harness's own noise. Paired in blocks: two models did not fit into "
        "memory at once, so blocks of rounds were set against one another. Hollow markers are predictions.",
        step_time.timed,
    ),
    Kind(
        "counts",
        counts.draw,
        counts.describe,
        panels.MOST_ROWS,
        "The parameter counts side by side. Where a support moves they differ by orders of magnitude, "
        "so that one of them alone misleads. Hollow markers are predictions.",
    ),
)
FIT = Kind(
    "fit",
    fit.draw,
    fit.describe,
    panels.MOST_ROWS,
    "What a card must have: the most bytes that CUDA's caching allocator holds in a steady-state step "
    f"(peak_reserved_bytes), and {capacity.CONTEXT_BYTES // tables.MIB} MiB for the CUDA context, an assumption, the "
    "same for all. The strong part of a bar ends at the context and the allocated bytes (peak_step_bytes); the pale "
    "part is what the allocator caches besides. Where more is allocated in the preparation than in a step, a line "
    "leads on to that (peak_preparation_bytes and the context; its cache is not recorded). Hatched bars are "
    "predictions; a bar that is missing was not obtained.",
)
BY_SIZE_CAPTION = (
    "The most bytes live in a steady-state step of one layer, or of two MLP blocks, by size and method, on one scale. "
    "Within a size methods stand side by side in the order of the legend. A line joins a method's peaks where each "
    "size has one record of it; where one has several (other budgets, other conditions), each has its mark. "
    "A cross stands for what was not obtained. Hollow, larger markers and dashed lines are predictions."
)


@dataclass(frozen=True)
class Image:
    """One rendering of a figure as a data URI; the page's style shows the one that fits the reader's screen."""

    layout: str
    width: int
    height: int
    uri: str


@dataclass(frozen=True)
class Illustration:
    """A figure of the page: its renderings, its alternative text and its caption."""

    images: tuple[Image, ...]
    alt: str
    caption: str


@dataclass(frozen=True)
class Regime:
    """The table of one regime, with what its rows have in common."""

    name: str
    table: tables.Table
    shared: list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """One workload on the page, by its number there."""

    number: int
    title: str
    illustrations: tuple[Illustration, ...]
    regimes: tuple[Regime, ...]


@dataclass(frozen=True)
class Term:
    """One field of the glossary."""

    name: str
    unit: str
    meaning: str


def write_report(records: Sequence[Record], out: Path, trend: bool = False) -> Path:
    """Write `records.csv`, the figures and `index.html` into the directory `out`; returns the page's path.

    With `trend` the page leads to the one of `reports/trend.py`, which stands beside it.
    Each file is replaced in one stroke and the page comes last, so that an interrupted run leaves the old page.
    Raises OSError where `out` cannot be written.
    """
    out = Path(out)
    records = list(records)
    record.write_bytes(encode(record.to_csv(records)), out / "records.csv")
    chart = by_size.Chart.of(records)
    sizes = _by_size(chart, out / "peak-by-size.png") if chart.regimes else None
    sections = []
    for position, (workload, regimes) in enumerate(tables.by_workload(records).items(), start=1):
        illustrations = [
            _of_kind(kind, workload.title, regimes, out / f"{kind.stem}-{position}.png")
            for kind in KINDS
            if kind.shows(regimes)
        ]
        sections.append(_section(position, workload, regimes, tuple(illustrations)))
    page = out / PAGE
    source = render(records, sections, sizes, _fits(records, out), _agreements(records), trend)
    record.write_bytes(encode(source), page)
    return page


def render(
    records: Sequence[Record],
    sections: Sequence[Section],
    sizes: Illustration | None,
    fits: Sequence[Section],
    agreements: Sequence[Section],
    trend: bool = False,
) -> str:
    """The page's HTML.

    `sizes` is the figure of all layers and blocks, where there are any; `fits` and `agreements` are the parts of
    "Does it fit" and of "Prediction beside measurement", with the numbers of the workloads' own sections.
    """
    return template("report.html.j2").render(
        records=records,
        sections=sections,
        sizes=sizes,
        fits=fits,
        agreements=agreements,
        trend=TREND_PAGE if trend else None,
        agreement=agreement.summary(agreement.pairs(records)),
        context_mib=capacity.CONTEXT_BYTES // tables.MIB,
        cuda=any(record.device_semantics == "cuda" for record in records),
        overview=overview(records),
        summary=tables.summary(records),
        period=tables.period(records),
        environment=[(name, _values(values)) for name, values in tables.environment(records)],
        glossary=glossary(),
        method_colour=palette.method_colour,
        themes=(palette.LIGHT, palette.DARK),
        longest_reason=LONGEST_REASON,
        longest_name=LONGEST_NAME,
        unmatched=tables.UNMATCHED,
        missing=tables.MISSING,
    )


def template(name: str) -> Template:
    """A template of a page, in which all that is filled in is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_in_order,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _in_order(value: object) -> object:
    """Text without the characters that turn the direction of what follows them: a name must not reorder the page."""
    return value.translate(_DIRECTIONS) if isinstance(value, str) else value


def glossary() -> list[Term]:
    """Every field of a record with its unit and its meaning, in the schema's order."""
    names = [field.name for field in fields(Record)]
    return [Term(name, _unit(name), record.meaning(name)) for name in names]


def _unit(name: str) -> str:
    return next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), "")


def _section(
    number: int, workload: tables.Workload, regimes: dict[str, list[Record]], illustrations: tuple[Illustration, ...]
) -> Section:
    parts = (
        Regime(name, tables.results_table(group), tables.shared_circumstances(group)) for name, group in regimes.items()
    )
    return Section(number, workload.title, illustrations, tuple(parts))


def _fits(records: Sequence[Record], out: Path) -> list[Section]:
    """Each workload whose fit is a question: what a card must have, as a figure and as tables."""
    sections = []
    for number, (workload, regimes) in enumerate(tables.by_workload(records).items(), start=1):
        groups = {name: asking for name, group in regimes.items() if (asking := capacity.asking(group))}
        if not groups:
            continue
        drawn = _of_kind(FIT, workload.title, groups, out / f"{FIT.stem}-{number}.png")
        drawn = replace(drawn, caption=f"{drawn.caption} {capacity.meant(panels.flat(groups))}")
        parts = (Regime(name, capacity.table(group), []) for name, group in groups.items())
        sections.append(Section(number, workload.title, (drawn,), tuple(parts)))
    return sections


def _agreements(records: Sequence[Record]) -> list[Section]:
    """Each workload that was both measured and predicted: the two side by side."""
    sections = []
    for number, (workload, regimes) in enumerate(tables.by_workload(records).items(), start=1):
        found = {name: pairs for name, group in regimes.items() if (pairs := agreement.pairs(group))}
        parts = (Regime(name, agreement.table(pairs), agreement.circumstances(pairs)) for name, pairs in found.items())
        if found:
            sections.append(Section(number, workload.title, (), tuple(parts)))
    return sections


def _of_kind(kind: Kind, title: str, groups: Panels, path: Path) -> Illustration:
    """A workload's figure of this kind; its wide rendering is also written to `path`."""
    images = renderings({layout: kind.draw(title, groups, layout) for layout in (sheet.WIDE, sheet.NARROW)}, path)
    return Illustration(images, kind.describe(title, groups), kind.caption + _left_out(groups, kind.most))


def _by_size(chart: by_size.Chart, path: Path) -> Illustration:
    images = renderings({layout: by_size.draw(chart, layout) for layout in (sheet.WIDE, sheet.NARROW)}, path)
    rest = f" {chart.left_out:,} records more stand in the tables alone." if chart.left_out else ""
    return Illustration(images, by_size.describe(chart), BY_SIZE_CAPTION + rest)


def renderings(sheets: Mapping[sheet.Layout, sheet.Sheet], path: Path) -> tuple[Image, ...]:
    """The renderings of a figure for a page; the wide one is also written to `path`."""
    record.write_bytes(sheets[sheet.WIDE].png(), path)
    return tuple(
        Image(layout.name, layout.width, round(drawing.height), _data_uri(drawing.svg()))
        for layout, drawing in sheets.items()
    )


def _left_out(groups: Panels, most: int) -> str:
    parts = [
        f" Of the {len(group):,} records with train_rest {regime} the first {most:,} are drawn; the table has them all."
        for regime, group in groups.items()
        if len(group) > most
    ]
    return "".join(parts)


def _values(values: list[tuple[str, int]]) -> list[str]:
    """An environment field's values; with the number of records for each where they differ."""
    if len(values) == 1:
        return [values[0][0]]
    lines = [f"{value} ({number:,} of the records)" for value, number in values[:MOST_VALUES]]
    rest = len(values) - MOST_VALUES
    return [*lines, f"and {rest:,} more"] if rest > 0 else lines


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def encode(text: str) -> bytes:
    """The text as UTF-8."""
    # JSON can carry half of a surrogate pair, which has no UTF-8 form.
    return text.encode("utf-8", "replace")
