"""The report: `records.csv`, the figures as PNG files, and one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reports import figures, palette, record, sheet, tables
from reports.record import Record

TEMPLATES = Path(__file__).parent / "templates"
# A reason longer than this (a traceback, say) is folded away behind its beginning.
LONGEST_REASON = 160
# An environment field with more values than this names the rest by their number.
MOST_VALUES = 6

_UNITS = {"_bytes": "bytes", "_params": "entries", "_s": "seconds"}


@dataclass(frozen=True)
class Kind:
    """A kind of figure: its file name's stem, how it is drawn, its text twin and its caption."""

    stem: str
    draw: Callable[..., bytes]
    describe: Callable[[str, figures.Panels], str]
    caption: str


KINDS = (
    Kind(
        "breakdown",
        figures.breakdown,
        figures.breakdown_alt,
        "What was live at the instant of the step's peak. Regimes share one scale. Hatched bars are predictions; "
        "a bar that is missing was not obtained.",
    ),
    Kind(
        "counts",
        figures.counts,
        figures.counts_alt,
        "The parameter counts side by side. Where a support moves they differ by orders of magnitude, "
        "so that one of them alone misleads. Hollow markers are predictions.",
    ),
)


@dataclass(frozen=True)
class Image:
    """One rendering of a figure as a data URI; the page's style shows the one that fits the reader's screen."""

    layout: str
    theme: str
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
    """One workload on the page."""

    title: str
    illustrations: tuple[Illustration, ...]
    regimes: tuple[Regime, ...]


@dataclass(frozen=True)
class Term:
    """One field of the glossary."""

    name: str
    unit: str
    meaning: str


def write_report(records: Sequence[Record], out: Path) -> Path:
    """Write `records.csv`, the figures and `index.html` into the directory `out`; returns the page's path.

    Each file is replaced in one stroke and the page comes last, so that an interrupted run leaves the old page.
    Raises OSError where `out` cannot be written.
    """
    out = Path(out)
    records = list(records)
    record.write_bytes(_encode(record.to_csv(records)), out / "records.csv")
    sections = []
    for position, (workload, regimes) in enumerate(tables.by_workload(records).items(), start=1):
        illustrations = []
        for kind in KINDS:
            illustration, png = _illustrate(kind, workload.title, regimes)
            record.write_bytes(png, out / f"{kind.stem}-{position}.png")
            illustrations.append(illustration)
        sections.append(_section(workload, regimes, tuple(illustrations)))
    page = out / "index.html"
    record.write_bytes(_encode(render(records, sections)), page)
    return page


def render(records: Sequence[Record], sections: Sequence[Section]) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        records=records,
        sections=sections,
        summary=tables.summary(records),
        period=tables.period(records),
        environment=[(name, _values(values)) for name, values in tables.environment(records)],
        glossary=glossary(),
        meaning=record.meaning,
        method_colour=palette.method_colour,
        themes=(palette.LIGHT, palette.DARK),
        longest_reason=LONGEST_REASON,
        unmatched=tables.UNMATCHED,
        missing=tables.MISSING,
    )


def glossary() -> list[Term]:
    """Every field of a record with its unit and its meaning, in the schema's order."""
    names = [field.name for field in fields(Record)]
    return [Term(name, _unit(name), record.meaning(name)) for name in names]


def _unit(name: str) -> str:
    return next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), "")


def _section(
    workload: tables.Workload, regimes: dict[str, list[Record]], illustrations: tuple[Illustration, ...]
) -> Section:
    parts = (
        Regime(name, tables.results_table(group), tables.shared_circumstances(group)) for name, group in regimes.items()
    )
    return Section(workload.title, illustrations, tuple(parts))


def _illustrate(kind: Kind, title: str, panels: figures.Panels) -> tuple[Illustration, bytes]:
    """The illustration, and the wide, light rendering, which also goes into a file of its own."""
    pngs = {
        (layout.name, theme.name): kind.draw(title, panels, layout, theme)
        for layout in (sheet.WIDE, sheet.NARROW)
        for theme in (palette.LIGHT, palette.DARK)
    }
    images = tuple(Image(layout, theme, _data_uri(png)) for (layout, theme), png in pngs.items())
    caption = kind.caption + _left_out(panels)
    return Illustration(images, kind.describe(title, panels), caption), pngs["wide", "light"]


def _left_out(panels: figures.Panels) -> str:
    shown = figures.drawn(panels)
    parts = [
        f" Of the {len(group):,} records with train_rest {regime} the first {len(shown[regime]):,} are drawn; "
        "the table has them all."
        for regime, group in panels.items()
        if len(group) > len(shown[regime])
    ]
    return "".join(parts)


def _values(values: list[tuple[str, int]]) -> list[str]:
    """An environment field's values; with the number of records for each where they differ."""
    if len(values) == 1:
        return [values[0][0]]
    lines = [f"{value} ({number:,} of the records)" for value, number in values[:MOST_VALUES]]
    rest = len(values) - MOST_VALUES
    return [*lines, f"and {rest:,} more"] if rest > 0 else lines


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _encode(text: str) -> bytes:
    # JSON can carry half of a surrogate pair, which has no UTF-8 form.
    return text.encode("utf-8", "replace")
