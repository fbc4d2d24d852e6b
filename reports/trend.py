"""The trend page: which commit moved what, and small panels of what moved; `history.csv` and `moves.csv` beside it."""

from __future__ import annotations

import csv
import io
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from reports import palette, record, sheet, tables
from reports.compare import IDENTITY, VERDICTS, Benchmark, name
from reports.compare_tables import cells, counted
from reports.figures import trend as figure
from reports.figures.trend import short
from reports.history import CommitMove, Series, Trend
from reports.page import PAGE, TREND_PAGE, Illustration, encode, renderings, template

HEADINGS = ("commit", "benchmark", "figure", "old", "new", "change", "%", "verdict")
# Rows of one commit, and of all; moves.csv has the rest.
MOST_OF_A_COMMIT = 20
MOST_ROWS = 300
# Panels of one figure, and of all.
MOST_PANELS = 12
MOST_DRAWN = 36
# What is looked at first; the other figures follow in the order of thresholds.json.
FIRST = ("peak_step_bytes", "step_time_ratio", "resident_bytes", "peak_preparation_bytes", "trainable_params")
_OF_A_MOVE = ("figure", "old", "new", "change", "share", "verdict", "note")
_MOVE_COLUMNS = ("commit", "when", "since", "by_the_commit", *_OF_A_MOVE, *IDENTITY)


@dataclass(frozen=True)
class Row:
    """A row of the table of moves: the commit with its date, the cells behind it, and what is to be said of it."""

    commit: str
    date: str
    benchmark: str
    cells: tuple[str, ...]
    verdict: str
    note: str


def write_trend(trend: Trend, out: Path) -> Path:
    """Write the figures, `history.csv`, `moves.csv` and `trend.html` into `out`, the page last; returns its path."""
    out = Path(out)
    record.write_bytes(encode(_history_csv(trend)), out / "history.csv")
    record.write_bytes(encode(_moves_csv(trend)), out / "moves.csv")
    page = out / TREND_PAGE
    record.write_bytes(encode(render(trend, _illustrations(trend, out))), page)
    return page


def render(trend: Trend, illustrations: list[Illustration]) -> str:
    """The page's HTML."""
    rows, left_out = _rows(trend)
    presences = [
        (_commit(trend, each.position), each.what, _named(trend, each.benchmark))
        for each in trend.presences[: -MOST_ROWS - 1 : -1]
    ]
    drawn = sum(len(series) for _, series in _drawn(trend))
    verdicts = Counter(each.move.verdict for each in trend.moves)
    return template("trend.html.j2").render(
        trend=trend,
        headings=HEADINGS,
        rows=rows,
        rows_left_out=left_out,
        presences=presences,
        presences_left_out=len(trend.presences) - len(presences),
        illustrations=illustrations,
        panels_left_out=len(trend.moved) - drawn,
        commits=sorted({each.position for each in trend.moves}),
        dirty=sum(entry.commit.endswith("-dirty") for entry in trend.entries),
        period=[entry.when[:10] for entry in (trend.entries[0], trend.entries[-1])] if trend.entries else None,
        counts=", ".join(counted(number, verdict) for verdict in VERDICTS if (number := verdicts[verdict])),
        page=PAGE,
        themes=(palette.LIGHT, palette.DARK),
    )


def _named(trend: Trend, benchmark: Benchmark) -> str:
    return name(benchmark, trend.benchmarks)


def _commit(trend: Trend, position: int) -> tuple[str, str]:
    entry = trend.entries[position]
    return short(entry.commit), entry.when[:10]


def _rows(trend: Trend) -> tuple[list[Row], int]:
    """The rows, the newest commit first, and how many more there are."""
    rows = []
    # Stable: within a commit the most severe stay first.
    newest_first = sorted(trend.moves, key=lambda each: -each.position)
    for position, moves in itertools.groupby(newest_first, key=lambda each: each.position):
        rows += [_row(trend, position, each) for each in itertools.islice(moves, MOST_OF_A_COMMIT)]
    rows = rows[:MOST_ROWS]
    return rows, len(trend.moves) - len(rows)


def _row(trend: Trend, position: int, each: CommitMove) -> Row:
    plain = replace(each.move, note="")
    verdict, moved, old, new, change, share, benchmark = cells(plain, _named(trend, plain.benchmark))
    notes = list(_notes(trend, each))
    return Row(*_commit(trend, position), benchmark, (moved, old, new, change, share), verdict, "; ".join(notes))


def _notes(trend: Trend, each: CommitMove) -> Iterator[str]:
    changed = [f"{field} {tables.plain(old)} to {tables.plain(new)}" for field, old, new in each.move.environment]
    if changed:
        yield f"not by the commit alone: {', '.join(changed)}"
    elif each.move.note:
        yield each.move.note
    if each.since != each.position - 1:
        yield f"since {_commit(trend, each.since)[0]}, {each.position - each.since} commits before"


def _drawn(trend: Trend) -> list[tuple[str, list[Series]]]:
    """The series that are drawn, figure by figure; within one those that moved last first."""
    by_figure: dict[str, list[Series]] = {}
    for series in sorted(trend.moved, key=lambda series: -series.moves[-1].position):
        if any(value is not None for value in series.values):
            by_figure.setdefault(series.figure, []).append(series)
    order = [*FIRST, *(each for each in record.Record.__dataclass_fields__ if each not in FIRST)]
    room, found = MOST_DRAWN, []
    for each in sorted(by_figure, key=order.index):
        taken = by_figure[each][: min(MOST_PANELS, room)]
        room -= len(taken)
        if taken:
            found.append((each, taken))
    return found


def _illustrations(trend: Trend, out: Path) -> list[Illustration]:
    found = []
    for number, (moved, group) in enumerate(_drawn(trend), start=1):
        company = [series.benchmark for series in group]
        named = [(name(series.benchmark, company), series) for series in group]
        sheets = {layout: figure.draw(trend.entries, named, layout) for layout in (sheet.WIDE, sheet.NARROW)}
        found.append(
            Illustration(
                renderings(sheets, out / f"trend-{number}.png"),
                figure.describe(trend.entries, named),
                f"{moved}: {record.meaning(moved)}.",
            )
        )
    return found


def _history_csv(trend: Trend) -> str:
    """A row for each benchmark at each commit, under that commit and its date, with all that the history keeps."""
    return record.to_csv(
        replace(result.record, commit=entry.commit, created_at=entry.when)
        for entry in trend.entries
        for result in entry.results.values()
    )


def _moves_csv(trend: Trend) -> str:
    """A row for each move, in the order of commits."""
    stream = io.StringIO()
    # Quotes around all: a lone carriage return in a name would otherwise end its row.
    writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(_MOVE_COLUMNS)
    for each in trend.moves:
        entry, move = trend.entries[each.position], each.move
        change, share = (None if part is None else float(part) for part in (move.change, move.share))
        change = int(move.change) if move.change is not None and move.change.denominator == 1 else change
        row = (entry.commit, entry.when, trend.entries[each.since].commit, each.by_the_commit, move.figure)
        row = (*row, move.old, move.new, change, share, move.verdict, "; ".join(_notes(trend, each)), *move.benchmark)
        writer.writerow(["" if cell is None else str(cell).replace("\0", "\ufffd") for cell in row])
    return stream.getvalue()
